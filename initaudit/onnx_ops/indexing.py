"""Operators that pick, place, sort and find elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import STORAGE_ONLY, computed, ints, normal_axis, ordered, scalar, together, unordered
from initaudit.roles import Role, WeightUse


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front; negative ones count from the end."""
    whole = indices.to(torch.int64)
    return torch.where(whole < 0, whole + size, whole)


@operator(Role("passthrough", "slice", data=("data",)))
def Slice(
    data: Tensor,
    starts_: Tensor | None = None,
    ends_: Tensor | None = None,
    axes_: Tensor | None = None,
    steps: Tensor | None = None,
    *,
    starts: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    axes: Sequence[int] | None = None,
) -> Tensor:
    """Every step-th element from start up to end along the axes named; negative steps walk backwards."""
    begin = ints(starts if starts_ is None else starts_) or []
    stop = ints(ends if ends_ is None else ends_) or []
    chosen = ints(axes if axes_ is None else axes_)
    stride = ints(steps)
    for place, first in enumerate(begin):
        axis = normal_axis(chosen[place] if chosen else place, data.ndim)
        taken = range(data.shape[axis])[slice(first, stop[place], stride[place] if stride else 1)]
        if len(taken) == data.shape[axis] and taken.step == 1:
            continue
        index: list[slice] = [slice(None)] * data.ndim
        # torch has no negative steps: the same elements are taken forwards, then turned round.
        ahead = taken if taken.step > 0 else taken[::-1]
        index[axis] = slice(ahead.start, ahead.stop, ahead.step) if ahead else slice(0, 0)
        data = data[tuple(index)]
        if taken.step < 0:
            # flip is not there for every type; picking by index is.
            order = torch.arange(data.shape[axis] - 1, -1, -1, device=data.device)
            data = data.flip(axis) if data.dtype not in STORAGE_ONLY else data.index_select(axis, order)
    return data


