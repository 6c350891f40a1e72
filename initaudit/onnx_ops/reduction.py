"""Reductions over axes. The axes are an attribute in old opsets and an input in new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import STORAGE_ONLY, ints, normal_axis, ordered, unordered
from initaudit.roles import Role

Axes = Sequence[int] | Tensor | None


def _reduced_axes(x: Tensor, given: Axes, noop_with_empty_axes: int) -> list[int] | None:
    """The axes to reduce over; None where nothing is to be done. No axes at all mean every axis."""
    axes = ints(given)
    if not axes:
        return None if noop_with_empty_axes else list(range(x.ndim))
    return sorted({normal_axis(axis, x.ndim) for axis in axes})


def _reduction(
    name: str, meaning: str, reduce: Callable[[Tensor, list[int], bool], Tensor], each: Callable[[Tensor], Tensor]
) -> None:
    """Declare a reduction; `each` is what it does to the elements where no axis is reduced."""

    def apply(
        data: Tensor,
        axes_: Tensor | None = None,
        *,
        axes: Sequence[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        over = _reduced_axes(data, axes if axes_ is None else axes_, noop_with_empty_axes)
        value = data.to(torch.int64) if data.dtype in STORAGE_ONLY and data.dtype != torch.uint64 else data
        value = ordered(value) if data.dtype == torch.uint64 and name in ("ReduceMax", "ReduceMin") else value
        value = value.to(torch.int64) if value.dtype == torch.uint64 else value
        result = each(value) if over is None or (not over and data.ndim == 0) else reduce(value, over, bool(keepdims))
        if data.dtype == torch.uint64 and name in ("ReduceMax", "ReduceMin"):
            return unordered(result, data.dtype)
        return result.to(data.dtype)

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = meaning
    globals()[name] = operator(Role("reduction", meaning_name(name), data=("data",)))(apply)


def meaning_name(name: str) -> str:
    """The operator's name as a report spells it: ReduceLogSum is reduce_log_sum."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _extreme(value: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    if any(value.shape[axis] == 0 for axis in axes):
        # Of no elements at all the result is that bound of the type which every element would displace.
        shape = [1 if a in axes else n for a, n in enumerate(value.shape) if keep or a not in axes]
        if value.is_floating_point():
            bound: float = -torch.inf if largest else torch.inf
        elif value.dtype == torch.bool:
            bound = not largest
        else:
            bound = torch.iinfo(value.dtype).min if largest else torch.iinfo(value.dtype).max
        return value.new_full(shape, bound)
    return (torch.amax if largest else torch.amin)(value, axes, keep)


def _product(value: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in reversed(axes):
        value = value.prod(axis, keepdim=keep)
    return value


def _log_sum_exp(value: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(value if value.is_floating_point() else value.to(torch.float64), axes, keep)


def _floating(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.float64)


_reduction("ReduceSum", "The sum.", lambda v, a, k: v.sum(a, k), lambda v: v)
_reduction("ReduceMean", "The mean.", lambda v, a, k: _floating(v).mean(a, k), lambda v: v)
_reduction("ReduceMax", "The maximum.", lambda v, a, k: _extreme(v, a, k, True), lambda v: v)
_reduction("ReduceMin", "The minimum.", lambda v, a, k: _extreme(v, a, k, False), lambda v: v)
_reduction("ReduceProd", "The product.", _product, lambda v: v)
_reduction("ReduceL1", "The sum of absolute values.", lambda v, a, k: v.abs().sum(a, k), torch.abs)
_reduction("ReduceL2", "The root of the sum of squares.", lambda v, a, k: _root(v, a, k), torch.abs)
_reduction("ReduceSumSquare", "The sum of squares.", lambda v, a, k: (v * v).sum(a, k), lambda v: v * v)
_reduction(
    "ReduceLogSum", "The logarithm of the sum.", lambda v, a, k: _floating(v).sum(a, k).log(), lambda v: _floating(v).log()
)
_reduction("ReduceLogSumExp", "The logarithm of the sum of exponentials.", _log_sum_exp, lambda v: v)


def _root(value: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(_floating(value), 2, axes, keep)
    return norm


def _arg(data: Tensor, axis: int, keepdims: int, select_last_index: int, largest: bool) -> Tensor:
    value = ordered(data)
    value = value.to(torch.uint8) if value.dtype == torch.bool else value
    axis = normal_axis(axis, value.ndim)
    # Taken as the first of equal values: torch.argmax does not promise which one it returns.
    extreme = (torch.amax if largest else torch.amin)(value, axis, True)
    hits = (value == extreme).to(torch.uint8)
    found = (hits.flip(axis) if select_last_index else hits).max(axis, keepdim=True).indices
    found = data.shape[axis] - 1 - found if select_last_index else found
    return found if keepdims else found.squeeze(axis)


@operator(Role("opaque", "argmax"))
def ArgMax(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the maximum along an axis lies: the first of several, or the last."""
    return _arg(data, axis, keepdims, select_last_index, True)


@operator(Role("opaque", "argmin"))
def ArgMin(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the minimum along an axis lies: the first of several, or the last."""
    return _arg(data, axis, keepdims, select_last_index, False)
