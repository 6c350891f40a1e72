"""Nodes of an ONNX graph put in place of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

MICROSOFT = "com.microsoft"


def input_name(node: onnx.NodeProto, place: int) -> str:
    """The name of an input, "" where it is left out."""
    return str(node.input[place]) if place < len(node.input) else ""


def output_name(node: onnx.NodeProto, place: int) -> str:
    """The name of an output, "" where it is left out."""
    return str(node.output[place]) if place < len(node.output) else ""


def attribute_of(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, `default` where it is left out; text as str."""
    from onnx import helper

    value = next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def in_place_of(
    node: onnx.NodeProto,
    op_type: str,
    inputs: Sequence[str],
    output: str,
    *,
    copied: Sequence[str] | None = None,
    domain: str = "",
    **attributes: Any,
) -> onnx.NodeProto:
    """A node that stands for (a part of) `node`: under its name where it makes its first output, else under a name beside it.

    Attributes are copied from `node`, all of them or those named in `copied`; more are set by keyword.
    """
    from onnx import helper

    names = list(inputs)
    while names and not names[-1]:
        names.pop()
    name = node.name if output == node.output[0] else f"{node.name or node.output[0]}/{op_type}"
    made = helper.make_node(op_type, names, [output], name=name, domain=domain)
    made.attribute.extend(a for a in node.attribute if copied is None or a.name in copied)
    made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    made.metadata_props.extend(node.metadata_props)
    return made


def constant_node(name: str, value: float) -> onnx.NodeProto:
    """A Constant node of one number."""
    from onnx import TensorProto, helper

    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.FLOAT, [], [value]))


def with_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], initializers: Iterable[str] = ()) -> onnx.ModelProto:
    """The model with other nodes in its main graph. It names its initializers, and those given, but holds none of them."""
    import onnx

    made = onnx.ModelProto(
        ir_version=model.ir_version, producer_name=model.producer_name, producer_version=model.producer_version
    )
    for name in ("opset_import", "functions", "metadata_props", "training_info"):
        getattr(made, name).extend(getattr(model, name))
    made.graph.name = model.graph.name
    for name in ("input", "output", "sparse_initializer"):
        getattr(made.graph, name).extend(getattr(model.graph, name))
    for name in (*(t.name for t in model.graph.initializer), *initializers):
        made.graph.initializer.add(name=name)
    made.graph.node.extend(nodes)
    return made
