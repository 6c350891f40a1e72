"""The shape of what an operator makes of tensors without numbers, by a run on zeros where that is little work.

torch's own rules for the meta device are written in Python and import symbolic shapes, sympy and parts of the compiler, which
takes as long as a third of torch itself and is all that many a small graph would need them for. What they find is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from initaudit.errors import InitauditError
from initaudit.onnx_ops.budget import Budget, metered
from initaudit.roles import Role

# A few milliseconds of products and four megabytes of output; all of a graph together as long as the imports would take.
WORK, ALL_WORK, ELEMENTS = 2**28, 2**30, 2**22
# The others have shapes that depend on numbers, or bodies.
_KINDS = ("contraction", "pointwise", "normalization", "pooling", "softmax", "reduction", "passthrough", "merge", "embedding")
_CONTRACTIONS = ("matmul", "gemm", "conv", "einsum")


def work_of(role: Role, bound: Mapping[str, Any]) -> float:
    """A bound on the products and on the elements of a call with these arguments by name; infinite where zeros will not do."""
    if role.kind not in _KINDS or (role.kind == "contraction" and role.name not in _CONTRACTIONS):
        return math.inf
    # A role that names no data means that all of them are.
    data = [t for name in role.data or bound for t in tensors_in(bound.get(name))]
    if not data:
        return math.inf
    # Weights and scales are no signal, but neither do they steer; of the others, a number that is not known may.
    if role.kind not in ("contraction", "normalization"):
        seen = {id(t) for t in data}
        if any(t.is_meta and id(t) not in seen for value in bound.values() for t in tensors_in(value)):
            return math.inf
    sizes = sorted((t.numel() for t in data), reverse=True)
    every = sorted((t.numel() for value in bound.values() for t in tensors_in(value)), reverse=True)
    if role.name == "conv" or role.kind == "pooling":
        weights = (t.numel() for value in bound.values() for t in tensors_in(value) if t is not data[0])
        return _positions(data[0], bound) * max(weights, default=1)
    if role.name in ("matmul", "gemm"):
        a = data[0]
        inner = 1 if a.dim() == 0 else a.shape[0] if bound.get("transA") else a.shape[-1]
        return math.prod(sizes[:2]) / max(1, inner)
    if role.kind in ("contraction", "embedding"):
        return math.prod(every[:2])
    together = (max(axis) for axis in zip_longest(*(tuple(t.shape)[::-1] for t in data), fillvalue=1))
    return max(sum(sizes), math.prod(together) if role.kind in ("pointwise", "merge") else 0)


def _positions(x: Tensor, bound: Mapping[str, Any]) -> float:
    """The elements of `x` and of its padding, as far as that is told in numbers."""
    pads = [abs(int(p)) for p in bound.get("pads") or ()]
    if x.dim() < 3:
        return math.inf
    return math.prod(x.shape[:2]) * math.prod(side + 2 * max(pads, default=0) + 1 for side in x.shape[2:])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def stand_in(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
    """What `target` returns for zeros in the place of tensors without numbers, without its numbers again; None where it fails.

    The state of torch's generator is left as it was.
    """
    state = torch.get_rng_state()
    try:
        with metered(Budget(elements=ELEMENTS)), torch.no_grad():
            return _map(target(*_map(args, zeros), **_map(kwargs, zeros)), without_numbers)
    except (InitauditError, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None  # the meta device will say why, in the words that are known of it
    finally:
        torch.set_rng_state(state)


def zeros(tensor: Tensor) -> Tensor:
    """Zeros in memory for a tensor without numbers; others as they are."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def without_numbers(tensor: Tensor) -> Tensor:
    """The shape, type and strides of a tensor alone (`torch.empty_like` would ask the rules in Python)."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    return value
