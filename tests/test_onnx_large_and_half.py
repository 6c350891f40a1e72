"""ONNX files of gigabytes, never held; and files of 16-bit numbers, probed in 32."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import initaudit

SHAPE, COUNT = (8192, 14336), 5  # 470 MB each, 2.3 GB together
PROGRAM = """
import json, resource, sys
import initaudit
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
initaudit.audit(sys.argv[1])
before = peak()
audit = initaudit.audit(sys.argv[2])
notes = [f.message for f in audit.findings if f.code == "IA004"]
lost = [f.tensor for f in audit.findings if f.code == "IA001"]
print(json.dumps({"more": peak() - before, "layers": len(audit.layers), "notes": notes, "lost": lost}))
"""


def products(weights: list[TensorProto], rows: int) -> onnx.ModelProto:
    nodes, value = [], "x"
    for i, weight in enumerate(weights):
        nodes += [helper.make_node("MatMul", [value, weight.name], [f"h{i}"]), helper.make_node("Relu", [f"h{i}"], [f"r{i}"])]
        value = f"r{i}"
    kind = weights[0].data_type
    ends = [helper.make_tensor_value_info("x", kind, ["n", rows])], [helper.make_tensor_value_info(value, kind, None)]
    graph = helper.make_graph(nodes, "g", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_gigabytes_are_read_a_tensor_at_a_time(tmp_path):
    """The data file is sparse: it has the size of the weights, and next to nothing of it on the disk."""
    rng = np.random.default_rng(0)
    start = (rng.standard_normal(1 << 18) / np.sqrt(SHAPE[0])).astype(np.float32)
    size = 4 * SHAPE[0] * SHAPE[1]
    tensors = []
    with open(tmp_path / "weights.bin", "wb") as file:
        for i in range(COUNT):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
            tensor.dims.extend(SHAPE if i % 2 == 0 else SHAPE[::-1])
            for key, value in {"location": "weights.bin", "offset": str(i * size), "length": str(size)}.items():
                tensor.external_data.add(key=key, value=value)
            tensors.append(tensor)
            file.seek(i * size)
            file.write(start.tobytes())
        file.truncate(COUNT * size)
    if os.stat(tmp_path / "weights.bin").st_blocks * 512 > size:
        pytest.skip("this file system keeps no sparse files")
    assert COUNT * size > 2**31
    onnx.save(products(tensors, SHAPE[0]), tmp_path / "large.onnx")
    small = [numpy_helper.from_array(start[:4096].reshape(64, 64), "w")]
    onnx.save(products(small, 64), tmp_path / "small.onnx")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "small.onnx"), str(tmp_path / "large.onnx")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(run.stdout)
    assert found["layers"] == COUNT
    assert found["lost"] == []
    assert "--probe" in found["notes"][0]
    # The pages of one tensor, and the buffers of the measurement.
    assert found["more"] < size + 64 * 2**20


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_files_are_probed_in_32(kind):
    """Signals that 16 bits could not hold: the probe of the file is that of the same numbers in float32."""
    rng = np.random.default_rng(0)
    # Each layer shrinks the signal a hundredfold: its square leaves float16 behind the second.
    weights = [(0.01 * rng.standard_normal((64, 64)) * np.sqrt(2 / 64)).astype(kind) for _ in range(4)]
    half = products([numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)], 64)
    whole = products([numpy_helper.from_array(w.astype(np.float32), f"w{i}") for i, w in enumerate(weights)], 64)
    first, second = initaudit.audit(half), initaudit.audit(whole)
    # Only the input that was made up is rounded, in the one file.
    for a, b in zip(first.layers, second.layers, strict=True):
        for name in ("forward_moment2", "gradient_moment2", "weight_gradient_norm"):
            assert a.probe[name] == pytest.approx(b.probe[name], rel=5e-3)
        assert a.ratio["he"] == pytest.approx(b.ratio["he"], rel=1e-6)
    assert 0 < first.layers[-1].probe["forward_moment2"] < 1e-12
    assert first.risk["vanishing"] == pytest.approx(second.risk["vanishing"], rel=1e-3)
    assert [f.code for f in first.findings if f.code != "IA403"] == [f.code for f in second.findings]
