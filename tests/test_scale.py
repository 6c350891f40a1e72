"""What an audit costs where checkpoints are large: memory, what is imported, and the same report whatever runs side by side."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from initaudit import audit
from initaudit.rules.ia203_identical_layers import _most_alike
from initaudit.rules.roots import fold
from initaudit.rules.rule import Finding


def run(code: str, *arguments: str) -> str:
    """The last line that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.splitlines()[-1]


def large_file(path: Path, mebibytes: int) -> None:
    """One bfloat16 matrix of normal values, repeated every 8 MiB, with outliers that make rules look at it again."""
    values = (np.random.default_rng(0).normal(0, 0.02, 4 * 1024 * 1024)).astype(np.float32)
    values[::100_000] = 0.7
    part = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    rows = mebibytes * 512 * 1024 // 4096
    size = rows * 4096 * 2
    entry = {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, size]}
    header = json.dumps({"lm_head.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(mebibytes // 8):
            file.write(part)


# The peak since the process started its own program, which fork and exec leave alone.
PEAK = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux tells it")
def test_static_audits_stay_small_whatever_the_size(tmp_path):
    path = tmp_path / "large.safetensors"
    large_file(path, 640)
    code = f"import sys; from initaudit import audit; found = audit(sys.argv[1]); {PEAK}"
    assert int(run(code, str(path))) < 300_000
    # The same measure sees what a reading of everything would take.
    assert int(run(f"import sys; held = open(sys.argv[1], 'rb').read(); {PEAK}", str(path))) > 640_000


STATIC = "import sys; from initaudit.cli import run; run(['audit', '--no-probe', sys.argv[1]])"
LOADED = "; print([m for m in ('torch', 'onnx', 'transformers', 'scipy') if m in sys.modules])"


def test_a_static_audit_loads_no_torch(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": np.random.default_rng(0).normal(0, 0.05, (64, 64)).astype(np.float32)}, path)
    assert run(STATIC + LOADED, str(path)) == "[]"
    assert run("import torch; " + STATIC + LOADED, str(path)) == "['torch']"


SMALL = """
import sys, numpy as np, onnx
from onnx import helper, numpy_helper
weights = {"k": (8, 3, 3, 3), "w0": (32, 32), "b0": (32,), "w1": (32, 10)}
given = [numpy_helper.from_array(np.random.default_rng(0).normal(0, 0.2, s).astype(np.float32), n) for n, s in weights.items()]
nodes = [
    helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["c"], ["r"]),
    helper.make_node("MaxPool", ["r"], ["m"], kernel_shape=[4, 4], strides=[4, 4]),
    helper.make_node("Flatten", ["m"], ["f"]),
    helper.make_node("Gemm", ["f", "w0", "b0"], ["g"]),
    helper.make_node("Tanh", ["g"], ["t"]),
    helper.make_node("MatMul", ["t", "w1"], ["y"]),
]
x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", ["n", 3, 8, 8]), ("y", ["n", 10])))
onnx.save(helper.make_model(helper.make_graph(nodes, "small", [x], [y], given)), sys.argv[1])
from initaudit import audit
assert audit(sys.argv[1]).risk["untrainable"]
"""
HEAVY = "print([m for m in ('sympy', 'torch._dynamo', 'torch._inductor') if m in sys.modules])"


def test_a_small_graph_is_probed_without_torchs_compiler(tmp_path):
    """Symbolic shapes and the compiler take longer to import than all of such an audit."""
    path = str(tmp_path / "small.onnx")
    assert run(SMALL + HEAVY, path) == "[]"
    assert run("import sympy\n" + SMALL + HEAVY, path) == "['sympy']"


def test_tensors_side_by_side_give_the_same_report(tmp_path):
    """Threads over the tensors of one model, ones that are damaged and cut off among them."""
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.weight": rng.normal(0, 0.1, (64, 40 + i)).astype(np.float32) for i in range(12)}
    tensors |= {f"layers.{i}.bias": np.zeros(64, np.float32) for i in range(12)}
    tensors["layers.3.weight"][5] = np.nan
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    alone = audit(path)
    assert {f.code for f in alone.findings} >= {"IA001", "IA401"}
    for jobs in (2, 5):
        assert audit(path, config={"jobs": jobs}).to_dict() == alone.to_dict()


@pytest.mark.parametrize("kind", ["standard_normal", "random"])
def test_beginnings_alike_up_to_a_factor_are_found_among_thousands(kind):
    rng = np.random.default_rng(0)
    starts = getattr(rng, kind)((3000, 48))
    group = sorted(rng.choice(3000, 5, replace=False).tolist())
    for i in group[1:]:
        starts[i] = starts[group[0]] * rng.choice([-3, 0.1, 1]) * (1 + 2**-9 * rng.uniform(-1, 1, 48))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    assert _most_alike(starts) == group


def test_findings_fold_into_the_first_root_about_their_tensor():
    def finding(code: str, tensor: str, *related: str) -> Finding:
        return Finding(code, code.lower(), "warning", code, "", tensor=tensor, related=related)

    roots = [finding("IA201", f"t{i}") for i in range(3)]
    folded = fold([*roots, finding("IA109", "other", "t2", "t1"), finding("IA109", "alone"), finding("IA301", "")])
    assert [(f.code, f.tensor) for f in folded] == [("IA201", "t0"), ("IA201", "t1"), ("IA201", "t2"), ("IA109", "alone")]
    assert "IA109" in folded[1].message
    assert "IA301" in folded[0].message
    assert folded[2] == roots[2]


def test_a_hundred_thousand_findings_are_folded():
    """Each root explains one other finding. Comparing all pairs would take hours."""
    many = [Finding("IA201", "a", "error", "a", "", tensor=f"t{i}") for i in range(50_000)]
    many += [Finding("IA109", "b", "warning", "b", "", tensor=f"t{i}") for i in range(50_000)]
    assert len(fold(many)) == 50_000
