"""IA307: different inputs become the same representation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from initaudit.graph.reach import downstream
from initaudit.rules.culprit import culprit
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp, residual
from initaudit.rules.flow import ROUNDING
from initaudit.rules.health import CONTRAST, below, health, is_constant, pair_of
from initaudit.rules.mixing import collapse
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.structure import makers
from initaudit.rules.support import fields, initial, names, power, ratio_of, view

if TYPE_CHECKING:
    from initaudit.probe.trace import Trace


# Of the loss of guessing: what steps cannot get below.
_STUCK = 0.95


class InputsCollapse(Rule):
    """Different inputs become the same representation.

    What it does: follows the variance between examples as a share of the second moment, from the input to the layer that makes
    the output, where every step through weights, activations and norms counts and sums keep what any part has. Where every
    place of an example has an output of its own, it also asks whether attentions in a row have made its tokens equal.

    Why it is bad: the network computes a constant. Its gradients agree for all examples, so the first steps fit the average
    answer, and what tells inputs apart has to be found among rounding errors.

    Example: deep stacks with weights too small for their biases, or sigmoids, which add 1/2 to everything; attentions in a row
    without skip connections.

    Instead: the variance that the activation needs, zero biases, and a normalization or residual connections in deep stacks.

    Source: Poole et al. 2016, eq. 5; Schoenholz et al. 2017: a network trains up to about 6 correlation depths. Dong et al.
    2021, "Attention is not all you need": without skips tokens become one, doubly exponentially with depth.
    """

    code = "IA307"
    name = "inputs-collapse"
    severity = "error"
    phase = "init"
    summary = "different inputs become the same representation (correlation to 1, rank collapse)"
    thresholds = pair_of(CONTRAST, "of the share that differs between inputs")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        state, flow = health(evidence), view(evidence).flow
        if flow is None or evidence.trace is None or not initial(evidence) or not state.layers:
            return
        level = below(state.contrast, state.limits.contrast)
        signals = evidence.trace.signals
        last = [n for n in flow.last if n in signals]
        same = [n for n in last if is_constant(signals[n], flow.contrast)]
        cut = (x for x in state.layers if any(is_constant(signals.get(r.output), flow.contrast) for r in x.records))
        alone = next(cut, None) if same else None
        # One of several outputs may be constant on purpose (the volume that a flow starts with), but not by a layer that sends
        # the same to every input, unless that is a zero which moves at the first step, and another output goes round it.
        others = [n for n in last if n not in same]
        meant = bool(others) and (alone is None or (_moves(alone) and _leads(evidence, alone, others)))
        constant = bool(same) and not meant
        if not constant:
            yield from self._merged(evidence, least=2 if level else 1)
        if not level and not constant:
            yield from self._mixed(evidence)
            return
        alone = alone if constant else culprit(evidence, state, flow.contrast, state.contrast)
        if alone is not None and all(r.input_moment2 == 0 for r in alone.records):
            # It was lost before: in a table of one value, behind which a norm leaves nothing.
            tables = (x for x in evidence.layers if x.pair.role == "embedding" and x.moments.m2 == 0)
            alone = next(tables, alone)
        small = [alone] if alone else [x for x in state.layers if (ratio_of(x) or 1) < 1] or list(state.layers)
        found = "nothing" if constant else power(state.contrast)
        where = f"it is lost in {small[0].tensor}" if alone else f"{names(small, 3)} have small weights"
        yield self.finding(
            f"all inputs give {'the same' if constant else 'nearly the same'} output: of what tells them apart {found} is left "
            f"after {len(state.layers)} layers, relative to what they have in common (healthy networks keep more than 0.02); "
            f"{where}; the network starts as a constant, and all examples ask for the same change",
            init_line(*small),
            severity="warning" if _undone(evidence.trace) else "error" if constant else level or "warning",
            measured=0.0 if constant else state.contrast,
            expected=1.0,
            tensor=small[0].tensor,
            site=small[0].pair.site,
            location=small[0].pair.location,
            related=tuple(x.tensor for x in small[1:]),
        )

    def _mixed(self, evidence: Evidence) -> Iterator[Finding]:
        """Equal outputs though no layer is to blame: forward mixes the examples, or loses what tells them apart elsewhere.

        Zeros that are meant learn at once.
        """
        trace = evidence.trace
        if trace is None or not trace.alike or not trace.response or any(min(r.losses) < _STUCK for r in trace.response):
            return
        lost, drowned = _where_lost(evidence)
        if trace.met or not lost:
            where = "forward sums, averages or picks along the axis of the examples"
            advice = "reduce over the axes of one example only: look for mean, sum, max or an index along axis 0"
        elif drowned:
            where = f"at {lost} it is less than rounding beside what they have in common"
            advice = "keep it up to there: a smaller bias or constant, a larger branch, or a normalization of what differs"
        else:
            where = f"{lost} gives one value for all"
            advice = "look at what it is given: an index, a rounding or a comparison that comes out the same for every input"
        yield self.finding(
            f"all {trace.batch} inputs give the same output, and no virtual step tells them apart, though every layer does: "
            + where,
            advice,
            measured=0.0,
            expected=1.0,
            **fields(evidence.layers[-1]),
        )

    def _merged(self, evidence: Evidence, least: int) -> Iterator[Finding]:
        """Tokens that attentions have made one: what differs between inputs is kept, what differs between places is lost.

        `least` is how many attentions have to read nothing but equal tokens.
        """
        found = collapse(evidence)
        if found is None or len(found.blind) < least:
            return
        makes = makers(evidence, found.merging) or [x for x in evidence.layers if x.pair.role == "contraction"]
        several = len(found.blind) > 1
        further = (
            f"{len(found.blind)} more attentions read equal tokens, have nothing to choose from and no gradient to learn it by"
            if several
            else "one more attention reads equal tokens, has nothing to choose from and no gradient to learn it by"
        )
        yield self.finding(
            f"all tokens of an input become the same: they differ in {power(found.spread)} of the second moment before the "
            f"attentions, and in nothing but rounding behind that of {makes[0].tensor}, as no skip connection leads past them; "
            f"{further}, and every place gets the same output",
            "add what an attention reads to what it makes: x = x + attention(norm(x))",
            # Behind one more attention networks still learned within some hundred steps, behind two and more none did.
            severity="error" if several else "warning",
            measured=0.0,
            expected=found.spread,
            apart=True,
            **fields(makes[0]),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A deep stack under He, and LayerScale."""
        return (
            example("He before 20 ReLU layers", lambda: mlp(64, *[128] * 20, 5)),
            example("LayerScale 1e-6", lambda: residual(6, gate=1e-6)),
            example("attentions with skips", lambda: _attentions(skips=True)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Sigmoids, and a zero layer."""
        return (
            example("ten sigmoid layers", lambda: mlp(32, *[64] * 10, 5, act="Sigmoid", gain=1.0)),
            example("a mean over the batch", _averaged),
            example("six attentions without skips", lambda: _attentions(skips=False)),
            example("a zero layer", lambda: mlp(32, 64, 64, 64, 5, change=lambda m: linear(m)[1].weight.zero_())),
        )


def _where_lost(evidence: Evidence) -> tuple[str, bool]:
    """The first operator of which all examples get the same, and whether that is a layer, whose bias drowns what it is given.

    "" for no operator whose output was compared.
    """
    from initaudit.graph.calls import role_of
    from initaudit.graph.graph import location_of

    graph, trace = evidence.graph, evidence.trace
    assert graph is not None
    assert trace is not None
    varied = downstream(n for n in graph.fx.nodes if n.op == "placeholder")
    for node in graph.fx.nodes:
        seen = trace.signals.get(node.name)
        if (
            node in varied
            and node.op == "call_function"
            and seen is not None
            and seen.spread is not None
            and seen.spread <= ROUNDING
        ):
            role = role_of(node)
            place = f"{role.name or node.name} ({location_of(node).site or node.name})"
            return place, role.kind in ("contraction", "recurrent")
    return "", False


def _attentions(*, skips: bool) -> Any:
    import torch
    from torch import nn

    class Attentions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(6))
            self.norms, self.head = nn.ModuleList(nn.LayerNorm(32) for _ in range(6)), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer, norm in zip(self.layers, self.norms, strict=True):
                y = layer(x, x, x, need_weights=False)[0]
                x = norm(x + y if skips else y)
            z: torch.Tensor = self.head(x)
            return z

    return Attentions(), (torch.randn(16, 8, 32),)


def _averaged() -> Any:
    import torch
    from torch import nn

    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32)), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.body(x).mean(0, keepdim=True).expand(x.shape[0], -1))
            return y

    return Averaged(), (torch.randn(32, 20),)


def _moves(layer: LayerEvidence) -> bool:
    """Whether a layer of zeros gets a gradient."""
    zero = layer.moments.m2 == 0 and layer.moments.mean == 0
    return zero and any(r.gradient_norm for r in layer.records)


def _leads(evidence: Evidence, layer: LayerEvidence, ends: Collection[str]) -> bool:
    """Whether a way leads from a layer to one of these nodes."""
    assert evidence.graph is not None
    behind = downstream(n for n in evidence.graph.fx.nodes if n.name == layer.pair.node)
    return any(n.name in ends for n in behind)


def _undone(trace: Trace) -> bool:
    """Whether virtual steps of either optimizer learned half of their task: a layer of zeros that moves is soon none."""
    from initaudit.probe.features import OPTIMIZERS, lowest_loss
    from initaudit.probe.response import LEARNT

    losses = [lowest_loss(trace, name) for name in OPTIMIZERS]
    return all(loss is not None and loss < LEARNT for loss in losses)
