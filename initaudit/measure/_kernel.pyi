"""The extension that initaudit/measure/kernel/kernel.c makes, where there is a compiler."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

VERSION: int  # of these functions
LEVELS: int  # instruction sets that this processor has, of plain, AVX2 and AVX-512

def measure(
    kind: int,
    data: Array,
    rows: int,
    columns: int,
    table: Array | None,
    factors: Array | None,
    sums: Array | None,
    top: int,
    all_rows: int,
    level: int,
    /,
) -> tuple[int, float, float, float, float, float, float, int, int, int]: ...
def lay_out(places: Array, starts: Array, /) -> int: ...
def measure_many(
    kind: int,
    data: Array,
    table: Array | None,
    factors: Array,
    places: Array,
    numbers: Array,
    counts: Array,
    sums: Array,
    level: int,
    /,
) -> None: ...
def gather(
    kind: int,
    data: Array,
    rows: int,
    columns: int,
    table: Array | None,
    places: Array,
    left: int,
    width: int,
    to: Array,
    level: int,
    /,
) -> None: ...
def krylov(block: Array, rows: int, columns: int, steps: int, basis: Array, images: Array, level: int, /) -> int: ...
def survey(data: Array, level: int, /) -> tuple[float, float, float, float]: ...
