"""The malicious files of the tests before initaudit and its peers: picklescan, fickling and modelscan.

    python benchmarks/malicious_files.py [--peers PYTHON]

PYTHON is the interpreter of an environment that has the peers (`pip install picklescan fickling modelscan typing_extensions`).
Every file is handed to each of them through its Python interface; what counts is whether anything is said about it at a level
that fails a build: an error of initaudit, issues of picklescan and modelscan, a verdict of fickling that is not safe. Harmless
files go the same way. Nothing is run: the judge is a canary file that every payload would touch.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from malicious import CASES
from malicious_containers import CONTAINERS, archive, plain
from pickle_opcodes import system

# Runs in the peers' environment: a list of paths in, for each peer whether it says something, out.
PEERS = """
import contextlib, io, json, signal, sys, warnings
warnings.simplefilter("ignore")
def quiet(call, path):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        signal.alarm(3)
        try:
            return call(path)
        except Exception as error:
            return "error: " + type(error).__name__
        finally:
            signal.alarm(0)
def late(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, late)
def by_picklescan(path):
    from picklescan.scanner import scan_file_path
    found = scan_file_path(path)
    return "named" if found.issues_count or found.infected_files else "error" if found.scan_err else "clean"
def by_fickling(path):
    import fickling
    return "clean" if fickling.is_likely_safe(path) else "named"
def by_modelscan(path):
    from modelscan.modelscan import ModelScan
    found = ModelScan().scan(path)
    if found["summary"]["total_issues"]:
        return "named"
    return "error" if found["errors"] or not found["summary"]["scanned"]["total_scanned"] else "clean"
paths = json.load(sys.stdin)
peers = {"picklescan": by_picklescan, "fickling": by_fickling, "modelscan": by_modelscan}
json.dump({name: [quiet(call, path) for path in paths] for name, call in peers.items()}, sys.stdout)
"""


def ours(path: str) -> str:
    """What initaudit's rule says of a file."""
    from initaudit.errors import InitauditError
    from initaudit.load import load

    try:
        problems = load(path).problems
    except InitauditError:
        return "error"
    return "named" if any(p.code == "IA505" and p.severity is None for p in problems) else "clean"


def healthy() -> dict[str, Callable[[Path], Any]]:
    """Harmless files of the usual kinds."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    return {
        "state dict": lambda p: torch.save(model.state_dict(), p),
        "older stream": lambda p: torch.save(model.state_dict(), p, _use_new_zipfile_serialization=False),
        "training checkpoint": lambda p: torch.save(state, p),
        "whole module": lambda p: torch.save(model, p),
        "numpy in a pickle": lambda p: p.write_bytes(pickle.dumps({"w": np.ones(3)})),
        "archive of plain data": lambda p: p.write_bytes(archive(b"N")),
    }


def main() -> None:
    python = sys.argv[sys.argv.index("--peers") + 1] if "--peers" in sys.argv else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        canary = root / "canary"
        groups: dict[str, list[str]] = {"payload": [], "container": [], "harmless": []}
        for group, files in (
            ("payload", {case.name: plain(case.payload(canary)) for case in CASES}),
            ("container", {name: make(system(canary)) for name, make in CONTAINERS.items()}),
        ):
            for number, content in enumerate(files.values()):
                path = root / f"{group}{number}.{'pkl' if group == 'payload' else 'bin'}"
                path.write_bytes(content)
                groups[group].append(str(path))
        for number, save in enumerate(healthy().values()):
            path = root / f"harmless{number}.pt"
            save(path)
            groups["harmless"].append(str(path))
        paths = [path for group in groups.values() for path in group]
        done = subprocess.run([python, "-c", PEERS], input=json.dumps(paths), capture_output=True, text=True, check=True)
        said = {"initaudit": [ours(path) for path in paths], **json.loads(done.stdout)}
        ran = canary.exists()
    rows = []
    for tool, answers in said.items():
        by_path = dict(zip(paths, answers, strict=True))
        row: list[Any] = [tool]
        for group in groups.values():
            named = sum(by_path[path] == "named" for path in group)
            broken = sum(by_path[path].startswith("error") for path in group)
            row.append(f"{named} of {len(group)}" + (f" ({broken} not read)" if broken else ""))
        rows.append(row)
    print(tabulate(rows, headers=["tool", "payloads named", "containers named", "harmless files reported"]))
    print(f"\na payload was run: {'YES' if ran else 'no'}")


if __name__ == "__main__":
    main()
