"""Each format against the library that writes it: the same names, dtypes and numbers."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from initaudit.errors import UnreadableModel
from initaudit.load import Checkpoint, load, spans
from initaudit.load.checkpoint import Array, numpy_dtype
from initaudit.load.registry import as_format, collect, formats


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def stepped() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(value: object, path: Path, **options: object) -> Checkpoint:
    torch.save(value, path, **options)
    return load(path)


def assert_same(arrays: object, state: dict[str, torch.Tensor]) -> None:
    assert isinstance(arrays, dict)
    assert list(arrays) == list(state)
    for name, tensor in state.items():
        found = arrays[name].read()
        assert found.dtype == numpy_dtype(str(tensor.dtype).removeprefix("torch."))
        assert np.array_equal(found.astype(np.float64), tensor.detach().double().numpy())


STREAMS = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "stream"])


@STREAMS
def test_state_dict(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SMALL", 0)  # what is small is read all the same
    state = dict(network().state_dict())
    checkpoint = save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert_same(checkpoint.arrays, state)
    assert checkpoint.problems == ()
    assert isinstance(checkpoint.arrays["0.weight"].read(), np.memmap)
    assert not checkpoint.arrays["1.num_batches_tracked"].trainable


@STREAMS
@pytest.mark.parametrize("key", ["model", "state_dict", "module", "net", "weights"])
def test_training_checkpoint(key: str, zipped: bool, tmp_path: Path) -> None:
    model, optimizer = stepped()
    state = dict(model.state_dict())
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    value = {
        "epoch": 3, key: wrapped, "optimizer_states": [optimizer.state_dict()], "ema": wrapped, "rng": torch.get_rng_state(),
        "args": {"lr": 0.1},
    }  # fmt: skip
    checkpoint = save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(checkpoint.arrays, state)
    assert checkpoint.metadata["epoch"] == 3
    assert len(checkpoint.optimizer) == 3 * len(list(model.parameters()))
    notes = "; ".join(checkpoint.notes)
    assert f"weights taken from '{key}'" in notes
    assert "'module.' stripped" in notes
    assert "'_orig_mod.' stripped" in notes
    assert "'ema' holds the same names" in notes


def test_two_networks_keep_their_names(tmp_path: Path) -> None:
    value = {
        "generator": {"a": torch.ones(2, 2), "b": torch.ones(2)},
        "discriminator": {"a": torch.ones(3, 2), "b": torch.ones(3)},
    }
    assert list(save(value, tmp_path / "x.pt").arrays) == ["generator.a", "generator.b", "discriminator.a", "discriminator.b"]


@STREAMS
def test_pickled_module(zipped: bool, tmp_path: Path) -> None:
    model = network()
    checkpoint = save(model, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert {name: array.shape for name, array in checkpoint.arrays.items()} == {
        n: tuple(t.shape) for n, t in model.state_dict().items()
    }
    assert [problem.code for problem in checkpoint.problems] == ["IA505"]
    assert "Sequential, Linear, BatchNorm1d" in checkpoint.problems[0].message
    assert not checkpoint.arrays["1.running_var"].trainable


@STREAMS
def test_views_ties_parameters_and_dtypes(zipped: bool, tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    value = {
        "a": weight, "tied": weight, "transposed": weight.t(), "rows": weight[1:], "every": weight[:, ::2],
        "last": weight[2, 3], "parameter": nn.Parameter(weight), "frozen": nn.Parameter(weight, requires_grad=False),
        "expanded": weight[:, :1].expand(3, 7), "half": weight.half(), "brain": weight.bfloat16(),
        "double": weight.double(), "byte": weight.to(torch.uint8), "flag": weight > 0, "long": weight.long(),
    }  # fmt: skip
    arrays = save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped).arrays
    assert_same(arrays, value)
    assert arrays["a"].storage == arrays["tied"].storage == arrays["parameter"].storage
    assert arrays["a"].storage != arrays["rows"].storage
    assert arrays["parameter"].trainable
    assert not arrays["frozen"].trainable


def test_dtypes_that_only_the_archive_has(tmp_path: Path) -> None:
    value = {
        str(dtype): torch.arange(4).to(dtype) for dtype in (torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2)
    }
    assert_same(save(value, tmp_path / "x.pt").arrays, value)
    numbers = torch.randn(3, dtype=torch.complex64)
    assert np.array_equal(save({"c": numbers}, tmp_path / "y.pt").arrays["c"].read(), numbers.numpy())


@STREAMS
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_tensors_are_read_as_floats(zipped: bool, tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    whole = torch.quantize_per_tensor(weight, 0.1, 3, torch.qint8)
    channels = torch.quantize_per_channel(weight, torch.rand(4) + 0.1, torch.zeros(4), 1, torch.qint8)
    arrays = save({"whole": whole, "channels": channels}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped).arrays
    assert arrays["whole"].quantized == "affine int8"
    np.testing.assert_allclose(arrays["whole"].read(), whole.dequantize().numpy(), rtol=1e-6)
    np.testing.assert_allclose(arrays["channels"].read(), channels.dequantize().numpy(), rtol=1e-6)


def test_big_endian_archive(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    torch.save({"w": weight, "b": weight.bfloat16(), "c": torch.randn(2, dtype=torch.complex64)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        widths = {"x/data/0": 4, "x/data/1": 2, "x/data/2": 4}
        for name in old.namelist():
            content = b"big" if name == "x/byteorder" else old.read(name)
            if name in widths:
                content = np.frombuffer(content, f"<u{widths[name]}").byteswap().tobytes()
            new.writestr(name, content)
    little, big = load(tmp_path / "x.pt").arrays, load(tmp_path / "y.pt").arrays
    for name in little:
        assert np.array_equal(little[name].read(), big[name].read())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    value = {
        "c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
        "s": np.float32(2.5), "t": network().state_dict(),
        "n": [1, 2.5, None, True, "é", b"\x00", {"k": (1, 2, 3)}, {1, 2}, frozenset({3}), 2**80],
    }  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    checkpoint = load(tmp_path / "x.pkl")
    assert checkpoint.problems == ()
    assert np.array_equal(checkpoint.arrays["c"].read(), value["c"])
    assert np.array_equal(checkpoint.arrays["f"].read(), value["f"])
    assert checkpoint.arrays["s"].read() == 2.5
    assert np.array_equal(checkpoint.arrays["t.0.weight"].read(), value["t"]["0.weight"].numpy())


def test_joblib(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    value = {"w": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.random.rand(3, 4)), "v": np.ones(3, np.float32)}
    others = {"text": np.array(["a", "bc"]), "objects": np.array([{"deep": np.ones(2)}], dtype=object)}
    joblib.dump({**others, **value}, tmp_path / "x.joblib")
    checkpoint = load(tmp_path / "x.joblib")
    assert checkpoint.problems == ()
    assert np.array_equal(checkpoint.arrays["objects.0.deep"].read(), np.ones(2))
    for name, array in value.items():
        assert np.array_equal(checkpoint.arrays[name].read(), array)


def old_tar(path: Path, weight: np.ndarray) -> None:
    """The layout of torch/serialization.py, legacy_load, of which PyTorch keeps only the reader."""
    storages = pickle.dumps(1, 2) + pickle.dumps((7, "cpu", torch.FloatStorage), 2)
    storages += struct.pack("<q", weight.size) + weight.tobytes() + pickle.dumps([], 2)
    tensors = pickle.dumps(1, 2) + pickle.dumps((9, 7, torch.FloatTensor), 2)
    tensors += struct.pack("<ii", 2, 0) + struct.pack("<5q", *weight.shape, weight.shape[1], 1, 0)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> str | None:
            return "9" if value is weight else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": weight})
    parts = {
        "sys_info": pickle.dumps({"protocol_version": 1000}, 2),
        "pickle": out.getvalue(),
        "tensors": tensors,
        "storages": storages,
    }
    with tarfile.open(path, "w") as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_tar_of_the_oldest_format(tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    old_tar(tmp_path / "x.tar", weight)
    judge = torch.load(tmp_path / "x.tar", weights_only=False)["w"].numpy()
    checkpoint = load(tmp_path / "x.tar")
    assert checkpoint.format == "torch_tar"
    assert np.array_equal(checkpoint.arrays["w"].read(), judge)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = self.a
        self.items = nn.ModuleList([nn.Linear(2, 2)])
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.items[0](x) + torch.tensor([1.0, 2.0]) + self.offset.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_torchscript(tmp_path: Path) -> None:
    model = Scripted()
    torch.jit.save(torch.jit.script(model), tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt")
    assert checkpoint.format == "torchscript"
    assert checkpoint.problems == ()
    assert any("/modules/linear" in name for name in checkpoint.metadata["code"])
    for name, tensor in model.state_dict().items():
        assert np.array_equal(checkpoint.arrays[name].read(), tensor.numpy())
    assert checkpoint.arrays["a.weight"].storage == checkpoint.arrays["b.weight"].storage
    assert not checkpoint.arrays["offset"].trainable
    torch.jit.save(torch.jit.freeze(torch.jit.script(model.eval())), tmp_path / "frozen.pt")
    frozen = load(tmp_path / "frozen.pt").arrays
    assert {array.shape for name, array in frozen.items() if name.startswith("constants.")} >= {(2, 2), (2,)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_exported_program(tmp_path: Path) -> None:
    model = Scripted()
    torch.export.save(torch.export.export(model, (torch.randn(3, 2),)), tmp_path / "x.pt2")
    checkpoint = load(tmp_path / "x.pt2")
    assert checkpoint.format == "exported_program"
    assert checkpoint.problems == ()
    for name, tensor in model.state_dict().items():
        assert np.array_equal(checkpoint.arrays[name].read(), tensor.numpy())
    assert checkpoint.arrays["a.weight"].storage == checkpoint.arrays["b.weight"].storage
    assert not checkpoint.arrays["offset"].trainable


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_numpy_archive(pack: Callable[..., None], tmp_path: Path) -> None:
    value = {
        "c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.random.rand(3, 4)), "big": np.arange(3, dtype=">f4"),
        "scalar": np.array(3.0), "none": np.zeros((0, 2), np.int8),
    }  # fmt: skip
    pack(tmp_path / "x.npz", **value, objects=np.array([{}], dtype=object), text=np.array(["a"]))
    checkpoint = load(tmp_path / "x.npz")
    for name, array in value.items():
        assert np.array_equal(checkpoint.arrays[name].read(), array)
    assert {problem.tensor for problem in checkpoint.problems} == {"objects", "text"}


DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool"]


def test_safetensors(tmp_path: Path) -> None:
    value = {name: (np.arange(6) % 2).astype(getattr(ml_dtypes, name, name)).reshape(2, 3) for name in DTYPES}
    tensors = {name: torch.from_numpy((np.arange(6) % 2).reshape(2, 3)).to(getattr(torch, name)) for name in DTYPES}
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    checkpoint = load(tmp_path / "x.safetensors")
    assert checkpoint.metadata == {"format": "pt"}
    for name, array in value.items():
        found = checkpoint.arrays[name].read()
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


def test_packed_weights_are_named(tmp_path: Path) -> None:
    ints, floats = np.ones((4, 4), np.int32), np.ones((4, 4), np.float16)
    packed = {"qweight": ints, "qzeros": ints, "scales": floats}
    value = {f"one.{name}": array for name, array in {**packed, "g_idx": ints}.items()}
    value |= {f"two.{name}": array for name, array in packed.items()}
    value |= {
        "three.weight": ints.astype(np.uint8),
        "three.weight.absmax": floats,
        "three.weight.quant_map": floats,
        "four.weight": ints,
    }
    save_file(value, tmp_path / "x.safetensors")
    arrays = load(tmp_path / "x.safetensors").arrays
    kinds = {name: array.quantized for name, array in arrays.items() if array.quantized}
    assert kinds == {"one.qweight": "gptq", "two.qweight": "awq", "three.weight": "bitsandbytes 4-bit"}


def test_empty_tensors_are_missing_tensors(tmp_path: Path) -> None:
    checkpoint = save({"a": torch.zeros(0), "b": torch.zeros(2), "c": torch.zeros(0, 3)}, tmp_path / "x.pt")
    assert [(problem.code, problem.tensor) for problem in checkpoint.problems] == [("IA502", "a")]
    assert "1 more" in checkpoint.problems[0].message


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    numbers = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kinds = gguf.GGMLQuantizationType
    writer.add_tensor("f32", numbers)
    for kind in (kinds.Q8_0, kinds.BF16):
        writer.add_tensor(kind.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrays = load(tmp_path / "x.gguf").arrays
    assert np.array_equal(arrays["f32"].read(), numbers)
    assert arrays["Q8_0"].quantized == "q8_0"
    np.testing.assert_allclose(arrays["Q8_0"].read(), numbers, atol=0.02)
    assert np.array_equal(arrays["BF16"].read(), numbers.astype(ml_dtypes.bfloat16))


def test_gguf_without_its_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UnreadableModel, match="pip install gguf"):
        load(tmp_path / "x.gguf")


def test_registry_is_complete_and_refuses_duplicates() -> None:
    from initaudit.load import safetensors_file, spans

    assert len(formats()) >= 11
    assert as_format(spans) is None
    with pytest.raises(TypeError, match="registered already"):
        collect([safetensors_file, safetensors_file])
    half = type(spans)("half")
    half.FORMAT = "half"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="lacks recognise, load"):
        as_format(half)


def test_array_of_a_checkpoint_is_a_record() -> None:
    array = Array("w", (2, 3), "float32", lambda: np.zeros((2, 3), np.float32))
    assert array.size == 6
    assert array.read().shape == array.shape
