"""Whether an audit says the same whatever device the probe runs on.

    python benchmarks/devices.py cuda [--networks FOLDER] [--every 4] [--state devices.jsonl] [--workers 4]

Audits on the CPU and twice on the device: the small networks of FOLDER (networks.py, see benchmarks/trainability.py), every
so-many-th model of the zoo, and the ONNX files under fixtures/. Prints for each kind in how many the verdict and the findings
at warning or above agree, in how many the two runs on the device gave the same bytes, and how far a risk moved. Resumable.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import onnx
import trainability
import zoo_run
from tabulate import tabulate
from zoo_models import built, quiet
from zoo_silence import models

from initaudit import audit
from initaudit.config import Config
from initaudit.errors import InitauditError

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"
LIMIT = 200.0  # seconds of processor time a task


def row(task: str, device: str, networks: Path | None) -> dict[str, Any]:
    """One model on the CPU and twice on `device`."""
    kind, _, name = task.partition("|")
    if kind == "network":
        assert networks is not None
        made = trainability.script_at(networks)
        module, inputs = made.build(made.specs()[int(name)])
        model: Any = module
    elif kind == "zoo":
        model, inputs = built(models()[name])
    else:
        model, inputs = onnx.load(FIXTURES / name), None
    with quiet():
        host, first, again = (audit(model, inputs, config=Config(device=d)) for d in ("cpu", device, device))
    loud = [[f"{f.code} {f.tensor}" for f in found.findings if f.severity != "info"] for found in (host, first)]
    return {
        "verdicts": [host.verdict, first.verdict],
        "loud": loud,
        "risks": [_flat(host.risk), _flat(first.risk)],
        "same_bytes": json.dumps(first.to_dict()) == json.dumps(again.to_dict()),
        "probed": [host.report.risk is not None, first.report.risk is not None],
        "notes": list(first.report.notes),
    }


def _flat(risk: Any) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in dict(risk or {}).items():
        if isinstance(value, dict):
            found.update({f"{name}.{k}": v for k, v in value.items()})
        else:
            found[name] = value
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """What agrees, by kind of model; the models that do not by name."""
    lines, odd = [], []
    for kind in dict.fromkeys(r["task"].partition("|")[0] for r in rows):
        its = [r for r in rows if r["task"].startswith(kind + "|")]
        ran = [r for r in its if "failed" not in r]
        moved = [_moved(r) for r in ran]
        lines.append([
            kind, len(ran), sum(len(set(r["verdicts"])) == 1 for r in ran), sum(r["loud"][0] == r["loud"][1] for r in ran),
            sum(r["same_bytes"] for r in ran), sum(m <= 0.02 for m in moved), max(moved, default=0.0),
        ])  # fmt: skip
        odd += [f"{r['task']}: {r['failed']}" for r in its if "failed" in r]
        odd += [
            f"{r['task']}: {r['verdicts']} {r['loud']} risk moved {_moved(r):.3f} bytes {r['same_bytes']}"
            for r in ran
            if _odd(r)
        ]
    headers = ["models", "audited", "same verdict", "same findings", "same bytes twice", "risks within 0.02", "largest move"]
    return tabulate(lines, headers, tablefmt="pipe", floatfmt=".3f") + "\n\n" + "\n".join(odd)


def _odd(r: dict[str, Any]) -> bool:
    return len(set(r["verdicts"])) > 1 or r["loud"][0] != r["loud"][1] or not r["same_bytes"] or _moved(r) > 0.02


def _moved(r: dict[str, Any]) -> float:
    host, there = r["risks"]
    gaps = [abs(a - b) for k in host if (a := host[k]) is not None and (b := there.get(k, 1.0 - a)) is not None]
    return max(gaps, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="tasks whose name begins with one of these, as in 'zoo|timm'")
    parser.add_argument("--state", type=Path, default=Path("devices.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    script = None if arguments.networks is None else arguments.networks / "networks.py"
    tasks = [f"fixture|{p.relative_to(FIXTURES)}" for p in sorted(FIXTURES.rglob("*.onnx")) if _readable(p)]
    if script is not None:
        tasks += [f"network|{i}" for i in range(len(trainability.script_at(script).specs()))]
    tasks += [f"zoo|{name}" for name in list(models())[:: arguments.every]]
    if arguments.only:
        tasks = [t for t in tasks if t.startswith(tuple(arguments.only))]
    work = functools.partial(row, device=arguments.device, networks=script)
    rows = zoo_run.run(tasks, work, arguments.state, workers=arguments.workers, limit=LIMIT)
    print(table(list(rows.values())))


def _readable(path: Path) -> bool:
    try:
        audit(path, config=Config(probe=False))
    except InitauditError:
        return False
    return True


if __name__ == "__main__":
    main()
