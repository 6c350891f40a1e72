"""Where a probability leaves nothing to chance; loads no torch, as rules ask it of checkpoints without a program too."""

from __future__ import annotations


def certain(probability: object) -> bool:
    """Whether an element is zero with this probability always."""
    return isinstance(probability, (int, float)) and probability >= 1
