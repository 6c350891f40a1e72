"""IA505: a file that would run code."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule


class CodeInPickle(Rule):
    """The file would run code when unpickled.

    What it does: lists what a pickle names beyond tensors and plain containers, without calling any of it. The tensors are
    audited all the same. Objects that well-known libraries build of plain data (layers of torch.nn, training arguments,
    settings) are one warning.

    Why it is bad: `torch.load(..., weights_only=False)` and `pickle.load` call whatever the file names, with your rights.

    Example: a whole module saved by `torch.save(model, path)`, or an attack.

    Instead: `torch.load(path, weights_only=True)`, and safetensors for what you give to others.

    Source: https://docs.python.org/3/library/pickle.html, "never unpickle data that could have come from an untrusted source".
    """

    code = "IA505"
    name = "code-in-pickle"
    severity = "error"
    phase = "any"
    summary = "the file would run code when unpickled: what it would call is named, and nothing of it is run"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each problem of this kind that a loader noticed."""
        for problem in evidence.checkpoint.problems:
            if problem.code == self.code:
                yield self.finding(
                    problem.message,
                    "load it with torch.load(path, weights_only=True), or ask for safetensors",
                    severity=problem.severity,
                    tensor=problem.tensor,
                )
