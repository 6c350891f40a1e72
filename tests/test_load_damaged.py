"""Files that break their format, are cut off or blown up: one error that says what was found, or only what is cut is lost."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from initaudit.errors import UnreadableModel
from initaudit.load import load
from initaudit.load.pickle_machine import MAX_OPCODES


def header(**tensors: object) -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(begin: int, end: int, shape: list[object], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (struct.pack("<Q", 1000) + b"{}", "a header of 1000 bytes"),
        (struct.pack("<Q", 2) + b"{x", "not JSON"),
        (struct.pack("<Q", 40000) + b'{"a":' * 8000, "not JSON"),
        (struct.pack("<Q", 15) + b'{"a":1,"a":2}  ', "stands twice"),
        (header(a=1), "without dtype"),
        (header(a=entry(0, 4, [1], "F99")), "the dtype F99"),
        (header(a=entry(0, 4, [-1])), "negative size"),
        (header(a=entry(0, 4, [1.5])), "the shape"),
        (header(a=entry(0, 4, [True])), "the shape"),
        (header(a=entry(0, 4, [2**62, 2**62])), "more elements"),
        (header(a=entry(0, 8, [1])) + bytes(8), "expected 4 bytes"),
        (header(a=entry(-4, 0, [1])), "bytes -4 to 0"),
        (header(a=entry(0, 8, [2]), b=entry(4, 12, [2])) + bytes(12), "overlaps"),
        (header(a=entry(4, 8, [1])) + bytes(8), "unused before"),
        (header(a=entry(0, 4, [1])) + bytes(8), "after the last tensor"),
        (header(__metadata__={"a": 1}), "table of texts"),
    ],
)
def test_safetensors_that_break_the_format(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UnreadableModel, match=says):
        load(tmp_path / "x.safetensors")


def test_truncated_safetensors_loses_only_what_is_cut(tmp_path: Path) -> None:
    content = header(a=entry(0, 8, [2]), b=entry(8, 16, [2])) + bytes(12)
    (tmp_path / "x.safetensors").write_bytes(content)
    checkpoint = load(tmp_path / "x.safetensors")
    assert list(checkpoint.arrays) == ["a"]
    assert [(problem.code, problem.tensor) for problem in checkpoint.problems] == [("IA001", "b")]


def rezip(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive at `path` with members changed, or left out for None."""
    target = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name, content: None if name == "x/data/0" else content, "is missing from the archive"),
        (lambda name, content: content[:-4] if name == "x/data/0" else content, "44 bytes of storage"),
        (
            lambda name, content: content.replace(b"K\x03K\x04\x86", b"K\x05K\x04\x86") if name == "x/data.pkl" else content,
            "number 19",
        ),
    ],
    ids=["missing", "short", "view past the end"],
)
def test_storage_that_does_not_fit(change: Callable[[str, bytes], bytes | None], says: str, tmp_path: Path) -> None:
    torch.save({"w": torch.randn(3, 4), "v": torch.randn(2)}, tmp_path / "x.pt")
    checkpoint = load(rezip(tmp_path / "x.pt", change))
    assert list(checkpoint.arrays) == ["v"]
    assert [(problem.code, problem.tensor) for problem in checkpoint.problems] == [("IA001", "w")]
    assert says in checkpoint.problems[0].message


def test_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(3, 4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("x/data.pkl", old.read("x/data.pkl"))
        new.writestr("x/data/0", bytes(1 << 24))
    content = (tmp_path / "y.pt").read_bytes()
    at = content.rindex(b"PK\1\2") + 24
    (tmp_path / "y.pt").write_bytes(content[:at] + struct.pack("<I", 0xF0000000) + content[at + 4 :])
    assert "inflates to" in load(tmp_path / "y.pt").problems[0].message
    (tmp_path / "y.pt").write_bytes(content[:at] + struct.pack("<I", 48) + content[at + 4 :])
    assert "inflates to other than" in load(tmp_path / "y.pt").problems[0].message


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(3, 4), "v": torch.randn(3, 4)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    first = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", first + 4)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UnreadableModel, match="overlaps another member"):
        load(tmp_path / "x.pt")


def test_path_traversal_is_noted_and_nothing_is_written(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(3, 4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.writestr("../../escaped", "x")
    assert any("outside its folder" in note for note in load(tmp_path / "x.pt").notes)
    assert not (tmp_path.parent.parent / "escaped").exists()


BOMBS: dict[str, bytes] = {
    "lists that double": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "deep tuple as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "deep dicts": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 1 + b"}" + b"K\x01}s" * 100_000 + b"s.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "announced length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "announced bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "many opcodes": b"\x80\x02" + b"N0" * 60_000 + b"N.",
    "digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "empty stack": b"\x80\x02R.",
    "unknown memo": b"\x80\x02h\x05.",
    "only STOP": b"\x80\x02.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("initaudit.load.pickle_machine.MAX_OPCODES", 100_000 if name == "many opcodes" else MAX_OPCODES)
    (tmp_path / "x.pkl").write_bytes(BOMBS[name])
    try:
        checkpoint = load(tmp_path / "x.pkl")
    except UnreadableModel:
        return
    assert checkpoint.arrays == {}
    assert checkpoint.problems


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"hello\n" * 10, "a text file"),
        (bytes(100), "nothing but zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1f\x8b\x08", "gzip"),
        (bytes(range(255, 99, -1)), "of no known format"),
        (b"PK\x03\x04" + bytes(40), "a zip archive without its directory"),
    ],
)
def test_what_is_no_model(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnreadableModel, match=says):
        load(tmp_path / "x")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.pt").write_bytes(b"x")
    for source, says in {
        tmp_path / "sub": "the folder is empty",
        tmp_path / "modle.pt": "did you mean",
        tmp_path / "no" / "where": "does not exist either",
        Path("/dev/null"): "neither a file nor a folder",
    }.items():
        with pytest.raises(UnreadableModel, match=says):
            load(source)
    with pytest.raises(UnreadableModel, match="download it first"):
        load("https://example.com/model.onnx")


def test_models_of_tensorflow_and_keras_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"\x08\x01\x12\x02\x0a\x00")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, b"{}")
    for source, says in {folder: "SavedModel", folder / "saved_model.pb": "SavedModel", tmp_path / "m.keras": "Keras"}.items():
        with pytest.raises(UnreadableModel, match=says):
            load(source)
    save_file({"w": torch.zeros(2, 2)}, folder / "model.safetensors")
    assert len(load(folder).arrays) == 1


def seeds() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    state = {"state_dict": {"w": torch.randn(3, 4), "v": torch.randn(4)}}
    for name, zipped in (("archive", True), ("stream", False)):
        out = io.BytesIO()
        torch.save(state, out, _use_new_zipfile_serialization=zipped)
        made[name] = out.getvalue()
    made["pickle"] = pickle.dumps({"w": np.ones((3, 4)), "m": nn.Linear(2, 2)})
    made["safetensors"] = header(a=entry(0, 8, [2]), b=entry(8, 16, [2])) + bytes(16)
    out = io.BytesIO()
    np.savez(out, w=np.ones((3, 4)))
    made["npz"] = out.getvalue()
    return made


SEEDS = seeds()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_one_kind_of_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(SEEDS[data.draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    try:
        checkpoint = load(path)
    except UnreadableModel:
        return
    for array in checkpoint.arrays.values():
        try:
            assert array.read().shape == array.shape
        except UnreadableModel:
            continue
