"""ONNX's own backend suite and the nine real models inside the onnx package run on our operators."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_suite
import pytest
import torch
from onnx import numpy_helper

from initaudit.onnx_ops.backend import Backend

DOCUMENT = Path(__file__).parent.parent / "docs" / "onnx-operators.md"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documented(section):
    """The tests that the section of the document lists, `name` first on its line."""
    text = DOCUMENT.read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(test_\w+)`", text, re.MULTILINE))


def test_exactly_the_documented_tests_of_the_suite_fail():
    cases = onnx_suite.relevant()
    failures = {case.name: why for case in cases if (why := onnx_suite.run(case))}
    assert set(failures) == documented("Tests of the suite that fail"), failures
    assert len(cases) >= 1600
    assert len(failures) <= 0.004 * len(cases)


def test_exactly_the_documented_tests_of_narrow_types_fail():
    failures = {case.name: why for case in onnx_suite.executed() if (why := onnx_suite.run(case))}
    assert set(failures) == documented("Tests of narrow types that fail"), failures


def test_a_wrong_output_is_noticed():
    """Of all cases with a floating-point output, shifted by 5 % and 0.05, at most one in two hundred passes."""
    noticed = missed = 0
    for case in onnx_suite.relevant():
        inputs, outputs = case.data[0]
        floating = [o.dtype.kind == "f" and o.size and np.isfinite(o).all() for o in outputs]
        if onnx_suite.run(case) or not any(floating):
            continue
        shifted = [o * 1.05 + 0.05 if f else o for o, f in zip(outputs, floating, strict=True)]
        shifted = [s.astype(o.dtype) for s, o in zip(shifted, outputs, strict=True)]
        found = onnx_suite.difference(Backend.prepare(case.model).run(inputs), shifted, case.rtol, case.atol)
        noticed, missed = noticed + bool(found), missed + (not found)
    assert noticed > 1000
    assert missed <= noticed / 200


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda p: p.stem)
def test_real_models_give_their_stored_outputs(path):
    model = onnx.load(path)
    (given,) = (i for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer})
    shape = [d.dim_value or 1 for d in given.type.tensor_type.shape.dim]
    count = int(np.prod(shape))
    # This ramp is what the suite feeds to these models.
    feed = (np.arange(count).reshape(shape) / count).astype(np.float32)
    expected = onnx.TensorProto()
    expected.ParseFromString((path.parent / f"{path.stem}_output_0.pb").read_bytes())
    assert onnx_suite.difference(Backend.run_model(model, [feed]), [numpy_helper.to_array(expected)], 1e-3, 1e-5) is None
