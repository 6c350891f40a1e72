"""The depth profile of a finding: gains in closed form, both doors, and what the reports show of it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re

import pytest
import torch
from torch import nn
from zoo import EXPORTERS, quiet

import initaudit
from initaudit import cli

DEPTH, GAIN = 12, 0.25


def rotations():
    """Linear layers that turn and shrink: each takes the factor GAIN from signal and gradient, exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(DEPTH)], nn.Linear(32, 4, bias=False))
    for layer in model[:-1]:
        nn.init.orthogonal_(layer.weight, GAIN)
    return model


@pytest.mark.parametrize("door", ["module", "onnx"])
def test_gains_are_those_of_the_closed_form(door):
    model, x = rotations(), torch.randn(8, 32)
    if door == "onnx":
        with torch.random.fork_rng(devices=[]), quiet():
            model = EXPORTERS["legacy"](copy.deepcopy(model), (x,))
    found = initaudit.audit(model, (x,), config={"phase": "init"}).to_dict()
    profile = next(f["profile"] for f in found["findings"] if f["profile"])
    inner = profile[:-1]
    assert len(inner) >= DEPTH - 1
    assert [b["gain"] for b in inner] == pytest.approx([GAIN**2] * len(inner), rel=1e-4)
    for name in ("signal_moment2", "gradient_moment2"):
        falls = [b[name] for b in (inner if name == "signal_moment2" else inner[::-1])]
        assert [b / a for a, b in itertools.pairwise(falls)] == pytest.approx([GAIN**2] * (len(falls) - 1), rel=1e-3)
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(profile))
    # The head, which was not drawn with that gain, takes part in the rate.
    assert float(re.search(r"loses a factor ([0-9.]+) per layer from", found["cause"]).group(1)) == pytest.approx(4.0, rel=0.1)


def test_the_text_shows_it_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "wanted.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(*[f for _ in range(10) for f in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    cli.run(["wanted:net"])
    text = " ".join(capsys.readouterr().out.split())
    assert "gain of the gradient" in text
    assert re.search(r"over \d+ blocks, \S+ to \S+: signal \S+ to \S+, gradient \S+ to \S+, gain", text)
    cli.run(["wanted:net", "--format", "json"])
    (model,) = json.loads(capsys.readouterr().out)["models"]
    profiles = [f["profile"] for f in model["findings"] if f["profile"]]
    assert profiles
    assert all(math.isfinite(b["gain"]) for b in profiles[0])
