"""Hostile ONNX files through the real command: one clear line each, status 2, within ten seconds and 2 GB."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile_onnx import DANGEROUS, LOST, REFUSED, furnish, model
from onnx import helper, numpy_helper

from initaudit import audit

SECONDS, BYTES = 10.0, 2 << 30
HARMLESS = ("negative Pad",)  # runs into an error of its own and costs nothing: said of the operator, the rest is audited


def command(*arguments: object) -> tuple[int, str, str, float, int]:
    """(status, stdout, stderr, seconds of CPU, peak bytes) of a run of the tool in a process of its own."""
    limits = (120, 120)  # a run that hangs is ended
    process = subprocess.Popen(
        [sys.executable, "-m", "initaudit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, limits),
    )
    out, err = process.communicate(timeout=500)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process.returncode, out, err, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def written(folder: Path, name: str) -> Path:
    made = REFUSED[name][0]() if name in REFUSED else DANGEROUS[name]().SerializeToString()
    path = folder / (name.replace(" ", "_").replace("*", "") + ".onnx")
    path.write_bytes(made)
    return path


@pytest.mark.parametrize(
    "name",
    ["endless Loop that keeps all", "doubling Concat", "billion laughs"],
)
def test_a_sample_alone(name, tmp_path):
    path = written(tmp_path, name)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    status, out, err, spent, _ = command(path)
    spent -= before.ru_utime + before.ru_stime
    assert status == 2, out + err
    text = (out + err).strip()
    assert "Traceback" not in text
    assert sum(path.name in line for line in text.splitlines()) >= 1
    # Of the processor: how long that takes by the clock is for the machine's other users to say as well.
    assert spent < SECONDS, f"{spent} s of CPU, {time.monotonic() - start} s by the clock"


def test_all_of_them_next_to_a_healthy_model(tmp_path):
    """One process for all: each costs seconds at most, none takes more than 2 GB, and the healthy model is still audited."""
    names = [*REFUSED, *(n for n in DANGEROUS if n not in HARMLESS and "oop" not in n)]
    paths = [written(tmp_path, name) for name in names]
    onnx.save(model(), tmp_path / "healthy.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "garbage.onnx").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "zeros.onnx").write_bytes(bytes(4096))
    (tmp_path / "pickle.onnx").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    more = [tmp_path / f"{n}.onnx" for n in ("empty", "garbage", "zeros", "pickle")]
    status, out, err, _, peak = command("--format", "concise", *paths, *more, tmp_path / "healthy.onnx")
    text = out + err
    assert status == 2
    assert "Traceback" not in text
    lines = text.splitlines()
    for path in (*paths, *more):
        mine = [line for line in lines if str(path) in line or path.name in line]
        # A pickle is read as one, by its own rules: what it would have called is a finding.
        assert len(mine) == 1 or "IA505" in mine[0], (path.name, mine)
        assert mine[0].isprintable()
    assert peak < BYTES
    assert not (tmp_path / "owned").exists()


def test_one_bad_tensor_each(tmp_path):
    """External data that leads out of the folder, that is a pipe, a link, too short: said of the tensor, status at most 1."""
    folder = tmp_path / "models"
    folder.mkdir()
    furnish(folder)
    paths = []
    for name, (make, _) in LOST.items():
        path = folder / (name.replace(" ", "_").replace("*", "").replace("..", "dots") + ".onnx")
        path.write_bytes(model(tensors=[make()]).SerializeToString())
        paths.append(path)
    status, out, err, _, peak = command("--format", "concise", *paths)
    text = out + err
    assert status in (0, 1)
    assert "Traceback" not in text
    for path in paths:
        assert any(path.name in line and "IA001" in line for line in text.splitlines()), path.name
    assert peak < BYTES


SHAPES = {
    "a state of one example": {"h": (1, 1, 8)},
    "recurrent weights of one unit": {"r": (1, 32, 1)},
    "recurrent weights of two rows": {"r": (1, 2, 8)},
    "input weights of one row": {"w": (1, 1, 4)},
    "a bias of two": {"b": (1, 2)},
    "eight gates": {"w": (1, 64, 4), "r": (1, 64, 8)},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_recurrent_weights_that_do_not_fit_never_reach_the_kernel(kind, tmp_path):
    """torch's fused LSTM reads beyond the end of a tensor that is too small, and ends the process."""
    shapes = {"w": (1, 32, 4), "r": (1, 32, 8), **SHAPES[kind]}
    given = [numpy_helper.from_array(np.full(shape, 0.1, np.float32), name) for name, shape in shapes.items()]
    names = [name if name in shapes else "" for name in ("w", "r", "b", "", "h")]
    node = helper.make_node("LSTM", ["x", *names], ["y"], hidden_size=8)
    ends = [helper.make_tensor_value_info("x", 1, [3, 50, 4]), helper.make_tensor_value_info("y", 1, None)]
    path = tmp_path / "lstm.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], given)), path)
    found = audit(path, config={"cache": False})
    assert [f.code for f in found.findings if "recurrent layer" in f.message] == ["IA002"], found.findings
