"""Elementwise arithmetic, comparison and logic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import STORAGE_ONLY, computed, ordered, scalar, together, torch_type, unordered
from initaudit.roles import Role

POINTWISE = Role("pointwise")
OPAQUE = Role("opaque")


def _stretched(a: Tensor, b: Tensor, axis: int | None, broadcast: int) -> Tensor:
    """`b` with the trailing axes that opset 6 asks for: `axis` says with which axis of `a` its first one lines up."""
    if not broadcast or axis is None or b.ndim == 0:
        return b
    axis += a.ndim if axis < 0 else 0
    return b.reshape(b.shape + (1,) * (a.ndim - axis - b.ndim))


@operator(POINTWISE)
def Add(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """a + b, broadcast."""
    return computed(torch.add, a, _stretched(a, b, axis, broadcast))


@operator(POINTWISE)
def Sub(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """a - b, broadcast."""
    return computed(torch.sub, a, _stretched(a, b, axis, broadcast))


@operator(POINTWISE)
def Mul(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """a · b, broadcast."""
    return computed(torch.mul, a, _stretched(a, b, axis, broadcast))


@operator(POINTWISE)
def Div(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """a / b, broadcast; integers are divided towards zero."""
    mode = None if a.is_floating_point() else "trunc"
    return computed(lambda p, q: torch.div(p, q, rounding_mode=mode), a, _stretched(a, b, axis, broadcast))


@operator(POINTWISE)
def Pow(x: Tensor, y: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """x^y, in the type of x."""
    y = _stretched(x, y, axis, broadcast)
    if x.is_floating_point() or not y.is_floating_point():
        power: Callable[[Tensor, Tensor], Tensor] = lambda p, q: torch.pow(p, q)  # noqa: E731
        y = y.to(torch.int64) if y.dtype in STORAGE_ONLY else y
        return computed(power, x, y).to(x.dtype)
    return torch.pow(*together(x.to(torch.float64), y)).to(x.dtype)


@operator(POINTWISE)
def Mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder of a / b: with the sign of b, or with that of a where `fmod` is set."""
    return computed(torch.fmod if fmod else torch.remainder, a, b)


def _unary(function: Callable[[Tensor], Tensor], name: str, meaning: str) -> None:
    def apply(x: Tensor) -> Tensor:
        return computed(function, x)

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = meaning
    globals()[name] = operator(POINTWISE)(apply)


for _name, _function, _meaning in (
    ("Neg", torch.neg, "-x."),
    ("Abs", torch.abs, "|x|."),
    ("Sign", torch.sign, "-1, 0 or 1."),
    ("Floor", torch.floor, "The greatest integer not above x."),
    ("Ceil", torch.ceil, "The least integer not below x."),
    ("Round", torch.round, "The nearest integer, halves to the even one."),
    ("Sqrt", torch.sqrt, "The square root."),
    ("Exp", torch.exp, "e^x."),
    ("Log", torch.log, "The natural logarithm."),
    ("Reciprocal", torch.reciprocal, "1 / x."),
    ("Sin", torch.sin, "The sine."),
    ("Cos", torch.cos, "The cosine."),
    ("Tan", torch.tan, "The tangent."),
    ("Asin", torch.asin, "The inverse of the sine."),
    ("Acos", torch.acos, "The inverse of the cosine."),
    ("Atan", torch.atan, "The inverse of the tangent."),
    ("Sinh", torch.sinh, "The hyperbolic sine."),
    ("Cosh", torch.cosh, "The hyperbolic cosine."),
    ("Asinh", torch.asinh, "The inverse of the hyperbolic sine."),
    ("Acosh", torch.acosh, "The inverse of the hyperbolic cosine."),
    ("Atanh", torch.atanh, "The inverse of the hyperbolic tangent."),
    ("Erf", torch.erf, "The error function."),
):
    _unary(_function, _name, _meaning)


