"""Everything a rule may look at. Filled by audit.py, never by a rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """The evidence about one model."""
