"""IA106: a deep residual stack whose branches are not scaled down, or in which the wrong matrix is."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, residual
from initaudit.rules.remedy import normal_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.structure import sum_behind
from initaudit.rules.support import SIGMAS, apart, error_of, fields, fresh_layers, initial, names, power, sigmas

if TYPE_CHECKING:
    from torch import fx

# Branches that return to one stream, from which a stack counts as deep: two a block, so four transformer blocks.
_DEEP = 8
# Twelve unscaled blocks of GPT-2 grow the stream 40-fold and train; at a thousandfold what a block adds is a thirtieth of it.
_GROWN = 1e3


class ResidualBranchNotScaled(Rule):
    """A deep stack of residual branches, whose last matrices are drawn like all others, or in which another one was scaled.

    What it does: finds the matrices that write into a residual stream (a sum which is also carried on), and compares their
    spread with that of the matrices inside the branches. Where all are drawn with one standard deviation whatever their size,
    as in the GPT-2 family, the convention divides the last one of each branch by the square root of the number of branches. A
    warning where the scaled matrix is another one, where only some of the branches are scaled, or where the stream grows a
    thousandfold; else a remark.

    Why it is bad: every branch adds its variance to the stream. After L blocks the stream is 2L times as strong as one branch,
    and what later blocks add drowns in it, the more so the deeper the stack.

    Example: GPT-2's `c_proj` without its factor 1/sqrt(2L).

    Instead: `nn.init.normal_(c_proj.weight, std=0.02 / math.sqrt(2 * n_layer))`.

    Source: Radford et al. 2019 (GPT-2), section 2.3; https://github.com/huggingface/transformers/issues/47458;
    https://github.com/karpathy/llama2.c/issues/579.
    """

    code = "IA106"
    name = "residual-branch-not-scaled"
    severity = "warning"
    phase = "init"
    summary = (
        "a deep residual stack whose convention scales the last matrix of a branch, and this one does not, or the wrong one"
    )
    thresholds = (
        Threshold(
            "growth",
            _GROWN,
            "times the power of the residual stream",
            "twelve unscaled blocks of GPT-2 grow it 40-fold and train",
        ),
        Threshold("branches", _DEEP, "branches that return to one stream", "two a block, so four transformer blocks"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        if evidence.graph is None or not initial(evidence):
            return
        stack = _stack(evidence, self.limit(evidence, "branches"))
        if stack is None:
            return
        count = len(stack.writers)
        factor = 1 / math.sqrt(count)
        writer = stack.writers[0]
        wrong = _wrong(stack)
        spread = writer.moments.std if wrong else stack.spread
        unscaled = [x for x in stack.writers if abs(x.moments.std / spread - 1) < SIGMAS * error_of(x) + 0.02]
        if not wrong and stack.uniform and 0 < len(unscaled) < count:
            yield from self._some(stack, unscaled)
        if len(unscaled) < count or (not wrong and not stack.uniform):
            return
        grown = stack.growth > self.limit(evidence, "growth")
        if wrong:
            message = (
                f"{names(wrong, 2)} and the like have {wrong[0].moments.std / spread:.3g} of the other matrices' "
                "spread, as 1/sqrt of "
                "the number of branches would give, but they do not return to the residual stream; "
                f"{names(stack.writers, 2)} do, at "
                f"{writer.moments.std:.3g}, {_errors(writer, spread * factor):.0f} standard errors from the "
                f"{spread * factor:.3g} that was meant for them: the branches are quiet in the wrong place, and the stream "
                "grows with every block"
            )
        else:
            message = (
                f"{count} matrices return to the residual stream with the same standard deviation {writer.moments.std:.3g} "
                "as all others; "
                f"GPT-2's convention is {spread * factor:.3g}, {factor:.2g} of it (1/sqrt of the number of "
                f"branches), {_errors(writer, spread * factor):.0f} standard errors below. The probe "
                f"sees the stream's power grow {power(stack.growth)}-fold" + ("" if grown else ", which does no harm by itself")
            )
        yield self.finding(
            message,
            normal_line([*((x, spread * factor) for x in stack.writers), *((x, spread) for x in wrong)]),
            severity="warning" if wrong or grown else "info",
            measured=writer.moments.std,
            expected=spread * factor,
            law="GPT-2: the others' standard deviation over the square root of the number of branches",
            standard_errors=_errors(writer, spread * factor),
            related=tuple(x.tensor for x in (*stack.writers[1:], *wrong)),
            **fields(writer),
        )

    def _some(self, stack: _Stack, unscaled: list[LayerEvidence]) -> Iterator[Finding]:
        """Branches of one kind were scaled, those of another were not."""
        count = len(stack.writers)
        scaled = [x for x in stack.writers if _scaled(x, stack.spread, count)]
        if _follows_fans([*scaled, *unscaled, *stack.others], stack):
            return
        # One layer that is left out of many is an odd one among its siblings.
        if len(scaled) + len(unscaled) < count or min(len(scaled), len(unscaled)) < count / 4:
            return
        first, usual = unscaled[0], scaled[0].moments.std
        yield self.finding(
            f"{len(scaled)} of {count} matrices that return to the residual stream have the standard deviation {usual:.3g}, "
            f"{usual / stack.spread:.2g} of that of all others, as 1/sqrt of the number of branches would give; the other "
            f"{len(unscaled)}, as {names(unscaled, 2)}, have {first.moments.std:.3g} like the rest, "
            f"{_errors(first, usual):.0f} standard errors above: the convention was "
            "applied to a part of the branches, and the others decide how the stream grows",
            normal_line([(x, usual) for x in unscaled]),
            measured=first.moments.std,
            expected=usual,
            law="the standard deviation of the other matrices that return to the stream",
            standard_errors=_errors(first, usual),
            related=tuple(x.tensor for x in unscaled[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Scaled branches, gated branches, and a shallow stack."""
        return (
            example("scaled by 1/sqrt of the branches", lambda: residual(10, change=lambda m: _scale(m, last=True))),
            example("LayerScale", lambda: residual(10, gate=1e-5)),
            example("two blocks", lambda: residual(2)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Not scaled, and the wrong one."""
        return (
            example("N(0, 0.02) throughout", lambda: residual(10)),
            example("the first matrix of each branch scaled", lambda: residual(10, change=lambda m: _scale(m, last=False))),
            example("every other branch scaled", lambda: residual(10, change=_every_other)),
        )


@dataclass(frozen=True)
class _Stack:
    """`writers` return to the stream, `others` lie inside branches; `spread` is the usual standard deviation of the others.

    `uniform` tells whether the others share one standard deviation although their fans differ.
    """

    writers: list[LayerEvidence]
    others: list[LayerEvidence]
    spread: float
    uniform: bool
    growth: float


def _stack(evidence: Evidence, deep: float) -> _Stack | None:
    assert evidence.graph is not None
    nodes = {n.name: n for n in evidence.graph.fx.nodes}
    writers, others = [], []
    sums: list[fx.Node] = []
    streams: set[fx.Node] = set()
    for layer in fresh_layers(evidence, "contraction"):
        if not layer.moments.m2 > 0:
            continue
        end = sum_behind(nodes.get(layer.pair.node), streams)
        if end is None:
            others.append(layer)
        else:
            writers.append(layer)
            sums.append(end)
            streams.add(end)
    if len(writers) < deep or not others:
        return None
    stds = sorted(x.moments.std for x in others)
    spread = max(stds, key=lambda s: bisect_left(stds, 1.05 * s) - bisect_right(stds, 0.95 * s))
    usual = [x for x in others if abs(x.moments.std / spread - 1) < 0.05]
    fans = [x.pair.fan_in for x in (*usual, *writers)]
    uniform = 2 * len(usual) > len(others) and max(fans) > 1.5 * min(fans)
    growth = 1.0
    if evidence.trace is not None:
        powers = [s.moment2 for n in sums if (s := evidence.trace.signals.get(n.name)) is not None and s.moment2]
        growth = powers[-1] / powers[0] if powers else 1.0
    return _Stack(writers, others, spread, uniform, growth)


def _wrong(stack: _Stack) -> list[LayerEvidence]:
    """The matrices inside branches that have the scale which those that return to the stream ought to have.

    Spreads that follow the fans of their matrices are the work of another scheme.
    """
    writer = stack.writers[0]
    found = [x for x in stack.others if _scaled(x, writer.moments.std, len(stack.writers))]
    by_fan = writer.moments.variance * writer.pair.fan_in
    return [x for x in found if abs(x.moments.variance * x.pair.fan_in / by_fan - 1) > 0.1]


def _follows_fans(layers: list[LayerEvidence], stack: _Stack) -> bool:
    """Whether most variances are one number over the fan-in, or over the sum of fans: another scheme, that scales by size."""
    fans = [(x.pair.fan_in, x.pair.fan_out, x.pair.fan_in + x.pair.fan_out) for x in layers]
    for law in range(3):
        products = [x.moments.variance * by[law] for x, by in zip(layers, fans, strict=True)]
        middle = sorted(products)[len(products) // 2]
        off = [x for x, p in zip(layers, products, strict=True) if abs(apart(p, middle, error_of(x))) > SIGMAS]
        if not any(x in off for x in stack.writers) and 4 * len(off) < len(layers):
            return True
    return False


def _errors(layer: LayerEvidence, std: float) -> float:
    return abs(sigmas(layer, std * std))


def _scaled(layer: LayerEvidence, spread: float, count: int) -> bool:
    """Whether the spread is the usual one over sqrt(count), or over that of twice or half as many branches."""
    slack = SIGMAS * error_of(layer) + 0.02
    return any(abs(layer.moments.std / spread * math.sqrt(n) - 1) < slack for n in (count, 2 * count, count / 2) if n > 1)


def _scale(model: Any, *, last: bool) -> None:
    blocks = [x for x in linear(model) if x.in_features * 4 == x.out_features or x.out_features * 4 == x.in_features]
    for layer in blocks:
        if (layer.in_features > layer.out_features) == last:
            layer.weight.div_(math.sqrt(len(blocks) / 2))


def _every_other(model: Any) -> None:
    last = [x for x in linear(model) if x.in_features == 4 * x.out_features]
    for layer in last[::2]:
        layer.weight.div_(math.sqrt(len(last)))
