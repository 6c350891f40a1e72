"""Operators that make a value out of nothing but shapes, bounds and attributes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import ints, scalar, torch_type
from initaudit.roles import Role

GENERATOR = Role("generator")


@operator(GENERATOR)
def Constant(
    *,
    value: Tensor | None = None,
    sparse_value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    """The value that is written into the graph; a sparse one is handed over dense."""
    if value is not None:
        return value
    if sparse_value is not None:
        return sparse_value
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_int if value_ints is None else list(value_ints), dtype=torch.int64)
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_float if value_floats is None else list(value_floats), dtype=torch.float32)
    raise UnsupportedOperator("Constant", "a value of strings, or none")


@operator(GENERATOR)
def ConstantOfShape(input: Tensor, *, value: Tensor | None = None) -> Tensor:
    """A tensor of the shape given with one value everywhere (0 by default)."""
    shape = ints(input) or []
    reserve(shape, "ConstantOfShape")
    fill = torch.zeros(1) if value is None else value
    return fill.reshape(()).expand(shape).clone()


@operator(GENERATOR)
def Range(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    """start, start + delta, ... up to but without limit."""
    kind = start.dtype
    first, last, step = scalar(start), scalar(limit), scalar(delta)
    if step == 0:
        raise ValueError("a Range of step 0")
    count = max(0, -int((first - last) // step))
    reserve([count], "Range")
    wide = torch.float64 if kind.is_floating_point else torch.int64
    return (torch.arange(count, dtype=wide) * step + first).to(kind)


@operator(GENERATOR)
def EyeLike(input: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal of a matrix of the input's shape, zeros elsewhere."""
    rows, columns = input.shape
    offset = torch.arange(columns, device=input.device) - torch.arange(rows, device=input.device).reshape(-1, 1)
    return (offset == k).to(input.dtype if dtype is None else torch_type(dtype))


def _generator(seed: float | None) -> torch.Generator:
    """Numbers that are the same in every run: an audit must not depend on chance that nobody recorded."""
    return torch.Generator().manual_seed(0 if seed is None else int(seed))


def _normal(shape: Sequence[int], kind: torch.dtype, mean: float, scale: float, seed: float | None) -> Tensor:
    reserve(shape, "RandomNormal")
    return (torch.randn(list(shape), generator=_generator(seed)) * scale + mean).to(kind)


def _uniform(shape: Sequence[int], kind: torch.dtype, low: float, high: float, seed: float | None) -> Tensor:
    reserve(shape, "RandomUniform")
    return (torch.rand(list(shape), generator=_generator(seed)) * (high - low) + low).to(kind)


@operator(GENERATOR)
def RandomNormal(
    *, shape: Sequence[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Normal numbers of that mean and standard deviation."""
    return _normal(shape, torch_type(dtype), mean, scale, seed)


@operator(GENERATOR)
def RandomUniform(
    *, shape: Sequence[int], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    """Numbers uniform between low and high."""
    return _uniform(shape, torch_type(dtype), low, high, seed)


@operator(GENERATOR)
def RandomNormalLike(
    input: Tensor, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Normal numbers in the shape of the input."""
    return _normal(input.shape, input.dtype if dtype is None else torch_type(dtype), mean, scale, seed)


@operator(GENERATOR)
def RandomUniformLike(
    input: Tensor, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    """Uniform numbers in the shape of the input."""
    return _uniform(input.shape, input.dtype if dtype is None else torch_type(dtype), low, high, seed)


@operator(Role("generator", "bernoulli"))
def Bernoulli(input: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """1 with the probability that the input gives, otherwise 0."""
    kind = input.dtype if dtype is None else torch_type(dtype)
    return (torch.rand(input.shape, generator=_generator(seed)).to(input.device) < input).to(kind)


@operator(Role("generator", "multinomial"))
def Multinomial(input: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes drawn by their unnormalised log-probabilities, `n v` to `n sample_size`."""
    reserve([input.shape[0], sample_size], "Multinomial")
    drawn = torch.multinomial(torch.softmax(input.float().cpu(), -1), sample_size, replacement=True, generator=_generator(seed))
    return drawn.to(torch_type(dtype))
