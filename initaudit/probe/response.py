"""What a few steps of the customary size do to a network: does any of them begin to tell examples apart?

An initialization is judged by what training makes of it, and some of that cannot be read off the network as it stands: a layer
that is zero behind a normalization is undone by one step, a gradient that looks right explodes in the second. So small networks
take some virtual steps on a task of memory, random targets for (at most 32 of) the probe's inputs (`targets.py`), at customary
step sizes: 3e-3, 3e-2 and 3e-1 of SGD with momentum 0.9, 3e-4 and 3e-3 of Adam. The caller's weights are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from initaudit.graph.calls import role_of
from initaudit.graph.graph import Graph
from initaudit.meter import Meter, Say, silent
from initaudit.probe.backward import backward
from initaudit.probe.passes import Pass, batch_of
from initaudit.probe.targets import Targets, targets_of
from initaudit.probe.trace import Response

# The customary step sizes, the likeliest first: the others are tried while none has learnt.
RATES = (("sgd", 0.03), ("sgd", 0.3), ("sgd", 0.003), ("adam", 3e-3), ("adam", 3e-4))
STEPS = 20
LEARNT = 0.5  # of the loss of guessing: what has come so far needs no further steps
_MOMENTUM, _BETA1, _BETA2, _EPSILON = 0.9, 0.9, 0.999, 1e-8
# Multiplications of all forward passes together: some seconds of one core at the very most, a part of one as a rule.
AFFORDED = 3e10
_CALL = 7e5  # some 50 microseconds
_EXAMPLES, _LEAST = 32, 4
_NORMED, _TINY = 1e-3, 1e-12

# A loss of the output's first rows, and what guessing has of it.
Loss = tuple[Callable[[Tensor], Tensor], float]


def work(run: Pass) -> float:
    """Multiplications of one forward pass through the weights, and what calling each operator costs, in multiplications.

    A weight counts its elements times the places where it is applied.
    """
    total = _CALL * len(run.order)
    for node, uses in run.uses.items():
        shape, unit = run.shapes[node], run.axes[node].unit
        places = math.prod(shape) / (shape[unit] if unit is not None and shape[unit] else 1)
        for use in uses:
            size = run.weight_shape(use.weight) or ()
            total += places * math.prod(size) if len(size) > 1 else 0.0
    return total


def respond(
    graph: Graph,
    constant: frozenset[fx.Node],
    inputs: Sequence[Tensor],
    seen: Pass,
    seed: int,
    device: torch.device | None,
    say: Say = silent,
) -> tuple[Response, ...]:
    """The losses under each optimizer and step size; empty where steps would cost too much or nothing can be learnt.

    `seen` is the pass that the probe made over the same inputs.
    """
    batch = batch_of(inputs)
    if any(n.op == "call_function" and role_of(n).kind == "control" for n in graph.fx.nodes):
        return ()  # a loop of a stranger's graph is run once and not a hundred times
    if batch < _LEAST or not seen.parameters or len(RATES) * STEPS * work(seen) * min(1, _EXAMPLES / batch) > AFFORDED:
        return ()
    task = task_on(graph, constant, inputs, seen, seed, device)
    if task is None:
        return ()
    found: list[Response] = []
    meter = Meter(say, "probing: virtual steps with", "steps", len(RATES) * STEPS)
    for optimizer, rate in RATES:
        if not any(r.optimizer == optimizer and r.losses[-1] < LEARNT for r in found):
            found.append(Response(optimizer, rate, tuple(descend(task, optimizer, rate))))
        meter(f"{optimizer} at {rate:g}", STEPS)
    return tuple(found)


def task_on(
    graph: Graph,
    constant: frozenset[fx.Node],
    inputs: Sequence[Tensor],
    seen: Pass,
    seed: int,
    device: torch.device | None,
) -> Task | None:
    """The task of memory on some of the examples; None where no output has any."""
    batch = batch_of(inputs)
    task = Task(graph, constant, inputs, device, _tasks(seen, inputs, batch, seed))
    if not task.losses or batch <= _EXAMPLES:
        return task if task.losses else None
    fewer = replace(task, inputs=[x[:_EXAMPLES] if x.dim() and x.shape[0] == batch else x for x in inputs])
    # A graph with its batch size written into it takes no other.
    return fewer if fewer.step({})[0] is not None else task


@dataclass(frozen=True)
class Task:
    """The outputs to be steered, each with its loss by example and the loss of guessing."""

    graph: Graph
    constant: frozenset[fx.Node]
    inputs: Sequence[Tensor]
    device: torch.device | None
    losses: Mapping[fx.Node, Loss]

    def step(self, shift: Mapping[str, Tensor]) -> tuple[float | None, Callable[[], dict[str, Tensor]]]:
        """The loss in units of guessing once the weights have moved by `shift` (None where it fails), and its gradient."""
        run = Pass(self.graph, self.constant, device=self.device, shift=shift)
        run.run(*self.inputs)
        values, batch = dict(run.outputs), batch_of(self.inputs)
        if any(n not in values or not values[n].requires_grad or values[n].shape[0] != batch for n in self.losses):
            return None, dict
        chance = sum(c for _, c in self.losses.values())
        total = torch.stack([loss(values[n]) for n, (loss, _) in self.losses.items()]).sum()
        one = torch.ones((), device=total.device)
        return float(total.detach()) / chance, lambda: run.parameter_gradients(backward(run, [total], [one], keep=False))


def descend(task: Task, optimizer: str, rate: float, steps: int = STEPS) -> list[float]:
    """The loss before each step and after the last; ends early where it is not finite, or learnt."""
    shift: dict[str, Tensor] = {}
    memory: dict[str, tuple[Tensor, Tensor]] = {}
    losses: list[float] = []
    for step in range(steps + 1):
        loss, gradients = task.step(shift)
        losses.append(math.inf if loss is None else loss)
        if not math.isfinite(losses[-1]) or losses[-1] < LEARNT or step == steps:
            break
        for key, gradient in gradients().items():
            move = _move(memory, key, gradient, optimizer, rate, step + 1)
            shift[key] = shift[key] + move if key in shift else move
    return losses


def _move(
    memory: dict[str, tuple[Tensor, Tensor]], key: str, gradient: Tensor, optimizer: str, rate: float, step: int
) -> Tensor:
    """The step of torch.optim.SGD with momentum, or of Adam (Kingma & Ba 2015, algorithm 1)."""
    first, second = memory.get(key, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
    if optimizer == "sgd":
        first = _MOMENTUM * first + gradient
        memory[key] = (first, second)
        return -rate * first
    first = _BETA1 * first + (1 - _BETA1) * gradient
    second = _BETA2 * second + (1 - _BETA2) * gradient.square()
    memory[key] = (first, second)
    size = (second / (1 - _BETA2**step)).sqrt() + _EPSILON
    return -rate * first / (1 - _BETA1**step) / size


def _tasks(seen: Pass, inputs: Sequence[Tensor], batch: int, seed: int) -> dict[fx.Node, Loss]:
    """A task for every output that has an example along its first axis and hangs on a weight."""
    generator = torch.Generator().manual_seed(seed + 3)
    found = {}
    for node, value in seen.outputs:
        if value.requires_grad and value.dim() > 0 and value.numel() > 0 and value.shape[0] == batch:
            axes = seen.axes.get(node)
            unit = axes.unit if axes is not None and axes.unit not in (None, 0) else value.dim() - 1
            kept = value.detach()[:_EXAMPLES]
            targets = targets_of(inputs, batch, len(kept), _places(tuple(value.shape), unit or 0), generator)
            found[node] = _loss(node, kept, unit or 0, targets)
    return found


def _is_sigmoid(node: fx.Node) -> bool:
    """Whether an output is a probability for itself."""
    while node.op == "call_function" and role_of(node).kind == "passthrough" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "call_function" and role_of(node).name in ("sigmoid", "hardsigmoid")


def _places(shape: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """The axes between examples and units."""
    return tuple(size for i, size in enumerate(shape) if i not in (0, max(unit, 1)))


def _rows(value: Tensor, unit: int) -> Tensor:
    """(examples, positions, units)."""
    value = value.unsqueeze(1) if value.dim() == 1 else value
    moved = value.movedim(max(unit, 1), -1)
    return moved.flatten(1, -2) if moved.dim() > 2 else moved.unsqueeze(1)


def _loss(node: fx.Node, value: Tensor, unit: int, targets: Targets) -> Loss:
    """Cross-entropy with classes for scores and probabilities along `unit`; squared error where there is one output."""
    rows = _rows(value, unit)
    examples, _, classes = rows.shape
    if _is_sigmoid(node):
        wanted = targets.halves(classes).to(value)

        def entropy(x: Tensor) -> Tensor:
            p = _rows(x, unit)[:examples]
            # torch's own refuses what is no number, and a network that overflows is to be told, not to stop the probe.
            y = wanted[: p.shape[0]]
            return -(y * (p + _TINY).log() + (1 - y) * (1 - p + _TINY).log()).mean()

        return entropy, math.log(2)
    if classes == 1:
        number = targets.numbers(1).to(value.device)

        def error(x: Tensor) -> Tensor:
            y = _rows(x, unit)[:examples]
            return (y - number[: y.shape[0]]).square().mean()

        return error, 1.0
    label = targets.classes(classes).unsqueeze(2).to(value.device)
    shares = bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < _NORMED).all())

    def surprise(x: Tensor) -> Tensor:
        y = _rows(x, unit)[:examples]
        logs = y.clamp_min(_TINY).log() if shares else y.log_softmax(-1)
        return -logs.gather(2, label[: y.shape[0]]).mean()

    return surprise, math.log(classes)
