"""A rehearsal: a few optimizer steps on a copy, to see what breaks and what is learned. Off unless it is asked for.

The task is to remember: each example of the probe's batch gets a label of its own at random (`targets.py`), and cross-entropy
is lowered on them. A network that can be trained remembers a handful of examples in a few dozen steps; one that cannot tell
them apart does not, and one that explodes shows where. Nothing of the caller's is written to: the steps are kept beside the
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from initaudit.graph.constness import constant_nodes
from initaudit.graph.graph import Graph, location_of
from initaudit.meter import Meter, Say, silent
from initaudit.probe.backward import backward
from initaudit.probe.passes import Observer, Pass, batch_of
from initaudit.probe.response import STEPS
from initaudit.probe.run import floated, undisturbed
from initaudit.probe.targets import targets_of

# The two customary rates of each optimizer: a bold one and a careful one.
RATES = {"sgd": (0.1, 0.01), "adam": (0.01, 0.001)}
_MOMENTUM, _BETAS, _EPS = 0.9, (0.9, 0.999), 1e-8
_CLASSES = 8  # labels are drawn from as many classes at most, so that few outputs and many ask for the same
# Learned: the loss fell below half of what it began with (or of guessing, where it began above).
_HALF = 0.5


@dataclass(frozen=True)
class RehearsalRun:
    """One optimizer at one rate. `remembered` is the share of examples with the right label in the end.

    `guessing` is the loss of guessing, or that at the start where it is lower. `broke_at` is the number of steps after which
    the loss or a gradient was not finite, `broke_in` the first place where.
    """

    optimizer: str
    rate: float
    first_loss: float
    last_loss: float
    remembered: float | None
    broke_at: int | None = None
    broke_in: str | None = None
    learned: bool = False
    guessing: float = math.nan

    @property
    def left(self) -> float:
        """The loss in the end in units of guessing (of the loss at the start where that is lower); 1 where it broke."""
        return 1.0 if self.broke_at is not None else self.last_loss / self.guessing


@dataclass(frozen=True)
class Rehearsal:
    """`steps` of every optimizer and rate on the same batch and labels; `why_not` says why there are no runs."""

    steps: int
    examples: int
    runs: tuple[RehearsalRun, ...]
    why_not: str = ""

    def learned(self, optimizer: str) -> bool | None:
        """Whether `optimizer` learned at one of its rates; None where it was not run."""
        own = [r.learned for r in self.runs if r.optimizer == optimizer]
        return any(own) if own else None

    def left(self, optimizer: str) -> float | None:
        """The least of the loss that `optimizer` left at one of its rates, at most 1; None where it was not run.

        A few steps that did not learn prove nothing: below as many as the virtual steps are, only what was learned counts.
        """
        own = [min(r.left, 1.0) for r in self.runs if r.optimizer == optimizer]
        return min(own) if own and (self.steps >= STEPS or self.learned(optimizer)) else None


def rehearse(
    graph: Graph,
    inputs: Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    loss: bool = False,
    say: Say = silent,
) -> Rehearsal:
    """`steps` steps of SGD with momentum 0.9 and of Adam at two rates each, on labels drawn with `seed`.

    With `loss`, the model's first output is the loss that is lowered. The weights are left as they were.
    """
    place = None if device is None else torch.device(device)
    with undisturbed(seed, graph):
        task = _Task(graph, floated(inputs, place), place, seed, loss)
        if task.why_not:
            return Rehearsal(steps, task.batch, (), task.why_not)
        runs = tuple(_train(task, name, rate, steps, say) for name, rates in RATES.items() for rate in rates)
    return Rehearsal(steps, task.batch, runs)


class _FirstBroken(Observer):
    def __init__(self) -> None:
        self.site: str | None = None

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        return True

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        self._look(node, value)

    def gradient(self, run: Pass, node: fx.Node, gradient: Tensor) -> None:
        self._look(node, gradient)

    def _look(self, node: fx.Node, value: Tensor) -> None:
        if self.site is None and not bool(torch.isfinite(value).all()):
            self.site = location_of(node).site or node.name


class _Task:
    """The batch, its labels, and the loss of a network whose weights are moved by `shift`."""

    def __init__(self, graph: Graph, given: list[Tensor], place: torch.device | None, seed: int, loss: bool) -> None:
        self.graph, self.given, self.place, self.loss = graph, given, place, loss
        self.constant = constant_nodes(graph.fx)
        self.batch = batch_of(given)
        self.why_not = ""
        run = self._run({})
        ends = run.ends()
        self.labels = torch.zeros(0, dtype=torch.long)
        if not ends or run.missing:
            self.why_not = "the network cannot be run to its output"
        elif not run.leaves:
            self.why_not = "nothing is trainable"
        elif not loss:
            logits = self._logits(ends[0])
            if logits is None:
                self.why_not = f"an output of shape {tuple(ends[0].shape)} has no examples to tell apart"
                return
            # As many examples a class as can be, in a random order: guessing one class for all remembers few.
            classes = max(2, min(_CLASSES, logits.shape[1]))
            targets = targets_of(given, self.batch, len(logits), (), torch.Generator().manual_seed(seed))
            self.labels = targets.classes(classes).flatten()

    def _run(self, shift: Mapping[str, Tensor], observers: Sequence[Observer] = ()) -> Pass:
        run = Pass(self.graph, self.constant, device=self.place, shift=shift, observers=observers)
        run.run(*self.given)
        return run

    def _logits(self, output: Tensor) -> Tensor | None:
        """(examples, classes): positions are averaged; a single number is a logit against its negative."""
        if output.dim() == 0 or output.shape[0] != self.batch or self.batch < 2:
            return None
        if output.dim() == 1:
            output = output.unsqueeze(1)
        axis = 1 if output.dim() >= 4 else output.dim() - 1
        rows = output.movedim(axis, 1).flatten(2).mean(2) if output.dim() > 2 else output
        return torch.cat([rows, -rows], 1) if rows.shape[1] == 1 else rows

    def step(
        self, shift: Mapping[str, Tensor], observers: Sequence[Observer] = ()
    ) -> tuple[float, float | None, dict[str, Tensor]]:
        """(loss, share remembered, gradients by parameter) at the weights moved by `shift`."""
        run = self._run(shift, observers)
        ends = run.ends()
        if self.loss:
            value, right = ends[0].sum() / max(1, ends[0].numel()), None
        else:
            logits = self._logits(ends[0])
            assert logits is not None
            labels = self.labels.to(logits.device)
            value = torch.nn.functional.cross_entropy(logits, labels)
            right = float((logits.argmax(1) == labels).double().mean())
        gradients = run.parameter_gradients(backward(run, [value], [torch.ones_like(value)], keep=False))
        return float(value.detach()), right, gradients


def _train(task: _Task, optimizer: str, rate: float, steps: int, say: Say) -> RehearsalRun:
    shift: dict[str, Tensor] = {}
    rule = _Sgd(rate) if optimizer == "sgd" else _Adam(rate)
    first, last, right = math.nan, math.nan, None
    meter = Meter(say, f"rehearsing with {optimizer} at {rate:g}", "steps", steps + 1)
    for step in range(steps + 1):
        meter("")
        last, right, gradients = task.step(shift)
        first = last if step == 0 else first
        if not math.isfinite(last) or not all(bool(torch.isfinite(g).all()) for g in gradients.values()):
            look = _FirstBroken()
            task.step(shift, (look,))
            return RehearsalRun(optimizer, rate, first, last, right, step, look.site)
        if step < steps:
            for key, change in rule.changes(gradients):
                shift[key] = shift[key] + change if key in shift else change
    guessing = first if task.loss else min(first, math.log(len(set(task.labels.tolist()))))
    return RehearsalRun(optimizer, rate, first, last, right, learned=last < _HALF * guessing, guessing=guessing)


class _Sgd:
    """Heavy-ball momentum as torch.optim.SGD has it."""

    def __init__(self, rate: float) -> None:
        self.rate, self.velocity = rate, dict[str, Tensor]()

    def changes(self, gradients: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for key, g in gradients.items():
            self.velocity[key] = g if key not in self.velocity else _MOMENTUM * self.velocity[key] + g
            yield key, -self.rate * self.velocity[key]


class _Adam:
    """Kingma & Ba 2015, algorithm 1."""

    def __init__(self, rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first, self.second = dict[str, Tensor](), dict[str, Tensor]()

    def changes(self, gradients: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        self.count += 1
        one, two = _BETAS
        for key, g in gradients.items():
            self.first[key] = (1 - one) * g + (one * self.first[key] if key in self.first else 0)
            self.second[key] = (1 - two) * g * g + (two * self.second[key] if key in self.second else 0)
            size = (self.second[key] / (1 - two**self.count)).sqrt() + _EPS
            yield key, -self.rate * self.first[key] / (1 - one**self.count) / size
