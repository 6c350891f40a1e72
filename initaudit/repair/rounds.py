"""Round after round: audit, run the lines of the findings, audit again, until no line is left; then the file appears."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from initaudit.auditing.run import evidence_on, opened, run_one
from initaudit.config import Config
from initaudit.errors import UsageError
from initaudit.load import load
from initaudit.load.checkpoint import Array
from initaudit.load.module import build_spec, is_module_spec
from initaudit.randomness import random_state_kept
from initaudit.repair.lines import NotALine, drawn_by, run_line
from initaudit.repair.targets import STATE_DICTS, CopiedFile, OnnxFile, StateDict, Target, Values
from initaudit.report.report import ModelReport
from initaudit.rules.evidence import Evidence
from initaudit.rules.remedy import expression_of, parameter
from initaudit.rules.roots import findings_of
from initaudit.rules.rule import Finding
from initaudit.rules.selection import in_force

ROUNDS = 8  # a line serves those that it names; a network with more kinds of faults in a row is better written anew
_NO_LINE = "no line of torch.nn.init takes it away"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Drawn:
    """One tensor that was drawn again, with its standard deviations."""

    tensor: str
    before: float
    after: float


@dataclass(frozen=True)
class Applied:
    """A finding and what its line drew."""

    finding: Finding
    tensors: tuple[Drawn, ...]


@dataclass(frozen=True)
class Repair:
    """What was done, the findings that no line takes away with the reason, and the report on the file that was written.

    `report` is None where there was nothing to draw, and no file was written.
    """

    applied: tuple[Applied, ...]
    left: tuple[tuple[Finding, str], ...]
    report: ModelReport | None


def repair(source: str, out: Path, config: Config, progress: Progress) -> Repair:
    """Draws what the findings on `source` propose, and writes the model with these weights to `out`, whole or not at all.

    Errors and warnings are mended; weights that were trained are never drawn again. Draws follow `config.seed`. Raises
    UsageError where weights cannot be written in this form, UnreadableModel where the model cannot be read.
    """
    check_form(source, out)
    with random_state_kept(config.seed):
        evidence = evidence_on(opened(source, config), config, progress=progress)
    found = _flagged(evidence)
    if not any(_is_line(evidence, finding) for finding in found):
        return Repair((), tuple((finding, _NO_LINE) for finding in found), None)
    del evidence
    handle, name = tempfile.mkstemp(prefix=f".{out.name[:50]}.", suffix=out.suffix, dir=out.parent)
    os.close(handle)
    try:
        with random_state_kept(config.seed):
            target = _target(source, Path(name), out.suffix.lower())
            applied, left = _rounds(target, config, progress)
            target.finish()
        if not applied:
            return Repair((), left, None)
        again = dataclasses.replace(config, arch=source) if is_module_spec(source) else config
        report = run_one(name, again, progress)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, out)
    finally:
        Path(name).unlink(missing_ok=True)
    return Repair(applied, left, _named(report, name, str(out)))


def check_form(source: str, out: Path) -> None:
    """Raises UsageError where what `source` is cannot be written into a file called `out`."""
    where, suffix = f"fix {source}", out.suffix.lower()
    if is_module_spec(source):
        if suffix not in (*STATE_DICTS, ".safetensors"):
            known = ", ".join((*STATE_DICTS, ".safetensors"))
            raise UsageError(f"output {out}", "no name for the state dict of a module", f"one of {known}")
        return
    if "://" in source:
        raise UsageError(where, "an address", "a file or package.module:callable", "download it first")
    if Path(source).is_dir():
        raise UsageError(where, "a folder", "the one file of it that is to be mended", "with --arch for its program")
    if Path(source).exists() and suffix != Path(source).suffix.lower():
        raise UsageError(f"output {out}", f"another kind of file than {source}", f"a name that ends in {Path(source).suffix}")


def _target(source: str, file: Path, suffix: str) -> Target:
    if is_module_spec(source):
        return StateDict(source, build_spec(source), file, suffix)
    return OnnxFile(Path(source), file) if load(source).format == "onnx" else CopiedFile(Path(source), file)


def _flagged(evidence: Evidence) -> list[Finding]:
    """What is to be mended: remarks are not."""
    return [f for f in in_force(findings_of(evidence), evidence.config) if f.severity != "info"]


def _rounds(target: Target, config: Config, progress: Progress) -> tuple[tuple[Applied, ...], tuple[tuple[Finding, str], ...]]:
    """What was applied, and what is left with the reason."""
    applied: list[Applied] = []
    for turn in range(1, ROUNDS + 1):
        progress(f"round {turn}: auditing")
        checkpoint = target.open()
        evidence = evidence_on(checkpoint, config, progress=progress)
        run = _Round(target, evidence)
        for finding in _flagged(evidence):
            run.apply(finding)
        if not run.applied:
            break
        target.put(evidence.checkpoint, run.values())
        applied += run.applied
    return tuple(applied), tuple(run.left)


class _Round:
    """One audit's findings and what their lines draw."""

    def __init__(self, target: Target, evidence: Evidence) -> None:
        self.evidence = evidence
        self.arrays: dict[str, Array] = {
            expression: evidence.checkpoint.arrays[tensor]
            for expression, tensor in _expressions(evidence).items()
            if target.writable(tensor, evidence.checkpoint.arrays[tensor])
        }
        self.shapes = {expression: array.shape for expression, array in self.arrays.items()}
        self.drawn: dict[str, torch.Tensor] = {}
        self.applied: list[Applied] = []
        self.left: list[tuple[Finding, str]] = []

    def apply(self, finding: Finding) -> None:
        """Runs the line of a finding, unless a line of this round has drawn one of its weights: the next audit judges that."""
        try:
            named = drawn_by(finding.help, self.shapes)
        except NotALine:
            self.left.append((finding, _NO_LINE))
            return
        kept = [self.arrays[text].name for text in named if _trained(self.evidence, self.arrays[text].name)]
        if kept or not named:
            self.left.append((finding, f"{kept[0]} is trained" if kept else _NO_LINE))
            return
        if self.drawn.keys() & set(named):
            return
        before = {text: _floats(self.arrays[text].read()) for text in named}
        after = {text: torch.from_numpy(values.copy()) for text, values in before.items()}
        run_line(finding.help, after)
        self.drawn |= after
        changes = (Drawn(self.arrays[text].name, _spread(before[text]), _spread(after[text].numpy())) for text in named)
        self.applied.append(Applied(finding, tuple(changes)))

    def values(self) -> dict[str, Values]:
        """The new values by the names of the tensors."""
        return {self.arrays[text].name: tensor.numpy() for text, tensor in self.drawn.items()}


