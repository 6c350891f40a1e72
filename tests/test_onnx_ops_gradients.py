"""Gradients of the operators in double precision against finite differences, on the cases of ONNX's own suite."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import onnx
import onnx_suite
import pytest
import torch

from initaudit.errors import InitauditError
from initaudit.onnx_ops.convert import from_numpy
from initaudit.onnx_ops.run import run_model

DOCUMENT = Path(__file__).parent.parent / "docs" / "onnx-operators.md"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT)

# Inputs that steer an operator: they are numbers for the host, no path of the signal.
STEERING = {
    "BatchNormalization": {3, 4}, "Clip": {1, 2}, "Dropout": {1}, "Pad": {2}, "Range": {0, 1, 2}, "Resize": {1, 2},
    "Upsample": {1}, "CastLike": {1}, "OneHot": {1}, "TopK": {1},
}  # fmt: skip


def in_double(model):
    """The model with its floating constants, casts and types in float64, so that nothing is rounded away."""
    model = onnx.ModelProto.FromString(model.SerializeToString())

    def tensor(proto):
        if proto.data_type in TYPES:
            value = onnx.numpy_helper.to_array(proto).astype("float64")
            proto.CopyFrom(onnx.numpy_helper.from_array(value, proto.name))

    def nodes(found):
        for node in found:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    tensor(attribute.t)
                if attribute.type == onnx.AttributeProto.GRAPH:
                    nodes(attribute.g.node)
                if attribute.name in ("to", "dtype", "softmax_precision", "output_dtype") and attribute.i in TYPES:
                    attribute.i = onnx.TensorProto.DOUBLE
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name in ("value_float", "value_floats"):
                given = node.attribute[0]
                values = [given.f] if given.name == "value_float" else list(given.floats)
                shape = [] if given.name == "value_float" else [len(values)]
                value = onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, shape, values)
                node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", value))

    nodes(model.graph.node)
    for proto in model.graph.initializer:
        tensor(proto)
    return model


def differentiated(case):
    """None where the case has no differentiable path, else what gradcheck says: True, or why it fails."""
    model = in_double(case.model)
    names = [i.name for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}]
    generator = torch.Generator().manual_seed(0)
    steering = {
        name for node in model.graph.node for place, name in enumerate(node.input) if place in STEERING.get(node.op_type, ())
    }
    feeds, leaves = {}, []
    for name, array in zip(names, case.data[0][0], strict=True):
        value = from_numpy(array)
        if value.dtype in FLOATS or value.dtype == torch.float64:
            value = value.double()
            if name not in steering and value.numel():
                # Finite differences need finite numbers, of a size that a small step still changes.
                usual = value.isfinite() & (value.abs() < 1e3)
                value = torch.where(usual, value, torch.rand(value.shape, generator=generator, dtype=torch.float64))
                # A little off the grid of round numbers on which kinks and ties lie.
                value = value + 1e-3 * torch.rand(value.shape, generator=generator, dtype=torch.float64)
                leaves.append(name)
        feeds[name] = value
    if not leaves:
        return None
    values = [feeds[name].clone().requires_grad_() for name in leaves]

    def function(*given):
        results = run_model(model, feeds | dict(zip(leaves, given, strict=True)))
        return tuple(r for r in results if r.is_floating_point() and r.requires_grad and r.numel())

    if not function(*values):
        return None
    return torch.autograd.gradcheck(function, values, fast_mode=True, atol=1e-4, rtol=1e-3, eps=1e-6, raise_exception=True)


def verdicts():
    found = {}
    with warnings.catch_warnings():
        # Inputs of the suite may be infinite or empty; gradcheck warns of what it then compares.
        warnings.simplefilter("ignore")
        for case in onnx_suite.relevant():
            if "expanded" in case.name:
                continue
            try:
                result = differentiated(case)
            except (InitauditError, RuntimeError) as error:
                result = f"{type(error).__name__}: {error}"
            if result is not None:
                found[case.name] = result
    return found


def test_gradients_agree_with_finite_differences_but_for_those_documented():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = verdicts()
    torch.set_num_threads(before)
    failures = {name: why for name, why in found.items() if why is not True}
    text = DOCUMENT.read_text().partition("## Gradients that finite differences do not confirm")[2].partition("\n## ")[0]
    assert set(failures) == set(re.findall(r"^\| `(test_\w+)`", text, re.MULTILINE)), failures
    assert len(found) >= 900
    assert len(failures) <= 0.02 * len(found)


def test_a_wrong_gradient_is_noticed():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return 2 * x

        @staticmethod
        def backward(context, gradient):
            return gradient

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Wrong.apply, (x,), fast_mode=True)
