"""Every kind of tensor that torch.save writes, read and compared with what torch.load makes of the same file."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from initaudit import audit
from initaudit.errors import UnreadableModel
from initaudit.load import load
from initaudit.load.sparse import Parts, check_dense, dense

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


class Marked(torch.Tensor):
    """A subclass that adds nothing; a checkpoint may be full of them."""


def matrix(*shape: int) -> torch.Tensor:
    """Numbers of which half are zeros."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return values * (values > 0)


def uncoalesced() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1, 0], [2, 0, 2]]), torch.tensor([1.0, 2.0, 3.0]), (2, 3))


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "COO": lambda: matrix(6, 8).to_sparse(),
    "COO of integers": lambda: (matrix(6, 8) > 1).long().to_sparse(),
    "COO of truths": lambda: (matrix(6, 8) > 1).to_sparse(),
    "COO of halves": lambda: matrix(6, 8).bfloat16().to_sparse(),
    "COO not coalesced": uncoalesced,
    "COO with dense axes": lambda: matrix(4, 5, 3).to_sparse(2),
    "COO of three axes": lambda: matrix(4, 5, 3).to_sparse(),
    "COO of nothing": lambda: torch.zeros(4, 5).to_sparse(),
    "CSR": lambda: matrix(6, 8).to_sparse_csr(),
    "CSC": lambda: matrix(6, 8).to_sparse_csc(),
    "BSR": lambda: matrix(6, 8).to_sparse_bsr((2, 4)),
    "BSC": lambda: matrix(6, 8).to_sparse_bsc((3, 2)),
    "CSR in batches": lambda: torch.ones(3, 4, 5).to_sparse_csr(),
    "per tensor": lambda: torch.quantize_per_tensor(matrix(3, 4), 0.1, 3, torch.qint8),
    "per tensor, unsigned": lambda: torch.quantize_per_tensor(matrix(3, 4), 0.1, 3, torch.quint8),
    "per tensor, wide": lambda: torch.quantize_per_tensor(matrix(3, 4), 1e-4, 0, torch.qint32),
    "per channel": lambda: torch.quantize_per_channel(matrix(3, 4), torch.rand(4) + 0.1, torch.ones(4), 1, torch.qint8),
    "a subclass": lambda: matrix(3, 4).as_subclass(Marked),  # type: ignore[arg-type]
    "a parameter": lambda: nn.Parameter(matrix(3, 4)),
    "a frozen parameter": lambda: nn.Parameter(matrix(3, 4), requires_grad=False),
    "a buffer": lambda: nn.Buffer(matrix(3, 4)),
    "a view": lambda: matrix(6, 8)[1::2, ::3],
    "a transposed view": lambda: matrix(6, 8).t(),
    "an expanded view": lambda: matrix(6, 1).expand(6, 5),
    "channels last": lambda: matrix(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "no axis": lambda: torch.tensor(2.5),
    "no element": lambda: torch.zeros(0, 3),
    "bfloat16": lambda: matrix(3, 4).bfloat16(),
    "float8": lambda: matrix(3, 4).to(torch.float8_e4m3fn),
    "float8 of five exponents": lambda: matrix(3, 4).to(torch.float8_e5m2),
    "complex": lambda: torch.complex(matrix(3, 4), matrix(3, 4)),
    "a conjugate": lambda: torch.complex(matrix(3, 4), matrix(3, 4)).conj(),
    "a negative": lambda: torch.complex(matrix(3, 4), matrix(3, 4)).conj().imag,
}


