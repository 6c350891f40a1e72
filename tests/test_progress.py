"""What a terminal is told while an audit goes on: the place, a rate, and nothing that stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_progress_waits_a_second_and_wipes_itself(capsys, monkeypatch):
    from initaudit import progress

    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "REFRESH", 0.01)
    with progress.Progress(shown=True) as show:
        show("net.onnx: measuring \x1b[31mfc1")
        time.sleep(0.2)
    err = capsys.readouterr().err
    assert "\rnet.onnx: measuring \\x1b[31mfc1  0 s\x1b[K" in err
    assert err.endswith("\r\x1b[K")
    with progress.Progress(shown=True) as show:
        show("quick")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("unit", "amount", "said"), [("MB", 3_000_000, "3 of 6 MB"), ("edges", 3, "3 of 6 edges")])
def test_a_meter_names_the_place_and_the_rate(monkeypatch, unit, amount, said):
    from initaudit import meter

    clock = iter((10.0, 12.0))
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(clock))
    heard = []
    meter.Meter(heard.append, "measuring", unit, 2 * amount)("fc1.weight", amount)
    assert heard == [f"measuring fc1.weight, {said}, 2 {unit}/s"]


STAGES = {
    "finding inputs: input=": "tries",
    "tracing 0": "layers",
    "measuring 0.weight": "MB",
    "pairing 0.weight": "weights",
    "probing: forward at": "edges",
    "probing: backward at": "edges",
    "probing: gradients of single examples at 0": "layers",
    "probing: virtual steps with adam": "steps",
    "recognising 0.weight": "weights",
}


def test_every_stage_of_an_audit_names_its_place_and_its_rate():
    from torch import nn

    from initaudit.auditing.run import gather
    from initaudit.config import Config
    from initaudit.load import from_module

    heard = []
    gather(from_module(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))), Config(), progress=heard.append)
    silent = [
        stage
        for stage, unit in STAGES.items()
        if not any(re.match(rf"{re.escape(stage)}.*, \d+( of [\d,]+)? {unit}, [\d,]+ {unit}/s$", said) for said in heard)
    ]
    assert silent == []


# The command as it is, which says what it does after hundredths of a second instead of a whole one.
IMPATIENT = """
import sys
from initaudit import cli, progress
progress.PATIENCE = progress.REFRESH = 0.01
sys.exit(cli.run(sys.argv[1:]))
"""


def on_a_terminal(*arguments, columns=100, **environment):
    """What the command writes to a terminal of its own, stdout and stderr together, as it comes."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # Linux ends a terminal whose other side has gone with EIO
        pass
    os.close(ours)
    return process.wait(timeout=60), written.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_sees_what_is_being_done_and_how_fast(columns, tmp_path):
    """The line names the place and a rate, stays within the width, and is wiped."""
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "net.safetensors"
    torch.manual_seed(0)
    save_file({f"blocks.{i}.fc.weight": torch.randn(512, 512) for i in range(24)}, file)
    status, text = on_a_terminal(str(file), "--no-cache", columns=columns)
    assert status == 0, text
    lines = [re.sub(r"\x1b\[K", "", line) for line in re.findall(r"\r([^\r\n]*\d s\x1b\[K)", text)]
    assert any(re.search(r"safetensors: judging by IA\d+, \d+ of \d+ rules, [\d,]+ rules/s", line) for line in lines), text
    assert any(re.search(r"measuring blocks\.\d+\.fc\.weight, \d+ of 25 MB, [\d,]+ MB/s", line) for line in lines), text
    assert max(map(len, lines)) < columns
    assert "\r\x1b[K" in text
    plain = re.sub(r"\x1b\[[0-9;]*[mK]", "", text.rpartition("\r\x1b[K")[2])
    assert max(map(len, plain.split("\r\n"))) <= columns


def test_without_a_terminal_nothing_is_said_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "initaudit", "fixtures/good/he_mlp.onnx"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
