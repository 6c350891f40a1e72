"""The import order: a stage imports what stands above it, never below. The tuple is the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "initaudit"
ORDER = (
    *("errors", "suggest", "location", "meter", "randomness", "config", "roles", "load"),
    *("onnx_ops", "graph", "measure", "pair"),
    *("expect", "probe", "rules", "report", "auditing", "repair", "baseline", "cache", "session", "progress", "options"),
    *("testing", "integrations", "pytest_plugin", "terminal", "cli", "__main__"),
)
LIGHT = ("torch", "onnx", "numpy", "tabulate")


def imports(file: Path) -> Iterator[str]:
    """The stages that a file imports, also inside functions; not what is for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = {
        id(n) for b in ast.walk(tree) if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test) for n in ast.walk(b)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "initaudit":
            names = [f"initaudit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("initaudit.") and name != "initaudit.__version__")


def stage(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if stage(file) == "__init__":
            continue  # the front of the package offers what lies inside, lazily
        assert stage(file) in ORDER, f"{file} belongs to no stage: give it a place in ORDER"
        wrong += [f"{file}: {name}" for name in imports(file) if ORDER.index(name) > ORDER.index(stage(file))]
    assert wrong == []


def test_the_order_test_can_fail(tmp_path):
    file = tmp_path / "load.py"
    file.write_text("def f():\n    from initaudit.rules import rule\nfrom initaudit import errors\n")
    assert sorted(imports(file)) == ["errors", "rules"]


def loaded_after(code: str) -> set[str]:
    """The modules of `LIGHT` that are loaded once the code has run in a new interpreter."""
    tail = f"; import sys; print('LOADED', *[m for m in {LIGHT!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["audit", "--help"], ["config"], ["no-such-command", "--wrong"]]
)
def test_what_audits_nothing_loads_nothing_heavy(arguments):
    loaded = loaded_after(f"from initaudit.cli import run; run({arguments!r})")
    assert not loaded & {"torch", "onnx", "numpy"}


def test_the_laziness_test_can_fail():
    assert loaded_after("import numpy") == {"numpy"}


def test_files_are_short_enough_to_be_read():
    long = {f.name: n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}
