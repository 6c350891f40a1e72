"""Reading a file by its format, and asking besides what it would run for a loader that takes it for a pickle.

`torch.load` and `pickle.load` begin at the first byte and do not mind what a file claims to be: the length of a safetensors
header, or the fields of an ONNX model, can be opcodes too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint, Problem
from initaudit.load.hidden import polyglot
from initaudit.load.pickle_arrays import code_problems
from initaudit.load.pickle_values import Recorder
from initaudit.load.spans import Span


def guarded(path: Path, load: Callable[[Path], Checkpoint]) -> Checkpoint:
    """What `load` makes of `path`, with an IA505 for what the file would run as a pickle.

    A file that cannot be read as what it claims to be, and would run something, is a checkpoint without tensors; any other
    raises `UnreadableModel` as `load` does.
    """
    recorder = Recorder()
    if path.is_file():
        polyglot(Span.of_file(path), recorder)
    problems = tuple(code_problems(recorder))
    try:
        made = load(path)
    except UnreadableModel as error:
        if not problems:
            raise
        return Checkpoint(os.fspath(path), "pickle", {}, problems=(*problems, Problem("IA001", "", str(error))))
    if any(problem.code == "IA505" for problem in made.problems):
        return made
    return replace(made, problems=(*made.problems, *problems))
