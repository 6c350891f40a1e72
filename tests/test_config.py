"""Configuration: the nearest file, the command line over it, every mistake named with what was meant."""

from __future__ import annotations

import dataclasses
import re

import pytest

from initaudit.config import Config, Ignore, load_config
from initaudit.errors import UsageError


def write(folder, text, name="initaudit.toml"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_without_a_file_everything_has_its_default(tmp_path):
    assert load_config(tmp_path) == Config()


def test_the_nearest_file_upwards_is_read(tmp_path):
    write(tmp_path, "seed = 1")
    write(tmp_path / "a", "[tool.initaudit]\nseed = 2\n[tool.other]\nseed = 9\n", "pyproject.toml")
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    write(tmp_path / "a" / "b", "[tool.other]\nx = 1\n", "pyproject.toml")
    assert load_config(deep).seed == 2
    assert load_config(tmp_path).seed == 1
    write(tmp_path / "a", "seed = 3")
    assert load_config(deep).seed == 3, "initaudit.toml wins over the pyproject.toml beside it"


def test_the_command_line_wins_and_says_so(tmp_path):
    write(tmp_path, "seed = 1\nstrict = true")
    config = load_config(tmp_path, {"seed": (7, "--seed")})
    assert (config.seed, config.strict, config.phase) == (7, True, "auto")
    assert config.origin["seed"] == "command line (--seed)"
    assert config.origin["strict"] == str(tmp_path / "initaudit.toml")
    assert "phase" not in config.origin


def test_every_key_is_read(tmp_path):
    write(
        tmp_path,
        """
select = ["IA1"]
ignore = ["IA109"]
extend-select = ["IA201"]
strict = true
fail-on = "warning"
phase = "init"
probe = false
inputs = {x = "2x3:float32"}
data = "batch.npz"
loss = true
jvp = true
base = "base.safetensors"
arch = "pkg:Net"
device = "cpu"
dtype = "float16"
seed = 3
probe-batch = 8
probe-seeds = 2
severity = {IA106 = "error"}
thresholds = {depth = 2}
baseline = "known.json"
rehearse = 5
jobs = 2
cache = false
[[per-tensor-ignores]]
tensors = "head.*"
codes = ["IA201"]
reason = "starts at zero on purpose"
[models.small]
source = "pkg:small"
seed = 9
inputs = {ids = "2x8:int64"}
""",
    )
    config = load_config(tmp_path)
    unset = {field.name for field in dataclasses.fields(Config) if getattr(config, field.name) == getattr(Config(), field.name)}
    assert unset == {"trust"} | ({"origin"} & unset)
    assert config.data == str(tmp_path / "batch.npz"), "a path in a file is relative to the file"
    assert config.per_tensor_ignores == (Ignore("head.*", ("IA201",), "starts at zero on purpose"),)
    source, small = config.for_model("small")
    assert (source, small.seed, dict(small.inputs), small.phase) == ("pkg:small", 9, {"ids": "2x8:int64"}, "init")
    assert small.origin["seed"].endswith("[models.small]")
    assert config.for_model("other.onnx") == ("other.onnx", config)


def test_the_command_line_wins_over_what_the_file_says_about_one_model(tmp_path):
    write(tmp_path, '[models.small]\nsource = "pkg:small"\nseed = 9\n')
    assert load_config(tmp_path, {"seed": (4, "--seed")}).for_model("small")[1].seed == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead = 1", "sead: unknown key; did you mean 'seed'"),
        ("extend_select = []", "did you mean 'extend-select'"),
        ("zzzzzz = 1", "unknown key; see docs/configuration.md"),
        ("seed = true", "seed: True; expected a whole number"),
        ('seed = "1"', "expected a whole number"),
        ("strict = 1", "expected true or false"),
        ('select = "IA1"', "expected a list of strings"),
        ('phase = "trainde"', "expected one of auto, init, trained; did you mean 'trained'"),
        ("probe-batch = 0", "expected at least 1"),
        ("jobs = 0", "expected at least 1"),
        ("inputs = 3", "inputs: 3; expected a table"),
        ("inputs = {x = 3}", "inputs.x: 3; expected a string"),
        ('severity = {IA101 = "bad"}', "expected one of error, warning, info"),
        ('thresholds = {x = "1"}', "expected a number"),
        ("trust = true", "command line only"),
        ("[[per-tensor-ignores]]\ntensors = 'a'", "no reason"),
        ("[[per-tensor-ignores]]\ntensor = 'a'", "did you mean 'tensors'"),
        ("per-tensor-ignores = 3", "an array of tables"),
        ("[models.a]\nseed = 1", "models.a: no source"),
        ("[models.a]\nsource = 'x'\nsede = 1", "models.a.sede: unknown key; did you mean 'seed'"),
        ("models = 3", "a table for each model"),
        ("= 3", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_config(tmp_path)
    assert "initaudit.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_config(file=tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {"IA101": True, "IA301": True}),
        ({"select": ("IA1",)}, {"IA101": True, "IA301": False}),
        ({"select": ("IA1",), "extend_select": ("IA301",)}, {"IA101": True, "IA301": True, "IA302": False}),
        ({"ignore": ("IA3",)}, {"IA101": True, "IA301": False}),
        ({"ignore": ("IA3",), "select": ("IA301",)}, {"IA101": False, "IA301": True, "IA302": False}),
        ({"select": ("IA",), "ignore": ("IA101",)}, {"IA101": False, "IA102": True}),
        ({"select": ("IA101",), "ignore": ("IA101",)}, {"IA101": False}),
        ({"ignore": ("IA3",), "extend_select": ("IA301",)}, {"IA101": True, "IA301": True, "IA302": False}),
    ],
)
def test_the_longest_prefix_decides(fields, wanted):
    config = Config(**fields)
    assert {code: config.wants(code) for code in wanted} == wanted


@pytest.mark.parametrize(
    ("fields", "failing"),
    [
        ({}, ("error",)),
        ({"strict": True}, ("error", "warning")),
        ({"fail_on": "warning"}, ("error", "warning")),
        ({"fail_on": "info"}, ("error", "warning", "info")),
        ({"fail_on": "info", "strict": True}, ("error", "warning", "info")),
        ({"fail_on": "never"}, ()),
        ({"fail_on": "never", "strict": True}, ()),
    ],
)
def test_failing_levels(fields, failing):
    assert Config(**fields).failing == failing


def test_per_tensor_ignores_match_tensor_or_site_by_glob():
    config = Config(per_tensor_ignores=(Ignore("head.*", ("IA2",), "why"), Ignore("/norm/*", (), "all")))
    assert config.ignored("IA201", "head.weight", "") is not None
    assert config.ignored("IA101", "head.weight", "") is None
    assert config.ignored("IA101", "w", "/norm/Mul") is not None
    assert config.ignored("IA201", "", "") is None
