"""The command line as its users meet it: exit statuses, options, outputs, mistakes. The audit itself is a stand-in here."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sample_report import deep_model, healthy_model

import initaudit.session
from initaudit import cli
from initaudit.config import Config
from initaudit.report.report import ModelReport
from initaudit.rules import Rule

ROOT = Path(__file__).parent.parent
SEEN: list[tuple[str, Config]] = []


def stand_in(source, config, progress=None):
    """bad* is a network that fails, warn* one with a warning, gone* cannot be read, all others are healthy."""
    SEEN.append((source, config))
    if progress is not None:
        progress(f"{source}: measuring")
    name = Path(source).name
    if name.startswith("gone"):
        return ModelReport(source, "unknown", error=f"{source}: no such file")
    if name.startswith("interrupt"):
        raise KeyboardInterrupt
    if name.startswith("crash"):
        raise ValueError("a fault of ours")
    if name.startswith(("bad", "warn")):
        severity = "error" if name.startswith("bad") else "warning"
        findings = tuple(dataclasses.replace(f, severity=severity) for f in deep_model().findings)
        return dataclasses.replace(deep_model(), source=source, findings=findings)
    return dataclasses.replace(healthy_model(), source=source)


class SampleRule(Rule):
    """Reports a signal that dies on the way.

    It is bad because no gradient comes back.
    """

    code, name, severity, phase, summary = "IA301", "forward-vanishing", "error", "init", "the second moment shrinks with depth"

    def check(self, evidence):
        return iter(())


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No real audit, no configuration but the test's own, two rules."""
    other = type("Other", (SampleRule,), {"code": "IA201", "name": "constant-weight", "__doc__": "Another."})
    monkeypatch.setattr(initaudit.session, "audit_one", stand_in)
    for module in ("initaudit.rules", "initaudit.rules.selection", "initaudit.report.as_sarif"):
        monkeypatch.setattr(f"{module}.all_rules", lambda: (other(), SampleRule()))
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    SEEN.clear()


def run(capsys, *arguments):
    status = cli.run(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["good"], 0),
        (["bad"], 1),
        (["warn"], 0),
        (["warn", "--strict"], 1),
        (["warn", "--fail-on", "warning"], 1),
        (["bad", "--fail-on", "never"], 0),
        (["bad", "--exit-zero"], 0),
        (["gone"], 2),
        (["gone", "--exit-zero"], 2),
        (["bad", "gone", "good"], 2),
        (["bad", "--ignore", "IA3"], 0),
        (["bad", "--select", "IA2"], 0),
        (["bad", "--select", "ia2,IA301"], 1),
        (["audit", "bad"], 1),
        (["--quiet", "bad"], 1),
        ([], 2),
        (["good", "--no-such-option"], 2),
        (["good", "--select", "IB1"], 2),
        (["good", "--select", ""], 0),
        (["good", "--phase", "old"], 2),
        (["good", "--input", "x"], 2),
        (["good", "--format", "txt"], 2),
        (["good", "--format", "text", "--format", "json"], 2),
        (["good", "--config", "none.toml"], 2),
        (["crash"], 2),
        (["interrupt"], 130),
        (["--help"], 0),
        (["--version"], 0),
        (["explain", "IA999"], 2),
        (["rules"], 0),
        (["config"], 0),
        (["completion", "bash"], 0),
    ],
)
def test_exit_status(capsys, arguments, status):
    got, _out, err = run(capsys, *arguments)
    assert got == status, err


def test_unreadable_models_get_one_line_each_and_the_others_their_report(capsys):
    status, out, err = run(capsys, "gone1", "bad", "gone2")
    assert status == 2
    assert err.splitlines() == ["initaudit: error: gone1: no such file", "initaudit: error: gone2: no such file"]
    assert "IA301 forward-vanishing" in out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["good", "--formt", "json"], "error: no such option '--formt'. Did you mean '--format'?"),
        (["compare", "good"], "missing argument 'SECOND'; `initaudit compare --help` shows what there is"),
        ([], "MODEL: none given, and none in a configuration file; `initaudit --help` shows examples"),
        (["good", "--dtype", "flot16"], "is not one of 'float16', 'bfloat16'"),
        (["good", "--select", "IA310"], "did you mean 'IA301'"),
        (["good", "--format", "sarfi"], "did you mean 'sarif'"),
        (["explain", "forward-vanish"], "did you mean 'forward-vanishing'"),
        (["gonemodel.onxn"], "did you mean 'gonemodel.onnx'"),
        (["good", "--phase", "trainde"], "trained"),
    ],
)
def test_mistakes_get_a_hint(capsys, tmp_path, arguments, hint):
    (tmp_path / "gonemodel.onnx").write_bytes(b"")
    status, _out, err = run(capsys, *arguments)
    assert status == 2
    assert hint in err
    assert len(err.splitlines()) == 1


