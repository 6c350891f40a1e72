"""Looks for inputs that forward accepts: guesses are tried without arithmetic, the one that gets furthest is refined first."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from initaudit.meter import Meter, Say, silent
from initaudit.probe.dry_run import DryRun, Outcome, real_run
from initaudit.probe.guesses import (
    POSITIONS,
    Argument,
    Guess,
    channels_in,
    guesses_for,
    mismatch,
    ordered_for,
    signature_of,
    sizes_in,
)

Assignment = Mapping[str, Guess]

# A run without arithmetic takes 1 to 300 ms; what has not been found by then needs to be told.
_TRIES, _SECONDS = 400, 25.0
# Guesses for an input that are tried as they are before any is refined; of two inputs, in all combinations.
_WIDTH = 12
# Operators that a run must reach before it is worth repeating for real: a failure at the door is the input's.
_FAR = 20
# A map of one pixel has no variance over space, and after flattening says nothing about taps.
_SMALLEST = 2


@dataclasses.dataclass(frozen=True)
class Found:
    """Inputs that forward accepts, by argument, in the order of the signature, and what the run saw."""

    assignment: Assignment
    outcome: Outcome
    arguments: tuple[Argument, ...]


class NotFound(Exception):
    """Nothing fitted: `tried` are the attempts that got furthest with the error that each ended in."""

    def __init__(self, tried: Sequence[tuple[Assignment, str]]) -> None:
        super().__init__("no input fitted")
        self.tried = tried


class Search:
    """A best-first search over assignments of guesses to arguments. `given` are fixed; `say` is told what is tried."""

    def __init__(self, module: nn.Module, batch: int, given: Mapping[str, Guess], say: Say = silent) -> None:
        self.module, self.batch, self.given = module, batch, given
        self.arguments = signature_of(module)
        self.by_name = {a.name: a for a in self.arguments}
        common = guesses_for(module, batch)
        floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self.guesses = {a.name: _of_type(ordered_for(a, common, module), floating) for a in self.arguments}
        config = getattr(module, "config", None) or getattr(module, "pretrained_cfg", None) or {}
        self.sizes = list(dict.fromkeys(sizes_in(config)))
        self.channels = list(dict.fromkeys(channels_in(config)))
        self.dry = DryRun(module)
        self.seen: dict[tuple[tuple[str, Guess], ...], Outcome] = {}
        self.queue: list[tuple[float, int, Assignment]] = []
        self.count = itertools.count()
        self.until = time.monotonic() + _SECONDS
        self.meter = Meter(say, "finding inputs:", "tries")

    def found(self) -> Found:
        """The first assignment that runs, with its size and form settled; raises NotFound."""
        starts = {_key(start): start for start in self._starts()}
        for assignment in starts.values():
            outcome = self.attempt(assignment)
            if outcome.ok:
                return self._settled(assignment, outcome)
        if (confirmed := self._confirmed()) is not None:
            return confirmed
        for assignment in starts.values():
            self._refine(assignment)
        while self.queue and len(self.seen) < _TRIES and time.monotonic() < self.until:
            _, _, assignment = heapq.heappop(self.queue)
            outcome = self.attempt(assignment)
            if outcome.ok:
                return self._settled(assignment, outcome)
            self._refine(assignment)
        if (confirmed := self._confirmed()) is not None:
            return confirmed
        raise NotFound(self._furthest())

    def _confirmed(self) -> Found | None:
        """The attempt that got furthest, where only the run without arithmetic fails: some kernels have no such run."""
        assignment, error = self._furthest()[0]
        outcome = self.seen[_key(assignment)]
        if outcome.undecided or mismatch(error) is not None or outcome.progress < _FAR:
            return None
        positional, keywords, _ = self.call(assignment, _plain_tensor(outcome))
        if real_run(self.module, positional, keywords):
            return None
        return self._settled(assignment, dataclasses.replace(outcome, error=""))

    def _refine(self, assignment: Assignment) -> None:
        outcome = self.attempt(assignment)
        for step, successor in enumerate(self._successors(assignment, outcome)):
            key = _key(successor)
            known = self.seen.get(key)
            if known is None or known.ok:
                progress = math.inf if known is not None else outcome.progress - step / 1000
                heapq.heappush(self.queue, (-progress, next(self.count), successor))
            if known is not None and known.ok:
                return

    def attempt(self, assignment: Assignment) -> Outcome:
        """Runs an assignment without arithmetic, or for real with few examples where shapes alone do not decide."""
        key = _key(assignment)
        if key not in self.seen:
            self.meter(_shown(assignment))
            positional, keywords, names = self.call(assignment, _hollow_tensor)
            outcome = self.dry.run(positional, keywords, names)
            if outcome.undecided:
                positional, keywords, _ = self.call(assignment, _plain_tensor(outcome))
                outcome = dataclasses.replace(outcome, error=real_run(self.module, positional, keywords))
            if outcome.ok and outcome.positions is not None and self._longest(assignment) > outcome.positions:
                outcome = dataclasses.replace(outcome, error=f"a table of {outcome.positions} positions is too short")
            if outcome.ok and not self._batched(assignment):
                outcome = dataclasses.replace(outcome, error="the examples are taken for features")
            self.seen[key] = outcome
        return self.seen[key]

    def _batched(self, assignment: Assignment) -> bool:
        """Whether numbers of one axis count examples: a layer of as many features would take them for one example."""
        if self.given or not any(g.kind == "step" for g in assignment.values()):
            return True
        more = {
            n: dataclasses.replace(g, shape=(self.batch + 1, *g.shape[1:])) if g.shape[:1] == (self.batch,) else g
            for n, g in assignment.items()
        }
        positional, keywords, names = self.call(more, _hollow_tensor)
        outcome = self.dry.run(positional, keywords, names)
        return outcome.ok or outcome.undecided

    def call(self, assignment: Assignment, make: Callable[[str, Guess], Any]) -> tuple[list[Any], dict[str, Any], list[str]]:
        """(positional, keywords, names of the positional ones): by position as long as none is left out."""
        positional, names, keywords = list[Any](), list[str](), dict[str, Any]()
        gap = False
        for argument in self.arguments:
            if argument.name not in assignment:
                gap = True
            elif gap or not argument.positional:
                keywords[argument.name] = make(argument.name, assignment[argument.name])
            else:
                positional.append(make(argument.name, assignment[argument.name]))
                names.append(argument.name)
        return positional, keywords, names

    def _longest(self, assignment: Assignment) -> int:
        return max((g.shape[1] for g in assignment.values() if g.kind in ("ids", "sequence") and len(g.shape) > 1), default=0)

    def _starts(self) -> Iterator[Assignment]:
        """Assignments to begin with: what must be given; where nothing must, what the class calls its main input."""
        needed = [a.name for a in self.arguments if a.required or a.name in self.given]
        if not needed:
            main = str(getattr(self.module, "main_input_name", self.arguments[0].name))
            needed = [main if main in self.by_name else self.arguments[0].name]
        choices = [[self.given[n]] if n in self.given else self.guesses[n][:_WIDTH] for n in needed]
        if len(needed) > 2:
            # All of one kind, or the n-th input is what the n-th layer takes.
            yield from (dict(zip(needed, (c[i % len(c)] for c in choices), strict=True)) for i in range(_WIDTH))
            firsts = [c[k % len(c)] for k, c in enumerate(choices)]
            yield dict(zip(needed, firsts, strict=True))
            return
        places = itertools.product(*(range(len(c)) for c in choices))
        for place in sorted(places, key=lambda p: (sum(p), max(p))):
            yield {n: c[i] for n, c, i in zip(needed, choices, place, strict=True)}

    def _successors(self, assignment: Assignment, outcome: Outcome) -> Iterator[Assignment]:
        """What to try after a failure: sizes that the error names, arguments that it names, the next sizes, other kinds."""
        for name, guess in assignment.items():
            for size in self.sizes:
                # What the configuration says comes first: a position table may accept another size by broadcasting.
                changed = guess.resized(size) if guess.kind == "grid" and name not in self.given else None
                if changed is not None and _affordable(changed):
                    yield {**assignment, name: changed}
        yield from self._divided(assignment, outcome)
        yield from self._solved(assignment, outcome)
        yield from self._added(assignment, outcome)
        numbers = [int(n) for n in re.findall(r"(?<![\w.])\d{1,5}(?![\w.])", outcome.error)]
        free = {n: g for n, g in assignment.items() if n not in self.given}
        for name, guess in free.items():
            for number in dict.fromkeys(n for n in numbers if 0 < n <= 20000):
                for changed in (guess.refeatured(number), guess.resized(number) if number > 1 else None):
                    if changed is not None and _affordable(changed):
                        yield {**assignment, name: changed}
            for number in self.channels:
                if (changed := guess.refeatured(number)) is not None:
                    yield {**assignment, name: changed}
        for name, guess in free.items():
            for size in guess.ladder():
                if (changed := guess.resized(size)) is not None and _affordable(changed):
                    yield {**assignment, name: changed}
        for name in free:
            for other in self.guesses[name]:
                yield {**assignment, name: other}

    def _added(self, assignment: Assignment, outcome: Outcome) -> Iterator[Assignment]:
        """The same with an argument more: one that the error names, else, where something was None, the next one."""
        if outcome.error.startswith("RuntimeError") and "None" not in outcome.error:
            return  # an operator was given shapes that do not fit: another argument would not mend them
        absent = [a.name for a in self.arguments if a.name not in assignment and not self._scalar(a)]
        named = [n for n in absent if re.search(rf"\b{re.escape(n)}\b", outcome.error)]
        alike = list[str]()
        if "None" in outcome.error or "must " in outcome.error or "have to" in outcome.error:
            # A decoder reads the same kind of thing as the encoder: arguments named alike come first.
            words = {w for n in assignment for w in n.split("_")}
            alike = sorted(absent, key=lambda n: -len(words & set(n.split("_"))))[:4]
        for name in dict.fromkeys([*named, *alike]):
            same = [g for g in assignment.values() if g.kind in ("ids", "sequence")]
            for guess in dict.fromkeys([*self.guesses[name][:4], *same]):
                yield {**assignment, name: guess}

    def _scalar(self, argument: Argument) -> bool:
        return isinstance(argument.default, (bool, int, float, str)) or argument.annotation in ("bool", "int", "float", "str")

    def _divided(self, assignment: Assignment, outcome: Outcome) -> Iterator[Assignment]:
        """Inputs laid side by side give a matrix more or fewer features than it wants: what it wants, shared among them."""
        free = [n for n, g in assignment.items() if n not in self.given and g.kind in ("flat", "sequence")]
        gap = mismatch(outcome.error)
        if gap is None or len(free) < 2 or gap[1] < len(free):
            return
        others, wanted = len(free) - 1, gap[1]
        # Evenly, as coordinates are; or one wide input and numbers beside it, such as a time or an action.
        shares = [[wanted // len(free) + (i < wanted % len(free)) for i in range(len(free))]]
        shares += [[1] * i + [wanted - others] + [1] * (others - i) for i in range(len(free))]
        for counts in shares:
            changed = {n: assignment[n].refeatured(c) for n, c in zip(free, counts, strict=True)}
            yield {**assignment, **{n: g for n, g in changed.items() if g is not None}}

    def _solved(self, assignment: Assignment, outcome: Outcome) -> Iterator[Assignment]:
        """Where a matrix wants more or fewer features than it was given: the size at which they agree, by bisection."""
        if (gap := mismatch(outcome.error)) is None:
            return
        for name, guess in assignment.items():
            if name in self.given or guess.size is None:
                continue
            low, high = 1, 1024 if guess.kind == "grid" and len(guess.shape) == 4 else 32768
            got = gap[0]
            size: int = guess.size
            for _ in range(16):
                low, high = (size + 1, high) if got < gap[1] else (low, size - 1)
                if low > high:
                    break
                size = min((low + high) // 2, size * 2) if got < gap[1] else (low + high) // 2
                changed = guess.resized(size)
                if changed is None or not _affordable(changed):
                    break
                trial = {**assignment, name: changed}
                result = self.attempt(trial)
                new = mismatch(result.error)
                if new is None or new[1] != gap[1] or new[0] == gap[1]:
                    if result.progress > outcome.progress or result.ok:
                        yield trial
                    if result.ok:
                        break
                    got = 0 if result.progress < outcome.progress else got
                    continue
                if new[0] == got and size != guess.size:
                    break  # the size does not matter to this matrix
                got = new[0]

    def _settled(self, assignment: Assignment, outcome: Outcome) -> Found:
        """The same with positions where they are mixed, inputs of like form, and enough pixels for the last convolution."""
        for name in [n for n in assignment if n not in self.given and not self.by_name[n].required]:
            without = {n: g for n, g in assignment.items() if n != name}
            if without and (result := self.attempt(without)).ok:
                assignment, outcome = without, result
        if outcome.mixes_positions:
            # Unbatched calls of recurrent layers and of attention take the examples for positions.
            assignment, outcome = self._better(assignment, outcome, self._as_sequence, lambda _: True)
        if len(assignment) > 1 and not outcome.mixes_positions:
            flat = any(g.kind == "flat" for g in assignment.values())
            assignment, outcome = self._better(assignment, outcome, self._as_flat if flat else lambda g: None, lambda _: True)
        if outcome.smallest < _SMALLEST:
            for size in (64, 96, 128, 224):
                before = assignment
                assignment, outcome = self._better(
                    assignment, outcome, functools.partial(_as_image, size=size), lambda o: o.smallest >= _SMALLEST
                )
                if assignment is not before:
                    break
        return Found(*self._for_training(assignment, outcome), self.arguments)

    def _for_training(self, assignment: Assignment, outcome: Outcome) -> tuple[Assignment, Outcome]:
        """The same with images large enough for what only training reaches (auxiliary heads), where there is such a size."""
        if not self.module.training or self._trains(assignment):
            return assignment, outcome
        for size in (128, 192, 224, 299):
            changed, result = self._better(assignment, outcome, functools.partial(_as_image, size=size), lambda _: True)
            if changed is not assignment and self._trains(changed):
                return changed, result
        return assignment, outcome

    def _trains(self, assignment: Assignment) -> bool:
        positional, keywords, names = self.call(assignment, _hollow_tensor)
        return self.dry.run(positional, keywords, names, training=True).ok

    def _better(
        self, assignment: Assignment, outcome: Outcome, change: Callable[[Guess], Guess | None], good: Callable[[Outcome], bool]
    ) -> tuple[Assignment, Outcome]:
        """The assignment with every free guess changed where `change` can, if that runs and is good; else as it was."""
        free = {n: change(g) for n, g in assignment.items() if n not in self.given}
        changed = {**assignment, **{n: g for n, g in free.items() if g is not None}}
        if _key(changed) == _key(assignment):
            return assignment, outcome
        result = self.attempt(changed)
        return (changed, result) if result.ok and good(result) else (assignment, outcome)

    @staticmethod
    def _as_sequence(guess: Guess) -> Guess | None:
        flat = guess.kind == "flat" and len(guess.shape) == 2
        return Guess("sequence", (guess.shape[0], POSITIONS, guess.shape[1])) if flat else None

    @staticmethod
    def _as_flat(guess: Guess) -> Guess | None:
        stacked = guess.kind == "sequence" and len(guess.shape) == 3
        return Guess("flat", (guess.shape[0], guess.shape[2])) if stacked else None

    def _furthest(self) -> list[tuple[Assignment, str]]:
        order = sorted(self.seen.items(), key=lambda item: -item[1].progress)
        return [(dict(key), outcome.error) for key, outcome in order[:3]]


def _as_image(guess: Guess, size: int) -> Guess | None:
    image = guess.kind == "grid" and len(guess.shape) == 4 and guess.shape[2] < size
    return guess.resized(size) if image else None


def _key(assignment: Assignment) -> tuple[tuple[str, Guess], ...]:
    return tuple(sorted(assignment.items(), key=lambda item: item[0]))


def _affordable(guess: Guess) -> bool:
    elements = 1
    for n in guess.shape[1:]:
        elements *= n
    return elements <= 2**20


def _of_type(guesses: Sequence[Guess], floating: torch.dtype) -> list[Guess]:
    """The same with floating-point values in the type of the weights, which layers take no other with."""
    return [dataclasses.replace(g, dtype=floating) if g.dtype == torch.float32 else g for g in guesses]


def _hollow_tensor(_: str, guess: Guess) -> Any:
    return guess.value if guess.kind == "value" else torch.empty(guess.shape, dtype=guess.dtype, device="meta")


def _plain_tensor(outcome: Outcome) -> Callable[[str, Guess], Any]:
    """Real tensors for a run that shapes alone do not decide."""

    def make(name: str, guess: Guess) -> Any:
        if guess.kind == "value":
            return guess.value
        if guess.dtype.is_floating_point:
            return torch.ones(guess.shape, dtype=guess.dtype)
        return torch.ones(guess.shape, dtype=guess.dtype).clamp(max=max(0, outcome.rows.get(name, 2) - 1))

    return make


def describe(assignments: Iterable[tuple[Assignment, str]]) -> str:
    """What was tried, for a message: `x=8x3x32x32:float32 (RuntimeError: ...)`."""
    return "; ".join(f"{_shown(assignment)} ({error[:110]})" for assignment, error in assignments)


def _shown(assignment: Assignment) -> str:
    types = {n: f"{'x'.join(map(str, g.shape))}:{str(g.dtype).removeprefix('torch.')}" for n, g in assignment.items()}
    return ", ".join(f"{name}={of}" for name, of in types.items())
