"""What lies behind and before nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx


def upstream(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes themselves and every node from which a way leads to one of them."""
    stack = list(starts)
    seen = set(stack)
    while stack:
        new = [a for a in stack.pop().all_input_nodes if a not in seen]
        seen.update(new)
        stack += new
    return seen


def downstream(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes themselves and every node to which a way leads from one of them."""
    stack = list(starts)
    seen = set(stack)
    while stack:
        new = [u for u in stack.pop().users if u not in seen]
        seen.update(new)
        stack += new
    return seen
