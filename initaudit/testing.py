"""For test suites: one line that fails where a network cannot learn, and one that fails where its initialization is not the one
that was meant. The pytest plugin offers both as the fixture `initaudit`; they work under any test runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from initaudit.auditing import Audit
    from initaudit.auditing.conformance import Deviation, Expected
    from initaudit.config import Config

__all__ = ["Auditor", "assert_trainable", "expect_init"]

_SHOWN = 12  # deviations listed one by one


def assert_trainable(model: Any, inputs: Any = None, *, config: Config | Mapping[str, Any] | None = None) -> Audit:
    """Fails with a readable report where the audit of `model` has findings at the failing level (errors, unless configured).

    `model` and `inputs` are those of `initaudit.audit`. Fails too where no probe could be run, because nothing was then shown
    about training. Returns the audit. Raises UnreadableModel and UsageError as `initaudit.audit` does.
    """
    __tracebackhide__ = True
    from initaudit.auditing import audit

    found = audit(model, inputs, config=config)
    message = complaint(found, _settings(config))
    if not message and (why := not_probed(found)):
        message = f"{found.report.source} could not be shown to train: {why}"
    if message:
        raise AssertionError(message)
    return found


def expect_init(model: Any, expected: Expected, inputs: Any = None) -> None:
    """Fails where a tensor of `model` is not drawn as `expected` says; sampling error is allowed for, so no seed is needed.

    `expected` is one of

    - the name of a recipe for a whole model: "gpt2", "bert", "llama", "pytorch", "he", "xavier", "lecun", "orthogonal";
    - a scheme for every weight: "kaiming_normal(fan_out, relu)", or "xavier_uniform" with any parameters, "trunc_normal(0.02)";
    - a standard deviation for every weight: 0.02;
    - a mapping of globs over parameter names to schemes and standard deviations, of which the first that matches counts:
      {"*.c_proj.weight": "normal(0.02/sqrt(2*12))", "*.bias": "zeros", "*.weight": 0.02}. None: not judged.

    `model` is whatever `initaudit.audit` takes; `inputs` are needed only where they cannot be made up.
    """
    __tracebackhide__ = True
    from initaudit.auditing.conformance import deviations
    from initaudit.auditing.run import open_model

    count, found = deviations(open_model(model), expected, inputs)
    if found:
        raise AssertionError(_deviations_text(expected, count, found))


class Auditor:
    """What the fixture `initaudit` is: both assertions and the audit itself, under the configuration of the project."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def __call__(self, model: Any, inputs: Any = None, **settings: Any) -> Audit:
        """The audit of `model`; `settings` are fields of the configuration over those of the project."""
        from initaudit.auditing import audit

        return audit(model, inputs, config=self._config(settings))

    def assert_trainable(self, model: Any, inputs: Any = None, **settings: Any) -> Audit:
        """`assert_trainable` under the configuration of the project."""
        __tracebackhide__ = True
        return assert_trainable(model, inputs, config=self._config(settings))

    def expect_init(self, model: Any, expected: Expected, inputs: Any = None) -> None:
        """`initaudit.testing.expect_init`."""
        __tracebackhide__ = True
        expect_init(model, expected, inputs)

    def _config(self, settings: Mapping[str, Any]) -> Config:
        from initaudit.auditing.run import known_fields
        from initaudit.config import load_config

        given = known_fields(settings)
        return load_config(self.folder, {name: (value, f"{name}=") for name, value in given.items()})


def _settings(config: Config | Mapping[str, Any] | None) -> Config:
    from initaudit.config import Config

    return config if isinstance(config, Config) else Config(**(config if config is not None else {}))


def complaint(found: Audit, config: Config) -> str:
    """The findings at the failing level as text for an exception, or "" where there is none."""
    from initaudit.report.as_text import finding_lines
    from initaudit.report.style import Style, escape, wrap
    from initaudit.report.summary import counts, risk

    failing = [f for f in found.findings if f.severity in config.failing]
    if not failing:
        return ""
    style = Style(width=96)
    known = f"; risk: {risk(found.report)}" if found.risk else ""
    lines = [wrap(f"{escape(found.report.source)} is not fit for training: {counts(failing)}{known}", style.width)]
    for finding in failing:
        lines += ["", *finding_lines(finding, style)]
    return "\n".join(lines)


def not_probed(found: Audit) -> str:
    """Why no probe was run, so that nothing was shown about training; "" where one was."""
    if found.risk:
        return ""
    return next((f.message for f in found.report.findings if f.code == "IA004"), "no probe was run")


def _deviations_text(expected: Expected, count: int, found: list[Deviation]) -> str:
    from initaudit.report.style import escape, shorten

    what = f"as {expected!r} says" if isinstance(expected, str) else "as expected"
    lines = [f"{len(found)} of {count} tensors are not initialised {what}:"]
    width = max(len(shorten(escape(d.tensor), 48)) for d in found[:_SHOWN])
    for deviation in found[:_SHOWN]:
        name = shorten(escape(deviation.tensor), 48)
        lines.append(f"  {name:<{width}}  expected {deviation.expected}; found {deviation.found}")
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    return "\n".join(lines)
