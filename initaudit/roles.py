"""What an operator does to a signal, as data: the vocabulary in which both front doors describe their operators.

Axis letters of weights, used everywhere:

    o  units out        i  units in          k  kernel taps (one letter for each spatial axis)
    v  rows of a table  d  features of a row  n  independent copies (directions, experts, batched matrices)

A weight of a grouped convolution has axes `o i k k` where `i` already counts one group's inputs only. Gates of a recurrent
weight are stacked along `o`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "contraction",  # linear, matmul, einsum, convolution: sums products over an axis
    "embedding",  # picks rows of a table
    "recurrent",  # a whole LSTM, GRU or RNN layer
    "normalization",  # batch, layer, group, instance, RMS norm: invariant to the scale of its input
    "pointwise",  # each element of the output depends on the same element of the inputs
    "passthrough",  # moves, copies or selects elements: reshape, transpose, slice, cast, dropout, pad, resize
    "merge",  # brings several signals together by moving elements: concat, stack, scatter, where
    "pooling",  # averages or picks a maximum over space
    "reduction",  # sum, mean, variance over axes
    "softmax",  # normalised exponentials over an axis
    "attention",  # fused softmax(q k') v
    "generator",  # makes a value out of nothing but shapes or constants: Range, ConstantOfShape, RandomNormal
    "shape",  # integers about tensors: Shape, Size
    "control",  # If, Loop, Scan: what flows is decided by sub-graphs
    "opaque",  # executed, but the signal is not followed through it: TopK, NonZero, comparison, FFT
]


@dataclass(frozen=True)
class Operand:
    """One tensor argument of a call as a role sees it: `shape` is None where it is not known before running."""

    shape: tuple[int, ...] | None
    constant: bool


@dataclass(frozen=True)
class WeightUse:
    """How one tensor argument of a call serves as its weight.

    `argument` is the name of the operator's parameter and `index` the place in it where that parameter is a list.
    `axes` names every axis of the value. `groups` is that of a convolution; `gates` names the blocks stacked along `o`.
    `overlap` is the share of kernel taps that meet at one output element: 1 but for a strided transposed convolution, where it
    is 1/prod(stride). `unit_axis` is the axis of the *output* along which the units of this weight lie (None: none).
    """

    argument: str
    axes: tuple[str, ...]
    operator: str
    index: int | None = None
    bias: str | None = None
    groups: int = 1
    gates: tuple[str, ...] = ()
    overlap: float = 1.0
    unit_axis: int | None = -1

    def fans(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(fan_in, fan_out): how many products meet in one unit out, and how many units out one unit in feeds.

        He et al. 2015, section 2.2: fan_in = i·k·k. A table's row is picked by a single 1, so its fan_in is 1.
        """
        size = {letter: math.prod(n for n, a in zip(shape, self.axes, strict=True) if a == letter) for letter in "oikvd"}
        if "v" in self.axes:
            return 1, size["d"]
        units = size["o"] // max(1, len(self.gates))
        # A transposed convolution's weight is `i o k k`: its `i` counts every group, its `o` one group's.
        if self.axes[0] == "i" and self.groups > 1:
            return size["i"] // self.groups * size["k"], units * size["k"]
        return size["i"] * size["k"], units // self.groups * size["k"]


Weights = Callable[[Mapping[str, Any]], tuple[WeightUse, ...]]


@dataclass(frozen=True)
class Role:
    """The role of an operator.

    `data` names the parameters through which the signal flows (empty: every tensor parameter). `weights` receives the bound
    arguments of one call (tensor arguments as `Operand`, lists of them as lists, the others as they are) and says which of them
    serve as weights in this call. `name` is what the report calls the operator on a path ("layer_norm", "max_pool").
    """

    kind: Kind
    name: str = ""
    data: tuple[str, ...] = ()
    weights: Weights | None = field(default=None, compare=False)
