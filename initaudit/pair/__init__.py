"""Pairs every weight at every place of use with the activations downstream of it."""

from initaudit.pair.pair import Pair, pair
from initaudit.pair.walk import Feeds

__all__ = ["Feeds", "Pair", "pair"]
