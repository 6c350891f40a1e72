"""The probe of one model: run as it was asked for, or why it was not, and what is predicted in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from initaudit.config import Config
from initaudit.errors import InitauditError
from initaudit.graph.graph import Graph, OwnBackward
from initaudit.meter import Say, silent
from initaudit.onnx_ops.budget import Budget, metered
from initaudit.probe.features import learnt_later, rehearsal_decides
from initaudit.probe.propagation import Prediction, propagate
from initaudit.probe.rehearse import rehearse
from initaudit.probe.run import persisted, probe
from initaudit.probe.tangents import forward_gains
from initaudit.probe.trace import Trace
from initaudit.probe.verdict import Risk, judge, may_follow, seems_untrainable

# What a graph does with inputs that nobody promised to fit is the graph's matter: said, not raised.
_FAILURES = (InitauditError, RuntimeError, ValueError, TypeError, IndexError, MemoryError)


@dataclass(frozen=True)
class Probed:
    """A trace and the risk that it shows; or `no_probe`, the reason why there is none, and the moments predicted instead.

    `spread` is the standard deviation of each risk over the seeds that were run, by name; empty for a single one.
    """

    trace: Trace | None = None
    risk: Risk | None = None
    no_probe: str = ""
    prediction: Prediction | None = None
    spread: Mapping[str, float] = field(default_factory=dict)


def probed(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    config: Config,
    budget: Budget,
    *,
    device: str | None,
    synthetic: bool,
    say: Say = silent,
) -> Probed:
    """Probes `graph` on `inputs`, with `config.probe_seeds` seeds and a rehearsal where they are asked for.

    Every further seed draws another cotangent, and another batch where the inputs are `synthetic`.
    """
    try:
        with metered(budget):
            trace = probe(graph, inputs, seed=config.seed, device=device, say=say)
            if trace.unknown and not trace.parameters:
                why = "no output could be computed: " + next(iter(trace.unknown.values()))
                return Probed(trace, None, why, predicted(graph, budget))
            if config.rehearse:
                rehearsal = rehearse(graph, inputs, config.rehearse, seed=config.seed, device=device, loss=config.loss, say=say)
                trace = replace(trace, rehearsal=rehearsal)
            if config.jvp:
                say("probing: tangents forward")
                trace = replace(trace, forward=forward_gains(graph, inputs, trace, seed=config.seed, device=device))
            risks = [judge(graph, trace)]
            if seems_untrainable(trace, risks[0]):
                follow = may_follow(risks[0])
                later = persisted(graph, inputs, seed=config.seed, device=device, say=say, follow=follow)
                trace = replace(trace, persisted=later)
            for seed in range(config.seed + 1, config.seed + config.probe_seeds):
                batch = _redrawn(inputs, seed) if synthetic else inputs
                risks.append(judge(graph, probe(graph, batch, seed=seed, device=device, say=say)))
    except _FAILURES as error:
        return skipped(graph, "the probe stopped: " + " ".join(str(error).split())[:200], budget)
    return Probed(trace, risks[0], "", None, dict(_spread(risks)))


def believed(seen: Probed, own: OwnBackward | None) -> Probed:
    """Without what was seen of gradients, where the module's own autograd feeds parameters to which the graph hands none."""
    trace = seen.trace
    if trace is None or own is None or own.fed is None:
        return seen
    if not any(p.gradient_zero and p.name in own.fed for p in trace.parameters.values()):
        return seen
    forward = replace(
        trace,
        signals={n: replace(s, gradient_moment2=None, gradient_finite=True) for n, s in trace.signals.items()},
        weights=tuple(
            replace(w, gradient_norm=None, trust_ratio=None, output_gradient_moment2=None, units=None) for w in trace.weights
        ),
        parameters={},
        first_non_finite_gradient=None,
        gram=None,
        time=(),
        rehearsal=None,
        forward=None,
        response=(),
        persisted=None,
    )
    why = "it brings a backward pass of its own (torch.autograd.Function), which the graph of its operators does not show"
    return Probed(forward, None, why)


def skipped(graph: Graph, why: str, budget: Budget) -> Probed:
    """No probe, and what mean-field theory says instead."""
    return Probed(no_probe=why, prediction=predicted(graph, budget))


def predicted(graph: Graph, budget: Budget) -> Prediction | None:
    """The moments that the weights alone predict; None where nothing can be told."""
    try:
        with metered(budget):
            prediction = propagate(graph)
    except _FAILURES:
        return None
    return prediction if prediction.fields else None


def summary(trace: Trace) -> Iterator[str]:
    """What a rehearsal came to, a line an optimizer; and what further virtual steps did."""
    if (later := learnt_later(trace)) is not None:
        learnt = "their task" if later.task == "memory" else "to be what the network is with other weights"
        yield (
            "the risk of not learning is what the first virtual steps say; "
            f"{len(later.losses) - 1} steps of {later.optimizer} at {later.rate:g} learnt {learnt}"
        )
    rehearsal = trace.rehearsal
    if rehearsal is None:
        return
    if rehearsal.why_not:
        yield f"rehearsal: not run, {rehearsal.why_not}"
    for optimizer in dict.fromkeys(r.optimizer for r in rehearsal.runs):
        parts = []
        for run in (r for r in rehearsal.runs if r.optimizer == optimizer):
            if run.broke_at is not None:
                where = f" from {run.broke_in} on" if run.broke_in else ""
                parts.append(f"at rate {run.rate:g} not finite after {run.broke_at} steps{where}")
                continue
            kept = "" if run.remembered is None else f", {run.remembered:.0%} of the labels"
            parts.append(f"at rate {run.rate:g} the loss went from {run.first_loss:.3g} to {run.last_loss:.3g}{kept}")
        verdict = "learned" if rehearsal.learned(optimizer) else "did not learn"
        relies = "; the risk relies on it" if rehearsal_decides(trace, optimizer) else ""
        what = f"rehearsal of {rehearsal.steps} steps on {rehearsal.examples} examples"
        yield f"{what}: {optimizer} {verdict}; " + "; ".join(parts) + relies


def _redrawn(inputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Another made-up batch: numbers are drawn anew, ids change places, so that each stays within its table."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for x in inputs:
        if x.is_floating_point():
            drawn.append(torch.randn(x.shape, generator=generator).to(x.dtype))
        else:
            drawn.append(x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape))
    return drawn


def _spread(risks: Sequence[Risk]) -> Iterator[tuple[str, float]]:
    if len(risks) < 2:
        return
    for name in ("symmetry", "vanishing", "exploding", "untrainable_sgd", "untrainable_adam"):
        values = [float(getattr(r, name)) for r in risks]
        mean = sum(values) / len(values)
        yield name, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
