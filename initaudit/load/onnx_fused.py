"""Operators that onnxruntime's optimiser has fused, taken apart again, so that biases, sums and activations can be seen.

Each becomes the standard's own operators that it was made of (onnxruntime's ContribOperators.md says which these are).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from initaudit.load.onnx_rewrite import MICROSOFT, attribute_of, constant_node, in_place_of, input_name, output_name, with_nodes

if TYPE_CHECKING:
    import onnx

# The activation parameters that FusedConv lists, by the attribute of the activation that each is.
_PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Softplus", "Clip")
Nodes = Iterator["onnx.NodeProto"]


def is_fused(model: onnx.ModelProto) -> bool:
    """Whether the main graph has an operator that is taken apart here."""
    return any(node.op_type in _APART and node.domain == MICROSOFT for node in model.graph.node)


def unfused(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its fused operators taken apart; the model that is given is left as it was.

    Initializers are named only, as by `with_nodes`. What cannot be taken apart stays: an activation of another name, or
    outputs that only the fused operator has.
    """
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        fused = node.op_type in _APART and node.domain == MICROSOFT
        parts = list(_APART[node.op_type](node)) if fused else []
        made += parts or [node]
    return with_nodes(model, made)


def _activated(value: str, node: onnx.NodeProto, name: str, parameters: list[float]) -> Nodes:
    """The node's output: the activation of `value`."""
    result = node.output[0]
    if name == "Clip":
        ends = [f"{result}/{end}" for end in ("min", "max")]
        yield from (constant_node(end, number) for end, number in zip(ends, parameters, strict=True))
        yield in_place_of(node, "Clip", [value, *ends], result, copied=())
    else:
        given: dict[str, Any] = dict(zip(_PARAMETERS.get(name, ()), parameters, strict=False))
        yield in_place_of(node, name or "Identity", [value], result, copied=(), **given)


def _conv(node: onnx.NodeProto) -> Nodes:
    name, parameters = attribute_of(node, "activation", ""), list(attribute_of(node, "activation_params", []))
    if name not in (*_ACTIVATIONS, "") or (name == "Clip" and len(parameters) != 2):
        return
    own = [a.name for a in node.attribute if not a.name.startswith("activation")]
    value = f"{node.output[0]}/conv"
    yield in_place_of(node, "Conv", [input_name(node, i) for i in range(3)], value, copied=own)
    if input_name(node, 3):
        total = f"{node.output[0]}/sum"
        yield in_place_of(node, "Add", [value, input_name(node, 3)], total, copied=())
        value = total
    yield from _activated(value, node, name, parameters)


def _gemm(node: onnx.NodeProto) -> Nodes:
    name = attribute_of(node, "activation", "")
    given = (attribute_of(node, f"activation_{k}", None) for k in ("alpha", "beta"))
    parameters = [p for p in given if p is not None]
    if name not in (*_ACTIVATIONS, "") or (name == "Clip" and len(parameters) != 2):
        return
    value = f"{node.output[0]}/gemm"
    yield in_place_of(node, "Gemm", node.input, value, copied=("alpha", "beta", "transA", "transB"))
    yield from _activated(value, node, name, parameters)


def _gelu(approximate: str) -> Callable[[onnx.NodeProto], Nodes]:
    def apart(node: onnx.NodeProto) -> Nodes:
        value = node.input[0]
        if input_name(node, 1):
            value = f"{node.output[0]}/sum"
            yield in_place_of(node, "Add", node.input[:2], value, copied=())
        yield in_place_of(node, "Gelu", [value], node.output[0], copied=(), approximate=approximate)

    return apart


def _skip_norm(node: onnx.NodeProto) -> Nodes:
    """The sum with the skip, the norm of it, and the sum under its name where it is read."""
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    if output_name(node, 1) or output_name(node, 2):
        return
    bias = input_name(node, 3 if simplified else 4)
    total = output_name(node, 3) or f"{node.output[0]}/sum"
    value = node.input[0]
    if bias:
        value = f"{node.output[0]}/biased"
        yield in_place_of(node, "Add", [node.input[0], bias], value, copied=())
    yield in_place_of(node, "Add", [value, node.input[1]], total, copied=())
    scales = [node.input[2], *([] if simplified else [input_name(node, 3)])]
    op_type = "SimplifiedLayerNormalization" if simplified else "LayerNormalization"
    epsilon = attribute_of(node, "epsilon", 1e-12)
    yield in_place_of(node, op_type, [total, *scales], node.output[0], copied=(), axis=-1, epsilon=epsilon)


_APART: dict[str, Callable[[onnx.NodeProto], Nodes]] = {
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "BiasGelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
