"""What was asked for: one frozen record, filled from a configuration file and the command line, and where each value is from.

The file is `initaudit.toml`, or `[tool.initaudit]` in `pyproject.toml`, whichever is nearest upwards from the working
directory (in one folder the first wins). The command line wins over the file. Relative paths in a file are relative to it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from initaudit.errors import UsageError
from initaudit.suggest import did_you_mean

PHASES = ("auto", "init", "trained")
FAIL_ON = ("error", "warning", "info", "never")
SEVERITIES = ("error", "warning", "info")
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Ignore:
    """Findings with one of `codes` (prefixes; empty: all) about a tensor or site matching the glob `tensors` are dropped."""

    tensors: str
    codes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class NamedModel:
    """A model that the configuration names: `initaudit NAME` audits `source` with these values over the common ones."""

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """The configuration in force.

    `inputs` maps an input's name to "2x3x224x224:float32". `origin` maps a field's name to where its value came from; what it
    does not name has its default.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    extend_select: tuple[str, ...] = ()
    strict: bool = False
    fail_on: Literal["error", "warning", "info", "never"] = "error"
    phase: Literal["auto", "init", "trained"] = "auto"
    probe: bool = True
    inputs: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None
    loss: bool = False
    jvp: bool = False
    base: str | None = None
    arch: str | None = None
    device: str = "auto"
    dtype: str | None = None
    seed: int = 0
    probe_batch: int | None = None
    probe_seeds: int = 1
    per_tensor_ignores: tuple[Ignore, ...] = ()
    severity: Mapping[str, Literal["error", "warning", "info"]] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, NamedModel] = field(default_factory=dict)
    baseline: str | None = None
    rehearse: int = 0
    trust: bool = False
    jobs: int = 1
    cache: bool = True
    origin: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def failing(self) -> tuple[str, ...]:
        """The severities that make the exit status 1. `strict` raises warnings to the failing level."""
        level = "warning" if self.strict and self.fail_on == "error" else self.fail_on
        return () if level == "never" else SEVERITIES[: SEVERITIES.index(level) + 1]

    def wants(self, code: str) -> bool:
        """Whether findings of this rule are asked for. The longest matching prefix wins; at equal length `ignore` does."""
        chosen = max((len(p) for p in (*self.select, *self.extend_select) if code.startswith(p)), default=-1)
        dropped = max((len(p) for p in self.ignore if code.startswith(p)), default=-1)
        if chosen < 0 and not self.select:
            chosen = 0
        return chosen >= 0 and chosen > dropped

    def ignored(self, code: str, *names: str) -> Ignore | None:
        """The per-tensor ignore that covers a finding about these names (tensor, site), or None."""
        from fnmatch import fnmatchcase

        for entry in self.per_tensor_ignores:
            if (not entry.codes or code.startswith(entry.codes)) and any(fnmatchcase(n, entry.tensors) for n in names if n):
                return entry
        return None

    def for_model(self, source: str) -> tuple[str, Config]:
        """The source to audit and its configuration, where `source` may be a name of `models`."""
        named = self.models.get(source)
        if named is None:
            return source, self
        # The command line still wins over what the file says about one model.
        values = {k: v for k, v in named.values.items() if not self.origin.get(k, "").startswith("command line")}
        place = self.origin.get("models", "")
        origin = {**self.origin, **dict.fromkeys(values, f"{place} [models.{source}]")}
        return named.source, dataclasses.replace(self, **values, origin=origin)


def load_config(start: Path | None = None, overrides: Mapping[str, Any] | None = None, file: Path | None = None) -> Config:
    """The configuration for a run started in `start` (default: the working directory).

    `overrides` are fields with the options that set them, {"seed": (1, "--seed")}; `file` names the configuration file and
    keeps others from being looked for. Raises `UsageError` for a key or a value that means nothing.
    """
    path = file if file is not None else _nearest(start if start is not None else Path.cwd())
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if path is not None:
        for key, value in _read_table(path).items():
            name, parsed = _parse(key, value, path, _KEYS)
            values[name] = parsed
            origin[name] = str(path)
    for name, (value, option) in (overrides if overrides is not None else {}).items():
        values[name] = value
        origin[name] = f"command line ({option})"
    return Config(**values, origin=origin)


def key_of(name: str) -> str:
    """How a field is spelled in a configuration file."""
    return name.replace("_", "-")


def _nearest(start: Path) -> Path | None:
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "initaudit.toml").is_file():
            return folder / "initaudit.toml"
        project = folder / "pyproject.toml"
        if project.is_file() and "tool.initaudit" in project.read_text(encoding="utf-8", errors="replace"):
            return project
    return None


