"""Holds the predicted risk against networks that were really trained, and fits its coefficients.

    python benchmarks/trainability.py FOLDER [--fit] [--traces FILE]

FOLDER holds networks.py (names and builds the networks) and outcomes.jsonl (the accuracy each reached). Every network is
probed with its real inputs and with N(0, 1); the table gives, for each optimizer, the area under the ROC curve and the balanced
accuracy at the shipped threshold with whole architecture families left out, and the mistakes by name. `--fit` writes the
coefficients that all networks together give to initaudit/probe/coefficients.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from initaudit.graph.from_torch import from_module
from initaudit.probe.features import features
from initaudit.probe.run import probe

FEATURES = {
    "sgd": ["slow_sgd", "stuck_sgd", "rank_loss_sgd", "collapse_sgd", "sharpness", "dead", "faded_gradient"],
    "adam": ["slow_adam", "stuck_adam", "rank_loss_adam", "collapse_adam", "sharpness", "unevenness", "dead", "faded_gradient"],
}
FAILS, TRAINS = 0.5, 0.9  # best accuracy below, at least; what lies between is left out
RIDGE = 1.2  # of the standardised coefficients, so that no feature decides alone
COEFFICIENTS = Path(__file__).parent.parent / "initaudit" / "probe" / "coefficients.json"


def measured(folder: Path, kept: Path | None) -> list[tuple[dict[str, Any], dict[str, dict[str, float]]]]:
    """(outcome, features by kind of input) of every network; read from `kept` where that exists, else measured and kept."""
    if kept is not None and kept.exists():
        return pickle.loads(kept.read_bytes())  # our own file of the run before
    spec = importlib.util.spec_from_file_location("networks", folder / "networks.py")
    networks = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = networks
    spec.loader.exec_module(networks)
    rows = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    found = []
    for i, row in enumerate(rows):
        keys = ("arch", "depth", "width", "activation", "init", "fault", "seed")
        module, inputs = networks.build(networks.Spec(*(row[k] for k in keys)))
        graph = from_module(module, (inputs,))
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
        found.append((row, {"real": features(probe(graph, (inputs,))), "synthetic": features(probe(graph, (noise,)))}))
        print(f"\r{i + 1}/{len(rows)} probed", end="", file=sys.stderr)
    print(file=sys.stderr)
    if kept is not None:
        kept.write_bytes(pickle.dumps(found))
    return found


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Intercept and coefficients (>= 0) of a ridge logistic regression with both outcomes weighted alike."""
    scale = x.std(0) + 1e-9
    z, n = x / scale, len(y)
    weight = np.where(y == 1, n / 2 / max(y.sum(), 1), n / 2 / max((1 - y).sum(), 1))

    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        score = z @ p[1:] + p[0]
        residual = (1 / (1 + np.exp(-score)) - y) * weight
        value = (weight * (np.logaddexp(0, score) - y * score)).sum() / n + RIDGE * (p[1:] ** 2).sum() / n
        slope = np.concatenate([[residual.sum()], z.T @ residual]) / n
        slope[1:] += 2 * RIDGE * p[1:] / n
        return value, slope

    bounds = [(None, None)] + [(0, None)] * z.shape[1]
    best = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, bounds=bounds, method="L-BFGS-B").x
    best[1:] /= scale
    return best


def area(score: np.ndarray, y: np.ndarray) -> float:
    """The area under the ROC curve: the share of (fails, trains) pairs in the right order, ties counted half."""
    gap = score[y == 1][:, None] - score[y == 0][None, :]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", action="store_true", help="write the coefficients")
    parser.add_argument("--traces", type=Path, help="keep the measured features here, and read them from here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(options.folder, options.traces)
    families = np.array([row["arch"] for row, _ in found])
    shipped: dict[str, Any] = {"made_by": "benchmarks/trainability.py --fit"}
    for optimizer, names in FEATURES.items():
        best = np.array([row[optimizer] for row, _ in found])
        known = (best < FAILS) | (best >= TRAINS)
        y = (best < FAILS).astype(float)
        x = {kind: np.array([[f[kind][n] for n in names] for _, f in found]) for kind in ("real", "synthetic")}
        for kind, values in x.items():
            score = np.zeros(len(y))
            for family in sorted(set(families)):
                out = families == family
                train = known & ~out
                p = fit(np.vstack([v[train] for v in x.values()]), np.concatenate([y[train]] * len(x)))
                score[out] = values[out] @ p[1:] + p[0]
            hit = score[known] > 0
            balanced = (hit[y[known] == 1].mean() + (~hit[y[known] == 0]).mean()) / 2
            print(f"{optimizer:5}{kind:10} AUC {area(score[known], y[known]):.3f}  balanced accuracy {balanced:.3f}")
            for family in sorted(set(families)):
                at = known & (families == family)
                if 0 < y[at].sum() < at.sum():
                    print(f"    {family:12} AUC {area(score[at], y[at]):.3f} of {at.sum()}")
            wrong = [i for i in np.flatnonzero(known) if (score[i] > 0) != (y[i] == 1)]
            for i in sorted(wrong, key=lambda i: score[i]):
                what = "missed" if y[i] else "alarmed"
                print(f"    {what:8}{found[i][0]['name']:44} reached {best[i]:.2f}, score {score[i]:.1f}")
        p = fit(np.vstack([v[known] for v in x.values()]), np.concatenate([y[known]] * len(x)))
        shipped[optimizer] = {n: round(float(v), 4) for n, v in zip(["intercept", *names], p, strict=True)}
    print(json.dumps(shipped, indent=2))
    if options.fit:
        COEFFICIENTS.write_text(json.dumps(shipped, indent=2) + "\n")


if __name__ == "__main__":
    main()
