"""Every way to put a payload into a file that some reader would unpickle.

Each payload stands beside an array, so that a test can ask whether the array is read all the same.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from pickle_opcodes import MARK, NONE, WEIGHTS, args, by_line, call, text


def legacy_stream(body: bytes) -> bytes:
    """The older stream of torch.save around one object."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return head + b"\x80\x02" + body + b"." + pickle.dumps([], 2)


def plain(payload: bytes) -> bytes:
    """{"w": WEIGHTS, "x": payload} as a pickle that no writer but this one has made."""
    array = pickle.dumps(WEIGHTS, 2)[2:-1]
    return b"\x80\x04(" + text("w") + array + text("x") + payload + b"d."


def stream(payload: bytes) -> bytes:
    return legacy_stream(MARK + text("w") + pickle.dumps(WEIGHTS, 2)[2:-1] + text("x") + payload + b"d")


def torch_body(payload: bytes) -> bytes:
    """The data.pkl of torch.save({"w": tensor, "x": payload})."""
    pid = args(text("storage"), by_line("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x0c") + b"Q"
    hooks = call(by_line("collections", "OrderedDict"))
    shape, stride = args(b"K\x03", b"K\x04"), args(b"K\x04", b"K\x01")
    tensor = call(by_line("torch._utils", "_rebuild_tensor_v2"), pid, b"K\x00", shape, stride, b"\x89", hooks)
    return b"\x80\x02(" + text("w") + tensor + text("x") + payload + b"d."


def archive(
    payload: bytes, compression: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None, more: bytes = b""
) -> bytes:
    """A torch.save archive around the payload."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        made.writestr("archive/data.pkl", torch_body(payload) + more)
        made.writestr("archive/data/0", WEIGHTS.tobytes())
        made.writestr("archive/version", "3\n")
        for name, content in (extra or {}).items():
            made.writestr(name, content)
    return out.getvalue()


def wrong_checksum(payload: bytes) -> bytes:
    made = archive(payload)
    right = struct.pack("<I", zlib.crc32(torch_body(payload)))
    return made.replace(right, b"\xde\xad\xbe\xef")


def marked_encrypted(payload: bytes) -> bytes:
    """The encryption bit of the directory set: zipfile wants a password, PyTorch does not care."""
    made = bytearray(archive(payload))
    made[made.index(b"PK\1\2") + 8] |= 1
    return bytes(made)


def renamed_member(payload: bytes) -> bytes:
    """Another name in the member's own header than in the directory: zipfile stops."""
    return archive(payload).replace(b"archive/data.pkl", b"archive/data.txt", 1)


def two_main_pickles(payload: bytes) -> bytes:
    out = io.BytesIO(archive(NONE))
    with zipfile.ZipFile(out, "a") as made:
        made.writestr("archive/more/data.pkl", b"\x80\x02" + payload + b".")
    return out.getvalue()


def same_name_twice(payload: bytes) -> bytes:
    import warnings

    out = io.BytesIO(archive(NONE))
    with zipfile.ZipFile(out, "a") as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.writestr("archive/data.pkl", torch_body(payload))
    return out.getvalue()


def pickle_before_zip(payload: bytes) -> bytes:
    """torch.load looks at the first bytes and unpickles; zipfile looks at the last and sees a clean archive."""
    return plain(payload) + archive(NONE)


def object_array(payload: bytes) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return out.getvalue() + b"\x80\x04" + payload + b"."


def npz(payload: bytes) -> bytes:
    out, weights = io.BytesIO(), io.BytesIO()
    np.save(weights, WEIGHTS)
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("w.npy", weights.getvalue())
        made.writestr("x.npy", object_array(payload))
    return out.getvalue()


def object_array_twice(payload: bytes) -> bytes:
    """Two members of one name: zipfile, and with it NumPy, hands out the last."""
    import warnings

    out = io.BytesIO(npz(NONE))
    weights = io.BytesIO()
    np.save(weights, WEIGHTS)
    with zipfile.ZipFile(out, "a") as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.writestr("w.npy", object_array(payload))
        made.writestr("w.npy", weights.getvalue())
    return out.getvalue()


def long_header(payload: bytes) -> bytes:
    """NumPy reads headers of any length where it is told to trust the file."""
    header = repr({"descr": "|O", "fortran_order": False, "shape": (1,)}).encode().ljust(60_000) + b"\n"
    made = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\x80\4" + payload + b"."
    weights, out = io.BytesIO(), io.BytesIO()
    np.save(weights, WEIGHTS)
    with zipfile.ZipFile(out, "w") as archived:
        archived.writestr("w.npy", weights.getvalue())
        archived.writestr("x.npy", made)
    return out.getvalue()


def capitals(payload: bytes) -> bytes:
    """PyTorch's reader finds members without telling capitals from small letters."""
    return archive(payload).replace(b"archive/data.pkl", b"archive/DATA.pkl")


def _tar(members: list[tuple[str, bytes]], link: tuple[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.LNKTYPE, link[1]
            made.addfile(info)
    return out.getvalue()


def _old(payload: bytes, name: str = "pickle") -> list[tuple[str, bytes]]:
    body = b"\x80\2" + MARK + text("w") + pickle.dumps(WEIGHTS, 2)[2:-1] + text("x") + payload + b"d."
    none = pickle.dumps(0, 2) + pickle.dumps([], 2)
    return [("storages", none), ("tensors", pickle.dumps(0, 2)), (name, body)]


def tar_without_magic(payload: bytes) -> bytes:
    """tarfile asks for the checksum of a header and for nothing else."""
    made = bytearray(_tar(_old(payload)))
    place = 0
    while any(made[place : place + 512]):
        header = made[place : place + 512]
        header[257:265], header[148:156] = bytes(8), b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        made[place : place + 512] = header
        place += 512 + (int(header[124:135], 8) + 511) // 512 * 512
    return bytes(made)


def safetensors_too(payload: bytes) -> bytes:
    """The length of the header is B and how far to skip; the first name V reads up to the line feed in the first tensor."""
    content = b"\n0" + payload + b"."
    content = content.ljust(-(-len(content) // 4) * 4)
    first, second = len(content), len(content) + WEIGHTS.nbytes
    header = json.dumps({
        "V": {"dtype": "U8", "shape": [first], "data_offsets": [0, first]},
        "w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [first, second]},
    }).encode()  # fmt: skip
    return struct.pack("<Q", 0x542) + header.ljust(0x542) + content + WEIGHTS.tobytes()


def zipped(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        made.writestr(name, content)
    return out.getvalue()


def script(payload: bytes) -> bytes:
    return archive(NONE, extra={"archive/constants.pkl": b"\x80\x02" + payload + b".", "archive/code/a.py": b""})


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "plain pickle": plain,
    "older stream": stream,
    "archive": archive,
    "deflated archive": lambda p: archive(p, zipfile.ZIP_DEFLATED),
    "wrong checksum": wrong_checksum,
    "marked as encrypted": marked_encrypted,
    "renamed member": renamed_member,
    "two main pickles": two_main_pickles,
    "same name twice": same_name_twice,
    "hidden pickle": lambda p: archive(NONE, extra={"archive/extra.pkl": b"\x80\x02" + p + b"."}),
    "hidden pickle without an ending": lambda p: archive(NONE, extra={"archive/readme": b"\x80\x04" + p + b"."}),
    "pickle before an archive": pickle_before_zip,
    "broken behind the payload": lambda p: plain(p)[:-2] + b"\xff\xff",
    "no STOP": lambda p: plain(p)[:-1],
    "second pickle": lambda p: pickle.dumps({"w": WEIGHTS}) + b"\x80\x04" + p + b".",
    "wrong frame": lambda p: b"\x80\x04\x95" + struct.pack("<Q", 1) + plain(p)[2:],
    "without a magic number": lambda p: b"C\x03abc0" + plain(p)[2:],
    "text first": lambda p: b"X" + struct.pack("<I", 1 << 16) + b" " * (1 << 16) + b"0" + plain(p)[2:],
    "payload before garbage": lambda p: MARK + text("w") + pickle.dumps(WEIGHTS, 2)[2:-1] + p + b"\xff" * 20_000,
    "capitals": capitals,
    "pickle behind the main one": lambda p: archive(NONE, more=b"\x80\2" + p + b"."),
    "hidden pickle of protocol 0": lambda p: archive(NONE, extra={"archive/data/notes": b"(lp0\n0" + p + b"."}),
    "deflated hidden pickle": lambda p: archive(NONE, zipfile.ZIP_DEFLATED, {"archive/readme": b"\x80\x04" + p + b"."}),
    "archive in an archive": lambda p: archive(NONE, extra={"archive/extra.bin": archive(p)}),
    "compressed in an archive": lambda p: archive(NONE, extra={"archive/x.gz": gzip.compress(plain(p))}),
    "tar": lambda p: _tar(_old(p)),
    "tar without its magic number": tar_without_magic,
    "tar with a link": lambda p: _tar(_old(p, "other"), ("pickle", "other")),
    "tar with a name twice": lambda p: _tar([*_old(p), ("./pickle", b"\x80\2N.")]),
    "tar with broken storages": lambda p: _tar([("storages", b"\x80\2K\1."), *_old(p)[1:]]),
    "tar of other files": lambda p: _tar([("a/b.txt", b"x"), ("a/model", plain(p))]),
    "zip of other files": lambda p: zipped("a/model.joblib", plain(p), zipfile.ZIP_DEFLATED),
    "zlib": lambda p: zlib.compress(plain(p)),
    "gzip": lambda p: gzip.compress(plain(p)),
    "bzip2": lambda p: bz2.compress(plain(p)),
    "xz": lambda p: lzma.compress(plain(p)),
    "safetensors too": safetensors_too,
    "NumPy archive": npz,
    "NumPy archive with a name twice": object_array_twice,
    "NumPy array with a long header": long_header,
    "TorchScript constants": script,
}

# What torch.load(path, weights_only=False) runs; NumPy's, joblib's and other readers run the rest.
TORCH_RUNS = (
    "plain pickle", "older stream", "archive", "deflated archive", "wrong checksum", "renamed member",
    "pickle before an archive", "broken behind the payload", "no STOP", "without a magic number", "text first",
    "payload before garbage", "capitals", "tar", "tar without its magic number", "tar with a link", "tar with a name twice",
    "safetensors too",
)  # fmt: skip
