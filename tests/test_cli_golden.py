"""The real command over the fixtures: its outputs are files in tests/golden, renewed by `pytest --overwrite`.

What must hold whatever the files say (verdict, exit status, codes) stands here: a wrong output cannot be accepted blindly.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from initaudit import cli

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# fixture: exit status, codes of which at least one must be reported
CASES = {
    "good/he_mlp.onnx": (0, set()),
    "good/he_mlp.safetensors": (0, set()),
    "good/he_relu_30.onnx": (0, set()),
    "good/small_cnn.onnx": (0, set()),
    "broken/sigmoid_unit_normal.onnx": (1, {"IA102", "IA301", "IA303", "IA306", "IA307"}),
    "broken/zero.onnx": (1, {"IA201", "IA207"}),
    # Without a graph nothing tells whether a zero weight ends a branch, where it is healthy.
    "broken/zero.safetensors": (0, set()),
    "broken/constant.onnx": (1, {"IA201", "IA202"}),
    "broken/xavier_relu_30.onnx": (1, {"IA101", "IA103", "IA301"}),
    "broken/truncated.onnx": (2, set()),
    "broken/not-a-model.txt": (2, set()),
    "broken/empty.onnx": (2, set()),
}


def run(capsys, *arguments):
    status = cli.run(list(arguments))
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def without_times(text: str) -> str:
    return re.sub(r"\b\d+(\.\d+)? s\b", "… s", text)


@pytest.mark.parametrize("name", sorted(CASES))
def test_text_is_as_it_was(capsys, overwrite, name):
    expected, codes = CASES[name]
    status, out, err = run(capsys, f"fixtures/{name}")
    assert status == expected, out + err
    assert not codes or codes & set(re.findall(r"IA\d{3}", out)), f"none of {sorted(codes)} in\n{out}"
    assert max(map(len, out.splitlines()), default=0) <= 100
    if expected == 2:
        assert len(err.splitlines()) == 1
    text = without_times(out + err)
    golden = GOLDEN / (name.replace("/", "-") + ".text")
    if overwrite:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, "utf-8")
    assert golden.read_text("utf-8") == text, "if the new output is right: pytest tests/test_cli_golden.py --overwrite"


def test_every_golden_file_belongs_to_a_case():
    assert {path.name for path in GOLDEN.glob("*.text")} <= {name.replace("/", "-") + ".text" for name in CASES}


def test_json_of_the_real_audit_follows_the_schema(capsys):
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text("utf-8"))
    status, out, _ = run(capsys, *(f"fixtures/{name}" for name in CASES), "--format", "json")
    assert status == 2
    document = json.loads(out)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert len(document["models"]) == len(CASES)
    failed = {model["source"] for model in document["models"] if model["verdict"] == "fail"}
    assert failed == {f"fixtures/{name}" for name, (status, _) in CASES.items() if status == 1}


def test_models_side_by_side_give_the_same_report(capsys):
    names = [f"fixtures/{name}" for name in ("good/he_mlp.onnx", "broken/zero.onnx", "broken/truncated.onnx")]
    assert run(capsys, *names, "--jobs", "2") == run(capsys, *names)


def test_fixtures_are_what_their_script_makes():
    done = subprocess.run(
        [sys.executable, "fixtures/make.py", "--check"], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
