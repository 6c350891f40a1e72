"""The streaming pass against what one writes by hand: safe_open and torch.std_mean, one thread, the file warm.

    OMP_NUM_THREADS=1 python benchmarks/moments.py

Prints ratios of medians of alternated runs; our pass gives nine statistics, the loop two.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from initaudit.measure.moments import measure
from initaudit.measure.units import measure_units

SHAPE, TENSORS = (4096, 4096), 6


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for dtype, stored in ((torch.float32, np.float32), (torch.bfloat16, ml_dtypes.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_file({f"w{i}": (torch.randn(SHAPE) * 0.02).to(dtype) for i in range(TENSORS)}, path)
            size = TENSORS * SHAPE[0] * SHAPE[1] * dtype.itemsize
            start = path.stat().st_size - size
            mapped = np.memmap(path, stored, "r", offset=start, shape=(TENSORS, *SHAPE))

            def by_hand(path: Path = path) -> None:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no mapping)
                        torch.std_mean(file.get_tensor(name).float())

            def moments(mapped: np.ndarray = mapped) -> None:
                for tensor in mapped:
                    measure(tensor)

            def units(mapped: np.ndarray = mapped) -> None:
                for tensor in mapped:
                    measure_units(tensor)

            times: dict[str, list[float]] = {"by hand": [], "moments": [], "moments and unit sums": []}
            for _ in range(5):
                for name, run in zip(times, (by_hand, moments, units), strict=True):
                    times[name].append(timed(run))
            base = statistics.median(times["by hand"])
            for name, seconds in times.items():
                median = statistics.median(seconds)
                print(f"{stored.__name__:10}{name:24}{size / median / 1e9:7.2f} GB/s{base / median:8.2f} x")


if __name__ == "__main__":
    main()
