"""One model from its source to its report, and the Python interface `initaudit.audit`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from initaudit.auditing.result import model_report
from initaudit.auditing.tensors import measure_all, survey_all
from initaudit.config import Config
from initaudit.errors import InitauditError, UnreadableModel, UsageError
from initaudit.load import from_module, is_module_spec, load, load_proto
from initaudit.load.checkpoint import Checkpoint
from initaudit.meter import silent
from initaudit.report.report import Layer, ModelReport, Verdict
from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding

if TYPE_CHECKING:
    from initaudit.auditing.program import Program

Progress = Callable[[str], None]
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory")  # how torch says so


class Audit:
    """The audit of one model: what was found, as records and as the JSON document's plain values."""

    def __init__(self, report: ModelReport) -> None:
        self.report = report

    @property
    def verdict(self) -> Verdict:
        """ "pass", "warn" or "fail"."""
        return self.report.verdict

    @property
    def risk(self) -> Mapping[str, Any]:
        """Probabilities: symmetry, vanishing, exploding, untrainable (sgd, adam); empty where no probe was run."""
        return self.report.risk

    @property
    def layers(self) -> tuple[Layer, ...]:
        """One record for each weight at each kind of use, in forward order."""
        return self.report.layers

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings in force, the worst first."""
        return self.report.findings

    def to_dict(self) -> dict[str, Any]:
        """The model's entry of the JSON report."""
        from initaudit.report.as_json import model_dict

        return model_dict(self.report)

    def __repr__(self) -> str:
        """The verdict and how many findings of which severity."""
        return f"<Audit {self.report.source}: {self.verdict}, {len(self.findings)} findings>"


def audit(model: Any, inputs: Any = None, *, config: Config | Mapping[str, Any] | None = None) -> Audit:
    """Audits `model`: a path, a `torch.nn.Module` or an `onnx.ModelProto`.

    `inputs` are example inputs: a tensor, a tuple of them, or a mapping by name; they are made up where None. `config` is a
    `Config` or a mapping of its fields. Raises UnreadableModel where the model cannot be read or run, UsageError for inputs or
    configuration that mean nothing.
    """
    from initaudit.rules.selection import check_config

    settings = config if isinstance(config, Config) else Config(**known_fields(config or {}))
    check_config(settings)
    return Audit(_in_force(report_on(open_model(model), settings, inputs=inputs), settings))


def open_model(model: Any) -> Checkpoint:
    """The checkpoint of whatever `audit` takes; raises UnreadableModel, and UsageError for anything else."""
    if isinstance(model, (str, os.PathLike)):
        return load(model)
    if hasattr(model, "graph") and hasattr(model, "opset_import"):
        return load_proto(model)
    if hasattr(model, "named_parameters") and callable(model):
        return from_module(model)
    raise UsageError("audit", f"a {type(model).__name__} was given", "a path, a torch.nn.Module or an onnx.ModelProto")