def _read_table(path: Path) -> Mapping[str, Any]:
    try:
        table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(str(path), error.strerror or type(error).__name__, advice="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(str(path), f"not valid TOML: {error}") from error
    if path.name == "pyproject.toml":
        tool = table.get("tool", {})
        table = tool.get("initaudit", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [tool.initaudit]", f"a {type(table).__name__}", "a table")
    return table


Parser = Callable[[Any, str, Path], Any]


def _parse(key: str, value: Any, path: Path, keys: Mapping[str, Parser]) -> tuple[str, Any]:
    if key == "trust":
        # A file that came with somebody's checkpoint must not be able to say that it is to be trusted.
        raise UsageError(f"{path}: trust", "trust is given on the command line only", advice="use --trust")
    if key not in keys:
        raise UsageError(f"{path}: {key}", "unknown key", advice=did_you_mean(key, keys) or "see docs/configuration.md")
    return key.replace("-", "_"), keys[key](value, f"{path}: {key}", path.parent)


def _of(kind: type, label: str) -> Parser:
    def parse(value: Any, where: str, folder: Path) -> Any:
        # TOML's true is an int to Python; a seed of `true` is a mistake.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(where, f"{value!r}", label)
        return value

    return parse


_text, _bool, _int = _of(str, "a string"), _of(bool, "true or false"), _of(int, "a whole number")


def _count(least: int) -> Parser:
    def parse(value: Any, where: str, folder: Path) -> Any:
        if _int(value, where, folder) < least:
            raise UsageError(where, f"{value}", f"at least {least}")
        return value

    return parse


def _choice(options: tuple[str, ...]) -> Parser:
    def parse(value: Any, where: str, folder: Path) -> Any:
        if value not in options:
            raise UsageError(where, f"{value!r}", f"one of {', '.join(options)}", did_you_mean(str(value), options))
        return value

    return parse


def _texts(value: Any, where: str, folder: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(where, f"{value!r}", "a list of strings")
    return tuple(value)


def _path(value: Any, where: str, folder: Path) -> str:
    text: str = _text(value, where, folder)
    return text if "://" in text else str(folder / text)


def _source(value: Any, where: str, folder: Path) -> str:
    """A model: a path where there is such a file beside the configuration, else a URL or an importable name as it is."""
    text: str = _text(value, where, folder)
    return str(folder / text) if (folder / text).exists() else text


def _mapping(item: Parser) -> Parser:
    def parse(value: Any, where: str, folder: Path) -> Any:
        if not isinstance(value, dict):
            raise UsageError(where, f"{value!r}", "a table")
        return {name: item(part, f"{where}.{name}", folder) for name, part in value.items()}

    return parse


def _number(value: Any, where: str, folder: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(where, f"{value!r}", "a number")
    return float(value)


def _thresholds(value: Any, where: str, folder: Path) -> Mapping[str, float]:
    """Numbers by "IA306.slope"; without quotes TOML reads that as a table of its own, {IA306 = {slope = ...}}."""
    if not isinstance(value, dict):
        raise UsageError(where, f"{value!r}", "a table")
    found: dict[str, float] = {}
    for key, part in value.items():
        inner = {f"{key}.{name}": number for name, number in part.items()} if isinstance(part, dict) else {key: part}
        found |= {name: _number(number, f"{where}.{name}", folder) for name, number in inner.items()}
    return found


def _ignores(value: Any, where: str, folder: Path) -> tuple[Ignore, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError(where, f"{value!r}", "an array of tables with tensors, codes and reason")
    keys: dict[str, Parser] = {"tensors": _text, "codes": _texts, "reason": _text}
    entries = []
    for index, item in enumerate(value):
        parsed = {}
        for key, part in item.items():
            if key not in keys:
                raise UsageError(f"{where}[{index}].{key}", "unknown key", "one of " + ", ".join(keys), did_you_mean(key, keys))
            parsed[key] = keys[key](part, f"{where}[{index}].{key}", folder)
        for needed in ("tensors", "reason"):
            if not parsed.get(needed):
                raise UsageError(f"{where}[{index}]", f"no {needed}", "tensors (a glob) and a reason; codes if not all")
        entries.append(Ignore(**parsed))
    return tuple(entries)


def _models(value: Any, where: str, folder: Path) -> Mapping[str, NamedModel]:
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise UsageError(where, f"{value!r}", "a table for each model, with at least source")
    models = {}
    for name, table in value.items():
        values = {}
        for key, part in table.items():
            if key not in _MODEL_KEYS:
                raise UsageError(
                    f"{where}.{name}.{key}", "unknown key", advice=did_you_mean(key, _MODEL_KEYS) or "a model needs 'source'"
                )
            values[key.replace("-", "_")] = _MODEL_KEYS[key](part, f"{where}.{name}.{key}", folder)
        if "source" not in values:
            raise UsageError(f"{where}.{name}", "no source", "source = a path, a URL or package.module:callable")
        models[name] = NamedModel(values.pop("source"), values)
    return models


# What may differ from model to model; the rest belongs to the run.
_MODEL_KEYS: dict[str, Parser] = {
    "source": _source,
    "select": _texts,
    "ignore": _texts,
    "extend-select": _texts,
    "phase": _choice(PHASES),
    "probe": _bool,
    "inputs": _mapping(_text),
    "data": _path,
    "loss": _bool,
    "jvp": _bool,
    "base": _source,
    "arch": _text,
    "device": _text,
    "dtype": _choice(DTYPES),
    "seed": _int,
    "probe-batch": _count(1),
    "probe-seeds": _count(1),
    "per-tensor-ignores": _ignores,
    "severity": _mapping(_choice(SEVERITIES)),
    "thresholds": _thresholds,
    "rehearse": _count(0),
}

_KEYS: dict[str, Parser] = {
    **{key: parser for key, parser in _MODEL_KEYS.items() if key != "source"},
    "strict": _bool,
    "fail-on": _choice(FAIL_ON),
    "models": _models,
    "baseline": _path,
    "jobs": _count(1),
    "cache": _bool,
}
