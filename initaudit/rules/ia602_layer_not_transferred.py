"""IA602: against a base checkpoint, a layer that did not come along."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.measure.against import Against, Change
from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule, Threshold
from initaudit.rules.support import HEAD, names, to_output

# Tensors that must have come along before the one that did not is an exception: else NEW was simply not made from BASE.
_ALONG = 2


class LayerNotTransferred(Rule):
    """Against a base checkpoint, a layer that should have come along did not, or nothing was trained at all.

    What it does: correlates every tensor with the one of that name in the base given by `--base` or `initaudit compare`. A
    tensor that was trained on keeps a correlation with its start; one that was drawn anew has none, within the sampling error
    1/sqrt(n) of independent values. Reports those where others came along, and a copy in which every tensor is the base's.

    Why it is bad: a layer that did not match by name was left as it was drawn, and its features are lost.

    Example: `model.load_state_dict(state, strict=False)` where the layers are called otherwise.

    Instead: rename the keys, load with `strict=True`; and look that the optimizer was given the model's parameters.

    Source: Neyshabur et al. 2020 (what is being transferred in transfer learning), for how little fine-tuning moves weights.
    """

    code = "IA602"
    name = "layer-not-transferred"
    severity = "warning"
    phase = "any"
    summary = "against a base checkpoint: a layer that should have come along did not, or one that should be new did"
    thresholds = (
        Threshold("along", _ALONG, "tensors, at least", "with fewer that came along NEW was simply not made from BASE"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for layers drawn anew, one for a checkpoint in which nothing was trained."""
        base = evidence.base
        if base is None:
            return
        anew = base.of("newly initialised")
        along = base.of("identical", "trained on")
        if anew and len(along) >= self.limit(evidence, "along"):
            yield self._not_along(evidence, anew, along)
        elif anew:
            yield self.finding(
                f"{len(anew)} of {len(anew) + len(along)} tensors have nothing in common with those of {base.source}: it is "
                "probably not what this checkpoint was made from",
                "give the base that was tuned",
                severity="info",
                tensor=anew[0].tensor,
                related=tuple(change.tensor for change in anew[1:]),
            )
        if along and not anew and len(base.of("identical")) == len(along) > 1:
            yield self._untouched(base, along)

    def _not_along(self, evidence: Evidence, anew: tuple[Change, ...], along: tuple[Change, ...]) -> Finding:
        outputs = {x.tensor for x in evidence.layers if to_output(x)} | {x.pair.bias for x in evidence.layers if to_output(x)}
        known = evidence.graph is not None
        head = all(c.tensor in outputs if known else HEAD.search(c.tensor) is not None for c in anew)
        unmatched = "it did not match by name"
        reason = f"right for a new head, else {unmatched}" if head else f"{unmatched}, or was drawn anew"
        first = max(anew, key=lambda change: abs(change.correlation))
        listed = names([c.tensor for c in anew])
        verb = "was" if len(anew) == 1 else "were"
        return self.finding(
            f"{listed} {verb} not made from the base: {len(along)} other tensors are identical or trained on, while the "
            f"correlation with the base is {first.correlation:.2g} at most: {reason}",
            "compare the names with those of the base: model.load_state_dict(base, strict=True)",
            severity="info" if head else "warning",
            measured=first.correlation,
            expected=1.0,
            tensor=anew[0].tensor,
            related=tuple(c.tensor for c in anew[1:]),
        )

    def _untouched(self, base: Against, along: tuple[Change, ...]) -> Finding:
        return self.finding(
            f"all {len(along)} tensors that {base.source} has too are identical with its own: nothing was trained on, or the "
            "base was saved in the place of the tuned model",
            "look that the optimizer was given model.parameters(), and which file was saved",
            severity="info",
            tensor=along[0].tensor,
        )
