"""Sequences of tensors, as far as exporters use them to take a tensor apart and put it together. A sequence is a list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import ints, normal_axis, scalar
from initaudit.roles import Role


@operator(Role("passthrough", "split", data=("input",)))
def SplitToSequence(input: Tensor, split: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """Pieces of `input` along an axis: of equal size for a scalar `split`, of the sizes given for a vector, else of size 1."""
    axis = normal_axis(axis, input.ndim)
    if split is None:
        pieces = list(torch.split(input, 1, axis))
        return pieces if keepdims else [p.squeeze(axis) for p in pieces]
    sizes = ints(split) or []
    return list(torch.split(input, sizes[0] if split.ndim == 0 else sizes, axis))


@operator(Role("passthrough", "getitem", data=("input_sequence",)))
def SequenceAt(input_sequence: Sequence[Tensor], position: Tensor) -> Tensor:
    """One tensor of a sequence; a negative position counts from the end."""
    return input_sequence[int(scalar(position))]


@operator(Role("merge", "concat", data=("inputs",)))
def SequenceConstruct(*inputs: Tensor) -> list[Tensor]:
    """A sequence of the tensors given."""
    return list(inputs)


@operator(Role("merge", "concat", data=("input_sequence", "tensor")))
def SequenceInsert(input_sequence: Sequence[Tensor], tensor: Tensor, position: Tensor | None = None) -> list[Tensor]:
    """The sequence with one tensor more, at its end unless a position is given."""
    items = list(input_sequence)
    items.insert(len(items) if position is None else int(scalar(position)), tensor)
    return items


@operator(Role("generator", "sequence"))
def SequenceEmpty(*, dtype: int = 1) -> list[Tensor]:
    """A sequence of no tensors."""
    return []


@operator(Role("shape", "sequence_length", data=("input_sequence",)))
def SequenceLength(input_sequence: Sequence[Tensor]) -> Tensor:
    """How many tensors a sequence holds."""
    return torch.tensor(len(input_sequence), dtype=torch.int64)


@operator(Role("merge", "concat", data=("input_sequence",)))
def ConcatFromSequence(input_sequence: Sequence[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """The tensors of a sequence one after another along an axis, or stacked along a new one."""
    return torch.stack(list(input_sequence), axis) if new_axis else torch.cat(list(input_sequence), axis)
