"""Matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import STORAGE_ONLY, computed, together
from initaudit.roles import Role, WeightUse


def matmul_axes(rank: int, right: bool, transposed: bool = False) -> tuple[str, ...]:
    """The axes of a constant operand of a matrix product: `n… i o` on the right, `n… o i` on the left, `i` for a vector."""
    if rank == 1:
        return ("i",)
    return ("n",) * (rank - 2) + (("i", "o") if right != transposed else ("o", "i"))


def matmul_weights(
    call: Mapping[str, Any], left: str = "a", right: str = "b", bias: str | None = None
) -> tuple[WeightUse, ...]:
    """The constant operand of a matrix product; of two constants (a table sent through a layer) that on the right."""
    a, b = call[left], call[right]
    if not (a.constant or b.constant):
        return ()
    name, used = (right, b) if b.constant else (left, a)
    if not used.shape:
        return ()
    transposed = bool(call.get("transB" if b.constant else "transA", 0))
    axes = matmul_axes(len(used.shape), b.constant, transposed)
    other = a.shape if b.constant else b.shape
    unit_axis: int | None = -1 if b.constant or (other is not None and len(other) == 1) else -2
    return (WeightUse(name, axes, "matmul", bias=bias, unit_axis=unit_axis if "o" in axes else None),)


def _gemm_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    bias = call.get("c")
    uses = matmul_weights(call, bias="c" if bias is not None and bias.constant else None)
    return tuple(WeightUse(u.argument, u.axes, "gemm", bias=u.bias, unit_axis=u.unit_axis) for u in uses)


@operator(Role("contraction", "matmul", data=("a", "b"), weights=matmul_weights))
def MatMul(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of the last two axes, the others broadcast."""
    return computed(torch.matmul, a, b)


@operator(Role("contraction", "gemm", data=("a", "b", "c"), weights=_gemm_weights))
def Gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    """alpha a b + beta c, either operand transposed on demand."""
    a, b = together(a.mT if transA else a, b.mT if transB else b)
    if c is not None and a.is_floating_point() and beta == 1 and alpha == 1 and c.shape == b.shape[-1:]:
        return torch.addmm(together(c, a)[0], a, b)
    product = computed(torch.mm, a, b)
    product = product if alpha == 1 else (alpha * product).to(a.dtype)
    if c is None:
        return product
    return computed(lambda p, q: p + (q if beta == 1 else (beta * q).to(q.dtype)), product, c)


def _einsum_terms(equation: str) -> tuple[list[str], str]:
    """The letters of every input and of the output; an implicit output holds the letters that occur once, sorted."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        joined = "".join(terms).replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in set(joined) if joined.count(x) == 1))
    return terms, right


def _einsum_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    operands = call["inputs"]
    terms, output = _einsum_terms(call["equation"])
    constants = [i for i, operand in enumerate(operands) if operand.constant]
    if len(constants) != 1 or len(operands) < 2 or "..." in terms[constants[0]]:
        return ()
    (place,) = constants
    others = "".join(t for i, t in enumerate(terms) if i != place)
    # A letter that is kept is a unit out, unless the signal carries it too: then it counts independent copies.
    axes = tuple("i" if x not in output else "n" if x in others else "o" for x in terms[place])
    if "i" not in axes:
        return ()
    kept = [x for x, axis in zip(terms[place], axes, strict=True) if axis == "o"]
    tail = output.replace("...", "")
    unit_axis = tail.index(kept[0]) - len(tail) if len(kept) == 1 and "..." not in output.rpartition(kept[0])[2] else None
    return (WeightUse("inputs", axes, "einsum", index=place, unit_axis=unit_axis),)


@operator(Role("contraction", "einsum", data=("inputs",), weights=_einsum_weights))
def Einsum(*inputs: Tensor, equation: str) -> Tensor:
    """The sum of products that the equation spells."""
    tensors = together(*inputs)
    kind = tensors[0].dtype
    if kind in STORAGE_ONLY:
        return torch.einsum(equation, *(t.to(torch.int64) for t in tensors)).to(kind)
    return torch.einsum(equation, *tensors)
