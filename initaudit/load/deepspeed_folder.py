"""DeepSpeed's checkpoint folders: `*_model_states.pt` with the module, `*_optim_states.pt` with what ZeRO split among ranks.

With ZeRO-3 the module holds placeholders without elements and the weights lie flattened in the optimizer files; they are
reported as missing, because only DeepSpeed's own zero_to_fp32.py knows how its version put them together.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.finish import WRAPPERS
from initaudit.load.hidden import look_into
from initaudit.load.pickle_arrays import code_problems
from initaudit.load.pickle_values import Recorder
from initaudit.load.spans import Span, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.torch_zip import read_archive
from initaudit.load.zip_entries import is_zip

FORMAT = "deepspeed"
# deepspeed/runtime/engine.py, _get_ckpt_name and _get_zero_ckpt_name
MODEL, OPTIMIZER = "*_model_states.pt", "*_optim_states.pt"


def recognise(path: Path, head: bytes) -> bool:
    """True for a folder with a file of model states."""
    return path.is_dir() and any(path.glob(MODEL))


def load(path: Path) -> Checkpoint:
    """Reads the first rank's module and every rank's optimizer state; raises `UnreadableModel` where a file is broken."""
    where = show(path, 200)
    models, optimizers = sorted(path.glob(MODEL)), sorted(path.glob(OPTIMIZER))
    root, made = _read(models[0])
    problems = list(made.problems)
    notes = list(made.notes)
    for file in models[1:]:
        problems += [
            replace(p, message=f"{show(file.name)}: {p.message}") for p in _read(file)[1].problems if p.code == "IA505"
        ]
    if len(models) > 1:
        notes.append(f"{len(models)} files of model states; {show(models[0].name)} was audited")
    optimizer: dict[str, Array] = dict(made.optimizer)
    for file in optimizers:
        _, state = _read(file)
        problems += [replace(p, message=f"{show(file.name)}: {p.message}") for p in state.problems if p.code == "IA505"]
        held = {**state.arrays, **state.optimizer}
        optimizer.update({f"{file.stem}.{name}": array for name, array in held.items()})
    for file in sorted(path.iterdir()):
        if file.is_file() and file not in (*models, *optimizers):
            recorder = Recorder()
            look_into(Span.of_file(file), show(file.name), recorder)
            found = [p for p in code_problems(recorder) if p.code == "IA505"]
            problems += [replace(p, message=f"{show(file.name)}: {p.message}") for p in found]
    problems += _missing(root, made, bool(optimizers), where)
    return replace(made, source=str(path), format=FORMAT, problems=tuple(problems), optimizer=optimizer, notes=tuple(notes))


def _read(file: Path) -> tuple[Any, Checkpoint]:
    where = show(file, 200)
    span = Span.of_file(file)
    if not is_zip(span.part(0, min(4, span.length)).read()):
        raise UnreadableModel(where, "not an archive of torch.save", advice="the file is truncated or damaged")
    recorder = Recorder()
    root = read_archive(span, where, recorder)
    if isinstance(root, dict) and not recorder.events and not _has_weights(root):
        return root, Checkpoint(str(file), FORMAT, {})
    return root, checkpoint_of(root, str(file), FORMAT, where, recorder)


def _has_weights(root: dict[Any, Any]) -> bool:
    return any(isinstance(value, (dict, list)) and value for value in root.values())


def _missing(root: Any, made: Checkpoint, optimizers: bool, where: str) -> list[Problem]:
    """IA502 for the parameters whose shapes the file knows and whose values it lacks."""
    shapes = root.get("param_shapes") if isinstance(root, dict) else None
    tables = shapes if isinstance(shapes, list) else [shapes]
    names = [str(name) for table in tables if isinstance(table, dict) for name in table]
    plain = [name.removeprefix(WRAPPERS[0]) for name in names]
    lost = [name for name in plain if name not in made.arrays or made.arrays[name].size == 0]
    if not lost:
        return []
    advice = (
        "gather them with DeepSpeed's zero_to_fp32.py" if optimizers else "the optimizer files that hold them are missing too"
    )
    found = f"{where}: {len(lost)} of {len(names)} parameters, such as {show(lost[0])}, were split among ranks by ZeRO"
    return [Problem("IA502", lost[0], f"{found}; {advice}")]