def _table(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    data, indices = call["data"], call["indices"]
    shape = data.shape
    # Rows that constants pick are a signal where they are used as one (a position table); one single row is a slice.
    single = indices.constant and math.prod(indices.shape or (1,)) == 1
    if not data.constant or single or shape is None or len(shape) != 2 or call.get("axis", 0) not in (0, -2):
        return ()
    return (WeightUse("data", ("v", "d"), "embedding", unit_axis=None),)


@operator(Role("embedding", "gather", data=("data",), weights=_table))
def Gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """The slices of `data` along an axis that `indices` name: its axes stand where that axis stood."""
    data, indices = together(data, indices)
    axis = normal_axis(axis, data.ndim)
    flat = _wrapped(indices, data.shape[axis]).reshape(-1)
    taken = data.index_select(axis, flat) if data.ndim else data
    return taken.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


@operator(Role("passthrough", "gather_elements", data=("data",)))
def GatherElements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """For every entry of `indices` the element at that place along an axis."""
    data, indices = together(data, indices)
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


def _nd_index(indices: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(_wrapped(indices[..., k], sizes[k]) for k in range(indices.shape[-1]))


@operator(Role("passthrough", "gather_nd", data=("data",)))
def GatherND(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """The slices of `data` that the vectors along the last axis of `indices` name."""
    data, indices = together(data, indices)
    batch = data.shape[:batch_dims]
    count = math.prod(batch)
    table = data.reshape(count, *data.shape[batch_dims:])
    chosen = indices.reshape(count, -1, indices.shape[-1])
    index = _nd_index(chosen, table.shape[1:])
    row = torch.arange(count, device=data.device).reshape(-1, 1).expand(chosen.shape[:2])
    return table[(row, *index)].reshape((*indices.shape[:-1], *data.shape[batch_dims + indices.shape[-1] :]))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scattered(data: Tensor, indices: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    data, indices, updates = together(data, indices, updates)
    places = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, places, updates)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"a scatter with the unknown reduction {reduction!r}")
    result = ordered(data).scatter_reduce(axis, places, ordered(updates), _REDUCTIONS[reduction], include_self=True)
    return unordered(result, data.dtype)


@operator(Role("merge", "scatter", data=("data", "updates")))
def ScatterElements(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """`data` with every element of `updates` put (or added, multiplied, ...) at its place along an axis."""
    return _scattered(data, indices, updates, axis, reduction)


@operator(Role("merge", "scatter", data=("data", "updates")))
def Scatter(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """The old name of ScatterElements."""
    return _scattered(data, indices, updates, axis, "none")


@operator(Role("merge", "scatter_nd", data=("data", "updates")))
def ScatterND(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """`data` with the slices of `updates` put (or added, ...) where the vectors of `indices` say."""
    data, indices, updates = together(data, indices, updates)
    depth = indices.shape[-1]
    rows, inner = math.prod(data.shape[:depth]), data.shape[depth:]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    for k, index in enumerate(_nd_index(indices, data.shape)):
        flat = flat * data.shape[k] + index
    width = math.prod(inner)
    places = flat.reshape(-1, 1).expand(-1, width)
    result = _scattered(data.reshape(rows, width), places, updates.reshape(-1, width), 0, reduction)
    return result.reshape(data.shape)


@operator(Role("merge", "tensor_scatter", data=("past_cache", "update")))
def TensorScatter(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A cache with an update written along `axis`, from a place of its own in every batch; "circular" wraps round."""
    past_cache, update = together(past_cache, update)
    axis = normal_axis(axis, past_cache.ndim)
    start = torch.zeros(update.shape[0], dtype=torch.int64) if write_indices is None else write_indices.to(torch.int64)
    places = start.to(update.device).reshape(-1, 1) + torch.arange(update.shape[axis], device=update.device)
    if mode == "circular":
        places = places % past_cache.shape[axis]
    shape = [1] * update.ndim
    shape[0], shape[axis] = places.shape
    return past_cache.scatter(axis, places.reshape(shape).expand(update.shape), update)


@operator(Role("opaque", "one_hot"))
def OneHot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """values[1] at the index along a new axis of size `depth`, values[0] elsewhere; an index outside leaves all off."""
    count = int(scalar(depth))
    reserve([indices.numel(), count], "OneHot")
    indices, values = together(indices, values)
    axis = normal_axis(axis, indices.ndim + 1)
    whole = indices.to(torch.int64)
    whole = torch.where(whole < 0, whole + count, whole).unsqueeze(axis)
    shape = [1] * whole.ndim
    shape[axis] = count
    on = whole == torch.arange(count, device=whole.device).reshape(shape)
    return torch.where(on, values[1], values[0])


@operator(Role("opaque", "non_zero"))
def NonZero(x: Tensor) -> Tensor:
    """The indices of what is not zero, one column each."""
    # A number on its own counts as a vector of one in the reference, which yields one row.
    return torch.nonzero(x).T.contiguous()


@operator(Role("passthrough", "compress", data=("input",)))
def Compress(input: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices (without an axis: the elements) for which the condition holds."""
    value = input.reshape(-1) if axis is None else input
    chosen = torch.nonzero(condition.reshape(-1)).reshape(-1)
    return value.index_select(0 if axis is None else axis, chosen.to(value.device))


@operator(Role("opaque", "top_k"))
def TopK(
    x: Tensor,
    k_: Tensor | None = None,
    *,
    k: int | None = None,
    axis: int = -1,
    largest: int = 1,
    sorted: int = 1,
    outputs: int = 2,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k largest (or smallest) values along an axis and their places; of equal ones those with the lower place."""
    count = k if k_ is None else int(scalar(k_))
    value = ordered(x)
    value = value.to(torch.uint8) if value.dtype == torch.bool else value
    # Sorting, because torch.topk does not say which of equal values it takes.
    places = torch.sort(value, dim=axis, descending=bool(largest), stable=True).indices.narrow(axis, 0, count or 0)
    values = unordered(torch.gather(value, axis, places), x.dtype).to(x.dtype)
    return values if outputs == 1 else (values, places)


@operator(Role("opaque", "unique"))
def Unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int = 1) -> Tensor | tuple[Tensor, ...]:
    """The distinct elements (or slices), where each first occurs, which one every element is, and how often it occurs."""
    value = ordered(x)
    _, inverse, counts = torch.unique(value.detach(), sorted=True, return_inverse=True, return_counts=True, dim=axis)
    flat = inverse.reshape(-1)
    count = counts.numel()
    places = torch.arange(flat.numel(), device=x.device)
    first = torch.full((count,), flat.numel(), device=x.device).scatter_reduce(0, flat, places, "amin")
    if not sorted:
        order = torch.argsort(first)
        first, counts = first[order], counts[order]
        flat = torch.argsort(order)[flat]
    # Picked from the input rather than taken from the search, so that gradients find their way.
    values = computed(lambda t: t.reshape(-1)[first] if axis is None else t.index_select(axis, first), x)
    result = (values, first, flat, counts)
    return result[0] if outputs == 1 else result


@operator(Role("passthrough", "reverse_sequence", data=("input",)))
def ReverseSequence(input: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first `sequence_lens` steps of every batch entry in reverse order, the others where they are."""
    steps, batch = input.shape[time_axis], input.shape[batch_axis]
    length = sequence_lens.to(torch.int64).to(input.device).reshape(1, -1)
    step = torch.arange(steps, device=input.device).reshape(-1, 1)
    source = torch.where(step < length, length - 1 - step, step)
    shape = [1] * input.ndim
    shape[time_axis], shape[batch_axis] = steps, batch
    source = source if time_axis < batch_axis else source.T
    return torch.gather(input, time_axis, source.reshape(shape).expand(input.shape))


@operator(Role("passthrough", "trilu", data=("input",)))
def Trilu(input: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of the last two axes from the k-th diagonal on, zeros elsewhere."""
    diagonal = 0 if k is None else int(scalar(k))
    rows, columns = input.shape[-2:]
    offset = torch.arange(columns, device=input.device) - torch.arange(rows, device=input.device).reshape(-1, 1)
    keep = offset >= diagonal if upper else offset <= diagonal
    return torch.where(keep, input, torch.zeros((), dtype=input.dtype, device=input.device))
