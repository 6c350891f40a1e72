"""Gates of recurrent layers that their biases hold, whatever the weights send: shut, or in the flat part of a tanh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.support import fresh_layers, view

if TYPE_CHECKING:
    from torch import fx

# What is lost where the bias of a gate lies far on one side (-1, 1; 0 for either), by operator and letter. Where the gates of
# an LSTM are all open for ever, nothing is lost.
_LOST: dict[str, dict[str, tuple[int, str, str]]] = {
    "lstm": {
        "i": (-1, "input gate", "nothing is written into the cell"),
        "f": (-1, "forget gate", "the cell forgets everything at each step"),
        "o": (-1, "output gate", "nothing of the cell gets out"),
        "g": (0, "cell input", "the same is written whatever comes in"),
        "c": (0, "cell input", "the same is written whatever comes in"),
    },
    "gru": {
        "z": (1, "update gate", "the first state is kept for ever"),
        "n": (0, "new state", "the same is written whatever comes in"),
        "h": (0, "new state", "the same is written whatever comes in"),
    },
    "rnn": {"h": (0, "state", "it is the same whatever comes in")},
}
# A sigmoid hands on less than a fiftieth of what is behind it; at tanh(4) the slope is 0.0013.
_FAR = 4.0
_MOST = 0.5  # of the units
_PART = 0.1  # of the largest summand: what is less is not what holds the gate


@dataclass(frozen=True)
class Held:
    """A gate that is held: its `name`, what that means, the mean of its bias, the standard deviation of what is sent to it.

    `biases` are the tensors that make this mean, the one that is furthest off first.
    """

    layer: LayerEvidence
    name: str
    means: str
    bias: float
    reach: float
    biases: tuple[str, ...]
    share: float


def held_gates(evidence: Evidence, deviations: float) -> Iterator[Held]:
    """The gates most of whose units have a bias more than `deviations` standard deviations of what the weights send to them."""
    nodes, by_node = view(evidence).nodes, dict[str, list[LayerEvidence]]()
    for layer in fresh_layers(evidence, "recurrent"):
        if layer.records and layer.pair.gates and layer.pair.node in nodes:
            by_node.setdefault(layer.pair.node, []).append(layer)
    seen = set[str]()
    for name, layers in by_node.items():
        for part in _parts(evidence, nodes[name]):
            used = [x for x in layers if x.pair.value in part.weights]
            key = ".".join(x.tensor for x in used)
            if used and key not in seen:
                seen.add(key)
                yield from _held(used, part, deviations)


@dataclass(frozen=True)
class _Part:
    """One layer and direction of a recurrent operator: its weights' nodes, the biases added up as `g h`, and their names."""

    weights: frozenset[str]
    biases: dict[str, np.ndarray[Any, Any]]
    direction: int | None = None


def _held(layers: list[LayerEvidence], part: _Part, deviations: float) -> Iterator[Held]:
    first = layers[0]
    gates = first.pair.gates
    kind = next((k for k in _LOST if first.pair.operator.startswith(k)), "")
    total = sum(part.biases.values())
    if not kind or not isinstance(total, np.ndarray) or total.size % len(gates) or not np.isfinite(total).all():
        return
    rows = [_power(x, part, total.size) for x in layers]
    if any(r is None for r in rows):
        return
    reach = np.sqrt(sum(r for r in rows if r is not None))
    height = total.size // len(gates)
    for i, letter in enumerate(gates):
        side, name, means = _LOST[kind].get(letter, (1, "", ""))
        here = slice(i * height, (i + 1) * height)
        far = total[here] * side if side else np.abs(total[here])
        share = float(np.mean(far > np.maximum(_FAR, deviations * reach[here])))
        if name and share > _MOST:
            means_of = {n: abs(float(b[here].mean())) for n, b in part.biases.items()}
            off = sorted((n for n, m in means_of.items() if m > _PART * max(means_of.values())), key=lambda n: -means_of[n])
            spread = math.sqrt(float(np.mean(reach[here] ** 2)))
            yield Held(first, name, means, float(total[here].mean()), spread, tuple(off), share)


def _power(layer: LayerEvidence, part: _Part, units: int) -> np.ndarray[Any, Any] | None:
    """The second moment of what the weights send to each unit; a state lies between -1 and 1."""
    weight = layer.read().astype(np.float64)
    if part.direction is not None and weight.ndim == 3:
        weight = weight[part.direction]
    if weight.ndim != 2 or weight.shape[0] != units:
        return None
    given = layer.records[0].input_moment2
    power = (weight**2).sum(1) * (1.0 if given is None else given)
    return power if bool(np.isfinite(power).all()) else None


def _parts(evidence: Evidence, node: fx.Node) -> Iterator[_Part]:
    """The layers and directions of torch's operators, of its cells, and of the standard's operators."""
    from torch import fx

    from initaudit.graph.calls import arguments
    from initaudit.pair.evaluate import ConstantReader

    assert evidence.graph is not None
    reader, bound, constant = ConstantReader(evidence.graph), arguments(node), view(evidence).constant

    def values(*given: Any) -> dict[str, np.ndarray[Any, Any]]:
        found = [g for g in given if isinstance(g, fx.Node) and g in constant]
        return {_stored(g): reader.value(g).detach().double().cpu().numpy() for g in found}

    if "params" in bound and bound.get("has_biases"):
        params = bound["params"]
        gates = 4 if getattr(node.target, "__name__", "").startswith("lstm") else 0
        shape = params[1].meta.get("shape") or (0, 0)
        step = 5 if gates and shape[1] * gates != shape[0] else 4
        for i in range(0, len(params), step):
            yield _Part(frozenset(p.name for p in params[i : i + 2]), values(*params[i + 2 : i + 4]))
    elif "b_ih" in bound:
        weights = [bound[w].name for w in ("w_ih", "w_hh") if isinstance(bound.get(w), fx.Node)]
        yield _Part(frozenset(weights), values(bound["b_ih"], bound.get("b_hh")))
    elif isinstance(bound.get("b"), fx.Node) and bound["b"] in constant:
        weights = [bound[w].name for w in ("w", "r") if isinstance(bound.get(w), fx.Node)]
        ((name, both),) = values(bound["b"]).items()
        for d, row in enumerate(both if both.ndim == 2 else ()):
            yield _Part(frozenset(weights), {name: row.reshape(2, -1).sum(0)}, d)


def _stored(node: fx.Node) -> str:
    """The name of the constant that a value is made of."""
    from initaudit.graph.reach import upstream

    return next((str(n.target) for n in sorted(upstream([node])) if n.op == "get_attr"), node.name)
