"""A line on stderr about what is going on, for whoever waits at a terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from initaudit.report.style import escape, shorten

PATIENCE = 1.0  # seconds: what is done sooner needs no word
REFRESH = 0.2


class Progress:
    """Shows the latest label and the seconds gone by, once a second has passed; wiped at the end.

    Nothing is shown where stderr is no terminal. Call it with a label; use it as a context.
    """

    def __init__(self, *, shown: bool | None = None) -> None:
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._label = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, label: str) -> None:
        """What is being done from now on ("model.onnx: measuring fc1.weight, 1.2 GB/s")."""
        self._label = label

    def __enter__(self) -> Progress:
        if self._shown:
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _draw(self) -> None:
        import shutil

        began = time.monotonic()
        drawn = False
        wait = PATIENCE
        while not self._over.wait(wait):
            wait = REFRESH
            if not self._label:
                continue
            drawn = True
            seconds = time.monotonic() - began
            room = shutil.get_terminal_size().columns - 10
            sys.stderr.write(f"\r{fitted(escape(self._label), room)}  {seconds:.0f} s\x1b[K")
            sys.stderr.flush()
        if drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def fitted(label: str, room: int) -> str:
    """The label in so many columns: the model's own name, which stands first, gives way before what is being done to it."""
    model, colon, doing = label.partition(": ")
    if colon and len(label) > room:
        label = shorten(model, max(12, room - len(doing) - 2)) + colon + doing
    return shorten(label, room)
