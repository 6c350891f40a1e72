"""What the virtual steps and the rehearsal are to learn: targets that the inputs allow to be told.

An example of many numbers can be told from all others, so that its target is drawn for itself: a task of memory. An example of
few numbers (a time, a place, four measurements) cannot: its neighbours lie too near for a network that is smooth at its start
to answer differently, and a healthy one would be blamed for that. There the targets are a random linear function of the
numbers, which is what a network learns of them first (Rahaman et al. 2019, "On the spectral bias of neural networks").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def numbers_of(inputs: Sequence[Tensor], batch: int) -> int | None:
    """How many real numbers make an example: in so many directions can examples differ.

    None where there is no such limit: integers are rows of tables, each told from all others.
    """
    own = _own(inputs, batch)
    return sum(x[0].numel() for x in own) if own else None


def _own(inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The inputs that differ by example; none where one of them is not of real numbers."""
    own = [x for x in inputs if x.dim() and x.shape[0] == batch]
    return own if all(x.is_floating_point() for x in own) else []


@dataclass(frozen=True)
class Targets:
    """Draws targets with `generator`: `numbers` and `classes` for each of `places` of each of `examples`.

    `given` are the numbers by which each example [examples, numbers], or each place of each one [examples * places, numbers],
    is told; None where each is told by itself.
    """

    generator: torch.Generator
    examples: int
    places: int
    given: Tensor | None = None

    def numbers(self, count: int) -> Tensor:
        """[examples, places, count], of mean 0 and variance 1."""
        if self.given is None:
            drawn = torch.randn(self.examples, self.places, count, generator=self.generator)
            return (drawn - drawn.mean()) / drawn.std()
        rows, numbers = self.given.shape
        functions = count * self.places * self.examples // rows
        made = self.given @ torch.randn(numbers, functions, generator=self.generator, dtype=self.given.dtype)
        made = (made - made.mean(0)) / made.std(0)
        return made.float().view(self.examples, self.places, count)

    def classes(self, count: int) -> Tensor:
        """[examples, places], as many of every class: to learn how frequent they are must not count as learning."""
        rows = self.examples * self.places
        even = torch.arange(rows) % count
        if self.given is None:
            return even[torch.randperm(rows, generator=self.generator)].view(self.examples, self.places)
        sizes = torch.bincount(even).tolist()
        scores, label = self.numbers(len(sizes)).view(rows, -1), torch.full((rows,), len(sizes) - 1)
        for k, size in enumerate(sizes[:-1]):
            # Each class takes the highest scores of what is left; the last one keeps the rest.
            taken = scores[:, k].topk(size).indices
            label[taken] = k
            scores[taken] = -math.inf
        return label.view(self.examples, self.places)

    def halves(self, count: int) -> Tensor:
        """[examples, places, count], of zeros and ones."""
        if self.given is None:
            return torch.randint(2, (self.examples, self.places, count), generator=self.generator).float()
        numbers = self.numbers(count)
        return (numbers > numbers.median()).float()


def targets_of(
    inputs: Sequence[Tensor], batch: int, examples: int, places: tuple[int, ...], generator: torch.Generator
) -> Targets:
    """Targets for the first `examples` of the batch, at each of the output's `places` (sizes of axes; may be none)."""
    count, own = math.prod(places), [x[:examples] for x in _own(inputs, batch)]
    local = [_at_places(x, places) for x in own]
    rows = [r for r in local if r is not None] if places else []
    if len(rows) < len(own) or not rows:
        rows = [x.reshape(len(x), -1) for x in own]
    if not rows or sum(r.shape[1] for r in rows) >= len(rows[0]) - 1:
        return Targets(generator, examples, count)
    given = torch.cat([r.detach().cpu().double() for r in rows], 1)
    given = given - given.mean(0)
    told = bool(torch.isfinite(given).all()) and bool(given.any())
    return Targets(generator, examples, count, given if told else None)


def _at_places(x: Tensor, places: tuple[int, ...]) -> Tensor | None:
    """[examples * places, numbers] of an input that has the output's places, its units before, behind or not there at all."""
    n, middle = len(places), tuple(x.shape[1:])
    if middle[:n] == places and len(middle) <= n + 1:
        return x.reshape(x.shape[0] * math.prod(places), -1)
    if middle[1:] == places:
        return x.movedim(1, -1).reshape(x.shape[0] * math.prod(places), -1)
    return None
