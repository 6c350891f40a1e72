"""The extension that initaudit/measure/kernel/kernel.c makes, where there is a compiler."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

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
def survey(data: Array, level: int, /) -> tuple[float, float, float, float]: ...
