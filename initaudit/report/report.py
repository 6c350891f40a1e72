"""The records that every report format is fed: one `Report` of what was audited, in plain numbers and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from initaudit.rules.rule import Finding

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Activation:
    """What a weight feeds: the name by what it computes, its parameters ("negative_slope"), its gain, and the path to it."""

    name: str
    gain: float | None
    path: tuple[str, ...] = ()
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One weight at one place of use. Variances are centred; ratios are observed / expected; None where unknown.

    `observed`, `expected`, `ratio` and `probe` have the keys of the JSON schema (docs/report.schema.json).
    """

    tensor: str
    site: str
    operator: str
    role: str
    shape: tuple[int, ...]
    fan_in: int | None
    fan_out: int | None
    groups: int
    activations: tuple[Activation, ...]
    observed: Mapping[str, float | int | None]
    expected: Mapping[str, float | None]
    ratio: Mapping[str, float | None]
    schemes: tuple[Mapping[str, Any], ...] = ()
    phase: str = "unknown"
    probe: Mapping[str, float | None] = field(default_factory=dict)
    provenance: tuple[str, ...] = ()
    location: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelReport:
    """One audited model, or one that could not be read (`error` is then its line and everything else is empty).

    `risk` has the keys symmetry, vanishing, exploding (0..1) and untrainable (a mapping with sgd and adam). `depth` is the
    second moment of the signal and of its gradient at each weight in forward order (None where no probe ran; the signal's may
    be predicted). `changes` holds the tensors by what became of them against the base ("identical", "trained on", ...), where
    one was given. `accepted` is how many findings a baseline has taken out of `findings`. `probe` has the keys of the JSON
    schema.
    """

    source: str
    format: str
    phase: str = "unknown"
    verdict: Verdict = "pass"
    risk: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    findings: tuple[Finding, ...] = ()
    depth: tuple[tuple[float | None, float | None], ...] = ()
    notes: tuple[str, ...] = ()
    cause: str = ""
    probe: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    changes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    accepted: int = 0


@dataclass(frozen=True)
class Report:
    """Everything that one run of the command found."""

    models: tuple[ModelReport, ...]
    version: str
    seconds: float | None = None
