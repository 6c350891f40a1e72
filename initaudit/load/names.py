"""Names of one network as two sources spell them: the same but for a prefix that stands before all of one side's."""

from __future__ import annotations

from collections.abc import Iterable

DEPTH = 4  # parts of a name that a prefix may have


def matched(mine: Iterable[str], theirs: Iterable[str]) -> tuple[dict[str, str], str]:
    """Which of `theirs` each of `mine` is, and the prefix that one of the two has besides; most names decide."""
    own, given = list(mine), list(theirs)
    known = set(given)
    best: tuple[int, dict[str, str], str] = (-1, {}, "")
    for inside in _prefixes(given):
        for outside in _prefixes(own) if not inside else [""]:
            found = {
                name: inside + name.removeprefix(outside)
                for name in own
                if name.startswith(outside) and inside + name.removeprefix(outside) in known
            }
            if len(found) > best[0]:
                best = (len(found), found, inside or outside)
    return best[1], best[2]


def _prefixes(names: list[str]) -> list[str]:
    """The dotted beginnings that stand before most of the names, the empty one first."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, min(len(parts), DEPTH)):
            beginning = ".".join(parts[:length]) + "."
            counts[beginning] = counts.get(beginning, 0) + 1
    return ["", *(beginning for beginning, count in counts.items() if 2 * count > len(names))]
