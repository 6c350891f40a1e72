"""Which tests of ONNX's own suite do not concern a trainable network, and why: the first reason that applies counts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
from onnx import AttributeProto, TensorProto

NUMERIC = {
    TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip

# Pattern of the operator's name -> the reason.
OPERATORS = (
    (r"Sequence\w*|\w+Sequence|Optional\w*", "a sequence or an optional is no tensor", {"ReverseSequence"}),
    (r"String\w*|Regex\w*|TfIdfVectorizer", "strings are not trained on", set()),
    (r"ImageDecoder", "decodes files", set()),
    (r"Bernoulli|Random\w*|Multinomial", "random: no output to compare with", set()),
    (
        r"QuantizeLinear|DequantizeLinear|QLinear\w*|\w+Integer|DynamicQuantizeLinear",
        "quantised: tested against onnxruntime instead",
        set(),
    ),
    (r"DFT|STFT|MelWeightMatrix|\w+Window", "signal processing", set()),
    (r"NonMaxSuppression|RoiAlign|MaxRoiPool", "detection", set()),
    (r"BitShift|BitCast|Bitwise\w+", "bit patterns", set()),
)


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the model, its subgraphs and functions."""

    def within(nodes):
        for node in nodes:
            yield node
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield from within(attribute.g.node)

    yield from within(model.graph.node)
    for function in model.functions:
        yield from within(function.node)


def element_types(model: onnx.ModelProto) -> set[int]:
    """The element types of the inputs, outputs, constants and casts; -1 stands for what is no tensor."""
    found = set()
    for info in [*model.graph.input, *model.graph.output]:
        found.add(info.type.tensor_type.elem_type if info.type.WhichOneof("value") == "tensor_type" else -1)
    found |= {proto.data_type for proto in model.graph.initializer}
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                found.add(attribute.t.data_type)
            if node.op_type == "Cast" and attribute.name == "to":
                found.add(attribute.i)
    return found


def exclusion(name: str, model: onnx.ModelProto) -> str | None:
    """Why this test is left out, or None."""
    types = element_types(model)
    nodes = list(all_nodes(model))
    if -1 in types:
        return "a sequence, optional, map or sparse tensor is no tensor"
    if TensorProto.STRING in types:
        return "strings are not trained on"
    for domain, reason in (
        ("ai.onnx.ml", "classical machine learning"),
        ("ai.onnx.preview.training", "optimisers as operators"),
    ):
        if any(node.domain == domain for node in nodes):
            return reason
    # The name also tells what an expanded test was before its operators were replaced by their definitions.
    for pattern, reason, exceptions in OPERATORS:
        if any(re.fullmatch(pattern, node.op_type) and node.op_type not in exceptions for node in nodes):
            return reason
    for stem, reason in (
        ("dynamicquantizelinear", "quantised: tested against onnxruntime instead"),
        ("bernoulli", "random: no output to compare with"),
    ):
        if stem in name and name.endswith("_expanded"):
            return reason
    if types - NUMERIC:
        return "a type of 8 or fewer bits, or complex, that no network is trained in"
    return None
