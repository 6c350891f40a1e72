"""The records of a probe: what one forward and a few backward passes saw, in plain numbers.

Moments are over every element of a tensor: `mean` is E[x], `moment2` is E[x²] (not centred). Gradients are those of
L = sum over the outputs of <c, output>, where c has independent N(0, 1) entries over sqrt(elements per example), so that an
example's cotangent has norm 1 in expectation, as the gradient of one cross-entropy has at most sqrt(2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initaudit.probe.measures import Measures
    from initaudit.probe.rehearse import Rehearsal
    from initaudit.probe.tangents import ForwardGains


@dataclass(frozen=True)
class Signal:
    """One data node. None stands for "not measured here" (integers, unknown axes, no gradient path).

    `order` counts data nodes in order of execution. `peak` is the largest absolute value, not looked for in functions
    of one signal.
    `cosine` is the mean cosine between different examples, `spread` the variance over examples as a share of the second moment;
    `rank` is (Σλ)²/Σλ² of the Gram matrix of the (at most 32) examples' signals: 1 where they all lie on one line.
    `token_cosine`, `token_spread` and `token_rank` say the same of the positions of one example (Dong et al. 2021).
    `entropy` of a softmax or an attention is the mean entropy of its rows as a share of that of a uniform row.
    `dead` and `saturated` are shares of units of an activation: local derivative exactly zero, or below
    `activations.SATURATED` of its steepest, at every sampled example and position.
    """

    node: str
    order: int
    kind: str
    shape: tuple[int, ...]
    mean: float | None = None
    moment2: float | None = None
    peak: float | None = None
    finite: bool = True
    gradient_moment2: float | None = None
    gradient_finite: bool = True
    cosine: float | None = None
    spread: float | None = None
    rank: float | None = None
    token_cosine: float | None = None
    token_spread: float | None = None
    token_rank: float | None = None
    entropy: float | None = None
    dead: float | None = None
    saturated: float | None = None
    slope: float | None = None


@dataclass(frozen=True)
class Units:
    """The units (rows along `o`) of a weight: how many, and how many classes of them hold equal values and biases.

    `distinct` counts classes that differ in values, bias or gradient: as many are left after one update, since equal values
    part only where their gradients differ. `distinct_gradients` counts those that differ in gradients alone.
    """

    count: int
    distinct_values: int
    distinct_gradients: int
    distinct: int


@dataclass(frozen=True)
class WeightRecord:
    """A weight at one place of use: `weight` is consumed by `node` as its parameter `argument` (at `index` of a list).

    `constants` names the parameters that the weight is made of. Norms are Frobenius norms; `trust_ratio` is
    norm(w) / norm(gradient) (You et al. 2017, eq. 6, without its coefficient), None where the gradient is zero. `weight_peak`
    is the largest absolute value, `fan_in` the number of products that meet in a unit. `output` is the node whose value is the
    layer's output: `node`, or the sum with its bias behind it, and `output_moment2` is that node's.
    """

    node: str
    weight: str
    argument: str
    index: int | None
    constants: tuple[str, ...]
    elements: int
    weight_norm: float
    gradient_norm: float | None
    trust_ratio: float | None
    input_moment2: float | None
    output_moment2: float | None
    output_gradient_moment2: float | None
    units: Units | None = None
    weight_peak: float | None = None
    fan_in: int | None = None
    output: str = ""

    @property
    def sgd_update(self) -> float | None:
        """norm(update) / norm(w) of one SGD step on the probe's loss at learning rate 1; times the rate for another."""
        return self.gradient_norm / self.weight_norm if self.gradient_norm is not None and self.weight_norm > 0 else None

    @property
    def adam_update(self) -> float | None:
        """norm(update) / norm(w) of Adam's first step, whose elements are all ±1, at learning rate 1."""
        return math.sqrt(self.elements) / self.weight_norm if self.weight_norm > 0 else None


