"""The words and operators that TorchScript's code may use: a table of primitives, and ATen's own by name."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from initaudit.errors import UnreadableModel, UnsupportedOperator
from initaudit.graph.allowed import bounded, packet
from initaudit.graph.script_numbers import append, bounded_range, extend, leaves, on_numbers
from initaudit.graph.sound import check
from initaudit.load.spans import show

MOST_ELEMENTS = 2**28  # of one value


def _raised(*args: Any) -> Any:
    raise UnreadableModel("TorchScript", f"its code raises {show(args[0] if args else '', 120)}")


COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
# Functions that the code calls without a prefix
WORDS: Mapping[str, Callable[..., Any]] = {
    "annotate": lambda _, value: value, "unchecked_cast": lambda _, value: value, "uninitialized": lambda _: None,
    "getattr": _raised, "int": int, "float": float, "bool": bool, "str": str, "range": bounded_range, "len": len, "list": list,
    "isinstance": lambda value, _: _raised("isinstance"), "complex": complex, "_cast_int": int,
}  # fmt: skip
# ops.prim.NAME, and what the code writes as torch.NAME and is no operator of ATen
_PRIMITIVES: Mapping[str, Callable[..., Any]] = {
    "RaiseException": _raised, "NumToTensor": torch.scalar_tensor, "unchecked_unwrap_optional": lambda value: value,
    "data": lambda tensor: tensor.detach(), "dtype": lambda tensor: tensor.dtype, "device": lambda tensor: torch.device("cpu"),
    "is_cuda": lambda _: False, "shape": lambda tensor: list(tensor.shape), "ndim": lambda tensor: tensor.dim(),
    "requires_grad": lambda tensor: tensor.requires_grad, "layout": lambda _: torch.strided, "is_quantized": lambda _: False,
    "min": lambda *values: min(*values), "max": lambda *values: max(*values), "abs": abs, "type": lambda _: "cpu",
    "is_meta": lambda _: False, "is_sparse": lambda _: False, "is_mkldnn": lambda _: False, "is_nested": lambda _: False,
    "dim": lambda tensor: tensor.dim(), "size": lambda tensor, *axis: tensor.shape[axis[0]] if axis else list(tensor.shape),
    "len": lambda value: len(value), "numel": lambda tensor: tensor.numel(), "unwrap_optional": lambda value: value,
    "_unwrap_optional": lambda value: value, "is_floating_point": lambda tensor: tensor.is_floating_point(),
    "is_complex": lambda tensor: tensor.is_complex(), "unbind": lambda tensor, dim=0: list(tensor.unbind(dim)),
    "IntImplicit": lambda tensor: int(tensor), "FloatImplicit": lambda tensor: float(tensor), "TupleIndex": operator.getitem,
    "ScalarImplicit": lambda tensor: tensor.item(), "Int": lambda tensor: int(tensor), "Float": lambda tensor: float(tensor),
    "Bool": lambda tensor: bool(tensor), "dict": dict, "stride": lambda tensor, *axis: tensor.stride(*axis),
    "is_contiguous": lambda tensor, *_: tensor.is_contiguous(), "format": lambda *_: "...", "warn": lambda *_, **__: None,
    "__isnot__": operator.is_not, "__is__": operator.is_, "append": append,
    "list": lambda value: list(value), "extend": extend, "__getitem__": operator.getitem,
    "__contains__": lambda items, item: any(item is held for held in items), "_set_item": operator.setitem,
    "backward": _raised, "AutogradZero": lambda: None, "AutogradAllNonZero": _raised,
}  # fmt: skip
_PLAIN_OF_TENSORS = frozenset(_PRIMITIVES) - {"min", "max", "abs"}


def call(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What `torch.NAME` or `ops.prim.NAME` makes of the arguments; raises UnsupportedOperator for any other name."""
    prefix, _, last = name.rpartition(".")
    tensors = any(isinstance(leaf, torch.Tensor) for leaf in leaves((args, kwargs)))
    if prefix == "ops.prim" and last in _PRIMITIVES:
        return _PRIMITIVES[last](*args)
    if prefix in ("torch", "ops.aten"):
        plain = on_numbers(last) if not tensors else None
        if plain is not None:
            return plain(*args, **kwargs)
        if last in _PLAIN_OF_TENSORS:
            return _PRIMITIVES[last](*args)
        return _computed(last, args, kwargs)
    raise UnsupportedOperator(show(name), "a call that code out of a file may not make")


def _computed(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    found = packet(name)
    kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    args = [torch.device("cpu") if isinstance(value, torch.device) else value for value in args]
    check(name.removesuffix("_"), args, kwargs)
    try:
        result = bounded(found, MOST_ELEMENTS, args, kwargs)
    except (TypeError, RuntimeError) as error:
        raise UnreadableModel(f"torch.{name}", show(str(error).split("\n")[0], 200)) from error
    return list(result) if isinstance(result, torch.Size) else result
