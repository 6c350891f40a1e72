"""PyTorch modules: one in memory, or the one that `package.module:callable` builds.

This is the only loader that runs code, and only code that the user named. torch is imported when a module is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
import sysconfig
import traceback
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem, numpy_dtype
from initaudit.load.host import device_of, on_host
from initaudit.load.spans import reason, show
from initaudit.load.unwrap import unwrap

if TYPE_CHECKING:
    import torch

_NAME = r"[^\W\d]\w*"
_SPEC = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}(\.{_NAME})*")


def is_module_spec(source: str) -> bool:
    """True for what reads as `package.module:callable`; a file of that name is a file all the same."""
    return _SPEC.fullmatch(source) is not None and not source.partition(":")[0].endswith(".py") and not os.path.lexists(source)


def load_spec(spec: str) -> Checkpoint:
    """The module that `spec` names, as a checkpoint; raises `UnreadableModel`."""
    return replace(from_module(build_spec(spec)), source=spec)


def build_spec(spec: str) -> torch.nn.Module:
    """Imports and calls what `spec` names, with the working directory on the path, as `python -m` would.

    The callable is a class or function that needs no arguments, or a module that exists already. Raises `UnreadableModel`
    with the place in the user's own code where that raised.
    """
    module_name, _, attribute = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = _attribute(_import(module_name, spec), attribute, spec)
    import torch

    if isinstance(found, torch.nn.Module):
        model: Any = found
    elif callable(found):
        model = _call(found, spec)
    else:
        raise UnreadableModel(
            spec, f"{show(attribute)} is a {type(found).__name__}", "a torch.nn.Module or a callable that makes one"
        )
    if not isinstance(model, torch.nn.Module):
        raise UnreadableModel(spec, f"it returned a {type(model).__name__}", "a torch.nn.Module")
    return model


def from_module(module: torch.nn.Module) -> Checkpoint:
    """The parameters and buffers of `module` as views of its memory, tied ones with one `storage`; `program` is the module.

    Wrappers (DataParallel, DistributedDataParallel, FSDP, torch.compile) are taken off first. Values follow later changes of
    the module, because nothing is copied; only sharded tensors and those of another device or layout are. Of a module on an
    accelerator `program` is a copy on the host, and `resident` the module itself.
    """
    inner, notes = unwrap(module)
    resident = None
    if device_of(inner) is not None:
        resident = inner
        inner = on_host(inner) or inner
    arrays: dict[str, Array] = {}
    problems: list[Problem] = []
    named: list[tuple[str, torch.Tensor, bool]]
    named = [(name, value, value.requires_grad) for name, value in inner.named_parameters(remove_duplicate=False)]
    named += [(name, value, False) for name, value in inner.named_buffers(remove_duplicate=False)]
    for name, tensor, trainable in named:
        try:
            arrays[name] = _tensor_array(name, tensor, trainable)
        except UnreadableModel as error:
            problems.append(Problem("IA001", name, str(error)))
    return Checkpoint(type(inner).__name__, "module", arrays, inner, tuple(problems), notes=notes, resident=resident)


def _tensor_array(name: str, tensor: torch.Tensor, trainable: bool) -> Array:
    import torch

    if torch.nn.parameter.is_lazy(tensor):
        raise UnreadableModel(show(name), "is not initialized yet (a lazy module)", advice="run one forward pass first")
    if tensor.is_meta:
        raise UnreadableModel(show(name), "is on the meta device and has no values", advice="build the model on the CPU")
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    quantized = ""
    if tensor.is_quantized:
        quantized, dtype = f"affine {dtype}", "float32"
    try:
        numpy_dtype(dtype)
    except TypeError as error:
        raise UnreadableModel(show(name), f"its dtype {dtype} has no counterpart in NumPy") from error
    storage = ""
    if tensor.layout == torch.strided and not quantized and tensor.numel():
        storage = f"{tensor.untyped_storage().data_ptr():x}+{tensor.storage_offset()}"
    return Array(name, shape, dtype, lambda: _values(name, tensor, dtype), storage, quantized, trainable)


def _values(name: str, tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    import torch

    try:
        plain = tensor.detach().cpu()
        if plain.is_quantized:
            plain = plain.dequantize()
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        plain = plain.resolve_conj().resolve_neg()
        carrier = {"bfloat16": torch.int16}.get(dtype, torch.uint8 if dtype.startswith("float8") else None)
        if carrier is None:
            return plain.numpy()
        return plain.view(carrier).numpy().view(numpy_dtype(dtype))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnreadableModel(show(name), reason(error)) from error


def _import(module_name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            advice = _near_module(missing) or (
                f"run it from the folder that holds {show(missing.partition('.')[0])}, or install that package"
            )
            raise UnreadableModel(spec, f"no module named {show(missing)}", advice=advice) from error
        raise UnreadableModel(spec, f"importing it needs {show(missing)}, which is not installed ({_place(error)})") from error
    except (Exception, SystemExit) as error:
        raise UnreadableModel(spec, f"importing it raised {_raised(error)}") from error


def _near_module(missing: str) -> str:
    """A module beside the one that is missing whose name is nearly the same, "" for none; nothing is imported for it."""
    parent, _, last = missing.rpartition(".")
    folders = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else [os.getcwd()]
    beside = {found.name for found in pkgutil.iter_modules(folders)}
    near = difflib.get_close_matches(last, sorted(beside), n=1, cutoff=0.7)
    return f"did you mean {show(f'{parent}.' if parent else '')}{show(near[0])}?" if near else ""


def _attribute(module: ModuleType, path: str, spec: str) -> Any:
    found: Any = module
    walked = module.__name__
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            near = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("__")], n=1)
            advice = f"did you mean {near[0]}?" if near else ""
            raise UnreadableModel(spec, f"{walked} has no {part}", advice=advice) from error
        except Exception as error:
            raise UnreadableModel(spec, f"looking up {part} raised {_raised(error)}") from error
        walked += f".{part}"
    return found


def _call(factory: Any, spec: str) -> Any:
    if needed := _needed_arguments(factory):
        advice = "write a function without arguments that builds the model"
        raise UnreadableModel(spec, f"it needs arguments ({', '.join(needed)})", "a callable without any", advice)
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise UnreadableModel(spec, f"building it raised {_raised(error)}") from error


def _needed_arguments(factory: Any) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []  # a builtin without a signature: calling it will tell
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def _raised(error: BaseException) -> str:
    text = reason(error)
    name = type(error).__name__
    return f"{name if text == name else f'{name}: {text}'} ({_place(error)})"


def _place(error: BaseException) -> str:
    """file:line of the user's own code: the deepest frame that belongs neither to a library nor to us."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(error.filename)}:{error.lineno}"
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    ours = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((ours, "<frozen"))]
    own = [frame for frame in frames if not frame.filename.startswith(tuple(libraries))] or frames
    return f"{_relative(own[-1].filename)}:{own[-1].lineno}" if own else "no frame of its own"


def _relative(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
