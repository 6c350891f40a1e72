"""Batch norms that an exporter has folded into the weights in front of them, and what can still be told of them.

Folding multiplies each output channel of a weight by gamma / sqrt(variance + epsilon) and makes the shift a bias; values alone
do not show it. Who folds leaves a trace, though: torch's exporter writes into the node which rule rewrote it and which call it
comes from, its predecessor renames weight and bias after the operator that reads them (both of them for no other reason),
tf2onnx and onnxruntime name what they have fused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from initaudit.load.checkpoint import Array

_FOLDABLE = ("Conv", "ConvTranspose", "Gemm")
_LAYOUT = ("Identity", "Transpose", "Reshape")
_SCALED = ("Cast", "Mul", "Identity", "Add")
_RULE = "FuseBatchNorm"
_CALL = re.compile(r"batch_norm|BatchNorm")
_RENAMED = re.compile(r"onnx::Conv(Transpose)?_\d+")
_NAMED = re.compile(r"fused_bn|ConvBnFusion|Conv_?BN_?Fusion|FusedBatchNorm", re.IGNORECASE)
_SEEN = 4096  # values of a weight that are looked at first, to see whether any differs from zero


@dataclass(frozen=True)
class Folded:
    """`sites` are the first outputs of the nodes that hold a folded norm, `restored` those behind which it is put back.

    A norm whose statistics are still at 0 and 1 takes its weight's scale away as soon as training begins. `restored` is empty
    where the norms have learnt something: they are then what evaluation makes of them, factors of the weights.
    """

    sites: frozenset[str]
    restored: frozenset[str]

    def note(self) -> str:
        """One line for the report; "" where nothing is folded."""
        if not self.sites:
            return ""
        count = f"{len(self.sites)} weight{'s' if len(self.sites) > 1 else ''}"
        text = f"{count} had a batch norm folded in by the exporter, so that variances are not those that were drawn"
        if self.restored:
            return (
                f"{text}: the norm has seen no data and is put back, on the statistics of the batch, as training will have it"
            )
        return f"{text} and hold what it has learnt"


def folded_norms(graph: onnx.GraphProto, arrays: Mapping[str, Array]) -> Folded:
    """The batch norms folded into the weights of a graph. Reads the biases of these weights, and a few values of their own."""
    reader = _Reader(graph, arrays)
    found = [(node, reader.bias(node)) for node in graph.node if node.op_type in _FOLDABLE and len(node.input) > 1]
    found = [(node, bias) for node, bias in found if _traces(node, bias)]
    fresh = all(_fresh(reader.array(node.input[1]), reader.array(bias), node) for node, bias in found)
    kept = [node.output[0] for node, _ in found if fresh and _any(reader.array(node.input[1]))]
    return Folded(frozenset(node.output[0] for node, _ in found), frozenset(kept))


class _Reader:
    """Constants of a graph behind changes of layout, and the biases of its operators."""

    def __init__(self, graph: onnx.GraphProto, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.moved = {n.output[0]: n.input[0] for n in graph.node if n.op_type in _LAYOUT and n.input and n.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)

    def source(self, name: str) -> str:
        """The constant behind a name, else the name."""
        inner = name
        while inner not in self.arrays and inner in self.moved:
            inner = self.moved[inner]
        return inner if inner in self.arrays else name

    def array(self, name: str) -> Array | None:
        """The array behind a name; None where none is."""
        return self.arrays.get(self.source(name))

    def bias(self, node: onnx.NodeProto) -> str:
        """The name of the bias that a node adds, or that is added behind it (as where its product was one of integers)."""
        if len(node.input) > 2:
            return str(node.input[2])
        value = node.output[0]
        while len(users := self.users.get(value, [])) == 1 and users[0].op_type in _SCALED and users[0].output:
            other = next((name for name in users[0].input if name != value), "")
            if users[0].op_type == "Add":
                return self.source(other) if self.array(other) is not None else ""
            value = users[0].output[0]
        return ""


def _traces(node: onnx.NodeProto, bias: str) -> bool:
    """Whether the node says that a batch norm went into its weight."""
    for prop in node.metadata_props:
        if prop.key.endswith("rule_name") and _RULE in prop.value:
            return True
        if prop.key.endswith("class_hierarchy") and _CALL.search(prop.value.rpartition(",")[2]):
            return True
    weight = node.input[1]
    return any(_NAMED.search(n) for n in (weight, bias)) or all(_RENAMED.match(n) for n in (weight, bias))


def _fresh(weight: Array | None, bias: Array | None, node: onnx.NodeProto) -> bool:
    """Whether the shift that folding made is that of a norm which has seen no data.

    It is zero then, or the operator's own bias as torch draws it, within 1/sqrt(fan_in) of zero. One whose weight cannot be
    told is none.
    """
    if weight is None or len(weight.shape) < 2:
        return False
    if bias is None:
        return True
    values = np.asarray(bias.read(), dtype=np.float64)
    if not values.any():
        return True
    return bool(np.abs(values).max() <= 1.0001 / math.sqrt(max(1, _fan_in(weight.shape, node))))


def _fan_in(shape: tuple[int, ...], node: onnx.NodeProto) -> int:
    transposed = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "transB"), 0)
    if node.op_type == "Gemm":
        return shape[1] if transposed else shape[0]
    # torch counts the second axis of a transposed kernel `i o k` too, for the bound that biases are drawn within.
    return math.prod(shape[1:])


def _any(weight: Array | None) -> bool:
    """Whether any value differs from zero: the last norm of a residual branch may start at zero, and then nothing is left."""
    if weight is None:
        return False
    values = weight.read().reshape(-1)
    return bool(values[:_SEEN].any()) or bool(values.any())
