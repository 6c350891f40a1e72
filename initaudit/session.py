"""One run over several models: which are audited with what, in how many processes, and the exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from initaudit import __version__, cache
from initaudit.config import Config
from initaudit.errors import InitauditError
from initaudit.report.report import ModelReport, Report
from initaudit.suggest import did_you_mean

FINE, FINDINGS, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def audit_all(sources: Sequence[str], config: Config, progress: Callable[[str], None], commands: Sequence[str]) -> Report:
    """The report on every source, in their order; one that cannot be read has its `error` set, the others are audited."""
    from initaudit.rules.selection import in_force

    jobs = [config.for_model(source) for source in sources]
    if config.jobs > 1 and len(jobs) > 1:
        models = list(_side_by_side(jobs, min(config.jobs, len(jobs))))
    else:
        models = [_audited(source, its, progress) for source, its in jobs]
    done = []
    for model, (_, its), given in zip(models, jobs, sources, strict=True):
        if model.error is not None:
            done.append(dataclasses.replace(model, error=with_hint(model.error, given, (*commands, *config.models))))
        else:
            done.append(dataclasses.replace(model, findings=in_force(model.findings, its)))
    return Report(tuple(done), __version__)


def models_of(sources: Sequence[str], config: Config) -> tuple[str, ...]:
    """The models that the sources stand for, each once: several for a folder of several."""
    found: dict[str, None] = {}
    for source in sources:
        parts: tuple[str, ...] = (source,)
        if source not in config.models and os.path.isdir(source):
            from initaudit.load.collection import models_in

            parts = models_in(source)
        found.update(dict.fromkeys(parts))
    return tuple(found)


def audit_one(source: str, config: Config, progress: Callable[[str], None] | None = None) -> ModelReport:
    """One model; a function of this module so that another process can be told to run it."""
    entry = cache.entry_of(source, config)
    kept = cache.read(entry) if entry is not None else None
    if kept is not None:
        return kept
    from initaudit.auditing import run_one
    from initaudit.load.remote import fetched, is_remote

    if not is_remote(source):
        report = run_one(source, config, progress)
        if entry is not None and report.error is None:
            cache.write(entry, report)
        return report

    def say(label: str) -> None:
        if progress is not None:
            progress(f"{source}: {label}")

    try:
        with fetched(source, say) as local:
            report = run_one(local, config, progress)
    except InitauditError as error:
        return ModelReport(source, "unknown", error=str(error))
    # The copy's own name would tell nobody anything, and differs from run to run.
    unread = report.error.replace(local, source) if report.error is not None else None
    findings = tuple(dataclasses.replace(f, message=f.message.replace(local, source)) for f in report.findings)
    return dataclasses.replace(report, source=source, error=unread, findings=findings)


def _audited(source: str, config: Config, progress: Callable[[str], None] | None = None) -> ModelReport:
    try:
        # What the model's own code prints is no part of the report.
        with contextlib.redirect_stdout(sys.stderr):
            return audit_one(source, config, progress)
    except Exception as error:  # noqa: BLE001 - a fault of ours in one model must leave the others audited; it is shown whole
        text = f"{source}: an internal error, not a finding about the model: {type(error).__name__}: {error}"
        return ModelReport(source, "unknown", notes=("".join(traceback.format_exception(error)),), error=text)


def _side_by_side(jobs: Sequence[tuple[str, Config]], workers: int) -> Iterator[ModelReport]:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Each process would otherwise start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # A forked child of a process in which torch has started threads can hang.
    jobs = [(source, dataclasses.replace(config, jobs=max(1, config.jobs // workers))) for source, config in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_audited, *zip(*jobs, strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def with_hint(error: str, given: str, names: Sequence[str]) -> str:
    """The line about an unreadable model, with the nearest file, command or configured name where the path does not exist."""
    path = Path(given)
    if "://" in given or os.path.exists(path) or "did you mean" in error or "; write " in error:
        return error
    try:
        beside = [str(path.parent / entry) for entry in os.listdir(path.parent)] if path.parent.is_dir() else []
    except OSError:
        beside = []
    hint = did_you_mean(str(path), (*names, *beside))
    return f"{error}; {hint}" if hint else error


def exit_status(report: Report, config: Config, *, exit_zero: bool = False) -> int:
    """2 where a model could not be read, else 1 where a finding is at the failing level (never with `exit_zero`), else 0."""
    if any(model.error is not None for model in report.models):
        return UNUSABLE
    failing = any(f.severity in config.failing for model in report.models for f in model.findings)
    return FINDINGS if failing and not exit_zero else FINE


def stamps(sources: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Modification time and size of every file that the sources are made of; a change of them means another audit."""
    found: dict[str, tuple[int, int]] = {}
    for source in sources:
        for path in _files(source):
            try:
                state = path.stat()
            except OSError:
                continue
            found[str(path)] = (state.st_mtime_ns, state.st_size)
    return found


def _files(source: str) -> Iterator[Path]:
    path = Path(source)
    if path.is_dir():
        yield from (p for p in path.rglob("*") if p.is_file())
    elif path.exists():
        yield path
        # External data of an ONNX file and the like lie beside it under its name.
        yield from path.parent.glob(f"{path.name}*")
    elif ":" in source and "://" not in source:
        # An importable name: the files of its top package, without importing anything.
        top = Path(source.partition(":")[0].partition(".")[0])
        if top.is_dir():
            yield from top.rglob("*.py")
        elif top.with_suffix(".py").exists():
            yield top.with_suffix(".py")