def known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Config`; raises UsageError with the nearest name for one that does not exist."""
    from initaudit.suggest import did_you_mean

    names = [f.name for f in dataclasses.fields(Config)]
    for name in fields:
        if name not in names:
            raise UsageError(
                f"config: {name}", "no such setting", advice=did_you_mean(name, names) or "one of " + ", ".join(names)
            )
    return dict(fields)


def _in_force(report: ModelReport, config: Config) -> ModelReport:
    from initaudit.auditing.result import verdict_of
    from initaudit.rules.selection import in_force

    findings = in_force(report.findings, config)
    return dataclasses.replace(report, findings=findings, verdict=verdict_of(findings))


def run_one(source: str, config: Config, progress: Progress | None = None) -> ModelReport:
    """The report on one source of the command line; a model that cannot be read or run has its `error` set, never raised."""
    say = progress if progress is not None else silent
    try:
        say(f"{source}: reading")
        report = report_on(opened(source, config), config, progress=lambda label: say(f"{source}: {label}"))
        return dataclasses.replace(_in_force(report, config), source=source)
    except InitauditError as error:
        text = str(error)
        line = text if source in text else f"{source}: {text}"
        return ModelReport(source, "unknown", error=line)


def opened(source: str, config: Config) -> Checkpoint:
    """The checkpoint; what the user's own code draws while it builds a module follows the seed, so that runs repeat."""
    if not is_module_spec(source):
        return load(source)
    from initaudit.randomness import random_state_kept

    with random_state_kept(config.seed):
        return load(source)


def report_on(checkpoint: Checkpoint, config: Config, *, inputs: Any = None, progress: Progress = silent) -> ModelReport:
    """The report on a checkpoint that has been opened."""
    from initaudit.rules.roots import findings_of

    try:
        evidence = evidence_on(checkpoint, config, inputs=inputs, progress=progress)
    except SystemExit as error:  # a stranger's forward must not end a run over other models, and not as a success
        raise UnreadableModel(
            checkpoint.source, f"its code called sys.exit({error.code!r})", "a forward that returns"
        ) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        raise UnreadableModel(
            checkpoint.source, "the probe does not fit into memory", advice="a smaller --probe-batch"
        ) from error
    return model_report(evidence, findings_of(evidence, progress))


def evidence_on(checkpoint: Checkpoint, config: Config, *, inputs: Any = None, progress: Progress = silent) -> Evidence:
    """Everything that the rules look at: in the architecture that is asked for, and against the base where one is given."""
    if config.arch is not None or "config" in checkpoint.metadata:
        from initaudit.auditing.architecture import in_architecture

        progress("building the architecture")
        checkpoint = in_architecture(checkpoint, config.arch)
    elif checkpoint.program is None and checkpoint.format in ("exported_program", "torchscript") and checkpoint.arrays:
        from initaudit.auditing.read_program import with_program

        progress("reading the file's graph")
        checkpoint = with_program(checkpoint, config)
    evidence = gather(checkpoint, config, inputs=inputs, progress=progress)
    if checkpoint.optimizer:
        from initaudit.measure.gradient_history import histories

        evidence = dataclasses.replace(evidence, histories=histories(evidence.checkpoint))
    if config.base is not None:
        from initaudit.measure.against import against

        progress("comparing with the base")
        found = against(evidence.checkpoint.arrays, load(config.base).arrays, config.base)
        evidence = dataclasses.replace(evidence, base=found)
    return evidence


def gather(checkpoint: Checkpoint, config: Config, *, inputs: Any = None, progress: Progress = silent) -> Evidence:
    """Runs the stages in order: measure, graph, pair, expect, probe. Nothing is judged here."""
    program: Program | None = None
    if checkpoint.program is not None and checkpoint.format in ("exported_program", "torchscript") and config.arch is None:
        from initaudit.auditing.read_program import opened

        checkpoint, program = opened(checkpoint, config, inputs, progress)
    if checkpoint.format == "module":
        from initaudit.auditing.lazy import settled

        checkpoint = settled(checkpoint, config, inputs)
    static = checkpoint.program is None
    seen = survey_all(checkpoint, progress, config.jobs) if static else measure_all(checkpoint.arrays, progress, config.jobs)
    tensors = seen.moments
    notes = (*checkpoint.notes, *_of_complex(checkpoint))
    checkpoint = dataclasses.replace(checkpoint, problems=(*checkpoint.problems, *seen.problems), notes=notes)
    lost = {p.tensor for p in checkpoint.problems if p.code == "IA001"}
    if lost and not tensors and lost.issuperset(checkpoint.arrays) and all(p.code == "IA001" for p in checkpoint.problems):
        # Nothing is left to judge: the model as a whole cannot be read.
        raise UnreadableModel(checkpoint.source, *_whole(checkpoint))
    if static:
        from initaudit.auditing.recognition import in_company
        from initaudit.auditing.static import NOTE, norm_vectors

        checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, NOTE))
        phase, layers = in_company(tuple(seen.layers), checkpoint.arrays, tensors, norm_vectors(checkpoint), config)
        why = str(checkpoint.metadata.get("no_program", "the file holds weights and no program"))
        return Evidence(checkpoint, config, phase, layers, tensors, no_probe=why)
    from initaudit.auditing.program import open_program

    program = program or open_program(checkpoint, config, inputs, progress)
    return dataclasses.replace(program, checkpoint=checkpoint).evidence(tensors)


def _of_complex(checkpoint: Checkpoint) -> tuple[str, ...]:
    names = [name for name, array in checkpoint.arrays.items() if array.dtype.startswith("complex")]
    if not names:
        return ()
    named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (f"complex tensors ({named}) are not compared with schemes, which are laws of real numbers",)


def _whole(checkpoint: Checkpoint) -> tuple[str, str, str]:
    """What was found, expected and advised where not a single tensor can be read."""
    count = len(checkpoint.problems)
    many = f"none of its {count} tensors can be read, the first: " if count > 1 else ""
    return many + checkpoint.problems[0].message.removeprefix(f"{checkpoint.source}: "), "", "fetch or save the file again"
