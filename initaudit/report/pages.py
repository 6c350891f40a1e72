"""The pages about the tool itself: the list of rules, the page of one, the configuration in force."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from initaudit.config import Config, NamedModel, key_of
from initaudit.report.style import Style, escape, wrap
from initaudit.rules.rule import Rule


def rule_table(rules: Iterable[Rule], width: int) -> str:
    """One rule a line: code, name, the highest severity, the phase it judges, and when it fires."""
    from tabulate import tabulate

    heads = ["code", "name", "severity", "phase", "fires when"]
    rows = [[rule.code, rule.name, rule.severity, rule.phase, rule.summary] for rule in rules]
    # tabulate leaves two columns behind each cell, and makes none narrower than its head and two more.
    used = sum(max(len(heads[i]) + 2, *(len(row[i]) for row in rows)) + 2 for i in range(4))
    for row in rows:
        row[4] = textwrap.fill(row[4], max(16, width - used))
    return str(tabulate(rows, headers=heads, tablefmt="plain"))


def terminal_page(rule: Rule, style: Style) -> str:
    """The page of a rule for a terminal."""
    head = f"{rule.code} {rule.name}"
    facts = f"severity: up to {rule.severity}   judges: {_PHASES[rule.phase]}"
    fires = wrap(f"Fires when {rule.summary.rstrip('.')}.", style.width)
    page = [style.paint(head, "bold"), facts, "", fires, "", _reflow(docstring(rule), style.width)]
    if thresholds := type(rule).thresholds:
        page += ["", "Thresholds, as thresholds = { ... } of the configuration changes them:"]
        page += [wrap(f"{rule.code}.{t.name} = {t.default:g}  {t.unit}; {t.source}", style.width, "  ") for t in thresholds]
    return "\n".join(page)


def _reflow(text: str, width: int) -> str:
    """Paragraphs at this width; lists, code and tables as they are."""
    parts = []
    for block in text.split("\n\n"):
        prose = not any(line.startswith((" ", "-", "*", "|", "```", ">>>")) for line in block.splitlines())
        parts.append(wrap(" ".join(block.split()), width) if prose else block)
    return "\n\n".join(parts)


def docstring(rule: Rule) -> str:
    """The docstring of a rule's class, without its indentation."""
    return inspect.cleandoc(type(rule).__doc__ or "")


def config_table(config: Config) -> str:
    """Every key, its value in TOML's notation and where it came from."""
    from tabulate import tabulate

    rows = []
    for field in dataclasses.fields(config):
        if field.name == "origin":
            continue
        value = escape(toml(getattr(config, field.name)))
        rows.append([key_of(field.name), value, config.origin.get(field.name, "default")])
    heads = ["key", "value", "from"]
    return str(tabulate(rows, headers=heads, tablefmt="plain", disable_numparse=True, maxcolwidths=[None, 60, None]))


def toml(value: Any) -> str:
    """A value as a configuration file would hold it; "(none)" for what is not set."""
    if value is None:
        return "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, NamedModel):
        return toml({"source": value.source, **{key_of(name): part for name, part in value.values.items()}})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {toml(part)}" for name, part in value.items()) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return toml({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml(part) for part in value) + "]"
    return str(value)


_PHASES = {"init": "weights that have not been trained", "trained": "trained checkpoints", "any": "fresh and trained weights"}