def test_a_mistyped_command_is_hinted_at(capsys, monkeypatch):
    unread = ModelReport("rulse", "unknown", error="rulse: no such file")
    monkeypatch.setattr(initaudit.session, "audit_one", lambda *_: unread)
    assert "did you mean 'rules'" in run(capsys, "rulse")[2]


def test_options_reach_the_audit(capsys, tmp_path):
    Path("initaudit.toml").write_text('seed = 1\ninputs = {a = "1:int64"}\n')
    line = "--no-probe --phase trained --input x=2x3:float32 --data d.npz --loss --base b --arch m:N --device cpu "
    line += "--dtype float16 --probe-batch 4 --rehearse 3 --trust --extend-select IA2"
    assert run(capsys, "good", *shlex.split(line))[0] == 0
    config = SEEN[0][1]
    assert (config.probe, config.phase, config.data, config.loss, config.base) == (False, "trained", "d.npz", True, "b")
    assert (config.arch, config.device, config.dtype, config.probe_batch) == ("m:N", "cpu", "float16", 4)
    assert (config.rehearse, config.trust, config.extend_select, config.seed) == (3, True, ("IA2",), 1)
    assert dict(config.inputs) == {"a": "1:int64", "x": "2x3:float32"}


def test_without_models_those_of_the_configuration_are_audited(capsys):
    Path("initaudit.toml").write_text("[models.one]\nsource = 'good'\nseed = 5\n[models.two]\nsource = 'bad'\n")
    assert run(capsys)[0] == 1
    assert [(source, config.seed) for source, config in SEEN] == [("good", 5), ("bad", 0)]
    SEEN.clear()
    assert run(capsys, "one")[0] == 0
    assert SEEN[0][0] == "good"


def test_configured_ignores_and_severities_are_in_force(capsys):
    Path("initaudit.toml").write_text("[severity]\nIA301 = 'info'\n")
    assert run(capsys, "bad")[0] == 0
    Path("initaudit.toml").write_text("[[per-tensor-ignores]]\ntensors = 'layers.*'\nreason = 'known'\n")
    status, out, _ = run(capsys, "bad")
    assert status == 0
    assert "IA301" not in out


def test_several_outputs_at_once(capsys, tmp_path):
    status, out, _ = run(capsys, "bad", "--format", "text", "--format", "sarif:out.sarif", "--format", "junit:j.xml")
    assert status == 1
    assert "forward-vanishing" in out
    assert json.loads(Path("out.sarif").read_text())["version"] == "2.1.0"
    assert Path("j.xml").read_text().startswith("<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j.xml", "out.sarif"]


def test_output_replaces_its_own_target_whole_and_keeps_its_mode(capsys, tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old" * 100_000)
    target.chmod(0o640)
    status, out, _ = run(capsys, "good", "--format", "json", "--output", "report.json")
    assert (status, out) == (0, "")
    assert json.loads(target.read_text())["schema"] == "initaudit/1"
    assert target.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link.json"
    link.symlink_to(target)
    assert run(capsys, "bad", "--format", "json", "--output", "link.json")[0] == 1
    assert link.is_symlink()
    assert '"fail"' in target.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.txt", "--output", "good.txt"], "is what is to be audited"),
        (["good", "--output", "weights.onnx"], "an existing .onnx file"),
        (["good", "--output", "."], "a folder"),
        (["good", "--output", "none/x"], "no folder"),
        (["good", "--format", "json:"], "no file after the colon"),
        (["good", "--format", "json:a", "--format", "sarif:./a"], "two formats for one file"),
        (["good", "--format", "json:a", "--output", "b"], "has its file already"),
    ],
)
def test_no_output_destroys_anything(capsys, tmp_path, arguments, message):
    for name in ("weights.onnx", "good.txt"):
        (tmp_path / name).write_bytes(b"precious")
    status, _out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert not SEEN, "said before the work is done, not after"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(("weights.onnx", "good.txt"), b"precious")