@dataclass(frozen=True)
class TimeRecord:
    """A recurrent layer along its `steps`, at most 64 of them evenly picked, the first and the last among them.

    `signal` is the second moment of its output at each step, `gradient` the squared norm that a N(0, 1) cotangent at the last
    step's output has at each step's input (Pascanu et al. 2013, eq. 5).
    """

    node: str
    steps: int
    signal: tuple[float, ...]
    gradient: tuple[float, ...]

    @property
    def gradient_rate(self) -> float | None:
        """The factor by which the gradient's squared norm changes for each step back; None where it is zero at an end."""
        first, last = self.gradient[0], self.gradient[-1]
        return (first / last) ** (1 / (self.steps - 1)) if first > 0 and last > 0 else None


@dataclass(frozen=True)
class ParameterRecord:
    """A trainable parameter: its own gradient, summed over every place of use.

    `gradient_zero` means exactly zero. `revived` is then the number of virtual steps (1 or 2) after which it is not, None when
    it stays zero; 0 for a parameter that has a gradient at once.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    gradient_norm: float | None
    gradient_zero: bool
    revived: int | None = 0
    reached: bool = True


@dataclass(frozen=True)
class Kernel:
    """The Gram matrix K of per-example gradients of one scalar (the same cotangent for every example), through its spectra.

    `eigenvalues` are those of K / n in falling order, `centred` those after the mean gradient is taken from every example's.
    """

    eigenvalues: tuple[float, ...]
    centred: tuple[float, ...]

    @property
    def trace(self) -> float:
        """The mean squared norm of an example's gradient."""
        return sum(self.eigenvalues)

    @property
    def centred_share(self) -> float:
        """What of the squared norm is left without the mean gradient: 0 where every example asks for the same change."""
        return sum(self.centred) / self.trace if self.trace > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(entropy of the centred eigenvalues), Roy & Vetterli 2007, eq. 3; 0 where nothing is left."""
        total = sum(self.centred)
        shares = [e / total for e in self.centred if e > 0] if total > 0 else []
        return math.exp(-sum(p * math.log(p) for p in shares if p > 0)) if shares else 0.0


@dataclass(frozen=True)
class GramRecord:
    """Per-example gradients, as seen by two optimizers.

    `sgd` is the plain Gram matrix; in `adam` each weight's part is divided by the root mean square of its batch gradient, as
    Adam's step is, so that the scale of a layer's gradient does not count. `examples` is the number of examples compared.
    """

    examples: int
    sgd: Kernel
    adam: Kernel


@dataclass(frozen=True)
class Response:
    """What steps of one size do to the loss of a task, relative to that of guessing.

    `losses` begin before the first step; they end early where one is not finite, or the task is half learnt. The `task` is
    "memory" (`targets.py`) or "following" a network of the same kind (`persistence.py`).
    """

    optimizer: str
    rate: float
    losses: tuple[float, ...]
    task: str = "memory"


@dataclass(frozen=True)
class Trace:
    """What the probe saw. `unknown` maps the nodes that could not be run, or lie downstream of one, to the reason.

    `numbers` is how many real numbers make one of the `batch` examples, None where an input is of integers. `alike` tells that
    examples that differ at the inputs are the same at every output. `persisted` are many more virtual steps, taken where the
    first ones learnt so little that the network seems not to learn. `met` names the node at which examples first meet whose
    outputs depend on each other.
    """

    batch: int
    signals: Mapping[str, Signal]
    weights: tuple[WeightRecord, ...]
    parameters: Mapping[str, ParameterRecord]
    outputs: tuple[str, ...]
    first_non_finite: str | None = None
    first_non_finite_gradient: str | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)
    gram: GramRecord | None = None
    virtual_steps: int = 0
    time: tuple[TimeRecord, ...] = ()
    measures: Measures | None = None
    rehearsal: Rehearsal | None = None
    forward: ForwardGains | None = None
    response: tuple[Response, ...] = ()
    persisted: Response | None = None
    numbers: int | None = None
    alike: bool = False
    met: str = ""

    @property
    def broken(self) -> bool:
        """Whether an output or a parameter's gradient is not finite.

        Infinities in between may be meant: a mask before a softmax, the padding of a maximum.
        """
        ends = any(not s.finite for name in self.outputs if (s := self.signals.get(name)) is not None)
        norms = (p.gradient_norm for p in self.parameters.values() if p.gradient_norm is not None)
        return ends or any(not math.isfinite(norm) for norm in norms)
