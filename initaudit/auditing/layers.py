"""Joins what the stages found about each weight: its pairing, the moments of its values, its law and what the probe saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from initaudit.auditing.gains import Gains, main_feed
from initaudit.expect.expectation import Expectation, expected_variances, standard_error
from initaudit.expect.gain import Gain
from initaudit.graph.calls import role_of
from initaudit.graph.graph import Graph
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.measure.moments import Moments, measure
from initaudit.onnx_ops.convert import to_numpy
from initaudit.pair.evaluate import ConstantReader
from initaudit.pair.records import Pair
from initaudit.probe.trace import Trace, WeightRecord
from initaudit.rules.evidence import LayerEvidence
from initaudit.rules.remedy import attribute_path


def layer_evidence(
    graph: Graph, pairs: tuple[Pair, ...], checkpoint: Checkpoint, measured: Mapping[str, Moments], trace: Trace | None
) -> tuple[LayerEvidence, ...]:
    """One entry for each weight and operator, in forward order.

    `measured` holds the moments of the stored tensors by name; a weight that was computed from stored ones is measured here.
    Complex weights are in none: schemes are laws of real numbers, and gains of functions of real signals.
    """
    values = _Values(graph, checkpoint.arrays, measured)
    records = _records(trace)
    gains = Gains()
    found = []
    for group in _grouped(pairs):
        first = group[0]
        feeds = tuple({(f.activation.name, f.path): f for p in group for f in p.feeds}.values())
        main = main_feed(feeds)
        gain = gains.of(main) if main is not None else None
        known = values.of(first)
        if known is None:
            continue
        moments, read = known
        found.append(
            LayerEvidence(
                pair=first,
                pairs=group,
                feeds=feeds,
                moments=moments,
                expectation=_expectation(first, moments, gain),
                gain=gain,
                read=read,
                records=tuple(records[k] for p in group if (k := (p.node, p.value)) in records),
                expression=attribute_path(first.tensor, checkpoint.program, first.site),
            )
        )
    return tuple(found)


def _grouped(pairs: tuple[Pair, ...]) -> list[tuple[Pair, ...]]:
    """Places of use of one weight by one kind of operator: an unrolled recurrence uses it at every step."""
    groups: dict[tuple[Any, ...], list[Pair]] = {}
    for p in pairs:
        key = (p.tensor, p.constants, p.operator, p.axes, p.shape, p.provenance if p.stored else p.value)
        groups.setdefault(key, []).append(p)
    return [tuple(group) for group in groups.values()]


def _records(trace: Trace | None) -> dict[tuple[str, str], WeightRecord]:
    return {} if trace is None else {(r.node, r.weight): r for r in trace.weights}


def _expectation(pair: Pair, moments: Moments, gain: Gain | None) -> Expectation:
    error = standard_error(moments.variance, moments.kurtosis, moments.count) if moments.m2 > 0 else 0.0
    return expected_variances(
        max(1, pair.fan_in), max(1, pair.fan_out), gain.gain if gain is not None else None, pair.overlap, error
    )


class _Values:
    """Values of weights: those of the stored tensor where only its layout changed, else of the constant subgraph."""

    def __init__(self, graph: Graph, arrays: Mapping[str, Array], measured: Mapping[str, Moments]) -> None:
        self.graph, self.arrays, self.measured = graph, arrays, measured
        self.reader = ConstantReader(graph)
        self.nodes: dict[str, fx.Node] = {n.name: n for n in graph.fx.nodes}

    def of(self, pair: Pair) -> tuple[Moments, Callable[[], np.ndarray[Any, Any]]] | None:
        """The moments of the values used at a place, and how to read them; None where they are complex."""
        if pair.stored and pair.tensor in self.arrays and self.arrays[pair.tensor].shape == pair.shape:
            array = self.arrays[pair.tensor]
            if array.dtype.startswith("complex"):
                return None
            moments = self.measured.get(pair.tensor)
            return moments if moments is not None else measure(array.read()), array.read
        node = self.nodes[pair.value]

        def read() -> np.ndarray[Any, Any]:
            value = self.reader.value(node)
            return to_numpy(value if isinstance(value, torch.Tensor) else torch.as_tensor(value))

        values = read()
        return None if np.iscomplexobj(values) else (measure(values), read)


def norm_parameters(graph: Graph) -> frozenset[str]:
    """The names of the scales and shifts of normalizations; statistics that a norm keeps are not among them."""
    found: set[str] = set()
    for node in graph.fx.nodes:
        if node.op == "call_function" and role_of(node).kind == "normalization":
            for given in node.all_input_nodes:
                constant = graph.constants.get(str(given.target)) if given.op == "get_attr" else None
                if constant is not None and constant.kind == "parameter":
                    found.update((constant.name, *constant.tied))
    return frozenset(found)
