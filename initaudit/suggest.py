"""Did you mean: the nearest of the names that exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """ "did you mean 'seed'?", or "" where nothing is near; letter case, hyphens and underscores do not count."""
    names = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(given), names, n=1, cutoff=0.6)
    return f"did you mean '{names[near[0]]}'?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
