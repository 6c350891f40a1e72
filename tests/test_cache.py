"""The cache gives what the audit gave, and nothing else: any change that could matter makes it audit again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import initaudit.auditing
from initaudit import cache, cli
from initaudit.auditing import run_one
from initaudit.config import Config

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"


@pytest.fixture(autouse=True)
def audits(monkeypatch, tmp_path):
    """The sources that were really audited; the cache is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INITAUDIT_CACHE_DIR", str(tmp_path / "kept"))
    seen = []

    def counted(source, config, progress=None):
        seen.append(source)
        return run_one(source, config, progress)

    monkeypatch.setattr(initaudit.auditing, "run_one", counted)
    for name in ("good/he_mlp.onnx", "broken/zero.onnx", "good/he_mlp.safetensors"):
        shutil.copy(FIXTURES / name, tmp_path)
    return seen


def audit(capsys, *arguments):
    status = cli.run(list(arguments))
    return status, *capsys.readouterr()


def test_a_second_audit_prints_the_same_bytes_without_auditing(capsys, audits):
    arguments = ("zero.onnx", "he_mlp.onnx", "he_mlp.safetensors", "--format", "json")
    first, second = audit(capsys, *arguments), audit(capsys, *arguments)
    assert first == second
    assert audits == ["zero.onnx", "he_mlp.onnx", "he_mlp.safetensors"]
    assert audit(capsys, "zero.onnx")[0] == 1, "another format of the same report"
    assert len(audits) == 3


@pytest.mark.parametrize("name", ["zero.onnx", "he_mlp.onnx", "he_mlp.safetensors"])
def test_what_comes_out_is_what_went_in(name, tmp_path):
    report = run_one(name, Config())
    cache.write(tmp_path / "x.json", report)
    assert cache.read(tmp_path / "x.json") == report


@pytest.mark.parametrize(
    "options", [["--seed", "1"], ["--select", "IA2"], ["--no-probe"], ["--probe"], ["--phase", "init"], ["--no-cache"]]
)
def test_another_question_is_another_audit(capsys, audits, options):
    audit(capsys, "zero.onnx")
    audit(capsys, "zero.onnx", *options)
    assert len(audits) == 2


def test_what_only_shows_or_decides_is_no_other_question(capsys, audits):
    for options in ([], ["--strict"], ["--quiet"], ["--jobs", "1"], ["--fail-on", "never"], ["--statistics"]):
        audit(capsys, "zero.onnx", *options)
    assert len(audits) == 1


def test_changed_bytes_are_seen_whatever_the_time_stamp_says(capsys, audits):
    file = Path("net.safetensors")
    rng = np.random.default_rng(0)
    save_file({"fc.weight": rng.normal(0, 1, (64, 64)).astype(np.float32)}, file)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    before = audit(capsys, "net.safetensors", "--format", "json")
    save_file({"fc.weight": rng.normal(0, 1, (64, 64)).astype(np.float32)}, file)
    os.utime(file, ns=times)
    assert audit(capsys, "net.safetensors", "--format", "json") != before
    assert len(audits) == 2


def test_changed_external_data_is_seen_under_any_name(capsys, audits):
    import onnx

    model = onnx.load("he_mlp.onnx")
    Path("net").mkdir()
    save = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model, "net/model.onnx", **save)
    audit(capsys, "net/model.onnx")
    data = bytearray(Path("net/weights.bin").read_bytes())
    data[:4] = b"\0\0\0\0"
    Path("net/weights.bin").write_bytes(data)
    audit(capsys, "net/model.onnx")
    assert len(audits) == 2


def test_another_program_is_another_audit(capsys, audits, monkeypatch):
    audit(capsys, "zero.onnx")
    monkeypatch.setattr(cache, "_program", lambda: "later")
    audit(capsys, "zero.onnx")
    assert len(audits) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"$": "ModelReport"}', '{"$": "Nobody"}', "\udcff"])
def test_a_damaged_entry_is_no_entry(capsys, audits, text):
    expected = audit(capsys, "zero.onnx")
    (entry,) = Path("kept").glob("*.json")
    entry.write_text(text, "utf-8", "surrogateescape")
    assert audit(capsys, "zero.onnx") == expected
    assert len(audits) == 2


def test_unreadable_models_and_code_are_not_kept(capsys, audits, monkeypatch):
    Path("damaged.onnx").write_bytes(b"\x08\x07")
    Path("cache_net.py").write_text("import torch\nnet = torch.nn.Linear(64, 64)\n")
    monkeypatch.syspath_prepend(".")
    for _ in range(2):
        audit(capsys, "damaged.onnx", "cache_net:net")
    assert len(audits) == 4
    assert not Path("kept").exists()


def test_the_cache_is_bounded_and_keeps_what_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MOST_ENTRIES", 3)
    report = run_one("he_mlp.safetensors", Config())
    names = [tmp_path / "kept" / f"{letter}.json" for letter in "abcd"]
    for age, name in enumerate(names[:3]):
        cache.write(name, report)
        os.utime(name, (age, age))
    assert cache.read(names[0]) == report
    cache.write(names[3], report)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["a.json", "c.json", "d.json"]
    monkeypatch.setattr(cache, "MOST_BYTES", 10)
    cache.write(names[1], report)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_may_not_be_written_is_no_reason_to_fail(capsys, audits, monkeypatch):
    monkeypatch.setenv("INITAUDIT_CACHE_DIR", "/proc/none")
    assert audit(capsys, "zero.onnx")[0] == 1
    monkeypatch.setenv("INITAUDIT_CACHE_DIR", "")
    assert cache.folder() is None
    monkeypatch.delenv("INITAUDIT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/initaudit")


def test_runs_side_by_side_read_whole_entries_or_none(tmp_path):
    command = [sys.executable, "-m", "initaudit", "zero.onnx", "he_mlp.onnx", "--format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert len(set(outputs)) == 1
    assert {run.returncode for run in runs} == {1}
    assert all(json.loads(path.read_text())["$"] == "ModelReport" for path in (tmp_path / "kept").glob("*.json"))
    assert not list((tmp_path / "kept").glob(".*")), "no temporary file stays"


def test_a_cached_report_loads_nothing_heavy(capsys, tmp_path):
    audit(capsys, "he_mlp.onnx", "--format", "json:a.json")
    code = "import sys; from initaudit.cli import run; run(['he_mlp.onnx', '--format', 'json:b.json'])"
    code += "; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()


def test_every_field_of_the_configuration_is_in_the_key_or_known_to_stand_apart():
    assert set(cache._APART) <= {f.name for f in dataclasses.fields(Config)}
