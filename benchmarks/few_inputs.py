"""Networks of few inputs, as tutorials, physics and control have them: are the healthy ones left alone, the sick ones told?

    python benchmarks/few_inputs.py [--state FILE] [--workers 2] [--count 360]

Draws networks at random: 1 to 24 numbers in, one to ten out, one to eight layers of 4 to 128 units, ten activations, four
initializations, half of them with a fault. Each is trained for 400 steps of batch 64 on a smooth function of its inputs with
SGD (momentum 0.9; 0.003, 0.03, 0.3) and Adam (3e-4, 3e-3, 3e-2), and audited untrained with 64 inputs and with none. Scores
are as in other_networks.py: 0.1 is chance, 1 perfect. Prints the areas under the ROC curve by number of inputs, and the
mistakes.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_run
from tabulate import tabulate
from torch import Tensor, nn
from trainability import area
from training import score_after

import initaudit

RUNS = (("sgd", 0.003), ("sgd", 0.03), ("sgd", 0.3), ("adam", 3e-4), ("adam", 3e-3), ("adam", 3e-2))
# A smooth function is learned by degrees: what is a third of the way in so few steps has begun. Guessing the commonest of
# unequal classes alone comes to 0.25.
FAILS, TRAINS = 0.25, 0.4
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU, "softplus": nn.Softplus, "mish": nn.Mish, "selu": nn.SELU,
}  # fmt: skip
INITS = ("default", "default", "xavier", "he")
FAULTS = ("tiny", "huge", "equal", "dead", "zeros")


def tasks(count: int) -> list[str]:
    """The names of the networks: inputs, outputs, layers, units, activation, initialization, fault, seed."""
    draw = random.Random(0)
    found = []
    for seed in range(count):
        fault = draw.choice(FAULTS) if draw.random() < 0.5 else "none"
        parts = (
            draw.choice((1, 1, 2, 3, 4, 8, 13, 24)), draw.choice((1, 1, 2, 3, 10)), draw.choice((1, 2, 3, 4, 6, 8)),
            draw.choice((4, 8, 16, 32, 64, 128)), draw.choice(list(ACTIVATIONS)), draw.choice(INITS), fault, seed,
        )  # fmt: skip
        found.append("|".join(map(str, parts)))
    return found


def build(task: str) -> nn.Module:
    """The untrained network."""
    numbers, outputs, depth, width, act, init, fault, seed = task.split("|")
    torch.manual_seed(int(seed))
    sizes = [int(numbers), *[int(width)] * int(depth), int(outputs)]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), ACTIVATIONS[act]()]
    linear = [m for m in layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer in linear:
            if init != "default":
                (nn.init.xavier_normal_ if init == "xavier" else nn.init.kaiming_normal_)(layer.weight)
                layer.bias.zero_()
        _break(linear, fault)
    return nn.Sequential(*layers[:-1])


def _break(linear: list[nn.Linear], fault: str) -> None:
    hidden = linear[:-1] or linear
    for layer in hidden if fault in ("tiny", "huge", "zeros") else hidden[-1:]:
        layer.weight.mul_({"tiny": 0.03, "huge": 12.0, "zeros": 0.0}.get(fault, 1.0))
        if fault == "equal":
            layer.weight.copy_(layer.weight[:1].clone().expand_as(layer.weight))
            layer.bias.fill_(0.1)
        if fault == "dead":
            layer.bias.fill_(-30.0)


def data(task: str) -> tuple[Tensor, Tensor]:
    """512 examples of N(0, 1) or of a uniform cube, and a smooth function of them: numbers, or the largest of several."""
    numbers, outputs, *_, seed = task.split("|")
    m, k = int(numbers), int(outputs)
    g = torch.Generator().manual_seed(int(seed))
    x = torch.randn(512, m, generator=g) if int(seed) % 2 else 2 * torch.rand(512, m, generator=g) - 1
    a, b = (torch.randn(m, k, generator=g) / m**0.5 for _ in range(2))
    y = (x @ a) + 0.5 * torch.sin(3 * x @ b + torch.randn(k, generator=g))
    y = (y - y.mean(0)) / y.std(0)
    return x, y if k in (1, 3) else y.argmax(1)


def row(task: str) -> dict[str, Any]:
    """What the audit says and what training comes to."""
    x, y = data(task)
    found: dict[str, Any] = {}
    for kind, inputs in (("given", x[:64]), ("made up", None)):
        seen = initaudit.audit(build(task), inputs)
        found[kind] = {
            "risk": dict(seen.risk["untrainable"]),
            "verdict": seen.verdict,
            "findings": [f"{f.code}:{f.severity}" for f in seen.findings if f.severity != "info"],
        }
    for optimizer, rate in RUNS:
        model = build(task)
        found[f"{optimizer}@{rate:g}"] = score_after(model, x, y, optimizer=optimizer, rate=rate, steps=400, batch=64, seed=1)
    for optimizer in ("sgd", "adam"):
        found[optimizer] = max(v for k, v in found.items() if k.startswith(f"{optimizer}@"))
    return found


def table(rows: list[dict[str, Any]], kind: str) -> str:
    """By number of inputs: how many fail and train, the area under the ROC curve, the shares that a risk of one half tells."""
    lines = []
    for numbers in [*sorted({int(r["task"].split("|")[0]) for r in rows}), 0]:
        some = [r for r in rows if numbers in (0, int(r["task"].split("|")[0]))]
        for optimizer in ("sgd", "adam"):
            sick = [r[kind]["risk"][optimizer] for r in some if r[optimizer] < FAILS]
            well = [r[kind]["risk"][optimizer] for r in some if r[optimizer] >= TRAINS]
            y = np.array([1] * len(sick) + [0] * len(well))
            auc = f"{area(np.array(sick + well), y):.3f}" if sick and well else ""
            told, alarmed = (f"{sum(v >= 0.5 for v in group)} of {len(group)}" for group in (sick, well))
            lines.append((numbers or "all", optimizer, auc, told, alarmed))
    return tabulate(lines, headers=("inputs", "optimizer", "AUC", "failing told", "training alarmed"), tablefmt="github")


def mistakes(rows: list[dict[str, Any]], kind: str) -> list[str]:
    """What the audit's findings say of the networks that train, or fail, under both."""
    said = []
    for r in rows:
        best, least = max(r["sgd"], r["adam"]), min(r["sgd"], r["adam"])
        sick = r["task"].split("|")[6] != "none"
        if best < FAILS and not r[kind]["findings"]:
            said.append(f"    missed  {r['task']:40} reached {best:.2f}")
        if least >= TRAINS and r[kind]["findings"] and not sick:
            said.append(f"    alarmed {r['task']:40} reached {least:.2f} {' '.join(r[kind]['findings'])}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("few-inputs.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=360)
    options = parser.parse_args()
    rows = list(zoo_run.run(tasks(options.count), row, options.state, workers=options.workers).values())
    for kind in ("given", "made up"):
        print(f"inputs {kind}\n\n{table(rows, kind)}\n")
        print("\n".join(mistakes(rows, kind)))


if __name__ == "__main__":
    main()
