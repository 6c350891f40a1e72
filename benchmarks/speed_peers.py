"""The commands by which other tools look at a checkpoint; `speed.py peers` times them.

python -m venv peers && peers/bin/pip install weightlens==0.3.0 model-clinic==0.4.2 weightwatcher==0.7.7
INITAUDIT_PEERS=peers/bin/python python benchmarks/speed.py peers
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Spectra of every matrix; WeightWatcher reads models, so the file becomes one without a forward.
_WATCHER = """
import sys, torch, weightwatcher
from safetensors.torch import load_file
model = torch.nn.Module()
for i, w in enumerate(load_file(sys.argv[1]).values()):
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(w.float())
    model.add_module(str(i), layer)
weightwatcher.WeightWatcher(model=model).analyze()
"""
_LOOP = """
import sys, torch
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    for name in file.keys():
        torch.std_mean(file.get_tensor(name).float())
"""


def commands(path: str) -> dict[str, list[str]]:
    """The command of each tool for the checkpoint at `path`, run by the interpreter that INITAUDIT_PEERS names."""
    other = os.environ.get("INITAUDIT_PEERS", sys.executable)
    return {
        "weightlens": [str(Path(other).with_name("lens")), "analyze", path],
        "model-clinic": [str(Path(other).with_name("model-clinic")), "exam", path],
        "WeightWatcher (spectra, a heavier job)": [other, "-c", _WATCHER, path],
        "a plain loop": [other, "-c", _LOOP, path],
    }
