"""IA401: a weight that is not finite."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.location import NOWHERE
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import convs, example
from initaudit.rules.remedy import reset_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.structure import is_mask


class NanOrInf(Rule):
    """A weight is not a finite number.

    What it does: counts NaN and infinities in every tensor. Infinities in tensors that are no weights (attention masks kept as
    buffers) are left alone.

    Why it is bad: every number that meets it becomes NaN: the loss, then all gradients, then all weights.

    Example: a checkpoint saved after a diverged step; a head made by `torch.empty`.

    Instead: go back to an earlier checkpoint, or initialise the tensor again.

    Source: IEEE 754, section 6.2; https://github.com/TransformerLensOrg/TransformerLens/issues/902.
    """

    code = "IA401"
    name = "nan-or-inf"
    severity = "error"
    phase = "any"
    summary = "a weight is not finite"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all tensors, at the first."""
        used = {c for x in evidence.layers for c in x.pair.constants} | {x.tensor for x in evidence.layers}
        bad = {
            name: m
            for name, m in evidence.tensors.items()
            if m.nan or (m.inf and (name in used or _trainable(evidence, name)) and not is_mask(evidence, name))
        }
        if not bad:
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
            related=tuple(n for n in bad if n != name),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Finite weights."""
        return (example("He", lambda: convs(norm=True)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """One NaN."""
        return (example("one NaN", lambda: convs(norm=True, change=lambda m: m[3].weight.view(-1)[5:6].fill_(float("nan")))),)


def _trainable(evidence: Evidence, name: str) -> bool:
    array = evidence.checkpoint.arrays.get(name)
    if array is None:
        return False
    if evidence.graph is not None and name in evidence.graph.constants:
        return evidence.graph.constants[name].kind == "parameter"
    return array.trainable and len(array.shape) > 0