def test_an_output_that_fails_leaves_the_others_written(capsys, tmp_path, monkeypatch):
    from initaudit.errors import UsageError
    from initaudit.report import write

    whole = write.write_whole

    def full_disk(file, text):
        if file.name == "a.json":
            raise UsageError(f"output {file}", "No space left on device")
        whole(file, text)

    monkeypatch.setattr(write, "write_whole", full_disk)
    status, out, err = run(capsys, "bad", "--format", "json:a.json", "--format", "sarif:b.sarif", "--format", "text")
    assert (status, err) == (2, "initaudit: error: output a.json: No space left on device\n")
    assert "forward-vanishing" in out
    assert [p.name for p in tmp_path.iterdir()] == ["b.sarif"]


def test_the_same_model_twice_is_audited_once(capsys):
    assert run(capsys, "bad", "good", "bad")[1].count("2 models: 1 pass, 1 fail") == 1
    assert [source for source, _ in SEEN] == ["bad", "good"]


def test_explain_lists_the_rules_of_a_family(capsys):
    status, out, _ = run(capsys, "explain", "ia")
    assert status == 0
    assert re.findall(r"^IA\d{3}", out, re.M) == ["IA201", "IA301"]


def test_an_interrupt_leaves_the_old_output_and_no_rest(capsys, tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    target.write_text("old")

    def stop(*_):
        raise KeyboardInterrupt

    assert run(capsys, "interrupt", "--format", "json:out.json")[0] == 130
    monkeypatch.setattr(os, "replace", stop)
    assert run(capsys, "good", "--format", "json:out.json")[0] == 130
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "old"


def test_a_device_is_written_to_and_not_replaced(capsys):
    assert run(capsys, "good", "--output", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "0"}, False), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colour_where_it_is_wanted(capsys, monkeypatch, environment, coloured):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in run(capsys, "bad")[1]) is coloured


def test_quiet_verbose_and_statistics(capsys):
    assert run(capsys, "good", "--quiet")[1] == ""
    assert "117 more like these" in run(capsys, "bad")[1]
    for option in ("--verbose", "--show-healthy"):
        assert "layers.60.weight" in run(capsys, "bad", option)[1]
    assert re.search(r"1  IA301  forward-vanishing", run(capsys, "bad", "--statistics")[1])


def test_help_fits_a_screen_and_names_only_what_exists(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert len(out.splitlines()) <= 42
    assert max(map(len, out.splitlines())) <= 80
    known = {opt for parameter in cli.cli.commands["audit"].params for opt in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"--[a-z-]+", out)) <= known | {"--help", "--version"}
    listed = re.findall(
        r"^  ([a-z]+) {3,}\S.*?(?: {3,}([a-z]+) {2,}\S.*)?$", out.partition("Commands:")[2].partition("\n\n")[0], re.M
    )
    assert {name for pair in listed for name in pair if name} == set(cli.cli.commands) - {"audit"}
    from initaudit.report import formats

    assert all(name in out for name in formats())


def test_rules_explain_and_config_speak(capsys):
    assert "IA301" in run(capsys, "rules")[1]
    assert json.loads(run(capsys, "rules", "--format", "json")[1])[1]["code"] == "IA301"
    page = run(capsys, "explain", "ia301")[1]
    assert "no gradient comes back" in page
    assert "Fires when the second moment shrinks with depth." in page
    Path("initaudit.toml").write_text("seed = 4\n")
    table = run(capsys, "config", "--strict")[1]
    assert re.search(r"seed +4 +.*initaudit.toml", table)
    assert re.search(r"strict +true +command line \(--strict\)", table)
    assert re.search(r"jobs +1 +default", table)


