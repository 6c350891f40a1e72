"""The records of pairing, free of torch, so that weights without a program can be told in the same terms."""

from __future__ import annotations

from dataclasses import dataclass

from initaudit.location import Location
from initaudit.pair.activation import Activation


@dataclass(frozen=True)
class Feeds:
    """An activation that a weight feeds. `node` is where its value is ("" at the model's output), `path` what lies between."""

    activation: Activation
    path: tuple[str, ...]
    node: str


@dataclass(frozen=True)
class Pair:
    """A weight at one place of use.

    `tensor` is the name of the weight, `site` where it is used, `node` the name of the consuming node and `value` that of
    the node whose value it consumes. `shape` and `axes` are those of the tensor as stored (then `stored`); where the stored
    tensor was computed with, those of the value used. `provenance` lists what lies between the stored tensor and its use,
    `constants` every stored tensor that takes part. `fan_in` and `fan_out` are counted from axis data
    (see `roles.WeightUse.fans`).
    """

    tensor: str
    site: str
    node: str
    value: str
    operator: str
    role: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int
    fan_out: int
    groups: int
    gates: tuple[str, ...]
    overlap: float
    unit_axis: int | None
    constants: tuple[str, ...]
    provenance: tuple[str, ...]
    stored: bool
    trainable: bool
    feeds: tuple[Feeds, ...]
    bias: str | None
    location: Location
