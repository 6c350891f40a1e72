"""Holds the predicted risk against networks that were really trained, and fits its coefficients.

    python benchmarks/trainability.py FOLDER [--fit] [--kept FILE] [--others FILE]

FOLDER holds networks.py (names and builds the networks) and outcomes.jsonl (the accuracy each reached). Every network is
audited with its real inputs and with N(0, 1); the table gives for each optimizer the area under the ROC curve and the balanced
accuracy at the shipped threshold with whole architecture families left out, and the mistakes by name with the features that
weighed most; then the static baseline, and what the audit's verdict was. `--fit` writes the coefficients that all networks
together give to initaudit/probe/coefficients.json. `--others` asks the coefficients about the networks of
benchmarks/other_networks.py, to which nothing is fitted: FILE is what that script wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from initaudit.auditing.run import gather
from initaudit.config import Config
from initaudit.load import from_module
from initaudit.probe.features import OPTIMIZERS, features
from initaudit.rules.roots import findings_of
from initaudit.rules.support import ratio_of

FORESEEN = ("slow", "rank_loss", "sharpness", "faded_gradient")
FAILS, TRAINS = 0.5, 0.9  # best accuracy below, at least; what lies between is left out
RIDGE = 1.2  # of the standardised coefficients, so that no feature decides alone
KINDS = ("real", "synthetic")
HEALTHY = ("he", "default", "orthogonal")
HERE = Path(__file__).parent
COEFFICIENTS = HERE.parent / "initaudit" / "probe" / "coefficients.json"
SPEC = ("arch", "depth", "width", "activation", "init", "fault", "seed")
OTHER = ("family", "task", "depth", "width", "activation", "init", "fault", "seed")

Row = dict[str, Any]


def names_of(optimizer: str, stepped: bool) -> list[str]:
    """The features of an optimizer's model, with virtual steps or without."""
    unlearnt = [f"unlearnt_{optimizer}"] if stepped else []
    return ["dead", "chaos", *(f"{name}_{optimizer}" for name in FORESEEN), *unlearnt]


def measured(script: Path, outcomes: Path, maker: str, fields: Sequence[str], kept: Path | None) -> list[Row]:
    """Outcome, features and findings of every network; what stands in `kept` is not measured again."""
    done = {} if kept is None or not kept.exists() else {r["name"]: r for r in map(json.loads, kept.read_text().splitlines())}
    rows: list[Row] = [json.loads(line) for line in outcomes.read_text().splitlines()]
    networks = script_at(script)
    for i, row in enumerate(rows):
        if row["name"] in done:
            rows[i] = done[row["name"]]
            continue
        module, inputs = networks.build(getattr(networks, maker)(*(row[k] for k in fields)))
        row["static"] = _static(module, inputs)
        for kind in KINDS:
            row[kind] = _seen(module, inputs if kind == "real" else _noise(inputs))
        print(f"\r{i + 1}/{len(rows)} audited", end="", file=sys.stderr)
        if kept is not None:
            with kept.open("a") as sink:
                sink.write(json.dumps(row) + "\n")
    print(file=sys.stderr)
    return rows


