"""Says in one clause what a file is that no format of ours claims: a reviewer is better served by a name than by "unknown"."""

from __future__ import annotations

import os
from pathlib import Path

from initaudit.load.spans import show
from initaudit.load.zip_entries import is_zip, member_names

# Magic numbers at the front of a file, what they mean and what to do about it.
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "run git lfs pull"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "save it as ONNX or safetensors"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive, which PyTorch does not load either", "unpack it and audit what is inside"),
    (b"\x1f\x8b", "gzip-compressed", "decompress it first"),
    (b"BZh", "bzip2-compressed", "decompress it first"),
    (b"\xfd7zXZ\x00", "xz-compressed", "decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "decompress it first"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", "decompress it first"),
    (b"Rar!", "a RAR archive", "unpack it and audit what is inside"),
    (b"\x7fELF", "an executable or a shared library, not a model", ""),
    (b"MZ", "a Windows executable, not a model", ""),
    (b"%PDF", "a PDF, not a model", ""),
    (b"<!DOCTYPE", "a web page, not a model", "the download was answered by a page: sign in or accept the licence"),
    (b"<html", "a web page, not a model", "the download was answered by a page: sign in or accept the licence"),
    (b"PK\x05\x06", "an empty zip archive", ""),
    (b"PK\x03\x04", "a zip archive without a model that is known here", "unpack it and audit what is inside"),
)
SAVED_MODEL = "saved_model.pb"  # by this name TensorFlow finds it; as a protobuf it could be ONNX as well
_OF_TENSORFLOW = ("a TensorFlow SavedModel", "convert it to ONNX (tf2onnx)")
_KERAS = {"metadata.json", "config.json", "model.weights.h5"}
MODEL_ADVICE = "known are ONNX, safetensors, PyTorch (.pt .pth .bin .ckpt .pt2), TorchScript, NumPy and GGUF"


def describe_foreign(path: Path, head: bytes) -> tuple[str, str]:
    """(what it is, what to do) for a path of no known format."""
    if path.is_dir():
        return _describe_folder(path)
    if path.name == SAVED_MODEL:
        return _OF_TENSORFLOW
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "save it as ONNX or safetensors"
    if is_zip(head) and _KERAS.issubset(member_names(path) or ()):
        return "a Keras model", "save it as ONNX or safetensors"
    for magic, found, advice in MAGIC:
        if head.startswith(magic):
            return found, advice
    if not head.strip(b"\0"):
        return "nothing but zero bytes", "copy or download it again"
    if _is_text(head):
        return "a text file, not a model", MODEL_ADVICE
    return "of no known format, or damaged at its start", MODEL_ADVICE


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < max(len(head) - 4, 16):
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f" for c in text)


def _describe_folder(path: Path) -> tuple[str, str]:
    names = sorted(os.listdir(path))
    if SAVED_MODEL in names:
        return _OF_TENSORFLOW
    if not names:
        return "the folder is empty", "name a folder with a model in it"
    inside = [name for name in names if (path / name).is_dir()]
    found = f"a folder without a model (it holds {show(', '.join(names), 100)})"
    return found, f"name one of its folders, such as {show(path / inside[0], 200)}" if inside else MODEL_ADVICE
