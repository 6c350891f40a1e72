"""Where something stands: a bottom record, free of torch, so that findings and reports can carry it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Location:
    """Where an operator stands: the source line that called it, and the module path or the ONNX node's name."""

    site: str = ""
    file: str | None = None
    line: int | None = None

    @property
    def source_line(self) -> str:
        """`net.py:12`, "" where no source line is known."""
        return f"{Path(self.file).name}:{self.line}" if self.file and self.line else ""


NOWHERE = Location()
