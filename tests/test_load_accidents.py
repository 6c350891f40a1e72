"""Bytes that look like something else by accident: numbers that spell opcodes, lengths that pass for magic numbers."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from malicious_containers import archive, plain
from onnx import TensorProto, helper, numpy_helper
from pickle_opcodes import NONE, system

import initaudit
from initaudit.load import load
from initaudit.load.pickle_reader import OPCODES
from initaudit.load.registry import claims, format_of, formats

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


def header(low: int, tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file whose header is filled with spaces until its length ends in the byte `low`."""
    table, place = {}, 0
    for name, values in tensors.items():
        table[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [place, place + values.nbytes]}
        place += values.nbytes
    text = json.dumps(table).encode()
    text += b" " * ((low - len(text)) % 256)
    return len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_begin_like_opcodes_are_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every opcode first, then a byte of any value: torch.load reads these as numbers and so must the audit."""
    rng = np.random.default_rng(0)
    weights = {}
    for first in OPCODES:
        for second in range(int(rng.integers(8)), 256, 8):
            raw = rng.integers(0, 256, 64, dtype=np.uint8)
            raw[:2] = first[0], second
            weights[f"t{len(weights)}.weight"] = torch.from_numpy(raw).view(dtype)
    torch.save(weights, tmp_path / "x.pt")
    made = load(tmp_path / "x.pt")
    assert (made.problems, made.notes, len(made.arrays)) == ((), (), len(weights))


def test_numbers_that_begin_like_opcodes_pass_an_audit(tmp_path: Path) -> None:
    scale = torch.ones(16)
    scale[0] = 1.0156  # 82 3f in bfloat16: EXT1
    weights = {"fc.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * 0.25, "norm.weight": scale}
    torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "x.pt")
    assert {finding.code for finding in initaudit.audit(tmp_path / "x.pt").findings} <= {"IA003", "IA004"}


def test_a_pickle_in_the_place_of_a_storage_is_named(tmp_path: Path) -> None:
    """Some libraries keep a pickle of their own in a tensor of bytes, and unpickle it when the model is loaded."""
    for number, content in enumerate((plain(system(tmp_path / "canary")), archive(system(tmp_path / "canary")))):
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        torch.save({"fc.weight": torch.ones(4, 4), "extra": tensor}, tmp_path / f"{number}.pt")
        problems = load(tmp_path / f"{number}.pt").problems
        assert [problem.code for problem in problems] == ["IA505"]
        assert "calls os.system('touch" in problems[0].message
    harmless = torch.frombuffer(bytearray(pickle.dumps({"scale": 1.0})), dtype=torch.uint8)
    torch.save({"fc.weight": torch.ones(4, 4), "extra": harmless}, tmp_path / "x.pt")
    assert load(tmp_path / "x.pt").problems == ()
    assert not (tmp_path / "canary").exists()


def test_a_storage_of_another_length_is_looked_into(tmp_path: Path) -> None:
    """What the main pickle does not read as the elements of a storage is a member like any other."""
    (tmp_path / "x.pt").write_bytes(archive(NONE, extra={"archive/data/1": b"\x80\x02cos\nsystem\n."}))
    assert "os.system" in " ".join(problem.message for problem in load(tmp_path / "x.pt").problems)


@pytest.mark.parametrize("payload", [b"cmy-module\nrun\n)R", b"\x82\x3f)R"], ids=("a name with a dash", "an extension code"))
def test_a_hidden_pickle_that_calls_something_odd_is_named(payload: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(archive(NONE, extra={"archive/extra": b"\x80\x02" + payload + b"."}))
    assert [problem.code for problem in load(tmp_path / "x.pt").problems] == ["IA505"]


def test_safetensors_of_every_low_byte_of_its_header_length(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 0.25, (2, 16, 16)).astype(np.float32)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"l1.weight": names[0], "l2.weight": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for low in range(256):
        for number, name in enumerate(names):
            (tmp_path / name).write_bytes(header(low, {f"l{number + 1}.weight": weights[number]}))
        alone, sharded = load(tmp_path / names[0]), load(tmp_path)
        assert (alone.format, alone.problems, list(alone.arrays)) == ("safetensors", (), ["l1.weight"])
        assert (sharded.format, sharded.problems, list(sharded.arrays)) == ("safetensors", (), ["l1.weight", "l2.weight"])


def as_bytes(save: Callable[..., object], *values: object, **named: object) -> bytes:
    out = io.BytesIO()
    if save is torch.save:
        save(*values, out, **named)
    else:
        save(out, *values, **named)
    return out.getvalue()


def onnx_bytes(rng: np.random.Generator, values: np.ndarray) -> bytes:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(values, "w")])
    made = helper.make_model(graph, producer_name="n" * int(rng.integers(0, 300)), ir_version=int(rng.integers(3, 11)))
    return bytes(made.SerializeToString())


def gguf_bytes(values: np.ndarray, path: Path) -> bytes:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("w", values)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path.read_bytes()


class Net(torch.nn.Module):
    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(16, 16, bias=False)
        self.fc.weight.data = torch.from_numpy(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def writers(rng: np.random.Generator, folder: Path) -> dict[str, bytes]:
    """One file of each format around the same bytes of chance."""
    raw = rng.integers(0, 256, 1024, dtype=np.uint8)
    values = raw.view(np.float32).reshape(16, 16)
    state = {"fc.weight": torch.from_numpy(values)}
    return {
        "safetensors": header(int(rng.integers(256)), {"w": values}),
        "torch_zip": as_bytes(torch.save, state),
        "torch_legacy": as_bytes(torch.save, state, _use_new_zipfile_serialization=False),
        "pickle": pickle.dumps({"w": values}, int(rng.integers(0, 6))),
        "npy": as_bytes(np.save, values),
        "npz": as_bytes(np.savez, w=values, b=raw),
        "npz deflated": as_bytes(np.savez_compressed, w=values),
        "onnx": onnx_bytes(rng, values),
        "gguf": gguf_bytes(values, folder / "x.gguf"),
    }


FORMAT_OF = {"torch_legacy": "pickle", "npy": "numpy", "npz": "numpy", "npz deflated": "numpy"}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_every_format_is_recognised_as_itself(tmp_path: Path) -> None:
    """Whatever bytes the weights are, alone and by what looks through a folder."""
    for seed in range(60):
        for kind, content in writers(np.random.default_rng(seed), tmp_path).items():
            path = tmp_path / "file"
            path.write_bytes(content)
            form = format_of(path)
            assert form is not None, (seed, kind)
            assert form.name == FORMAT_OF.get(kind, kind), (seed, kind)
            made = load(path)
            assert ([p for p in made.problems if p.code != "IA401"], len(made.arrays) > 0) == ([], True), (seed, kind)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.:DeprecationWarning")
def test_scripted_and_exported_modules_are_recognised_as_themselves(tmp_path: Path) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 256, 1024, dtype=np.uint8).view(np.float32).reshape(16, 16).copy()
        values[0, :1] = np.frombuffer(b"\x82\x3f\x80\x3f", np.float32)
        net = Net(np.nan_to_num(values))
        torch.jit.trace(net, torch.zeros(1, 16)).save(str(tmp_path / "script.pt"))
        torch.export.save(torch.export.export(net, (torch.zeros(1, 16),)), tmp_path / "program.pt2")
        for name, expected in (("script.pt", "torchscript"), ("program.pt2", "exported_program")):
            made = load(tmp_path / name)
            assert (made.format, made.problems) == (expected, ())


def test_a_guess_gives_way_to_what_is_surer(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(header(0x80, {"w": np.ones((4, 4), np.float32)}))
    head = path.read_bytes()[:4096]
    assert formats()["pickle"].recognise(path, head)
    assert [form.name for form in claims(path, head)] == ["safetensors"]
    (tmp_path / "empty").write_bytes(b"")
    assert format_of(tmp_path / "empty") is None
    assert format_of(tmp_path / "nothing") is None


def test_the_onnx_package_agrees_on_what_is_written(tmp_path: Path) -> None:
    onnx.load_from_string(onnx_bytes(np.random.default_rng(0), np.ones((16, 16), np.float32)))
