"""Twenty families that the verdict was neither fitted to nor looked at with, healthy and sick, really trained and compared.

    python benchmarks/fresh_networks.py --out FILE

trains each network for 150 steps of batch 64 on 512 examples, with SGD (momentum 0.9; 0.003, 0.03, 0.3) and Adam (3e-4, 3e-3,
0.03), asks `initaudit.audit` about it untrained, appends a line of JSON to FILE, and prints the areas under the ROC curve and
every mistake by name. Scores are as in other_networks.py: 0.1 is chance, 1 perfect. What stands in FILE is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh_layers import MAKERS
from torch import Tensor, nn
from training import score_after

import initaudit

RUNS = (("sgd", 0.003), ("sgd", 0.03), ("sgd", 0.3), ("adam", 3e-4), ("adam", 3e-3), ("adam", 0.03))
FAILS, TRAINS, LIKELY = 0.5, 0.9, 0.5
EXAMPLES, BATCH = 512, 64


def data(kind: str) -> tuple[Tensor, Tensor]:
    """Examples and labels (numbers for a regression): a class is a centre with noise around it."""
    g = torch.Generator().manual_seed(sum(map(ord, kind)))
    y = torch.randint(4, (EXAMPLES,), generator=g)
    if kind == "waves":
        x = 2 * torch.rand(EXAMPLES, 2, generator=g) - 1
        z = torch.sin(6 * x[:, :1]) * torch.cos(4 * x[:, 1:])
        return x, (z - z.mean()) / z.std()
    if kind == "words":
        common = torch.randint(40, (EXAMPLES, 12), generator=g)
        own = torch.randint(10, (EXAMPLES, 12), generator=g) + 10 * y[:, None]
        return torch.where(torch.rand(EXAMPLES, 12, generator=g) < 0.5, own, common), y
    if kind == "copy":
        x = torch.randn(EXAMPLES, 16, generator=g) @ torch.randn(16, 16, generator=g) / 4
        return x, x
    if kind == "pairs":
        same = y % 2
        first = torch.randn(EXAMPLES, 10, generator=g)
        other = torch.randn(EXAMPLES, 10, generator=g)
        near = first + 0.3 * torch.randn(EXAMPLES, 10, generator=g)
        return torch.stack([first, torch.where(same[:, None] == 1, near, other)], 1), same
    if kind == "tags":
        x = torch.randn(EXAMPLES, 10, 6, generator=g)
        return x, ((x.cumsum(1)[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long())
    shape = {"points": (16,), "images": (3, 8, 8), "series": (20, 4), "sets": (9, 5)}[kind]
    return torch.randn(4, *shape, generator=g)[y] + torch.randn(EXAMPLES, *shape, generator=g), y


def scale(factor: float, which: slice = slice(None)) -> Callable[[nn.Module], None]:
    """A fault: matrices and kernels times `factor`."""

    def apply(model: nn.Module) -> None:
        for p in [p for p in model.parameters() if p.dim() > 1][which]:
            p.mul_(factor)

    return apply


def equal_units(model: nn.Module) -> None:
    """A fault: every unit of a layer starts as its first one."""
    for p in [p for p in model.parameters() if p.dim() > 1]:
        p.copy_(p[:1].clone().expand_as(p))


def zeros(model: nn.Module) -> None:
    """A fault: all matrices are zero."""
    scale(0.0)(model)


def shifted(model: nn.Module) -> None:
    """A fault: every bias stands at -30."""
    for name, p in model.named_parameters():
        if p.dim() == 1 and "bias" in name:
            p.fill_(-30.0)


# Name, task, and what makes the sick one.
FAMILIES: tuple[tuple[str, str, Callable[[nn.Module], None]], ...] = (
    *(("maxout", "points", scale(0.02)), ("fixed_point", "points", scale(8.0)), ("siamese", "pairs", zeros)),
    *(("autoencoder", "copy", scale(0.02)), ("discriminator", "images", equal_units), ("experts", "points", equal_units)),
    *(("dilated", "series", scale(0.1)), ("selu", "points", scale(0.1)), ("siren", "waves", scale(0.05))),
    *(("gru_tagger", "tags", zeros), ("bare_attention", "series", scale(12.0)), ("set_attention", "sets", zeros)),
    *(("token_mixer", "series", equal_units), ("capsule", "points", zeros), ("unet", "images", scale(6.0))),
    *(("glu", "points", scale(0.1)), ("bag", "words", equal_units), ("linear", "points", scale(0.2))),
    *(("quadratic", "points", scale(5.0)), ("prelu_depthwise", "images", shifted)),
)


def build(name: str, sick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The untrained module, its examples and their labels."""
    task, fault = next((t, f) for n, t, f in FAMILIES if n == name)
    torch.manual_seed(0)
    model = MAKERS[name]()
    if sick:
        with torch.no_grad():
            fault(model)
    return model, *data(task)


