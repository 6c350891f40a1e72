"""IA502: a tensor that is empty, absent or unexpected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import HEAD, names


class MissingTensor(Rule):
    """A tensor has no elements, or is absent although the index, the configuration or the architecture names it.

    What it does: reports what the loader found missing or unexpected, and parameters with a size of zero. ONNX files use empty
    constants for inputs that are left out; these are no weights.

    Why it is bad: a loader that does not check fills the gap with random values.

    Example: shards gathered from ZeRO-3 without its context, whose parameters are placeholders of no elements.

    Instead: `deepspeed.zero.GatheredParameters`, or `zero_to_fp32.py` to put the checkpoint together.

    Source: https://github.com/microsoft/DeepSpeed/issues/2413.
    """

    code = "IA502"
    name = "missing-tensor"
    severity = "error"
    phase = "any"
    summary = "an empty, absent or unexpected tensor (against the index, the config or the architecture given)"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each problem, one for all empty tensors."""
        for problem in evidence.checkpoint.problems:
            if problem.code == self.code:
                yield self.finding(
                    f"this tensor is not as it should be: {problem.message}",
                    "save the checkpoint again, complete, or fetch the missing shard",
                    severity=problem.severity,
                    tensor=problem.tensor,
                    related=problem.related,
                )
        yield from self._against_base(evidence)
        onnx = evidence.checkpoint.format == "onnx"
        used = {c for x in evidence.layers for c in x.pair.constants}
        empty = [
            n
            for n, a in evidence.checkpoint.arrays.items()
            if a.size == 0 and a.dtype.startswith(("float", "bfloat")) and (not onnx or n in used)
        ]
        if empty and not any(
            p.code == self.code and {p.tensor, *p.related}.intersection(empty) for p in evidence.checkpoint.problems
        ):
            shape = "x".join(map(str, evidence.checkpoint.arrays[empty[0]].shape))
            yield self.finding(
                f"{names(empty)} {'has' if len(empty) == 1 else 'have'} no elements (shape {shape}): a placeholder was "
                "saved in the "
                "place of the values, and a loader fills the gap with random ones",
                "gather the parameters before saving, or put the shards together",
                tensor=empty[0],
                measured=0.0,
                related=tuple(empty[1:]),
            )

    def _against_base(self, evidence: Evidence) -> Iterator[Finding]:
        """What the base has and this has not, the other way round, and what changed its shape; heads are another task's."""
        base = evidence.base
        if base is None:
            return
        if not base.of("identical", "trained on", "newly initialised", "reshaped"):
            yield self.finding(
                f"no tensor has a name that {base.source} has too: they are not one network, or this one holds an adapter",
                "give the checkpoint that this one was tuned from",
                severity="info",
            )
            return
        for kind, says in (
            ("missing", "the base has {}, which is missing here"),
            ("unexpected", "{} is not in the base: added for the new task, or named otherwise"),
            ("reshaped", "{} has another shape than in the base ({} there, {} here)"),
        ):
            found = base.of(kind)  # type: ignore[arg-type]
            if found:
                head = all(HEAD.search(c.tensor) for c in found)
                shapes = found[0].shapes if found[0].shapes is not None else ((), ())
                yield self.finding(
                    says.format(names([c.tensor for c in found]), *("x".join(map(str, shape)) for shape in shapes)),
                    "compare the names: model.load_state_dict(base, strict=True) lists them",
                    severity="info" if head or kind == "unexpected" else "error" if kind == "missing" else "warning",
                    tensor=found[0].tensor,
                    related=tuple(c.tensor for c in found[1:]),
                )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """All there."""
        return (example("complete", lambda: mlp(16, 32, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A placeholder of no elements."""
        return (example("a placeholder", lambda: mlp(16, 32, 5, change=_empty)),)


def _empty(model: Any) -> None:
    import torch

    model.register_parameter("gathered", torch.nn.Parameter(torch.empty(0)))