def script_at(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = made
    spec.loader.exec_module(made)
    return made


def _noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


def _seen(module: torch.nn.Module, inputs: torch.Tensor) -> Row:
    evidence = gather(from_module(module), Config(), inputs=(inputs,))
    trace = evidence.trace
    assert trace is not None
    findings = [f"{f.code}:{f.severity}" for f in findings_of(evidence)]
    still = dataclasses.replace(trace, response=())
    return {"features": features(trace), "still": features(still), "broken": trace.broken, "findings": findings}


def _static(module: torch.nn.Module, inputs: torch.Tensor) -> list[float]:
    """The largest and the summed |log| of variance over that of each weight's activation."""
    evidence = gather(from_module(module), Config(probe=False), inputs=(inputs,))
    logs = [abs(math.log(max(r, 1e-12))) for x in evidence.layers if (r := ratio_of(x)) is not None]
    return [max(logs, default=0.0), sum(logs)]


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


def balanced(hit: np.ndarray, y: np.ndarray) -> float:
    """The mean of the shares of failing and of training networks that were told."""
    return float((hit[y == 1].mean() + (~hit[y == 0]).mean()) / 2)


@dataclasses.dataclass(frozen=True)
class Table:
    """The features (networks, features) of one optimizer by kind of input; `y` is 1 where it failed."""

    rows: list[Row]
    optimizer: str
    names: list[str]
    x: Mapping[str, np.ndarray]
    broken: Mapping[str, np.ndarray]
    families: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The accuracy reached."""
        return np.array([row[self.optimizer] for row in self.rows])

    @property
    def known(self) -> np.ndarray:
        """Whether the network clearly failed or trained."""
        return (self.best < FAILS) | (self.best >= TRAINS)

    @property
    def y(self) -> np.ndarray:
        """1 for what failed."""
        return (self.best < FAILS).astype(float)

    def fitted(self, at: np.ndarray) -> np.ndarray:
        """The coefficients that the networks `at` give, both kinds of input together."""
        return fit(np.vstack([v[at] for v in self.x.values()]), np.concatenate([self.y[at]] * len(self.x)))

    def left_out(self, kind: str) -> np.ndarray:
        """The scores, each family's by coefficients that have not seen it."""
        score = np.zeros(len(self.rows))
        for family in sorted(set(self.families)):
            out = self.families == family
            p = self.fitted(self.known & ~out)
            score[out] = self.x[kind][out] @ p[1:] + p[0]
        score[self.broken[kind]] = 60.0
        return score


def table_of(rows: list[Row], optimizer: str, stepped: bool, family: str) -> Table:
    """The table of one optimizer; without `stepped` the features as the network stands."""
    names, key = names_of(optimizer, stepped), "features" if stepped else "still"
    x = {k: np.array([[r[k][key].get(n, 4.0) for n in names] for r in rows]) for k in KINDS}
    broken = {k: np.array([r[k]["broken"] for r in rows]) for k in KINDS}
    return Table(rows, optimizer, names, x, broken, np.array([r[family] for r in rows]))


def report(table: Table, kind: str, score: np.ndarray, p: np.ndarray) -> Iterator[str]:
    """The lines of one optimizer and kind of input."""
    known, y = table.known, table.y
    hit = score > 0
    yield (
        f"{table.optimizer:5}{kind:10} AUC {area(score[known], y[known]):.3f}  "
        f"balanced accuracy {balanced(hit[known], y[known]):.3f}  "
        f"({int(y[known].sum())} fail, {int((1 - y[known]).sum())} train)"
    )
    for family in sorted(set(table.families)):
        at = known & (table.families == family)
        if 0 < y[at].sum() < at.sum():
            yield f"    {family:12} AUC {area(score[at], y[at]):.3f} of {at.sum()}"
    wrong = [i for i in np.flatnonzero(known) if hit[i] != (y[i] == 1)]
    for i in sorted(wrong, key=lambda i: score[i]):
        parts = sorted(zip(p[1:] * table.x[kind][i], table.names, strict=True), reverse=True)
        why = ", ".join(f"{name} {value:.1f}" for value, name in parts[:3] if value > 0.2) or "no feature stands out"
        what = "missed" if y[i] else "alarmed"
        yield f"    {what:8}{table.rows[i]['name']:46} reached {table.best[i]:.2f}, score {score[i]:.1f}: {why}"


def verdicts(rows: list[Row], kind: str) -> Iterator[str]:
    """How the audit's verdict (an error among its findings) fares: a network fails where it fails under both optimizers."""
    best, least = (np.array([f(r["sgd"], r["adam"]) for r in rows]) for f in (max, min))
    failed = np.array([any(f.endswith(":error") for f in r[kind]["findings"]) for r in rows])
    sick, well = best < FAILS, least >= TRAINS
    yield (
        f"verdict {kind}: fail for {failed[sick].sum()} of {sick.sum()} that fail under both, "
        f"{failed[well].sum()} of {well.sum()} that train under both"
    )
    for i in np.flatnonzero(well & failed):
        yield f"    alarmed {rows[i]['name']:46} {' '.join(f for f in rows[i][kind]['findings'] if ':error' in f)}"
    for i in np.flatnonzero(sick & ~failed):
        yield f"    missed  {rows[i]['name']:46} {' '.join(f for f in rows[i][kind]['findings'] if ':info' not in f) or 'pass'}"
    plain = [r for r, w, f in zip(rows, well, failed, strict=True) if w and f and r["init"] in HEALTHY and r["fault"] == "none"]
    yield f"    healthy counterparts (he, default, orthogonal; they train under both) at fail: {len(plain)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", action="store_true", help="write the coefficients")
    parser.add_argument("--kept", type=Path, help="keep what was measured here, and read it from here")
    parser.add_argument("--others", type=Path, help="outcomes written by benchmarks/other_networks.py")
    parser.add_argument("--others-kept", type=Path, help="the same as --kept for those")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(options.folder / "networks.py", options.folder / "outcomes.jsonl", "Spec", SPEC, options.kept)
    shipped: dict[str, Any] = {"made_by": "benchmarks/trainability.py --fit"}
    lines: list[str] = []
    for optimizer in OPTIMIZERS:
        for stepped in (True, False):
            table = table_of(rows, optimizer, stepped, "arch")
            p = table.fitted(table.known)
            named = {n: round(float(v), 4) for n, v in zip(["intercept", *table.names], p, strict=True)}
            shipped.setdefault(optimizer, {})["stepped" if stepped else "still"] = named
            for kind in KINDS:
                found = list(report(table, kind, table.left_out(kind), p))
                lines += found if stepped else [f"    without virtual steps: {found[0]}"]
        known, y = table.known, table.y
        static = [np.array([r["static"][j] for r in rows])[known] for j in (0, 1)]
        largest, summed = (area(x, y[known]) for x in static)
        lines.append(f"{optimizer:5}static     AUC {largest:.3f} (largest log ratio of variance), {summed:.3f} (summed)")
    for kind in KINDS:
        lines += verdicts(rows, kind)
    if options.fit:
        COEFFICIENTS.write_text(json.dumps(shipped, indent=2) + "\n")
    if options.others:
        lines.append("networks of other families, by the shipped coefficients:")
        others = measured(HERE / "other_networks.py", options.others, "Other", OTHER, options.others_kept)
        for optimizer in OPTIMIZERS:
            table = table_of(others, optimizer, True, "family")
            p = np.array([shipped[optimizer]["stepped"][n] for n in ["intercept", *table.names]])
            for kind in KINDS:
                score = np.where(table.broken[kind], 60.0, table.x[kind] @ p[1:] + p[0])
                lines += report(table, kind, score, p)
        for kind in KINDS:
            lines += verdicts(others, kind)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
