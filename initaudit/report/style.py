"""How text is written: width, colour, which characters, and the escaping of names that come from a stranger's file."""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass

_COLOURS = {"error": "31;1", "warning": "33", "info": "36", "ok": "32", "unknown": "2", "dim": "2", "bold": "1"}
_MARKS = {"error": "✗", "warning": "!", "info": "i", "ok": "✓", "unknown": "·"}
_ASCII = str.maketrans("✗✓·×–…→▁▂▃▄▅▆▇█", "xv.x-.>_.-=+*##")


@dataclass(frozen=True)
class Style:
    """How a report is to look.

    `width` is in columns; `unicode` is false where the terminal cannot show more than ASCII; `failing` are the severities that
    fail the run, for formats that say so.
    """

    width: int = 100
    colour: bool = False
    unicode: bool = True
    show_healthy: bool = False
    verbose: bool = False
    quiet: bool = False
    statistics: bool = False
    failing: tuple[str, ...] = ("error",)

    def paint(self, text: str, name: str) -> str:
        """The text in the colour of a severity, "ok", "dim" or "bold"; unchanged without colour."""
        return f"\x1b[{_COLOURS[name]}m{text}\x1b[0m" if self.colour and text else text

    def mark(self, name: str) -> str:
        """One coloured character for a severity, "ok" or "unknown"."""
        return self.paint(_MARKS[name], name)

    def finish(self, text: str) -> str:
        """The text as the terminal can show it; our own signs get an ASCII likeness, other characters their escape."""
        if self.unicode:
            return text
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def escape(text: str) -> str:
    """Text from a file, safe to print: control, bidirectional and unpaired characters become their escapes.

    A CI runner obeys `::command::` at the start of a line and `##[command]` anywhere: these are broken up too.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    text = re.sub(r"(^|\s)::", r"\1:\\x3a", text)
    return text.replace("##", "#\\x23")


def shorten(text: str, width: int) -> str:
    """At most `width` characters, cut in the middle: both ends of a tensor's name tell."""
    if len(text) <= width:
        return text
    if width < 4:
        return text[: max(0, width)]
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def number(value: float | int | None, digits: int = 3) -> str:
    """A number in at most `digits` significant digits and seven characters; "–" where it is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 10**digits:
        text = f"{value:.{digits}g}"
        return text if "e" not in text else f"{value:.0f}"
    if 10**digits <= abs(value) < 10 ** (digits + 1) - 0.5:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def wrap(text: str, width: int, indent: str = "") -> str:
    """Lines of at most `width` columns, each after `indent`; a word that is longer is broken, so nothing sticks out."""
    lines = textwrap.wrap(text, max(20, width), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    # Breaking a long word can bring a runner's command to the start of a line.
    return "\n".join(re.sub(r"^(\s*)::", r"\1:\\x3a", line) for line in lines)
