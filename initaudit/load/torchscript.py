"""TorchScript archives (torch.jit.save): tensors of the module and of its constants; the code is listed, never compiled.

The classes that data.pkl names (`__torch__...`) are part of the archive, not modules that a pickle could import, so building
them is no finding; any other name that is unknown is one, as everywhere.
"""

from __future__ import annotations

from pathlib import Path

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.finish import finish
from initaudit.load.pickle_arrays import Leaf, code_problems, leaves
from initaudit.load.pickle_globals import KNOWN
from initaudit.load.pickle_machine import Handler
from initaudit.load.pickle_values import Recorder, Tensor
from initaudit.load.spans import Span, show
from initaudit.load.state_dict import named_arrays
from initaudit.load.torch_zip import hidden_notes, is_main, is_torchscript, main_pickles, read_hidden, read_pickle
from initaudit.load.zip_entries import read_entries

FORMAT = "torchscript"


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
    for name in entries:
        if is_main(name):
            found += leaves(read_pickle(entries, name, where, recorder, known))
        elif is_main(name, "constants.pkl"):
            value = read_pickle(entries, name, where, recorder, known, "constants")
            found += [(("constants", *path), leaf, False) for path, leaf, _ in leaves(value)]
    code = [show(name, 200) for name in entries if "/code/" in name and name.endswith(".py")]
    hidden = read_hidden(entries, where, recorder)
    problems = code_problems(recorder)
    arrays = named_arrays(_learned(found), where, problems)
    if not arrays and not problems:
        raise UnreadableModel(where, "a TorchScript module without a tensor")
    notes = (*hidden_notes(entries), *hidden, f"TorchScript with {len(code)} source files, which were not compiled")
    return finish(Checkpoint(str(path), FORMAT, arrays, problems=tuple(problems), metadata={"code": code}, notes=notes))


def _learned(found: list[Leaf]) -> list[Leaf]:
    """Parameters ask for a gradient and buffers do not; where nothing does (a module without gradients) both may be weights."""
    asks = [isinstance(leaf, Tensor) and leaf.requires_grad for _, leaf, _ in found]
    return [
        (path, leaf, trainable and (ask or not any(asks))) for ask, (path, leaf, trainable) in zip(asks, found, strict=True)
    ]
