"""Which operators a graph out of a file may call by name: pure functions of tensors that ATen has, and arithmetic on sizes.

A name never becomes an import or an attribute of anything but `torch.ops.aten`: what reads or writes files, swaps the memory
behind a tensor, or belongs to another library is refused, and with it the graph.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from initaudit.errors import LimitExceeded, UnsupportedOperator
from initaudit.load.spans import show

_NAME = re.compile(r"[a-z][a-z0-9_]*|__[a-z]+__|_[a-z][a-z0-9_]*", re.IGNORECASE)
# from_file maps a file; set_ and resize_ change which memory a tensor stands on; _-names are kernels that trust their callers,
# but for those that torch itself writes into graphs.
_REFUSED = re.compile("from_file|set_?|record_stream|.*(resize|storage|mkldnn|cudnn|miopen|quantize|nested).*")
_INNER = re.compile(
    "_(convolution(_mode)?|softmax|log_softmax|safe_softmax|native_batch_norm_legit(_no_training)?|batch_norm_impl_index|"
    "to_copy|unsafe_view|reshape_alias|weight_norm(_interface)?|adaptive_avg_pool[23]d|trilinear|upsample_(bilinear|bicubic)2d_aa|"
    "upsample_nearest_exact[123]d|scaled_dot_product_(flash_attention_for_cpu|efficient_attention)|fused_rms_norm|grouped_mm|"
    "cdist_forward|conj|shape_as_tensor|assert_(tensor_metadata|scalar|async)|cast_[A-Z][a-z]+|prelu_kernel|"
    "(pack|pad)_(padded|packed)_sequence|fft_[rc]2[rc]|euclidean_dist|unsafe_index(_put)?|linalg_(svd|det))"
)
# What torch.export writes for arithmetic on symbolic sizes; no power, which can take for ever
_ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{function.__name__}": function
        for function in (
            *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg),
            *(operator.pos, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_),
            *(operator.or_, operator.xor, operator.not_, operator.getitem, operator.index),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_not", "sym_int", "sym_float", "sym_max", "sym_min", "sym_ite", "sym_sqrt", "sym_sum")
    },
}


def exported_target(target: str) -> Callable[..., Any]:
    """The function that an exported graph calls `target`; raises UnsupportedOperator for any that is not allowed."""
    if target in _ON_NUMBERS:
        return _ON_NUMBERS[target]
    parts = target.removeprefix("torch.ops.").split(".")
    if target.startswith("torch.ops.") and len(parts) == 3 and parts[0] == "aten":
        return overload(parts[1], parts[2])
    raise UnsupportedOperator(show(target), "an operator that a graph out of a file may not call")


def packet(name: str) -> torch._ops.OpOverloadPacket:
    """`torch.ops.aten.NAME`; raises UnsupportedOperator for a name that is refused or unknown."""
    inner = name.removesuffix("_")
    refused = _NAME.fullmatch(name) is None or (
        name[:1] == "_" and _INNER.fullmatch(inner) is None and not name.startswith("__")
    )
    if not refused and _REFUSED.fullmatch(name) is None:
        found = getattr(torch.ops.aten, name, None)
        if isinstance(found, torch._ops.OpOverloadPacket):
            return found
    raise UnsupportedOperator(f"aten.{show(name)}", "an operator that a graph out of a file may not call")


def overload(name: str, variant: str) -> torch._ops.OpOverload:
    """`torch.ops.aten.NAME.VARIANT`; raises UnsupportedOperator for one that is refused or unknown, or writes to an output."""
    found = packet(name)
    if variant in found.overloads():  # type: ignore[no-untyped-call]
        chosen: torch._ops.OpOverload = getattr(found, variant)
        if not any(argument.is_out for argument in chosen._schema.arguments):
            return chosen
    raise UnsupportedOperator(f"aten.{show(name)}.{show(variant)}", "an operator that a graph out of a file may not call")


def bounded(function: Callable[..., Any], most: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`function(*args, **kwargs)` unless it would make more than `most` elements; raises LimitExceeded.

    The size is found on torch's meta device, where nothing is allocated; operators that have no such kernel make no more than
    they are given.
    """
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and not _hollow((args, kwargs)):
        try:
            hollow = function(*_on_meta(args), **_on_meta(dict(kwargs)))
        except (NotImplementedError, RuntimeError, TypeError):
            hollow = None
        for leaf in pytree.tree_leaves(hollow):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > most:
                raise LimitExceeded(str(function), f"{leaf.numel()} elements in one output", f"at most {most}")
    return function(*args, **kwargs)


def _hollow(value: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_meta for t in tensors)


def _on_meta(value: Any) -> Any:
    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(moved, value)
