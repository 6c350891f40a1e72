"""What both rooms of `speed.py` share: times that take turns, and the checkpoints that are timed."""

from __future__ import annotations

import json
import math
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Runs = Mapping[str, Callable[[], object]]

_ROWS = 4096  # drawn at a time


def medians(runs: Runs, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of each, the median of `rounds` in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def write(path: Path, shape: tuple[int, ...], count: int, dtype: str, seed: int = 0) -> int:
    """A safetensors file of `count` matrices of normal values, each drawn anew; returns its bytes.

    Files of other seeds hold tensors of other names.
    """
    generator = np.random.default_rng(seed)
    size = math.prod(shape) * (2 if dtype == "BF16" else 4)
    header: dict[str, object] = {}
    for i in range(count):
        offsets = [i * size, (i + 1) * size]
        layer = seed * count // 4 + i // 4
        header[f"layers.{layer}.m{i % 4}.weight"] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            for top in range(0, shape[0], _ROWS):
                part = (min(_ROWS, shape[0] - top), *shape[1:])
                values = np.float32(0.02) * generator.standard_normal(part, np.float32)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values)
    return path.stat().st_size


@contextmanager
def replaced(parts: list[tuple[object, str]], made: Callable[[Callable[..., object], str], object]) -> Iterator[None]:
    """Attributes of modules replaced by what `made` makes of each and its name, until the block ends."""
    before = [(module, name, getattr(module, name)) for module, name in parts]
    for module, name, function in before:
        setattr(module, name, made(function, name))
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
