"""The observer of the probe's first pass: statistics of the signal and its gradient at every data node."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import arguments, role_of, signal_inputs
from initaudit.graph.probability import certain
from initaudit.probe.activations import Activation, by_exit, find_activations, flat_units, sample
from initaudit.probe.passes import Observer, Pass, kind_of
from initaudit.probe.statistics import (
    comparisons,
    example_rows,
    moments,
    power,
    row_entropy,
    token_rows,
)
from initaudit.probe.trace import Signal

# Attention maps are computed a second time to see their entropy: for so many examples and at most so long a sequence.
_MAPS, _LENGTH = 2, 1024
_HELD = 1 << 22  # numbers kept for comparison, 16 MiB


class SignalObserver(Observer):
    """Fills `signals` by node name when it is closed. Nodes that only move elements share the numbers of their source."""

    def __init__(self, graph: fx.Graph, constant: frozenset[fx.Node]) -> None:
        activations = find_activations(graph, constant)
        self.records: dict[str, dict[str, Any]] = {}
        self.signals: dict[str, Signal] = {}
        self.exits = by_exit(activations)
        self.waiting: dict[fx.Node, int] = {}
        for activation in activations:
            self.waiting[activation.root] = self.waiting.get(activation.root, 0) + 1
        self.samples: dict[fx.Node, Tensor] = {}
        self.references: dict[Any, Tensor | None] = {}
        self.rows = _Rows(self.records)
        self.first_non_finite: str | None = None
        self.first_non_finite_gradient: str | None = None
        self.same_as: dict[str, str] = {}
        self.closed = False
        self.last_gradient: tuple[Tensor | None, float] = None, 0.0

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        """The forward statistics of one node."""
        kind, source = kind_of(node), self._source(run, node, value)
        record: dict[str, Any] = {"order": run.order[node], "kind": kind, "shape": tuple(value.shape)}
        if source is not None:
            known = self.records[source]
            self.same_as[node.name] = source
            record |= {name: known[name] for name in ("mean", "moment2", "peak", "finite")}
        else:
            # Functions of one signal, and norms, hardly pass what stands before them: the look for the largest is saved.
            grows = kind not in ("pointwise", "normalization", "softmax") or len(set(signal_inputs(node))) > 1
            mean, moment2, largest, finite = moments(value, extremes=grows)
            record |= {"mean": mean, "moment2": moment2} if finite else {"mean": None, "moment2": None}
            record |= {"peak": largest, "finite": finite}
        self.records[node.name] = record
        if not record["finite"]:
            self.first_non_finite = self.first_non_finite or node.name
            return
        if kind != "passthrough":
            self._between_examples(run, node, value)
        if kind in ("softmax", "attention"):
            record["entropy"] = _entropy(run, node, value)
        record |= self._activation(run, node, value)

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        """Not where the source has the same elements and nobody else reads it: its gradient has the same power."""
        return not (node.name in self.same_as and len(signal_inputs(node)[0].users) == 1)

    def gradient(self, run: Pass, node: fx.Node, gradient: Tensor) -> None:
        """The gradient's second moment at one node."""
        if self.closed or not self.wants_gradient(run, node):
            return
        moment2 = self._gradient_power(gradient) / gradient.numel()
        finite = math.isfinite(moment2)
        if not finite and self.first_non_finite_gradient is None:
            self.first_non_finite_gradient = node.name
        self.records[node.name] |= {"gradient_moment2": moment2 if finite else None, "gradient_finite": finite}

    def _gradient_power(self, gradient: Tensor) -> float:
        """A sum hands the same gradient to all of its terms: it is measured once."""
        known, value = self.last_gradient
        if known is None or known is not gradient:
            value = power(gradient)
            self.last_gradient = gradient, value
        return value

    def close(self) -> None:
        """Makes the records of what was seen; later gradients are not recorded."""
        self.closed = True
        self.last_gradient = None, 0.0
        self.rows.flush()
        for name, source in self.same_as.items():
            known, origin = self.records[name], self.records[source]
            if known.get("gradient_moment2") is None and "gradient_moment2" in origin:
                known |= {key: origin[key] for key in ("gradient_moment2", "gradient_finite")}
        self.signals = {name: Signal(name, **record) for name, record in self.records.items()}

    def _source(self, run: Pass, node: fx.Node, value: Tensor) -> str | None:
        """The node whose elements this one has, in another order."""
        if kind_of(node) != "passthrough" or len(node.all_input_nodes) == 0:
            return None
        source = signal_inputs(node)[0]
        known = self.records.get(source.name)
        if known is None or math.prod(known["shape"]) != value.numel() or isinstance(run.env.get(source), (tuple, list)):
            return None
        names = [a for a in node.all_input_nodes if a is not source and a not in run.constant]
        return None if names or not _bijective(node) else source.name

    def _between_examples(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        axes = run.axes[node]
        if axes.batch is None:
            return
        self.rows.add("examples", node.name, example_rows(value, axes).unsqueeze(0))
        if value.dim() == 3 and axes.unit is not None and value.shape[axes.batch] == axes.examples and min(value.shape) > 0:
            self.rows.add("tokens", node.name, token_rows(value, axes.batch, axes.unit))

    def _activation(self, run: Pass, node: fx.Node, value: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        activation: Activation | None = self.exits.get(node)
        if activation is not None and activation.root in self.samples:
            root = activation.root
            flat = flat_units(activation, self.samples[root], run.axes[root].unit, run.weights.__getitem__, self.references)
            if flat is not None:
                found = dict(zip(("dead", "saturated", "slope"), flat, strict=True))
            self.waiting[root] -= 1
            if self.waiting[root] == 0:
                del self.samples[root]
        if self.waiting.get(node, 0) > 0 and value.dim() > 0:
            axes = run.axes[node]
            self.samples[node] = sample(value, axes.unit, axes.batch)
        return found


class _Rows:
    """Rows to be compared, gathered so that those of many nodes are compared at once: each call is small and there are many."""

    def __init__(self, records: dict[str, dict[str, Any]]) -> None:
        self.records = records
        self.held: dict[tuple[str, torch.Size], list[tuple[str, Tensor]]] = {}
        self.size = 0

    def add(self, what: str, name: str, rows: Tensor) -> None:
        """Takes a copy of the (groups, n, d) rows of a node."""
        self.held.setdefault((what, rows.shape), []).append((name, rows.clone()))
        self.size += rows.numel()
        if self.size > _HELD:
            self.flush()

    def flush(self) -> None:
        """Compares what is held and writes the results into the records."""
        for (what, _), held in self.held.items():
            stacked = torch.stack([rows for _, rows in held])
            prefix = "token_" if what == "tokens" else ""
            for (name, _), (cosine, spread, rank) in zip(held, comparisons(stacked), strict=True):
                self.records[name] |= {f"{prefix}cosine": cosine, f"{prefix}spread": spread, f"{prefix}rank": rank}
        self.held.clear()
        self.size = 0


# Operators that keep all elements but repeat or drop none have as many of them; these change values or pick with repetition.
_MOVED = ("resize", "index", "gather", "take", "tril", "triu", "pad", "grid_sampler", "unfold", "im2col", "col2im")
_NOT_BIJECTIVE = (*_MOVED, "dropped")


def _bijective(node: fx.Node) -> bool:
    return not role_of(node).name.lower().startswith(_NOT_BIJECTIVE)


def _entropy(run: Pass, node: fx.Node, value: Tensor) -> float | None:
    role, bound = role_of(node), arguments(node)
    if role.kind == "softmax":
        if "log" in role.name.lower():
            return None
        axis = bound.get("dim", bound.get("axis", -1))
        return row_entropy(value, axis if isinstance(axis, int) else -1)
    if certain(bound.get("dropout_p")):
        return None  # no row is left of its map
    names = role.data[:3]
    tensors = [run.env.get(bound[name]) if isinstance(bound.get(name), fx.Node) else None for name in names]
    if len(names) < 3 or not all(isinstance(t, Tensor) and t.dim() == 4 for t in tensors):
        return None
    query, key, held = (bound[name] for name in names)
    v = tensors[2]
    assert isinstance(v, Tensor)
    length = v.shape[2]
    if length > _LENGTH or length < 2 or len({query, key, held}) < 3:
        return None
    # With the identity for its values, an attention returns its map.
    identity = torch.eye(length, device=v.device).expand(min(_MAPS, v.shape[0]), v.shape[1], length, length)
    batch = v.shape[0]
    slices: dict[fx.Node, Any] = {}
    for a in node.all_input_nodes:
        x = run.weights[a] if a in run.constant else run.env[a]
        slices[a] = x[:_MAPS] if isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] == batch else x
    slices[held] = identity
    try:
        result = run.again(node, slices)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        # Fused forms that tie the sizes of keys and values cannot show their map.
        return None
    result = result[0] if isinstance(result, (tuple, list)) else result
    return row_entropy(result.float(), -1) if isinstance(result, Tensor) and result.shape[-1] == length else None
