"""Thresholds of the configuration: declared by the rules, in force where they are given, named where they do not exist."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import initaudit
from initaudit import cli
from initaudit.auditing.run import gather
from initaudit.cache import entry_of
from initaudit.config import Config, load_config
from initaudit.errors import UsageError
from initaudit.load import from_module
from initaudit.rules import all_rules
from initaudit.rules.selection import check_config

RULES = {rule.code: rule for rule in all_rules()}
DECLARED = [(rule, threshold) for rule in all_rules() for threshold in type(rule).thresholds]
ROOT = Path(__file__).parent.parent

# code: what silences its first invalid example, what makes its first valid one fire
TABLE = {
    "IA301": ({"warning": 0, "error": 0}, {"warning": 1e9}),
    "IA302": ({"warning": math.inf, "error": math.inf}, {"warning": 0.1}),
    "IA303": ({"warning": 0, "error": 0}, {"warning": 1e9}),
    "IA304": ({"warning": math.inf, "error": math.inf}, {"warning": 1e-9}),
    "IA305": ({"share": 2}, {"share": -1}),
    "IA306": ({"slope": 0, "always": 1}, {"slope": 1.1}),
    "IA310": ({"times": 1e9}, {"times": 0, "nats": -100}),
    "IA312": ({"span": 1e12}, {"span": 1}),
    "IA205": ({"rank": 0}, {"rank": 2}),
}


def fires(code, example, values):
    module, inputs = example.build()
    config = Config(phase="init", thresholds={f"{code}.{name}": value for name, value in values.items()})
    check_config(config)
    return bool(list(RULES[code].check(gather(from_module(module), config, inputs=inputs))))


@pytest.mark.parametrize("code", TABLE)
def test_a_threshold_decides_in_both_directions(code):
    silent, loud = TABLE[code]
    assert not fires(code, RULES[code].invalid()[0], silent)
    assert fires(code, RULES[code].valid()[0], loud)


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_threshold_moves_the_severity(level):
    module, inputs = RULES["IA303"].invalid()[0].build()
    limits = {"IA303.warning": 1.0, "IA303.error": 1.0 if level == "error" else 0.0}
    found = list(RULES["IA303"].check(gather(from_module(module), Config(phase="init", thresholds=limits), inputs=inputs)))
    assert [f.severity for f in found] == [level]


@pytest.mark.parametrize(("rule", "threshold"), DECLARED, ids=[f"{r.code}.{t.name}" for r, t in DECLARED])
def test_every_threshold_is_documented_and_read(rule, threshold):
    assert math.isfinite(threshold.default)
    assert re.fullmatch(r"[a-z][a-z-]*", threshold.name)
    assert threshold.unit
    assert threshold.source
    page = (ROOT / "docs" / "rules" / f"{rule.code}.md").read_text("utf-8")
    assert f"| `{rule.code}.{threshold.name}` | {threshold.default:g} |" in page
    # Declared and never asked for would be a promise that nothing keeps.
    read = Path(ROOT, *type(rule).__module__.split(".")).with_suffix(".py").read_text("utf-8")
    shared = (ROOT / "initaudit" / "rules" / "health.py").read_text("utf-8")
    assert f'self.limit(evidence, "{threshold.name}")' in read or f'of("{rule.code}"' in shared


def test_names_are_unique():
    names = [f"{rule.code}.{threshold.name}" for rule, threshold in DECLARED]
    assert len(names) == len(set(names)) >= 20


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("IA306.slop", "did you mean 'IA306.slope'"),
        ("ia306.slope", "did you mean 'IA306.slope'"),
        ("IA312.zzzzzzzzzzz", "one of IA312.span"),
        ("gradient-floor", "`initaudit explain CODE` lists them"),
    ],
)
def test_an_unknown_threshold_is_an_error(tmp_path, name, hint):
    (tmp_path / "initaudit.toml").write_text(f'thresholds = {{ "{name}" = 1 }}\n')
    config = load_config(tmp_path)
    with pytest.raises(UsageError, match=re.escape(hint)) as caught:
        check_config(config)
    assert f"thresholds.{name}" in str(caught.value)
    with pytest.raises(UsageError, match=re.escape(hint)):
        initaudit.audit(str(ROOT / "fixtures" / "good" / "he_mlp.onnx"), config={"thresholds": {name: 1}})
    (tmp_path / "initaudit.toml").write_text(f'[models.a]\nsource = "x"\nthresholds = {{ "{name}" = 1 }}\n')
    with pytest.raises(UsageError, match=r"models\.a\.thresholds"):
        check_config(load_config(tmp_path))


def test_toml_with_and_without_quotes_is_the_same(tmp_path):
    for text in ('"IA306.slope" = 0.2\n', "IA306.slope = 0.2\n"):
        (tmp_path / "initaudit.toml").write_text("[thresholds]\n" + text)
        assert dict(load_config(tmp_path).thresholds) == {"IA306.slope": 0.2}


def test_the_command_shows_and_obeys_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("initaudit.toml").write_text("[thresholds]\nIA303.warning = 1e9\n")
    assert cli.run(["config"]) == 0
    assert "IA303.warning = 1000000000.0" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["explain", "IA303"]) == 0
    assert "IA303.warning = 1e-06" in capsys.readouterr().out
    model = str(ROOT / "fixtures" / "good" / "he_mlp.onnx")
    cli.run([model, "--strict"])
    assert "IA303" in capsys.readouterr().out
    Path("initaudit.toml").write_text("[thresholds]\nIA303.waring = 1\n")
    assert cli.run([model]) == 2
    assert "did you mean 'IA303.warning'" in capsys.readouterr().err


def test_a_threshold_is_part_of_the_key_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INITAUDIT_CACHE_DIR", str(tmp_path))
    model = str(ROOT / "fixtures" / "good" / "he_mlp.onnx")
    keys = {entry_of(model, Config(thresholds=values)) for values in ({}, {"IA306.slope": 0.2}, {"IA306.slope": 0.1})}
    assert len(keys) == 3
