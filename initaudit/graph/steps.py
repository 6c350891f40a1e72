"""Small functions that stand in a graph where no operator of either framework does: parts of results, either of two values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from initaudit.roles import Role


def getitem(values: Sequence[Any], index: int) -> Any:
    """One of several outputs; an operator that was asked for one may hand it over alone."""
    return values[index] if isinstance(values, (tuple, list)) else values


def either(first: Any, second: Any) -> Any:
    """The value of one of two branches: the first stands for both."""
    return first if first is not None else second


def entry(value: torch.Tensor, axis: int, index: int) -> torch.Tensor:
    """One slice of a scanned value; an index beyond the last counts as the last."""
    return value.select(axis, min(index, value.shape[axis] - 1) if index >= 0 else max(index, -value.shape[axis]))


def stacked(axis: int, *values: torch.Tensor) -> torch.Tensor:
    """What the trips of a loop yielded, one behind the other."""
    return torch.stack(values, axis)


def restored_norm(x: torch.Tensor) -> torch.Tensor:
    """A batch norm that was folded away, as training starts with it: every channel by the batch's mean and variance."""
    over = [axis for axis in range(x.ndim) if axis != 1]
    mean, variance = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def dropped(x: torch.Tensor) -> torch.Tensor:
    """What a dropout of probability 1 hands on in training: zeros, which depend on nothing."""
    return torch.zeros_like(x)


ROLES: Mapping[Callable[..., Any], Role] = {
    getitem: Role("passthrough", "getitem", ("values",)),
    either: Role("merge", ""),
    entry: Role("passthrough", "select", ("value",)),
    stacked: Role("merge", "", ("values",)),
    dropped: Role("passthrough", "dropped", ("x",)),
    restored_norm: Role("normalization", "batch_norm", ("x",)),
}
