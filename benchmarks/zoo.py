"""Silence and detection over the architectures that people use.

    pip install --no-deps timm torchvision==0.28.0 pillow; pip install weightlens model-clinic syndset
    python benchmarks/zoo.py [--state zoo-state] [--workers 2] [--only silence onnx trained detection]

Audits every model of the zoo as its library initialises it (as a module, a third as ONNX), small networks trained here, and
forty models with one fault at a time; other tools are asked about the same weights. Every audit is one line of a file under
`--state`: an interrupted run is taken up where it stopped. Prints the tables of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import zoo_detection
import zoo_run
import zoo_silence
import zoo_table
import zoo_trained

LIMIT = 60.0  # seconds of processor time a task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("zoo-state"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--table", action="store_true", help="print the tables of what has been run, and run nothing")
    arguments = parser.parse_args()
    for part in arguments.only:
        tasks, work, table = PARTS[part]
        state = arguments.state / f"{part}.jsonl"
        if arguments.table:
            rows = zoo_run.rows_of(state)
        else:
            rows = zoo_run.run(tasks(), work, state, workers=arguments.workers, limit=LIMIT)
        print(table(list(rows.values())))


PARTS = {
    "silence": (lambda: [f"module|{n}" for n in zoo_silence.models()], zoo_silence.module_row, zoo_table.silence),
    "onnx": (zoo_silence.onnx_tasks, zoo_silence.onnx_row, zoo_table.silence),
    "trained": (zoo_trained.tasks, zoo_trained.row, zoo_table.trained),
    "detection": (zoo_detection.tasks, zoo_detection.row, zoo_table.detection),
}

if __name__ == "__main__":
    main()
