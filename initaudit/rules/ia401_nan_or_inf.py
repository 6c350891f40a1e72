"""IA401: a weight that is not finite."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.location import NOWHERE
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import convs, example, mlp
from initaudit.rules.norms import norms
from initaudit.rules.remedy import init_line, reset_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.structure import is_mask
from initaudit.rules.support import fields, fresh_layers, power, ratio_of

# Times the variance that keeps a signal: what takes a signal out of float32 is far beyond.
_LARGE = 10.0


_STEP = "after one step no weight is finite"


def _after(before: bool, early: bool, own: bool) -> str:
    if early:
        return "the probe's inputs may be outside of what the model takes"
    if own:
        return f"the inputs that were given hold such values, and {_STEP}"
    return f"forward does so with the inputs that were given, and {_STEP}" if before else _STEP


class NanOrInf(Rule):
    """A weight is not a finite number, or what it makes of an input is not.

    What it does: counts NaN and infinities in every tensor. Infinities in tensors that are no weights (attention masks kept as
    buffers) are left alone. Where all weights are finite, the first place of the probe is named from which the signal is not,
    if an output or a gradient is affected.

    Why it is bad: every number that meets it becomes NaN: the loss, then all gradients, then all weights.

    Example: a checkpoint saved after a diverged step; a head made by `torch.empty`.

    Instead: go back to an earlier checkpoint, or initialise the tensor again.

    Source: IEEE 754, section 6.2; https://github.com/TransformerLensOrg/TransformerLens/issues/902.
    """

    code = "IA401"
    name = "nan-or-inf"
    severity = "error"
    phase = "any"
    summary = "a weight, an output or a gradient is not finite"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all tensors, at the first."""
        used = {c for x in evidence.layers for c in x.pair.constants} | {x.tensor for x in evidence.layers}
        bad = {
            name: m
            for name, m in evidence.tensors.items()
            if m.nan or (m.inf and (name in used or _trainable(evidence, name)) and not is_mask(evidence, name))
        }
        if not bad:
            yield from self._signal(evidence)
            return
        name, moments = next(iter(bad.items()))
        layer = evidence.layer(name)
        yield self.finding(
            f"{moments.nan} values are NaN and {moments.inf} infinite, of {moments.size:,}"
            + (f"; so are values in {len(bad) - 1} other tensors" if len(bad) > 1 else "")
            + ": every output that depends on one is NaN, and after one step so are all weights",
            f"{reset_line(evidence, name)}  # or load an earlier checkpoint",
            tensor=name,
            site=layer.pair.site if layer is not None else "",
            location=layer.pair.location if layer is not None else NOWHERE,
            measured=float(moments.nan + moments.inf),
            expected=0.0,
            law=EXACT + "IEEE 754, section 6.2: what meets a NaN is one",
            related=tuple(n for n in bad if n != name),
        )

    def _signal(self, evidence: Evidence) -> Iterator[Finding]:
        """Where the probe's signal, or its gradient, stops being finite."""
        trace, graph = evidence.trace, evidence.graph
        if trace is None or graph is None or not trace.broken:
            return
        if any(n.variance in evidence.tensors and evidence.tensors[n.variance].min < 0 for n in norms(evidence)):
            return  # the root of it is NaN: IA508 says so
        from initaudit.graph.graph import location_of

        forward = any(not s.finite for n in trace.outputs if (s := trace.signals.get(n)) is not None)
        place = trace.first_non_finite if forward else trace.first_non_finite_gradient or trace.first_non_finite
        what = "signal" if forward else "gradient"
        location = next((location_of(n) for n in graph.fx.nodes if n.name == place), NOWHERE)
        orders = [trace.signals[w.node].order for w in trace.weights if w.node in trace.signals]
        seen = trace.signals.get(place) if place is not None else None
        # What happens before the first weight is a matter of the inputs; those that are made up may not be what it takes.
        before = forward and seen is not None and seen.order < min(orders, default=0)
        early = before and evidence.synthetic
        own = any(n.name == place and n.op == "placeholder" for n in graph.fx.nodes)
        large = [] if before else _large(evidence)
        root = fields(large[0]) if large else {"site": location.site, "location": location}
        cause = f"{large[0].tensor} has {power(ratio_of(large[0]) or 0)} times the variance it needs; " if large else ""
        yield self.finding(
            f"the {what} is not finite from {location.site or place} on, although all weights are finite; {cause}"
            + _after(before, early, own),
            "initaudit.audit(model, inputs)  # a batch of real inputs; --data on the command line"
            if early
            else init_line(*large)
            if large
            else "torch.autograd.set_detect_anomaly(True)  # no weight is too large: look at the operator itself",
            severity="info" if early else "error",
            measured=float(sum(not s.finite for s in trace.signals.values())),
            expected=0.0,
            law=EXACT + "operators of the probe whose signal is not finite",
            related=tuple(x.tensor for x in large[1:]),
            **root,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Finite weights."""
        return (example("He", lambda: convs(norm=True)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """One NaN, and a signal that overflows."""
        return (
            example("one NaN", lambda: convs(norm=True, change=lambda m: m[3].weight.view(-1)[5:6].fill_(float("nan")))),
            example("1e8 times He's in ten layers", lambda: mlp(32, *[64] * 10, 5, gain=1e8)),
        )


def _large(evidence: Evidence) -> list[LayerEvidence]:
    """The layers that are far too large for their activation, those left out that are not a tenth as large as the worst."""
    found = {x.tensor: (x, ratio) for x in fresh_layers(evidence) if (ratio := ratio_of(x) or 0.0) > _LARGE}
    worst = max((ratio for _, ratio in found.values()), default=0.0)
    return [x for x, ratio in found.values() if ratio > worst / 10]


def _trainable(evidence: Evidence, name: str) -> bool:
    array = evidence.checkpoint.arrays.get(name)
    if array is None:
        return False
    if evidence.graph is not None and name in evidence.graph.constants:
        return evidence.graph.constants[name].kind == "parameter"
    return array.trainable and len(array.shape) > 0
