"""Many more virtual steps, for a network that seems not to learn: does it learn anything at all?

Twenty steps tell networks apart that were asked for the same. What a network is by design can ask for more of them, or for
another task: its branches begin closed; it sees the sum of a sequence and not the order; it turns with its inputs; it puts
out a density whose logarithm is in the hundreds. No target that is drawn for an example fits all of these. A network of its own
kind does: the same graph with weights moved at random is a function that it can be, in its own units, and what learns can
follow it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from initaudit.graph.constness import constant_nodes
from initaudit.graph.graph import Graph
from initaudit.meter import Say, silent
from initaudit.probe.passes import Pass
from initaudit.probe.response import LEARNT, Loss, Task, descend, task_on
from initaudit.probe.trace import Response

# So many steps had the networks whose training tells what a risk is (docs/trainability.md): one that learns within them learns.
_LONG, _BOLD, _CAREFUL = 200, ("adam", 3e-3), ("adam", 3e-4)
# By how much each weight of the network to be followed differs: at least by one step at the careful rate, at most by a sixth of
# what all steps at the bold one can go.
_REACH = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
# What is told apart along one direction only is told by one number: of the share that differs, healthy networks keep 2e-2, and
# below this it is a fault (IA307).
_LINE = 1e-4


def persist(
    graph: Graph,
    inputs: Sequence[Tensor],
    seed: int,
    device: torch.device | None,
    say: Say = silent,
    *,
    follow: bool = True,
) -> Response | None:
    """Many more steps of Adam on each task until one is learnt, at most six times what `respond` could afford.

    Without `follow` the task of memory is the only one. It is the last, and what is returned where none is learnt. None
    without a task.
    """
    constant = constant_nodes(graph.fx)
    seen = Pass(graph, constant, device=device)
    seen.run(*inputs)
    memory = task_on(graph, constant, inputs, seen, seed, device)
    if memory is None:
        return None
    following = _following(memory, seed) if follow else None
    tried = [("following", following, rate) for rate in (_BOLD, _CAREFUL) if following is not None]
    for name, task, (optimizer, rate) in [*tried, ("memory", memory, _BOLD)]:
        say(f"probing: {_LONG} virtual steps with {optimizer} at {rate:g}")
        found = Response(optimizer, rate, tuple(descend(task, optimizer, rate, _LONG)), name)
        if found.losses[-1] < LEARNT:
            break
    return found


def _following(task: Task, seed: int) -> Task | None:
    """To be what the network is with other weights; None where these tell examples apart by no more than one number of each.

    The weights move as far as the outputs change by no more than they differ between examples: an unstable network is not asked
    for what explodes.
    """
    generator = torch.Generator().manual_seed(seed + 5)
    here = _run(task, {})
    start = {n: v.detach() for n, v in here.outputs if n in task.losses}
    drawn = {k: torch.randn(p.shape, generator=generator).to(p) for k, p in here.parameters.items()}
    for reach in _REACH:
        ends = {n: v.detach() for n, v in _run(task, {k: reach * d for k, d in drawn.items()}).outputs if n in start}
        moved = {n: _spread(v - start[n]) for n, v in ends.items()}
        if len(ends) == len(start) and all(v <= _spread(start[n]) for n, v in moved.items()):
            break
    else:
        return None
    told = {n for n, v in ends.items() if moved[n] > 0 and _spread(v) > 0 and _beside_one_line(v - start[n]) >= _LINE}
    losses = {n: _distance(ends[n], min(_spread(ends[n]), moved[n])) for n in told}
    return replace(task, losses=losses) if losses else None


def _run(task: Task, shift: Mapping[str, Tensor]) -> Pass:
    run = Pass(task.graph, task.constant, device=task.device, shift=shift)
    run.run(*task.inputs)
    return run


def _spread(value: Tensor) -> float:
    """The variance over examples; what is not finite is infinite."""
    found = float((value - value.mean(0)).square().mean())
    return found if math.isfinite(found) else math.inf


def _beside_one_line(value: Tensor) -> float:
    """The share of the variance over examples that does not lie along one direction of the units; 1 where there is one unit.

    Deep in a network that has made its examples one but for their size, all that other weights change is one number of each.
    """
    rows = value.flatten(1).double() if value.dim() > 1 else value.double()[:, None]
    if rows.shape[1] < 2:
        return 1.0
    found = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return float(1 - found[0] / found.sum()) if float(found.sum()) > 0 else 0.0


def _distance(wanted: Tensor, guessed: float) -> Loss:
    """The squared distance in units of what is left to one who knows the mean, or who stays what he is but for the mean."""

    def distance(value: Tensor) -> Tensor:
        return (value - wanted).square().mean() / guessed

    return distance, 1.0
