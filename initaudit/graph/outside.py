"""Tensors that a module holds and that neither `parameters()` nor `buffers()` does: layers in a plain list, dict or object."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Objects that are looked at: a walk of some ten milliseconds. Who holds more beside a network holds its data there.
_MOST = 20_000
_NOT_HELD = (str, bytes, int, float, complex, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
# What torch itself keeps in a module: parameters, buffers and children are registered, hooks hold no layer.
_TORCHS_OWN = frozenset(vars(nn.Module()))


def outside_name(key: object) -> str:
    """What a key of a dict is called as one part of a dotted name."""
    return str(key).replace(".", "_")


def held_outside(module: nn.Module, *, frozen: bool = False) -> dict[Tensor, str]:
    """The leaf tensors that `module` holds by other ways than registration, and their names, in the order in which it does.

    Those that ask for a gradient; all of them with `frozen`.

    A name is the way in Python, its steps joined by dots: what the tensor will be called once its layers are registered.
    Nothing is called on the way, so that no property or descriptor of a stranger's runs.
    """
    registered = {id(p) for p in (*module.parameters(), *module.buffers())}
    found: dict[Tensor, str] = {}
    queue: deque[tuple[str, Any]] = deque([("", module)])
    seen = {id(module)}
    while queue and len(seen) < _MOST:
        path, here = queue.popleft()
        if isinstance(here, Tensor):
            if here.is_leaf and (frozen or here.requires_grad) and id(here) not in registered:
                found.setdefault(here, path)
            continue
        for key, value in _held(here):
            if id(value) not in seen and not isinstance(value, _NOT_HELD):
                seen.add(id(value))
                queue.append((f"{path}.{outside_name(key)}" if path else outside_name(key), value))
    return found


def _held(here: Any) -> Iterator[tuple[object, Any]]:
    """What an object holds, by index, key or attribute; not what a set does, whose order changes from run to run."""
    if isinstance(here, nn.Module):
        own = object.__getattribute__(here, "__dict__")
        for group in ("_modules", "_parameters"):
            yield from own.get(group, {}).items()
        yield from ((k, v) for k, v in own.items() if k not in _TORCHS_OWN)
    elif isinstance(here, (list, tuple, deque)):
        yield from enumerate(here)
    elif isinstance(here, dict):
        yield from here.items()
    elif type(here).__module__.partition(".")[0] not in ("torch", "numpy", "builtins"):
        try:
            own = object.__getattribute__(here, "__dict__")
        except AttributeError:  # an object of slots
            return
        if isinstance(own, dict):
            yield from own.items()


def same_place(value: Tensor) -> tuple[int, tuple[int, ...]]:
    """What a tensor and an alias of it have in common: torch.export detaches what it lifts out of a module."""
    return (value.data_ptr() if value.layout == torch.strided else id(value)), tuple(value.shape)
