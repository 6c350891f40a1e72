"""What a rule is: one class in one file whose documentation, examples and message belong together.

A rule is found by its folder (`initaudit/rules/ia*.py`), registered once, and judged by its own examples: `invalid` builds
models that it must report, `valid` models that it must leave alone. Both are run by the tests and rendered on the rule's page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from initaudit.location import NOWHERE, Location

if TYPE_CHECKING:
    import torch

    from initaudit.rules.evidence import Evidence

Severity = Literal["error", "warning", "info"]
Phase = Literal["init", "trained", "any"]

# What the law of a finding begins with that no sampling stands behind: a copy is a copy, a zero a zero.
EXACT = "exact, no sampling error: "

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Block:
    """A stretch of the network from operator `start` to `end`, as the probe saw it.

    `signal` and `gradient` are the second moments at its end, `gain` what the squared norm of the gradient is multiplied by on
    its way back through it. None for what was not measured.
    """

    start: str
    end: str
    signal: float | None
    gradient: float | None
    gain: float | None


@dataclass(frozen=True)
class Finding:
    """One problem, at its root. `measured` and `expected` are finite numbers or None.

    `law` says where `expected` comes from, and `standard_errors` how many of them lie between the two: None where the fact is
    exact, which `law` then says, or where there is no law.
    `tensor` is the weight, `site` the operator that uses it. `message` says what was found and what it will do to training,
    `help` what to type. `related` names the other tensors that the same cause touches. `profile` is the signal and the gradient
    by depth, where the finding is about them. `apart` says that it follows from no other finding: what the graph computes
    is at fault, whatever the weights hold.
    """

    code: str
    name: str
    severity: Severity
    message: str
    help: str
    tensor: str = ""
    site: str = ""
    location: Location = NOWHERE
    measured: float | None = None
    expected: float | None = None
    law: str = ""
    standard_errors: float | None = None
    related: tuple[str, ...] = ()
    profile: tuple[Block, ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Threshold:
    """A number that decides whether a rule fires, or how loudly: `thresholds.CODE.name` in the configuration changes it.

    `source` says why the default is what it is.
    """

    name: str
    default: float
    unit: str
    source: str


@dataclass(frozen=True)
class Example:
    """A model that a rule must report or leave alone; `build` returns the module and its inputs, drawn from a fixed seed."""

    name: str
    build: Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]


class Rule:
    """A rule. Its docstring is its page: what it does, why it is bad, an example, what to do instead, the source."""

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity]  # the highest it uses
    phase: ClassVar[Phase]
    summary: ClassVar[str]  # fires when ...
    thresholds: ClassVar[tuple[Threshold, ...]] = ()

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """Yields the findings; reads `evidence` only."""
        raise NotImplementedError

    @classmethod
    def limit(cls, evidence: Evidence, name: str) -> float:
        """The threshold of this name that is in force; raises KeyError for one that the rule does not declare."""
        default = {threshold.name: threshold.default for threshold in cls.thresholds}[name]
        return evidence.config.thresholds.get(f"{cls.code}.{name}", default)

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Models that look alike and are healthy."""
        return ()

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Models that must be reported with this code."""
        return ()

    @classmethod
    def finding(cls, message: str, help: str, *, severity: Severity | None = None, **fields: Any) -> Finding:
        """A finding of this rule, at its highest severity unless another is given."""
        return Finding(cls.code, cls.name, severity if severity is not None else cls.severity, message, help, **fields)
