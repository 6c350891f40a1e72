"""A command line over code that prints, ends the interpreter or asks for too much, and over outputs that cannot be written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from initaudit.cli import run

CODE = """
import sys
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

class Prints(Net):
    def forward(self, x):
        print("hello from forward")
        return self.net(x)

class Exits(Net):
    def forward(self, x):
        sys.exit(0)
"""
SOUND = str(Path(__file__).parent.parent / "fixtures" / "good" / "he_mlp.onnx")


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("strangers", None)


def test_what_a_model_prints_is_not_in_the_report(here, capsys):
    assert run(["strangers:Prints", "--format", "json", "--no-cache"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["models"]
    assert "hello from forward" not in out


def test_a_forward_that_ends_the_interpreter_ends_nothing(here, capsys):
    assert run(["strangers:Exits", SOUND, "--format", "json", "--no-cache"]) == 2
    out, err = capsys.readouterr()
    assert [m["verdict"] for m in json.loads(out)["models"] if m["source"] == SOUND] == ["pass"]
    assert "its code called sys.exit(0)" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([SOUND, "--probe-batch", "99999999999"], "does not fit into memory"), (["a" * 300], "initaudit: error: " + "a" * 20)],
)
def test_too_much_is_one_line(capsys, arguments, says):
    assert run([*arguments, "--no-cache"]) == 2
    _, err = capsys.readouterr()
    assert says in err
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    command = [sys.executable, "-m", "initaudit", SOUND]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output" in done.stderr


def test_what_could_not_be_read_is_not_counted_as_without_findings(capsys):
    assert run(["missing.pt", SOUND, "--format", "concise", "--no-cache"]) == 2
    assert capsys.readouterr().out == "no findings in 1 model, 1 not read\n"
