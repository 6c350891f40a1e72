"""Which findings are in force: selection, per-tensor ignores and severity overrides of the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from initaudit.config import Config
from initaudit.rules import all_rules, check_codes
from initaudit.rules.rule import SEVERITIES, Finding, Rule


def enabled(config: Config) -> tuple[Rule, ...]:
    """The rules that the configuration asks for, by code."""
    return tuple(rule for rule in all_rules() if config.wants(rule.code))


def in_force(findings: Iterable[Finding], config: Config) -> tuple[Finding, ...]:
    """The findings that remain, with the severity that the configuration gives them, worst first, else in their order.

    Applying it twice is applying it once.
    """
    kept = []
    for finding in findings:
        if not config.wants(finding.code) or config.ignored(finding.code, finding.tensor, finding.site):
            continue
        severity = config.severity.get(finding.code, config.severity.get(finding.name, finding.severity))
        kept.append(finding if severity == finding.severity else dataclasses.replace(finding, severity=severity))
    return tuple(sorted(kept, key=lambda f: SEVERITIES.index(f.severity)))


def check_config(config: Config) -> None:
    """Raises `UsageError` where the configuration names a rule that does not exist."""
    for name in ("select", "ignore", "extend_select"):
        option = "--" + name.replace("_", "-")
        check_codes(getattr(config, name), option if "command line" in config.origin.get(name, "") else name.replace("_", "-"))
    for entry in config.per_tensor_ignores:
        check_codes(entry.codes, f"per-tensor-ignores {entry.tensors!r}")
    if config.severity:
        names = {rule.name for rule in all_rules()}
        check_codes((code for code in config.severity if code not in names), "severity")
