"""What follows from a trace about the network as a whole: gains of its Jacobian, scales of depth, width and number range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from initaudit.graph.calls import signal_inputs
from initaudit.graph.graph import Graph
from initaudit.probe.trace import Signal, WeightRecord

# IEEE 754-2008, table 3.5, and bfloat16: the largest number and the smallest above zero.
RANGES = {"float16": (65504.0, 2.0**-24), "bfloat16": (3.3895314e38, 2.0**-133)}
_ROWS = 4096
# Cosines nearer to 1 than this are float32 rounding of the signals that they compare.
_ROUNDING = 1e-6
_LEAST = 3  # layers that a fit of the depth scale needs


@dataclass(frozen=True)
class BlockGain:
    """A stretch of the network between two nodes through which everything passes.

    `gain` is what it multiplies the squared norm of a gradient by on the way back, norm(Jᵀg)² / norm(g)² for the gradient
    that arrives there: with a random g of n numbers, norm(J)² / n on average (Hutchinson 1990).
    """

    start: str
    end: str
    gain: float


@dataclass(frozen=True)
class Head:
    """An output read as logits along its classes: their standard deviation and the cross-entropy at the start.

    `loss` is the mean of -log softmax over all labels (as labels independent of the input meet it), `chance` is ln(classes).
    """

    node: str
    classes: int
    std: float
    loss: float

    @property
    def chance(self) -> float:
        """The loss of guessing."""
        return math.log(self.classes)


@dataclass(frozen=True)
class Headroom:
    """Binary digits between what the probe saw and the ends of a dtype's range; negative where the range is left.

    `weight` and `signal` count from the largest value up to overflow, `gradient` from the smallest root mean square of a
    weight's gradient (of the probe's loss) down to the smallest number. None where nothing was seen.
    """

    weight: float | None
    signal: float | None
    gradient: float | None


@dataclass(frozen=True)
class Measures:
    """What a trace says of the whole network.

    `jacobian_gain` is norm(J)²/n from the first signal that all gradients pass to the last, `blocks` its factors in forward
    order.
    `depth_scale` is the number of layers over which 1 - cosine of two inputs falls by e (Schoenholz et al. 2017, eq. 9), None
    where it does not fall. `beta` is the sum of 1/fan_in over the layers behind the first: the logarithms of gradients scatter
    between seeds with a variance proportional to it (Hanin & Nica 2020, theorem 1), and more in a chain than beside skips.
    `headroom` is given by dtype.
    """

    jacobian_gain: float | None
    blocks: tuple[BlockGain, ...]
    depth_scale: float | None
    beta: float
    heads: tuple[Head, ...]
    headroom: dict[str, Headroom]


def measures(
    graph: Graph, signals: dict[str, Signal], weights: Sequence[WeightRecord], outputs: Sequence[tuple[fx.Node, Tensor]]
) -> Measures:
    """All of them."""
    blocks = block_gains(graph, signals)
    gain = math.prod(b.gain for b in blocks) if blocks else None
    return Measures(
        jacobian_gain=gain,
        blocks=blocks,
        depth_scale=depth_scale(signals, weights),
        beta=sum(1 / w.fan_in for w in _contractions(signals, weights)[1:] if w.fan_in),
        heads=tuple(h for n, v in outputs if (h := head(n.name, v)) is not None),
        headroom={name: headroom(signals, weights, *ends) for name, ends in RANGES.items()},
    )


def _contractions(signals: dict[str, Signal], weights: Sequence[WeightRecord]) -> list[WeightRecord]:
    return [w for w in weights if w.output in signals and w.node in signals and signals[w.node].kind == "contraction"]


def block_gains(graph: Graph, signals: dict[str, Signal]) -> tuple[BlockGain, ...]:
    """The gain between successive nodes that all gradients pass, where a linear operator lies between them."""
    nodes = [n for n in graph.fx.nodes if n.name in signals and signals[n.name].gradient_moment2 is not None]
    place = {n: i for i, n in enumerate(nodes)}
    passed, reach = [], 0
    for i, node in enumerate(nodes):
        if reach <= i:
            passed.append(node)
        reach = max([reach, *(place[u] for u in node.users if u in place)])
    found = []
    start: fx.Node | None = None
    weighed = False
    for node in passed:
        before = place[start] if start is not None else -1
        weighed = weighed or any(_is_layer(signals, nodes[i]) for i in range(before + 1, place[node] + 1))
        if start is None:
            start, weighed = node, False
            continue
        if weighed:
            size = _norm2(signals[node.name])
            if size > 0:
                found.append(BlockGain(start.name, node.name, _norm2(signals[start.name]) / size))
            start, weighed = node, False
    return tuple(found)


def _is_layer(signals: dict[str, Signal], node: fx.Node) -> bool:
    return signals[node.name].kind in ("contraction", "recurrent") and bool(signal_inputs(node))


def _norm2(signal: Signal) -> float:
    return (signal.gradient_moment2 or 0.0) * math.prod(signal.shape)


def depth_scale(signals: dict[str, Signal], weights: Sequence[WeightRecord]) -> float | None:
    """-1 / slope of ln(1 - cosine) over the layers; None where inputs do not grow alike, or too few layers tell."""
    cosines = [signals[w.output].cosine for w in _contractions(signals, weights)]
    logs = [(i, math.log(1 - c)) for i, c in enumerate(cosines) if c is not None and 1 - c > _ROUNDING]
    # Far from the fixed point the fall is no exponential: only the second half, nearer to it, is looked at.
    logs = logs[len(logs) // 2 :] if len(logs) >= 2 * _LEAST else logs
    if len(logs) < _LEAST:
        return None
    x, y = [i for i, _ in logs], [v for _, v in logs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in logs) / sum((a - mean_x) ** 2 for a in x)
    return -1 / slope if slope < 0 else None


def head(node: str, value: Tensor) -> Head | None:
    """The logits of an output of at least two axes: along axis 1 of maps, else along the last one."""
    if value.dim() < 2 or not bool(torch.isfinite(value).all()):
        return None
    axis = 1 if value.dim() >= 4 else value.dim() - 1
    rows = value.detach().movedim(axis, -1).reshape(-1, value.shape[axis])
    if rows.shape[1] < 2 or rows.shape[0] == 0:
        return None
    rows = rows[:: max(1, rows.shape[0] // _ROWS)].double()
    loss = float((rows.logsumexp(1) - rows.mean(1)).mean())
    return Head(node, rows.shape[1], float(rows.var(1, correction=0).mean().sqrt()), loss)


def headroom(signals: dict[str, Signal], weights: Sequence[WeightRecord], most: float, least: float) -> Headroom:
    """The room of a dtype whose numbers lie between `least` and `most`; masks are no signals."""
    peaks = [p for w in _contractions(signals, weights) if (p := signals[w.output].peak)]
    steps = [w.gradient_norm / math.sqrt(w.elements) for w in weights if w.gradient_norm]
    held = [w.weight_peak for w in weights if w.weight_peak]

    def room(high: float, low: float) -> float:
        return math.log2(high) - math.log2(low)

    return Headroom(
        room(most, max(held)) if held else None,
        room(most, max(peaks)) if peaks else None,
        room(min(steps), least) if steps else None,
    )
