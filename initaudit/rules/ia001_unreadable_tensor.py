"""IA001: a tensor that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule


class UnreadableTensor(Rule):
    """A tensor's bytes are missing or cut off, or its shape or type is impossible.

    What it does: reports every tensor that the file names and whose values could not be read; the others are audited.

    Why it is bad: a loader that does not stop leaves such a weight as it was before, which is random or uninitialised.

    Example: the second shard of a checkpoint was not downloaded to its end.

    Instead: fetch the file again and compare its checksum, or save the model again.

    Source: safetensors and ONNX file formats; https://github.com/microsoft/DeepSpeed/issues/2413.
    """

    code = "IA001"
    name = "unreadable-tensor"
    severity = "error"
    phase = "any"
    summary = "a tensor's bytes are missing, truncated or of an impossible shape or type"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all problems of this kind: one damaged file leaves many tensors unread."""
        problems = [p for p in evidence.checkpoint.problems if p.code == self.code]
        if not problems:
            return
        first, *others = problems
        count = f"{len(problems)} tensors cannot be read, the first: " if others else "this tensor cannot be read: "
        yield self.finding(
            count + first.message,
            "fetch or save the file again; compare sizes and checksums with the source",
            tensor=first.tensor,
            measured=len(problems),
            related=tuple(dict.fromkeys(p.tensor for p in others if p.tensor and p.tensor != first.tensor)),
        )
