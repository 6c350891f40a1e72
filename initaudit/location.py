"""Where something stands: a bottom record, free of torch, so that findings and reports can carry it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """Where an operator stands: the source line that called it, and the module path or the ONNX node's name."""

    site: str = ""
    file: str | None = None
    line: int | None = None


NOWHERE = Location()
