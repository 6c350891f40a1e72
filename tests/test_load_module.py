"""Modules in memory and `package.module:callable`: views of the right numbers, and one line for each mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from initaudit.errors import UnreadableModel
from initaudit.load import from_module, is_module_spec, load
from initaudit.load.checkpoint import numpy_dtype

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, 2)


class Needs(nn.Module):
    def __init__(self, hidden, *, depth, heads=2):
        super().__init__()


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(-1, "two")


def number():
    return 3


def leave():
    raise SystemExit(3)


def two_lines():
    raise ValueError("first\\nsecond")


instance = nn.Linear(3, 3)


class holder:
    class inner:
        build = staticmethod(lambda: nn.Linear(5, 5))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "usermodels.py").write_text(SOURCE)
    (tmp_path / "syntax_broken.py").write_text("x = (\n")
    (tmp_path / "needs_missing.py").write_text("import no_such_library_anywhere\n")
    (tmp_path / "raises_at_import.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("usermodels", "syntax_broken", "needs_missing", "raises_at_import"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "width"), [("usermodels:Net", 4), ("usermodels:instance", 3), ("usermodels:holder.inner.build", 5)]
)
def test_builds_what_is_named(folder: Path, spec: str, width: int) -> None:
    checkpoint = load(spec)
    assert checkpoint.format == "module"
    assert checkpoint.source == spec
    assert isinstance(checkpoint.program, nn.Module)
    assert next(iter(checkpoint.arrays.values())).shape[1] == width


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("usermodels:Nte", "usermodels has no Nte; did you mean Net?"),
        ("usermodels:holder.outer", "usermodels.holder has no outer"),
        ("usermodels:Needs", r"it needs arguments \(hidden, depth\)"),
        ("usermodels:number", "it returned a int; expected a torch.nn.Module"),
        ("usermodels:SOURCE_missing", "has no SOURCE_missing"),
        ("usermodels:torch", "torch is a module; expected"),
        ("usermodels:leave", "building it raised SystemExit: 3 .*usermodels.py:28"),
        ("usermodels:Broken", r"building it raised TypeError: .*usermodels.py:20\)"),
        ("usermodels:two_lines", "ValueError: first .*usermodels.py:32"),
        ("user_models:Net", "no module named user_models; did you mean usermodels?"),
        ("nowhere_near:Net", "no module named nowhere_near; run it from the folder"),
        ("usermodels.sub:Net", "no module named usermodels.sub"),
        ("syntax_broken:Net", r"SyntaxError: .*syntax_broken.py:1"),
        ("needs_missing:Net", r"needs no_such_library_anywhere, which is not installed \(needs_missing.py:1\)"),
        ("raises_at_import:Net", r"importing it raised ZeroDivisionError: .*raises_at_import.py:1"),
    ],
)
def test_every_mistake_is_one_line(folder: Path, spec: str, says: str) -> None:
    with pytest.raises(UnreadableModel, match=says) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.b:C", True), ("a:c.d", True), ("models:größe", True), ("model.onnx", False), ("a.py:Net", False), ("a:b:c", False),
        ("https://x/y", False), ("C:\\models", False), ("a:", False), (":b", False), ("a/b:c", False), ("1a:b", False),
    ],
)  # fmt: skip
def test_is_module_spec(source: str, expected: bool) -> None:
    assert is_module_spec(source) is expected


def test_a_file_of_that_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").write_text("x")
    assert not is_module_spec("a:b")
    with pytest.raises(UnreadableModel, match="a text file"):
        load("a:b")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_views_are_exact_and_share_memory(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 4).to(dtype), requires_grad=True)
    array = from_module(module).arrays["weight"]
    found = array.read()
    assert found.dtype == numpy_dtype(array.dtype)
    assert np.array_equal(found.astype(np.float64), module.weight.detach().double().numpy())
    with torch.no_grad():
        module.weight.view(torch.uint8).zero_()
    assert not found.astype(np.float64).any()  # no copy was made


def test_ties_buffers_and_trainability() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    arrays = from_module(module).arrays
    assert arrays["0.weight"].storage == arrays["2.weight"].storage != arrays["2.bias"].storage
    assert not arrays["0.bias"].trainable
    assert arrays["2.bias"].trainable
    assert not arrays["1.running_mean"].trainable
    assert arrays["1.num_batches_tracked"].dtype == "int64"


def test_slices_of_one_storage_are_not_tied() -> None:
    flat = torch.randn(8)
    module = nn.Module()
    module.a, module.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    arrays = from_module(module).arrays
    assert arrays["a"].storage != arrays["b"].storage


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_wrappers_are_taken_off() -> None:
    inner = nn.Linear(2, 2)
    checkpoint = from_module(nn.DataParallel(torch.compile(inner)))
    assert checkpoint.program is inner
    assert list(checkpoint.arrays) == ["weight", "bias"]
    assert len(checkpoint.notes) == 2


@pytest.mark.parametrize(
    ("module", "says"),
    [(lambda: nn.Linear(2, 2, device="meta"), "meta device"), (lambda: nn.LazyLinear(2), "lazy module")],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_tensors_without_values_are_problems(module: object, says: str) -> None:
    checkpoint = from_module(module())  # type: ignore[operator]
    assert {problem.code for problem in checkpoint.problems} == {"IA001"}
    assert says in checkpoint.problems[0].message


def test_reading_files_imports_no_torch(tmp_path: Path) -> None:
    """And the check can fail: loading a module does import it."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pt")
    program = "import sys; from initaudit.load import load; load(sys.argv[1]); raise SystemExit(int('torch' in sys.modules))"
    run = [sys.executable, "-c", program]
    assert subprocess.run([*run, str(tmp_path / "x.pt")], check=False).returncode == 0
    assert subprocess.run([*run, "torch.nn:Identity"], check=False).returncode == 1


CODE = "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(4, 4)\n"


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("hint_nets.py", "hint_nets:Net"),
        ("hint_nets.py:Net", "write hint_nets:Net"),
        ("hint_pack/models.py:Net", "write hint_pack.models:Net"),
        ("hint_pack/models.py", "hint_pack.models:Net"),
        ("hint-odd/net.py:Net", "write net:Net in the folder hint-odd"),
        ("hint_nest:Net", "did you mean hint_nets?"),
        ("hint_pack.modls:Net", "did you mean hint_pack.models?"),
        ("hint_nets:Nat", "did you mean Net?"),
        ("hint_net.py:Net", "did you mean hint_nets.py?"),
        ("far.away.package:Net", "run it from the folder that holds far, or install that package"),
    ],
)
def test_a_mistyped_module_gets_a_hint(tmp_path, monkeypatch, source, hint):
    """One clear line: what to write, or what is nearest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in ("hint_nets.py", "hint_pack/models.py", "hint_pack/__init__.py", "hint-odd/net.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(CODE)
    with pytest.raises(UnreadableModel, match=re.escape(hint)) as caught:
        load(source)
    assert "\n" not in str(caught.value)
