"""Thresholds of the configuration: declared by the rules, in force where they are given, named where they do not exist."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

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
    "IA101": ({"ratio": 0}, None),
    "IA102": ({"ratio": 1e9}, None),
    "IA103": ({"IA101.ratio": 0, "IA102.ratio": 1e9}, None),
    "IA104": ({"fans": 1e9}, None),
    "IA106": ({"branches": 1e9}, None),
    "IA107": ({"share": 1e9}, None),
    "IA108": ({"far": 1e9}, None),
    "IA109": ({"factor": 1e9}, None),
    "IA111": ({"share": 1}, None),
    "IA202": ({"share": 2}, None),
    "IA204": ({"units": 1e9}, None),
    "IA206": ({"share": 2, "bit": 2, "gap": 99, "least": 0}, {"bit": 0}),
}


# Healthy by default, by code: what makes the model, what is given, and the severity of the finding that comes of it. The
# networks are He's but for one small oddity each.
LOUD = {
    "IA101": (lambda: he(spread=0.85**0.5), {"IA101.ratio": 0.9, "IA301.warning": 1e9}),
    "IA102": (lambda: he(spread=1.2**0.5), {"IA102.ratio": 1.1, "IA302.warning": 0.1}),
    "IA107": (lambda: he(mean=0.025), {"IA107.share": 0.1}),
    "IA108": (lambda: he(pinned=8), {"IA108.far": 7}),
    "IA109": (lambda: he(odd=1.3), {"IA109.factor": 1.2}),
    "IA111": (lambda: he(biases=3), {"IA111.share": 0.01, "IA111.mean": 0}),
    "IA202": (lambda: he(copies=1), {"IA202.share": 0.01}),
    "IA204": (lambda: he(zeros=1), {"IA204.units": 1}),
    "IA403": (RULES["IA403"].valid()[0].build, {"IA403.near": 1e9}),
}


def he(*, spread=1.0, mean=0.0, pinned=0.0, odd=1.0, biases=0, copies=0, zeros=0):
    """Eight layers of ReLU with He's variance, of which the fourth is odd where it is asked for."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(8)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())], nn.Linear(64, 5))
    std = spread * math.sqrt(2 / 64)
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, std)
            layer.bias.zero_()
        fourth, fifth = layers[3], layers[4]
        fourth.weight.mul_(odd).add_(mean)
        if pinned:
            fourth.weight.view(-1)[[7, 1007]] = -pinned * std
        fourth.bias[:biases] = -9.0
        for i in range(copies):
            fourth.weight[-1 - i] = fourth.weight[i]
            fifth.weight[:, -1 - i] = fifth.weight[:, i]
        fourth.weight[:zeros] = 0.0
    return model, (torch.randn(32, 64),)


@pytest.mark.parametrize("code", LOUD)
def test_a_threshold_makes_a_small_oddity_a_finding(code):
    build, limits = LOUD[code]
    module, inputs = build()
    found = [
        list(RULES[code].check(gather(from_module(module), Config(phase="init", thresholds=given), inputs=inputs)))
        for given in ({}, {name: value for name, value in limits.items() if not name.startswith(code)}, limits)
    ]
    assert [bool(each) for each in found] == [False, False, True]


def test_what_decides_between_base_and_stranger(tmp_path):
    torch.manual_seed(0)
    base = {f"{i}.weight": torch.randn(64, 64) for i in range(5)}
    new = {**base, "0.weight": torch.randn(64, 64)}
    paths = [tmp_path / "base.safetensors", tmp_path / "new.safetensors"]
    for path, state in zip(paths, (base, new), strict=True):
        save_file(state, path)
    severity = {}
    for along in (4, 5):
        audit = initaudit.audit(str(paths[1]), config={"base": str(paths[0]), "thresholds": {"IA602.along": along}})
        severity[along] = [f.severity for f in audit.findings if f.code == "IA602"]
    assert severity == {4: ["warning"], 5: ["info"]}


def fires(code, example, values):
    module, inputs = example.build()
    given = {name if "." in name else f"{code}.{name}": value for name, value in values.items()}
    config = Config(phase="init", thresholds=given)
    check_config(config)
    return bool(list(RULES[code].check(gather(from_module(module), config, inputs=inputs))))


@pytest.mark.parametrize("code", TABLE)
def test_a_threshold_decides_in_both_directions(code):
    silent, loud = TABLE[code]
    assert not fires(code, RULES[code].invalid()[0], silent)
    if loud is None:
        assert code in LOUD or code in ("IA103", "IA104", "IA106"), "these need a model of their own"
    else:
        assert fires(code, RULES[code].valid()[0], loud)


@pytest.mark.parametrize(("name", "value"), [("share", 2), ("near", 0)])
def test_rounding_to_zero_is_silenced_but_not_small_gradients(name, value):
    module, inputs = RULES["IA403"].invalid()[0].build()
    config = Config(phase="init", thresholds={f"IA403.{name}": value})
    found = list(RULES["IA403"].check(gather(from_module(module), config, inputs=inputs)))
    assert {f.severity for f in found} <= {"info"}


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
    shared = "".join((ROOT / "initaudit" / "rules" / name).read_text("utf-8") for name in ("health.py", "variance.py"))
    here = f'self.limit(evidence, "{threshold.name}")' in read
    assert here or f'of("{rule.code}"' in shared or f'"{rule.code}.{threshold.name}"' in shared


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