def test_baseline_accepts_what_there_is_and_fails_on_what_is_new(capsys):
    status, out, _ = run(capsys, "baseline", "write", "bad", "--reason", "legacy")
    assert (status, out) == (0, "initaudit-baseline.json: 1 accepted, 1 of them new\n")
    entry = json.loads(Path("initaudit-baseline.json").read_text())["findings"][0]
    assert entry["reason"] == "legacy"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert run(capsys, "baseline", "check", "bad")[0] == 0
    status, out, _ = run(capsys, "bad", "--baseline", "initaudit-baseline.json")
    assert status == 0
    assert "no new findings, 1 accepted in the baseline" in " ".join(out.split())
    assert run(capsys, "baseline", "check", "bad2")[0] == 1
    assert run(capsys, "baseline", "write", "bad")[1].endswith("1 accepted, 0 of them new\n")


def test_baseline_reports_and_forgets_what_has_gone(capsys, monkeypatch):
    run(capsys, "baseline", "write", "bad")
    monkeypatch.setattr(initaudit.session, "audit_one", lambda source, *_: dataclasses.replace(healthy_model(), source=source))
    status, out, _ = run(capsys, "baseline", "check", "bad")
    assert status == 0
    assert "gone: IA301 layers.0.weight in bad" in out
    assert run(capsys, "baseline", "prune", "bad")[1] == "initaudit-baseline.json: 0 accepted, 1 forgotten\n"


def test_baseline_of_an_unreadable_model_keeps_its_entries(capsys, monkeypatch):
    run(capsys, "baseline", "write", "bad")
    monkeypatch.setattr(
        initaudit.session, "audit_one", lambda source, *_: ModelReport(source, "unknown", error=f"{source}: broken")
    )
    assert run(capsys, "baseline", "prune", "bad")[:2] == (2, "initaudit-baseline.json: 1 accepted, 0 forgotten\n")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "initaudit-baseline/1", "findings": [{"code": 1}]}'])
def test_what_is_no_baseline_is_not_replaced(capsys, text):
    Path("initaudit-baseline.json").write_text(text)
    status, _out, err = run(capsys, "baseline", "write", "bad")
    assert status == 2
    assert "not a baseline" in err
    assert Path("initaudit-baseline.json").read_text() == text


def test_baseline_must_exist_to_be_checked(capsys):
    status, _out, err = run(capsys, "baseline", "check", "bad")
    assert status == 2
    assert "baseline write" in err


def test_compare_shows_what_came_and_went(capsys):
    status, out, _ = run(capsys, "compare", "good", "bad")
    assert status == 1
    assert re.search(r"^\+ error +IA301", out, re.M)
    assert run(capsys, "compare", "bad", "good")[0] == 0
    assert "no finding came or went" in run(capsys, "compare", "bad", "bad")[1]
    document = json.loads(run(capsys, "compare", "good", "bad", "--format", "json")[1])
    assert [finding["code"] for finding in document["appeared"]] == ["IA301"]
    assert run(capsys, "compare", "good", "gone")[0] == 2


def test_watch_audits_again_when_a_file_changes(capsys, monkeypatch, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"1")
    runs = []

    def audit(command, check):
        runs.append(command)
        if len(runs) == 3:
            raise KeyboardInterrupt
        file.write_bytes(b"1" * (len(runs) + 1))

    monkeypatch.setattr(subprocess, "run", audit)
    monkeypatch.setattr(sys, "argv", ["initaudit", "model.onnx", "--watch", "--strict"])
    assert run(capsys, "model.onnx", "--watch", "--strict")[0] == 130
    assert runs[0][1:] == ["-m", "initaudit", "model.onnx", "--strict"]


def test_an_internal_error_is_no_finding(capsys):
    status, out, err = run(capsys, "crash", "bad")
    assert status == 2
    assert "ValueError: a fault of ours" in err
    assert "internal error" in err
    assert "IA301" in out, "the others are audited"


def test_every_shell_gets_its_completion(capsys):
    from click.shell_completion import ShellComplete

    for shell in cli.SHELLS:
        assert "_INITAUDIT_COMPLETE" in run(capsys, "completion", shell)[1]
    complete = ShellComplete(cli.cli, {}, "initaudit", "_INITAUDIT_COMPLETE")
    assert "rules" in [item.value for item in complete.get_completions([], "ru")]
    assert "file" in [item.type for item in complete.get_completions([], "mod")]
    assert "--format" in [item.value for item in complete.get_completions(["model.onnx"], "--fo")]
    assert "--format" in [item.value for item in complete.get_completions([], "--fo")]
