"""Everything a rule may look at. Filled by auditing.py, never by a rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from initaudit.expect.expectation import Expectation
from initaudit.load.checkpoint import Checkpoint
from initaudit.measure.gradient_history import History
from initaudit.measure.moments import Moments

if TYPE_CHECKING:
    import numpy as np

    from initaudit.config import Config
    from initaudit.expect.gain import Gain
    from initaudit.expect.recognise import Recognition
    from initaudit.graph.graph import Graph
    from initaudit.measure.against import Against
    from initaudit.pair.records import Feeds, Pair
    from initaudit.probe.propagation import Prediction
    from initaudit.probe.trace import Trace, WeightRecord
    from initaudit.probe.verdict import Risk

ModelPhase = Literal["init", "trained", "mixed", "unknown"]


@dataclass(frozen=True)
class LayerEvidence:
    """One weight as one operator uses it: several places of use (an unrolled recurrence) are one layer.

    `pair` is the first place of use, `pairs` are all of them, `feeds` the activations of all. `moments` are those of the values
    used; `read` gives these values, axes as in `pair.axes`. `gain` is that of the first activation that is not linear,
    else of the linear unit; None where it has none. `records` are what the probe saw at the places of use. `expression` is what
    the weight is called in Python: `model.layer3[0].conv1.weight`.
    """

    pair: Pair
    pairs: tuple[Pair, ...]
    feeds: tuple[Feeds, ...]
    moments: Moments
    expectation: Expectation
    gain: Gain | None
    read: Callable[[], np.ndarray[Any, Any]] = field(repr=False, compare=False)
    recognition: Recognition | None = None
    records: tuple[WeightRecord, ...] = ()
    expression: str = ""

    @property
    def feed(self) -> Feeds | None:
        """The activation that the weight is judged by: the first that is not linear, else the first; None for none."""
        return next((f for f in self.feeds if f.activation.name != "linear"), self.feeds[0] if self.feeds else None)

    @property
    def tensor(self) -> str:
        """The name of the weight."""
        return self.pair.tensor


@dataclass(frozen=True)
class Evidence:
    """The evidence about one model.

    `layers` are in forward order. `tensors` holds the moments of every floating-point tensor of the checkpoint by name.
    `graph`, `trace` and `risk` are None where there is no program, or no probe: `no_probe` then says why, and `prediction`
    holds the moments that mean-field theory gives instead; `synthetic` tells that the probe's inputs were made up, and
    `varied` names those that were given, held no variation and were varied. `risk_spread` is the standard deviation of each
    risk over seeds. `base` is what became of the tensors of the checkpoint given by --base, `histories` what the optimizer's
    state remembers of the gradients.
    """

    checkpoint: Checkpoint
    config: Config
    phase: ModelPhase
    layers: tuple[LayerEvidence, ...]
    tensors: Mapping[str, Moments]
    graph: Graph | None = field(default=None, repr=False)
    trace: Trace | None = field(default=None, repr=False)
    risk: Risk | None = None
    no_probe: str = ""
    base: Against | None = None
    histories: tuple[History, ...] = ()
    prediction: Prediction | None = field(default=None, repr=False)
    risk_spread: Mapping[str, float] = field(default_factory=dict)
    synthetic: bool = False
    varied: tuple[str, ...] = ()

    def layer(self, tensor: str) -> LayerEvidence | None:
        """The first layer that uses a tensor of this name."""
        return self._by_tensor.get(tensor)

    @functools.cached_property
    def _by_tensor(self) -> Mapping[str, LayerEvidence]:
        return {found.pair.tensor: found for found in reversed(self.layers)}
