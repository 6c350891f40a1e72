"""Which findings are in force: selection, per-tensor ignores and severity overrides of the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from initaudit.config import Config
from initaudit.errors import UsageError
from initaudit.rules import all_rules, check_codes
from initaudit.rules.rule import SEVERITIES, Finding, Rule
from initaudit.suggest import did_you_mean


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
    _check_thresholds(config)
    if config.severity:
        names = {rule.name for rule in all_rules()}
        check_codes((code for code in config.severity if code not in names), "severity")


def _check_thresholds(config: Config) -> None:
    """Raises `UsageError` for a threshold that no rule declares, here or for one of the models."""
    given = dict.fromkeys(config.thresholds, "thresholds")
    for model, named in config.models.items():
        given |= dict.fromkeys(named.values.get("thresholds", {}), f"models.{model}.thresholds")
    if not given:
        return
    known = [f"{rule.code}.{threshold.name}" for rule in all_rules() for threshold in type(rule).thresholds]
    for name, where in given.items():
        if name not in known:
            own = [each for each in known if each.startswith(f"{name.partition('.')[0]}.")]
            advice = did_you_mean(name, known) or (f"one of {', '.join(own)}" if own else "`initaudit explain CODE` lists them")
            raise UsageError(f"{where}.{name}", "no rule has such a threshold", advice=advice)