def _expressions(evidence: Evidence) -> dict[str, str]:
    """The tensor that each Python expression means; one that could be two is none."""
    found: dict[str, set[str]] = {}
    for layer in evidence.layers:
        found.setdefault(expression_of(layer), set()).add(layer.tensor)
    for tensor in evidence.checkpoint.arrays:
        found.setdefault(parameter(evidence, tensor), set()).add(tensor)
    return {text: min(names) for text, names in found.items() if len(names) == 1 and min(names) in evidence.checkpoint.arrays}


def _trained(evidence: Evidence, tensor: str) -> bool:
    """Whether drawing this tensor again would throw away what training has made of it."""
    layer = evidence.layer(tensor)
    verdict = layer.recognition.verdict if layer is not None and layer.recognition is not None else "unknown"
    return verdict == "trained" or (verdict == "unknown" and evidence.phase == "trained")


def _is_line(evidence: Evidence, finding: Finding) -> bool:
    arrays = evidence.checkpoint.arrays
    try:
        return bool(drawn_by(finding.help, {text: arrays[name].shape for text, name in _expressions(evidence).items()}))
    except NotALine:
        return False


def _floats(values: Values) -> Values:
    """As numbers that torch draws: float64 as they are, everything else in float32."""
    return np.ascontiguousarray(values, dtype=np.float64 if values.dtype == np.float64 else np.float32)


def _spread(values: Values) -> float:
    with np.errstate(all="ignore"):  # what is to be mended may be NaN
        return float(np.std(values, dtype=np.float64))


def _named(report: ModelReport, old: str, new: str) -> ModelReport:
    """The report under the file's final name."""
    findings = tuple(
        dataclasses.replace(f, message=f.message.replace(old, new), help=f.help.replace(old, new)) for f in report.findings
    )
    error = report.error.replace(old, new) if report.error is not None else None
    return dataclasses.replace(report, source=new, findings=findings, error=error)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