def values(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As double precision, whatever the layout."""
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    plain = plain.dequantize() if plain.is_quantized else plain.as_subclass(torch.Tensor)
    plain = plain.resolve_conj().resolve_neg()
    return (plain if plain.is_complex() else plain.double()).numpy()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_read_as_torch_reads_it(kind: str, zipped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensor = TENSORS[kind]()
    if "float8" in kind and not zipped:
        pytest.skip("torch.save has no such stream")
    path = tmp_path / "x.pt"
    torch.save({"layer.weight": tensor}, path, _use_new_zipfile_serialization=zipped)
    with torch.serialization.safe_globals([Marked]):
        expected = torch.load(path, weights_only=True)["layer.weight"]
    made = load(path)
    array = made.arrays["layer.weight"]
    assert array.shape == tuple(expected.shape)
    read = array.read()
    np.testing.assert_allclose(
        read if np.iscomplexobj(read) else read.astype(np.float64), values(expected), rtol=1e-6, atol=0, strict=False
    )
    assert [p.message for p in made.problems if not (kind == "a subclass" and "Marked" in p.message)] == [
        p.message for p in made.problems if kind == "no element"
    ]


@pytest.mark.parametrize("kind", ["COO", "CSR", "per tensor", "bfloat16", "complex", "a view"])
def test_a_big_endian_file_holds_the_same(kind: str, tmp_path: Path) -> None:
    tensor = TENSORS[kind]()
    torch.save({"w": tensor}, tmp_path / "x.pt")
    widths = dict(_widths(tmp_path / "x.pt"))
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            content = b"big" if name == "x/byteorder" else old.read(name)
            if name in widths:
                content = np.frombuffer(content, f"<u{widths[name]}").byteswap().tobytes()
            new.writestr(name, content)
    np.testing.assert_array_equal(load(tmp_path / "y.pt").arrays["w"].read(), load(tmp_path / "x.pt").arrays["w"].read())


def _widths(path: Path) -> list[tuple[str, int]]:
    """How many bytes torch swaps at a time in each storage: those of its type, of a complex number those of a part."""
    import pickletools

    with zipfile.ZipFile(path) as archive:
        names = [arg for code, arg, _ in pickletools.genops(archive.read("x/data.pkl")) if isinstance(arg, str)]
    widths = {"FloatStorage": 4, "LongStorage": 8, "BFloat16Storage": 2, "ComplexFloatStorage": 4, "QInt8Storage": 1}
    found, current = [], 0
    for name in names:
        current = widths.get(name.rpartition(" ")[2].rpartition("\n")[2], current)
        if name.isdigit():
            found.append((f"x/data/{name}", current))
    return found


def test_zeros_of_a_sparse_tensor_are_counted(tmp_path: Path) -> None:
    held = matrix(64, 64)
    torch.save({"a.weight": held.to_sparse(), "b.weight": held}, tmp_path / "x.pt")
    layers = {layer.tensor: layer.observed for layer in audit(tmp_path / "x.pt").layers}
    assert layers["a.weight"] == layers["b.weight"]
    assert layers["a.weight"]["zeros"] == int((held == 0).sum())


def test_a_sparse_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    good = matrix(6, 8).to_sparse()
    wide = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.tensor([1.0]), (1 << 20, 1 << 20))
    torch.save({"good": good, "wide": wide, "plain": torch.ones(2, 2)}, tmp_path / "x.pt")
    made = load(tmp_path / "x.pt")
    assert set(made.arrays) == {"good", "plain"}
    assert [p.code for p in made.problems] == ["IA001"]
    assert "a sparse tensor of 4398046511104 bytes once dense" in made.problems[0].message
    raw = (tmp_path / "x.pt").read_bytes()
    indices = good.indices().numpy().astype("<i8").tobytes()
    assert raw.count(indices) == 1
    (tmp_path / "y.pt").write_bytes(raw.replace(indices, struct.pack("<q", 1 << 40) + indices[8:]))
    with pytest.raises(UnreadableModel, match="indices that do not fit a COO tensor"):
        load(tmp_path / "y.pt").arrays["good"].read()


@pytest.mark.parametrize(
    ("layout", "parts", "shape"),
    [
        ("sparse_coo", ([[0, -1]], [1.0, 2.0]), (2,)),
        ("sparse_coo", ([[0, 2]], [1.0, 2.0]), (2,)),
        ("sparse_coo", ([[0.0, 1.0]], [1.0, 2.0]), (2,)),
        ("sparse_coo", ([[0, 1]], [1.0, 2.0, 3.0]), (2,)),
        ("sparse_coo", ([0, 1], [1.0, 2.0]), (2,)),
        ("sparse_csr", ([0, 1, 3], [0, 1], [1.0, 2.0]), (2, 2)),
        ("sparse_csr", ([0, 2, 1], [0, 1], [1.0, 2.0]), (2, 2)),
        ("sparse_csr", ([0, 1, 2], [0, 2], [1.0, 2.0]), (2, 2)),
        ("sparse_csr", ([0, 1], [0], [1.0]), (2, 2)),
        ("sparse_bsr", ([0, 1], [0], [[[1.0, 1.0, 1.0]]]), (2, 2)),
        ("sparse_bsr", ([0, 1], [0], [1.0]), (2, 2)),
        ("sparse_csr", ([0, 1], [0], [1.0]), (2,)),
    ],
)
def test_sparse_parts_that_do_not_fit(layout: str, parts: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(UnreadableModel, match="indices that do not fit a"):
        dense(Parts(layout, tuple(lambda part=part: np.array(part) for part in parts)), shape, "x: w")
    with pytest.raises(UnreadableModel, match="once dense"):
        check_dense("float32", (1 << 20, 1 << 20), "x: w")
