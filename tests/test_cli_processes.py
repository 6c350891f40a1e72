"""The command line as a process: signals, pipes, encodings, the completion of a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


STAND_IN = """
import signal, sys, time, dataclasses
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
sys.path.insert(0, {tests!r})
import initaudit.session as session
from sample_report import deep_model
def audit_one(source, config, progress=None):
    if source == "slow":
        print("started", flush=True, file=sys.__stdout__); time.sleep(60)
    return dataclasses.replace(deep_model(2000), source=source)
session.audit_one = audit_one
from initaudit.cli import run
sys.exit(run(sys.argv[1:]))
"""


def start(*arguments, **options):
    code = STAND_IN.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_a_reader_that_goes_away_is_no_error():
    process = start("bad", "--verbose")
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert err == ""


def test_ctrl_c_ends_with_130_and_says_nothing_more():
    process = start("slow", "--format", "json:out.json")
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not Path("out.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(encoding):
    process = start("bad", env={**os.environ, "PYTHONIOENCODING": encoding})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert "forward-vanishing" in out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("exp", "explain expected.onnx"), ("--sel", "--select"), ("compl", "completion"), ("explai", "explain")],
)
def test_bash_completes_commands_options_and_files(tmp_path, typed, offered):
    (tmp_path / "initaudit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m initaudit "$@"\n')
    (tmp_path / "initaudit").chmod(0o755)
    (tmp_path / "expected.onnx").touch()
    script = f"""
    PATH="$PWD:$PATH"
    eval "$(initaudit completion bash)"
    COMP_WORDS=(initaudit {typed}); COMP_CWORD=1
    _initaudit_completion initaudit 2>/dev/null
    echo "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.stdout.split() == offered.split(), done.stderr
