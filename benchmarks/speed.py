"""What audits cost, as ratios to what one would do instead, within one run: medians of runs that take turns.

    python benchmarks/speed.py --quick                  # under a minute on two idle cores
    python benchmarks/speed.py                          # everything; the disk part writes 10 GB and deletes them
    python benchmarks/speed.py pass startup             # some parts

Parts that call the package stand in speed_passes.py, those that run whole commands in speed_commands.py. One thread an
operation throughout.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import speed_commands as commands
import speed_passes as passes

# Read when numpy and torch are imported, so that they have to be there before.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PARTS: dict[str, Callable[[Path, bool], None]] = {
    "pass": passes.one_pass,
    "variants": passes.variants,
    "threads": passes.threads,
    "startup": commands.startup,
    "memory": commands.memory,
    "probe": commands.probe,
    "jobs": commands.jobs,
    "disk": commands.disk,
    "tensors": passes.tensors,
    "width": passes.width,
    "layers": passes.layers,
    "whole": passes.whole,
    "peers": commands.peers,
}


def main() -> None:
    """Runs the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a temporary folder")
    chosen = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in THREADS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **THREADS})
    for part in chosen.parts or PARTS:
        folder = Path(tempfile.mkdtemp(dir=chosen.folder))
        try:
            PARTS[part](folder, chosen.quick)
        finally:
            shutil.rmtree(folder)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
