"""What the command says: the reports and lines on stdout, the complaints on stderr, and how wide and colourful they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from initaudit.errors import UsageError

if TYPE_CHECKING:
    from initaudit.config import Config
    from initaudit.report.report import Report
    from initaudit.report.style import Style


def deliver(report: Report, targets: Sequence[tuple[str, Path | None]], config: Config, **flags: bool) -> bool:
    """Writes every output; False where one could not be written. The others are written all the same."""
    from dataclasses import replace

    from initaudit.report import format_named
    from initaudit.report.write import write_whole

    style = replace(terminal_style(), failing=config.failing, **flags)
    written = True
    for name, file in targets:
        if file is None:
            emit(format_named(name).render(report, style), newline=False)
            continue
        try:
            write_whole(file, format_named(name).render(report, replace(style, colour=False, unicode=True, width=100)))
        except UsageError as error:
            written = False
            complain(str(error))
    return written


def terminal_style() -> Style:
    """As wide as the terminal, 80 to 160 columns, and 100 where there is none; colours as NO_COLOR and FORCE_COLOR say."""
    import shutil

    from initaudit.report.style import Style

    terminal = sys.stdout.isatty()
    width = min(160, max(80, shutil.get_terminal_size().columns)) if terminal else 100
    colour = terminal and os.environ.get("TERM") != "dumb"
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        colour = True
    if os.environ.get("NO_COLOR"):
        colour = False
    return Style(width=width, colour=colour, unicode="utf" in (sys.stdout.encoding or "").lower())


def emit(text: str, *, newline: bool = True) -> None:
    """Writes to stdout. Where its reader has gone away (`| head`), the rest goes nowhere and the exit status stays."""
    try:
        click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"), nl=newline, color=True)
        sys.stdout.flush()
    except BrokenPipeError:
        _close()
    except OSError as error:
        _close()
        raise UsageError("standard output", error.strerror or "cannot be written", "room for the report") from error
    except UnicodeEncodeError:
        sys.stdout.write(text.encode("ascii", "backslashreplace").decode("ascii") + ("\n" if newline else ""))


def _close() -> None:
    """Python would fail again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(line: str) -> None:
    from initaudit.report.style import escape

    click.echo(f"initaudit: error: {escape(line)}", err=True)
