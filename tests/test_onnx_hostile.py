"""Hostile ONNX files through the real command: one clear line each, status 2, within ten seconds and 2 GB."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from hostile_onnx import DANGEROUS, LOST, REFUSED, furnish, model

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
