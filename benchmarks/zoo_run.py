"""Runs tasks one after the other or side by side; each result is one line of a file, so that a run can be taken up again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows_of(state: Path) -> dict[str, Row]:
    """What a file holds, by task; a line that was cut off by an interruption is left out."""
    found: dict[str, Row] = {}
    if state.exists():
        for line in state.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["task"]] = row
    return found


def run(
    tasks: Iterable[str], work: Callable[[str], Mapping[str, Any]], state: Path, *, workers: int = 1, limit: float = 120.0
) -> dict[str, Row]:
    """The rows of all tasks, those already in `state` as they stand there; `work` must be a function of a module."""
    names = list(tasks)
    rows = rows_of(state)
    left = [name for name in names if name not in rows]
    state.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with state.open("a") as file, multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=60) as pool:
        arguments = ((name, work, limit) for name in left)
        for done, row in enumerate(pool.imap_unordered(_guarded, arguments), 1):
            rows[row["task"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            spent = time.perf_counter() - began
            tell(f"{done}/{len(left)} {row['task']} {row['seconds']:.1f} s; {spent / done * (len(left) - done):.0f} s left")
    tell("")
    return {name: rows[name] for name in names if name in rows}


def tell(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _guarded(arguments: tuple[str, Callable[[str], Mapping[str, Any]], float]) -> Row:
    import torch

    torch.set_num_threads(1)
    task, work, limit = arguments
    began, row = time.process_time(), {"task": task}
    # Processor time: what else the machine does shall not decide which models are in the table.
    signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, limit, 5.0)
    try:
        row.update(work(task))
    except Exception as error:  # noqa: BLE001 - the table names what failed
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if os.environ.get("ZOO_TRACE"):
            import traceback

            row["trace"] = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    row["seconds"] = round(time.process_time() - began, 3)
    return row


def _late(*_: object) -> None:
    raise TimeoutError("it took too long")