def _fold(function: Callable[[Tensor, Tensor], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    kind = tensors[0].dtype
    aligned = together(*(ordered(t) for t in tensors))
    return unordered(functools.reduce(function, aligned), kind)


@operator(POINTWISE)
def Max(*data_0: Tensor) -> Tensor:
    """The elementwise maximum of the inputs, broadcast."""
    return _fold(torch.maximum, data_0)


@operator(POINTWISE)
def Min(*data_0: Tensor) -> Tensor:
    """The elementwise minimum of the inputs, broadcast."""
    return _fold(torch.minimum, data_0)


@operator(POINTWISE)
def Sum(*data_0: Tensor) -> Tensor:
    """The elementwise sum of the inputs, broadcast."""
    return functools.reduce(lambda p, q: computed(torch.add, p, q), data_0)


@operator(POINTWISE)
def Mean(*data_0: Tensor) -> Tensor:
    """The elementwise mean of the inputs, broadcast."""
    return functools.reduce(lambda p, q: computed(torch.add, p, q), data_0) / len(data_0)


@operator(Role("pointwise", data=("input",)))
def Clip(
    input: Tensor,
    min_: Tensor | None = None,
    max_: Tensor | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
) -> Tensor:
    """min(max(input, lower), upper): the bounds are inputs (opset 11 on) or attributes."""
    kind, value = input.dtype, ordered(input)
    if min_ is not None or min is not None:
        bound = ordered(min_.to(kind)) if min_ is not None else torch.tensor(min, dtype=kind)
        value = torch.maximum(*together(value, bound))
    if max_ is not None or max is not None:
        bound = ordered(max_.to(kind)) if max_ is not None else torch.tensor(max, dtype=kind)
        value = torch.minimum(*together(value, bound))
    return unordered(value, kind)


@operator(Role("pointwise", data=("x", "y")))
def Where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the condition holds, y elsewhere, broadcast."""
    chosen, a, b = together(condition, x, y)
    return torch.where(chosen, a, b)


@operator(OPAQUE)
def IsNaN(x: Tensor) -> Tensor:
    """Whether x is not a number."""
    return torch.isnan(x)


@operator(OPAQUE)
def IsInf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Whether x is infinite, of either sign or of the one asked for."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_positive:
        found = found | (x == torch.inf)
    return found | (x == -torch.inf) if detect_negative else found


def _comparison(function: Callable[[Tensor, Tensor], Tensor], name: str, meaning: str) -> None:
    def compare(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
        return function(*together(ordered(a), ordered(_stretched(a, b, axis, broadcast))))

    compare.__name__ = compare.__qualname__ = name
    compare.__doc__ = meaning
    globals()[name] = operator(OPAQUE)(compare)


for _name, _compare, _meaning in (
    ("Equal", torch.eq, "Whether a = b."),
    ("Greater", torch.gt, "Whether a > b."),
    ("GreaterOrEqual", torch.ge, "Whether a ≥ b."),
    ("Less", torch.lt, "Whether a < b."),
    ("LessOrEqual", torch.le, "Whether a ≤ b."),
    ("And", torch.logical_and, "Whether both hold."),
    ("Or", torch.logical_or, "Whether one of them holds."),
    ("Xor", torch.logical_xor, "Whether just one of them holds."),
):
    _comparison(_compare, _name, _meaning)


@operator(OPAQUE)
def Not(x: Tensor) -> Tensor:
    """Whether x does not hold."""
    return torch.logical_not(x)


def _along(x: Tensor, axis: Tensor | int, exclusive: int, reverse: int, start: int, total: Callable[..., Tensor]) -> Tensor:
    """A running total along an axis: from the end where `reverse`, without the element itself where `exclusive`."""
    where = int(scalar(axis))
    x = x.flip(where) if reverse else x
    if exclusive:
        # The first element is that of the empty sum (0) or product (1), the last one drops out.
        x = torch.cat([torch.full_like(x.narrow(where, 0, 1), start), x.narrow(where, 0, x.shape[where] - 1)], where)
    result = total(x, where, dtype=x.dtype)
    return result.flip(where) if reverse else result


@operator(Role("reduction", "cumulative_sum", data=("x",)))
def CumSum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """The running sum along an axis."""
    return computed(lambda t: _along(t, axis, exclusive, reverse, 0, torch.cumsum), x)


@operator(Role("reduction", "cumulative_product", data=("x",)))
def CumProd(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """The running product along an axis."""
    return computed(lambda t: _along(t, axis, exclusive, reverse, 1, torch.cumprod), x)


@operator(Role("reduction", "determinant"))
def Det(x: Tensor) -> Tensor:
    """The determinant of the last two axes, `... m m` to `...`."""
    determinant: Tensor = torch.linalg.det(x)
    return determinant


def _signed(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """The same bits in a type on which torch has bitwise operators."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(x.dtype, x.dtype)
    return x.view(signed), x.dtype


def _bitwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    pairs = [_signed(t) for t in together(*tensors)]
    return function(*(t for t, _ in pairs)).view(pairs[0][1])


@operator(OPAQUE)
def BitwiseAnd(a: Tensor, b: Tensor) -> Tensor:
    """The bits set in both."""
    return _bitwise(torch.bitwise_and, a, b)


@operator(OPAQUE)
def BitwiseOr(a: Tensor, b: Tensor) -> Tensor:
    """The bits set in one or both."""
    return _bitwise(torch.bitwise_or, a, b)


@operator(OPAQUE)
def BitwiseXor(a: Tensor, b: Tensor) -> Tensor:
    """The bits set in just one."""
    return _bitwise(torch.bitwise_xor, a, b)


@operator(OPAQUE)
def BitwiseNot(x: Tensor) -> Tensor:
    """Every bit turned."""
    return _bitwise(torch.bitwise_not, x)


@operator(OPAQUE)
def BitShift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """x shifted by y bits to the "LEFT" or "RIGHT"; zeros come in, and all bits are gone from the width on."""
    width = 8 * x.element_size()
    x, y = together(x, y)
    signed = x.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
    amount = _signed(y)[0].to(torch.int64)
    # A shift by a negative amount is one by a huge unsigned amount.
    gone = (amount < 0) | (amount >= width)
    held = amount.clamp(0, width - 1)
    wide = _signed(x)[0].to(torch.int64)
    if not signed:
        wide = wide & (2**width - 1 if width < 64 else -1)
    if direction == "LEFT":
        shifted = torch.where(gone, 0, wide << held)
    elif signed:
        shifted = wide >> torch.where(gone, width - 1, held)
    else:
        # torch shifts in copies of the sign bit, which only 64-bit values have here.
        kept = ~torch.where(held > 0, torch.tensor(-1, device=x.device) << (64 - held).clamp(max=63), 0)
        shifted = torch.where(gone, 0, (wide >> held) & kept)
    return shifted.to(_signed(x)[0].dtype).view(x.dtype)


@operator(Role("passthrough", "bit_cast", data=("input",)))
def BitCast(input: Tensor, *, to: int) -> Tensor:
    """The same bits read as another type of the same width."""
    return input.view(torch_type(to))
