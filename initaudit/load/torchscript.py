"""TorchScript archives (torch.jit.save): tensors of the module and of its constants, and its code as text, never compiled.

The classes that data.pkl names (`__torch__...`) are part of the archive, not modules that a pickle could import, so building
them is no finding; any other name that is unknown is one, as everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.finish import finish, strip_names
from initaudit.load.pickle_arrays import Leaf, code_problems, leaves
from initaudit.load.pickle_globals import KNOWN
from initaudit.load.pickle_machine import Handler
from initaudit.load.pickle_values import Recorder, Tensor
from initaudit.load.script_code import script_program
from initaudit.load.spans import Span, show
from initaudit.load.state_dict import named_arrays
from initaudit.load.torch_zip import hidden_notes, is_main, is_torchscript, main_pickles, read_hidden, read_pickle
from initaudit.load.zip_entries import read_entries

FORMAT = "torchscript"
# The pickles of an archive and what the names of their tensors begin with
MEMBERS: dict[str, tuple[str, ...]] = {"data.pkl": (), "constants.pkl": ("constants",), "traced_inputs.pkl": ()}


class ScriptGlobals(dict[tuple[str, str], Handler | None]):
    """The known names, and every class that the archive itself defines."""

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (isinstance(key, tuple) and (key[0] + ".").startswith("__torch__."))

    def __missing__(self, key: tuple[str, str]) -> None:
        return None


def recognise(path: Path, head: bytes) -> bool:
    """True for an archive with both data.pkl and constants.pkl."""
    return bool(main_pickles(path, head)) and is_torchscript(path)


def load(path: Path) -> Checkpoint:
    """Reads the archive at `path`; raises `UnreadableModel` where it is broken or holds no tensor.

    Constants, which a frozen module has instead of parameters, are called `constants.0` and so on.
    """
    where = show(path, 200)
    entries = read_entries(Span.of_file(path))
    recorder, known = Recorder(), ScriptGlobals(KNOWN)
    found: list[Leaf] = []
    roots: dict[str, Any] = {}
    for name in entries:
        for member, prefix in MEMBERS.items():
            if is_main(name, member):
                folder = member.removesuffix(".pkl")
                roots[member] = read_pickle(entries, name, where, recorder, known, folder)
                if member != "traced_inputs.pkl":
                    found += [((*prefix, *path), leaf, made) for path, leaf, made in leaves(roots[member])]
    hidden = read_hidden(entries, where, recorder)
    problems = code_problems(recorder)
    learned = _learned(found)
    arrays = named_arrays(learned, where, problems)
    if not arrays and not problems:
        raise UnreadableModel(where, "a TorchScript module without a tensor")
    made = finish(Checkpoint(str(path), FORMAT, arrays, problems=tuple(problems), notes=(*hidden_notes(entries), *hidden)))
    short, _ = strip_names(arrays)
    names = {id(leaf): short.get(".".join(path), "") for path, leaf, _ in reversed(learned)}
    metadata: dict[str, Any] = {"code": [show(name, 200) for name in entries if "/code/" in name and name.endswith(".py")]}
    try:
        traced = list(leaves(roots.get("traced_inputs.pkl")))
        metadata["graph"] = script_program(roots.get("data.pkl"), roots.get("constants.pkl"), entries, names, traced, where)
    except UnreadableModel as error:
        metadata["no_program"] = str(error)
    return replace(made, metadata=metadata)


def _learned(found: list[Leaf]) -> list[Leaf]:
    """Parameters ask for a gradient and buffers do not; where nothing does (a module without gradients) both may be weights."""
    asks = [isinstance(leaf, Tensor) and leaf.requires_grad for _, leaf, _ in found]
    return [
        (path, leaf, trainable and (ask or not any(asks))) for ask, (path, leaf, trainable) in zip(asks, found, strict=True)
    ]
