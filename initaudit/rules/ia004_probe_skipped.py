"""IA004: nothing was run."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule


class ProbeSkipped(Rule):
    """No forward and backward probe was run.

    What it does: says why there is no measurement of signal and gradient.

    Why it is bad: variances alone say little about whether a network trains (AUC 0.63 to 0.74 on networks that were trained).

    Example: a checkpoint without its module, or `--no-probe`.

    Instead: give the module or an ONNX file, and inputs with `--input` or `--data` where none could be made up.

    Where there is a graph that cannot be run, second moments are predicted from the weights alone, and named as predicted.

    Source: measured on 276 trained networks; Poole et al. 2016 and Schoenholz et al. 2017 for the prediction.
    """

    code = "IA004"
    name = "probe-skipped"
    severity = "info"
    phase = "any"
    summary = "no forward/backward probe was run, and why"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        if evidence.trace is None:
            yield self.finding(
                f"no probe was run: {evidence.no_probe or 'there is no program'}; {_instead(evidence)}"
                "signal and gradient are not judged",
                "give the module or an ONNX file, and inputs with --input NAME=2x3x224x224:float32 or --data batch.npz",
            )
        elif evidence.no_probe and not evidence.trace.unknown:  # where it could not be run, IA002 says so
            yield self.finding(
                f"the probe went forward only: {evidence.no_probe}; the gradient is not judged",
                "read the findings about weights and signals, and watch the gradient in the first steps of training",
            )


def _instead(evidence: Evidence) -> str:
    """What mean-field theory predicts, where it predicts anything."""
    prediction = evidence.prediction
    if prediction is None:
        return ""
    moments = [f.moment2 for f in prediction.fields.values() if f.moment2 > 0]
    if not moments:
        return ""
    return (
        f"mean-field theory predicts second moments between {min(moments):.2g} and {max(moments):.2g} at "
        f"{prediction.share:.0%} of the nodes from the weights alone; "
    )
