"""Pickles that would run something, built opcode by opcode. Each one, unpickled for real, would touch the file it is given."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from malicious_containers import archive, legacy_stream
from pickle_opcodes import MARK, NONE, POP, REDUCE, args, by_line, by_stack, call, code, listed, raw, shell, system, text


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
    return by_line("collections", "UserDict") + NONE + attributes + b"\x86b" + POP + system(canary)


def _set_state(canary: Path) -> bytes:
    """BUILD calls __setstate__, which the stream itself has put on the instance's class."""
    instance = call(by_line("types", "SimpleNamespace"))
    state = b"}" + text("__setstate__") + by_line("os", "system") + b"s"
    return instance + state + b"b" + shell(canary) + b"b"


def _marshal(canary: Path) -> bytes:
    import marshal

    compiled = marshal.dumps(compile(f"open({str(canary)!r},'w').close()", "x", "exec"))
    function = call(by_line("types", "FunctionType"), call(by_line("marshal", "loads"), raw(compiled)), b"}")
    return call(function)


def _load_from_bytes(canary: Path) -> bytes:
    return call(by_line("torch.storage", "_load_from_bytes"), raw(legacy_stream(system(canary))))


def _load_plain_bytes(canary: Path) -> bytes:
    return call(by_line("torch.storage", "_load_from_bytes"), raw(b"\x80\x02" + system(canary) + b"."))


def _load_archive_bytes(canary: Path) -> bytes:
    return call(by_line("torch.storage", "_load_from_bytes"), raw(archive(system(canary))))


def _object_list(canary: Path) -> bytes:
    """numpy's array of objects: the list of them is its state."""
    array = call(by_line("numpy._core.multiarray", "_reconstruct"), by_line("numpy", "ndarray"), args(b"K\0"), raw(b"b"))
    dtype = call(by_line("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
    return array + args(b"K\1", args(b"K\1"), dtype, b"\x89", listed(system(canary))) + b"b"


def _rebuild_from_type(canary: Path) -> bytes:
    """A name that every checkpoint may use, handed a function of the attacker's."""
    return call(by_line("torch._tensor", "_rebuild_from_type_v2"), by_line("os", "system"), NONE, args(shell(canary)), NONE)


def _default_factory(canary: Path) -> bytes:
    return call(by_line("collections", "defaultdict"), by_line("os", "system")) + POP + system(canary)


def _map(canary: Path) -> bytes:
    mapped = call(by_line("builtins", "map"), by_line("os", "system"), listed(shell(canary)))
    return call(by_line("builtins", "list"), mapped)


def _sorted(canary: Path) -> bytes:
    return call(by_line("builtins", "filter"), by_line("builtins", "eval"), listed(code(canary))) + b"2\x85" + POP


CASES: tuple[Case, ...] = (
    # one opcode each
    Case("GLOBAL", system, ("calls os.system('touch",)),
    Case("STACK_GLOBAL", lambda c: call(by_stack("os", "system"), shell(c)), ("calls os.system",)),
    Case("dotted STACK_GLOBAL", lambda c: call(by_stack("shutil", "os.system"), shell(c)), ("calls shutil.os.system",)),
    Case("INST", lambda c: MARK + shell(c) + b"ios\nsystem\n", ("calls os.system",)),
    Case("OBJ", lambda c: MARK + by_line("os", "system") + shell(c) + b"o", ("calls os.system",)),
    Case("TUPLE1", lambda c: by_line("os", "system") + shell(c) + b"\x85R", ("calls os.system",)),
    Case("NEWOBJ", lambda c: by_line("subprocess", "Popen") + args(_argv(c)) + b"\x81", ("builds subprocess.Popen",), False),
    Case("NEWOBJ_EX", lambda c: by_line("subprocess", "Popen") + args() + b"}\x92", ("builds subprocess.Popen",), False),
    Case("EXT1", lambda c: b"\x82\x07" + args(shell(c)) + REDUCE, ("calls copyreg extension.7",), False),
    Case("EXT4", lambda c: b"\x84" + struct.pack("<I", 70000) + args() + REDUCE, ("calls copyreg extension.70000",), False),
    Case("import only", lambda c: by_line("antigravity", "fly") + POP + system(c), ("imports antigravity.fly",), False),
    Case("result dropped", lambda c: system(c) + POP + NONE, ("calls os.system",)),
    Case("result in the memo", lambda c: system(c) + b"q\xf0" + POP + b"h\xf0", ("calls os.system",)),
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
    Case("octal number", lambda c: b"I010\n0" + system(c), ("calls os.system",)),
    Case("number cut by a zero byte", lambda c: b"I1\0x\n0F1\0x\n0" + system(c), ("calls os.system",)),
    Case("memo in base ten", lambda c: b"Np010\n0g10\n0" + system(c), ("calls os.system",)),
    Case("text that is no UTF-8", lambda c: b"U\x01\xff0" + system(c), ("calls os.system",), False),
    Case("call behind a thousand others", lambda c: b"N0" * 5000 + system(c), ("calls os.system",)),
    Case("second command", lambda c: call(by_line("os", "system"), text("true")) + POP + system(c),
         ("calls os.system('true')", "calls os.system('touch")),
    Case("objects in an array", _object_list, ("calls os.system",)),
    Case("hooks of a tensor", lambda c: call(by_line("collections", "OrderedDict")) + text("0") + by_line("os", "system") + b"s"
         + POP + system(c), ("calls os.system",)),
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
    _one("pickle", "loads", lambda c: raw(b"\x80\x02" + system(c) + b"."), runs=True),
    _one("_pickle", "loads", lambda c: raw(b"\x80\x02" + system(c) + b"."), runs=True),
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
