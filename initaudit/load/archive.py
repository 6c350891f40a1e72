"""Archives and compressed files that are no checkpoint of PyTorch's own making: the pickles in them, wherever they stand.

joblib compresses its pickles, and training tools pack a checkpoint with its settings into a tar. The tensors that such pickles
hold are read from memory or from where they stand; nothing is unpacked to disk.
"""

from __future__ import annotations

from pathlib import Path

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.hidden import COMPRESSED, is_tar, look_into
from initaudit.load.pickle_values import Recorder
from initaudit.load.spans import Span, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.zip_entries import is_zip, member_names

FORMAT = "archive"
MAX_COMPRESSED = 256 << 20  # bytes that are read to see whether a pickle is inside
_OWN = ("data.pkl", "archive_format", "serialized_exported_program.json")  # what the archives of other formats hold


def recognise(path: Path, head: bytes) -> bool:
    """True for a compressed pickle, and for a zip or tar with a pickle in it that no other format claims."""
    if is_zip(head):
        names = member_names(path)
        if names is None or any(name.rpartition("/")[2].lower() in _OWN for name in names):
            return False
        return not all(name.endswith(".npy") for name in names) and _holds_pickle(path)
    if is_tar(head):
        from initaudit.load.torch_tar import recognise as is_torch_tar

        return not is_torch_tar(path, head) and _holds_pickle(path)
    packed = head[:1] == b"\x78" or any(head.startswith(magic) for magic, _ in COMPRESSED)
    return packed and path.stat().st_size <= MAX_COMPRESSED and _holds_pickle(path)


def _holds_pickle(path: Path) -> bool:
    return bool(look_into(Span.of_file(path), show(path, 200), Recorder()))


def load(path: Path) -> Checkpoint:
    """Reads every pickle inside; raises `UnreadableModel` where they hold no tensor and would run nothing."""
    where = show(path, 200)
    recorder = Recorder()
    found = look_into(Span.of_file(path), where, recorder)
    if not found:
        raise UnreadableModel(where, "an archive without a pickle")
    members = [label[len(where) + 2 :] for label, _ in found if label != where]
    notes = tuple(f"{show(member, 200)} was read as the pickle that it is" for member in members[:10])
    values = [value for _, value in found]
    return checkpoint_of(values[0] if len(values) == 1 else values, str(path), FORMAT, where, recorder, notes=notes)