def train(name: str, sick: bool, optimizer: str, rate: float, steps: int) -> float:
    """The score after `steps` steps; 0.1 where something is not finite."""
    return score_after(*build(name, sick), optimizer=optimizer, rate=rate, steps=steps, batch=BATCH, seed=1)


def measured(name: str, sick: bool, steps: int) -> dict[str, Any]:
    """What the audit says of it and what training came to."""
    model, x, _ = build(name, sick)
    seen = initaudit.audit(model, x[:BATCH])
    runs = {f"{o}@{r:g}": round(train(name, sick, o, r, steps), 3) for o, r in RUNS}
    best = {o: max(v for k, v in runs.items() if k.startswith(o)) for o in ("sgd", "adam")}
    findings = [f"{f.code}:{f.severity}" for f in seen.findings if f.severity != "info"]
    label = f"{name}-{'sick' if sick else 'healthy'}"
    return {
        "name": label,
        "verdict": seen.verdict,
        "risk": dict(seen.risk["untrainable"]),
        "findings": findings,
        "runs": runs,
        **best,
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the areas and the mistakes."""
    for optimizer in ("sgd", "adam"):
        known = [r for r in rows if not FAILS <= r[optimizer] < TRAINS]
        y = np.array([r[optimizer] < FAILS for r in known])
        risk = np.array([r["risk"][optimizer] for r in known])
        gap = risk[y][:, None] - risk[~y][None, :]
        area = ((gap > 0) + 0.5 * (gap == 0)).mean()
        balanced = ((risk[y] >= LIKELY).mean() + (risk[~y] < LIKELY).mean()) / 2
        print(f"{optimizer:5}AUC {area:.3f}  balanced accuracy {balanced:.3f}  ({y.sum()} fail, {(~y).sum()} train)")
        for r, fails in zip(known, y, strict=True):
            if (r["risk"][optimizer] >= LIKELY) != fails:
                what = "missed" if fails else "alarmed"
                found = f"reached {r[optimizer]:.2f}, risk {r['risk'][optimizer]:.2f} {' '.join(r['findings'])}"
                print(f"    {what:8}{r['name']:24} {found}")
    sick = [r for r in rows if max(r["sgd"], r["adam"]) < FAILS]
    well = [r for r in rows if min(r["sgd"], r["adam"]) >= TRAINS]
    told = {k: sum(r["verdict"] == "fail" for r in v) for k, v in (("sick", sick), ("well", well))}
    print(
        f"verdict fail: {told['sick']} of {len(sick)} that fail under both, {told['well']} of {len(well)} that train under both"
    )
    for r in [r for r in well if r["verdict"] == "fail"] + [r for r in sick if r["verdict"] != "fail"]:
        print(f"    {r['verdict']:6}{r['name']:24} {' '.join(r['findings'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {r["name"] for r in rows}
    for name, _, _ in FAMILIES:
        for sick in (False, True):
            if f"{name}-{'sick' if sick else 'healthy'}" in done:
                continue
            rows.append(measured(name, sick, options.steps))
            with options.out.open("a") as sink:
                sink.write(json.dumps(rows[-1]) + "\n")
            print(f"{len(rows)}/{2 * len(FAMILIES)} {rows[-1]['name']}", file=sys.stderr)
    table(rows)


if __name__ == "__main__":
    main()
