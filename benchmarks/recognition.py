"""How often the scheme that drew a tensor is recognised, how often another is, and how often training is seen.

    python benchmarks/recognition.py            # everything; what has been run is not run again
    python benchmarks/recognition.py --table    # the tables of what has been run

Four tables: fresh tensors of every scheme of the catalogue, by shape and by family (twelve shapes of 64 to 10 million weights,
three dtypes); tensors of a million weights whose variance is a tenth above or below that of their scheme; tensors of small
networks trained on scikit-learn's digits. Each task is a line of the file of results, so that a run can be taken up again, and
a few seeds of everything come before further ones: what has been run at any time covers every scheme, shape and dtype.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from scipy import stats
from zoo_run import Row, rows_of, run

from initaudit.expect.recognise import recognise
from initaudit.expect.schemes import Scheme, Site, catalogue, site_of
from initaudit.measure.observation import observe

Array = np.ndarray[Any, Any]

STATE = Path("recognition.jsonl")
ROUND = 4  # seeds of everything before the next
LINEAR, KERNEL, TRANSPOSED = ("o", "i"), ("o", "i", "k", "k"), ("i", "o", "k", "k")
SITES: dict[str, Site] = {
    "linear 8x8": site_of((8, 8), LINEAR),
    "linear 10x64": site_of((10, 64), LINEAR),
    "depthwise 64x1x3x3": site_of((64, 1, 3, 3), KERNEL, groups=64),
    "conv 16x3x3x3": site_of((16, 3, 3, 3), KERNEL),
    "linear 64x64": site_of((64, 64), LINEAR, depth=12, block=2),
    "transposed 32x16x4x4": site_of((32, 16, 4, 4), TRANSPOSED, operator="conv_transpose"),
    "depthwise 512x1x7x7": site_of((512, 1, 7, 7), KERNEL, groups=512),
    "packed QKV 576x192": site_of((576, 192), LINEAR, packed=3, depth=12),
    "linear 1000x512": site_of((1000, 512), LINEAR, depth=24, block=6),
    "conv 256x256x3x3": site_of((256, 256, 3, 3), KERNEL),
    "embedding 30000x128": site_of((30_000, 128), ("v", "d"), operator="embedding"),
    "linear 4096x2500": site_of((4096, 2500), LINEAR),
}
MILLION: dict[str, Site] = {
    "linear 1024x1024": site_of((1024, 1024), LINEAR, depth=24, block=9),
    "conv 340x340x3x3": site_of((340, 340, 3, 3), KERNEL),
    "embedding 8192x128": site_of((8192, 128), ("v", "d"), operator="embedding"),
}
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
# What two matrices, or kernels, are made to be: by torch.nn.init, which needs no variance.
STRUCTURES: Mapping[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "orthogonal": lambda w, groups: torch.nn.init.orthogonal_(w, gain=2**0.5),
    "delta_orthogonal": lambda w, groups: _delta(w),
    "identity": lambda w, groups: torch.nn.init.eye_(w),
    "dirac": lambda w, groups: torch.nn.init.dirac_(w, groups),
    "sparse": lambda w, groups: torch.nn.init.sparse_(w, 0.2, 0.01),
}
# The spacing of subnormal float16 in standard deviations: below this a draw keeps as many digits as bfloat16 has.
FINEST = 2.0**-24 * 2**7


def _delta(w: torch.Tensor) -> torch.Tensor:
    w.zero_()[:, :, w.shape[2] // 2, w.shape[3] // 2] = torch.nn.init.orthogonal_(torch.empty(w.shape[:2]))
    return w


def structures(site: Site) -> Iterator[str]:
    """Those that a tensor of this shape can have; a delta needs a matrix at its centre."""
    kernel = len(site.shape) == 4
    yield "orthogonal"
    if kernel and site.groups == 1:
        yield "delta_orthogonal"
    yield from ("dirac",) if kernel else ("identity", "sparse")


def draw(scheme: Scheme, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """A float32 draw; a truncated law by drawing again, which is another way than any formula of the package."""
    if scheme.distribution == "constant":
        return np.full(shape, scheme.mean, np.float32)
    if scheme.distribution == "uniform":
        u = rng.random(shape, np.float32)
        u -= np.float32(0.5)
        u *= np.float32(2 * scheme.bound)
        return u
    z = rng.standard_normal(shape, np.float32)
    if scheme.distribution == "normal":
        z *= np.float32(np.sqrt(scheme.variance))
        return z
    reach = scheme.bound / np.sqrt(scheme.variance)
    cut = min((2.0, 3.0), key=lambda c: abs(c / stats.truncnorm(-c, c).std() - reach))
    line = z.reshape(-1)
    left = np.flatnonzero(np.abs(line) > cut)
    while left.size:
        line[left] = rng.standard_normal(left.size, np.float32)
        left = left[np.abs(line[left]) > cut]
    z *= np.float32(scheme.bound / cut)
    return z


def judged(values: Array, site: Site, true: str, variance: float, count: collections.Counter[str]) -> None:
    """Count what is said of `values`, whose scheme has a name that begins with `true`."""
    result = recognise(observe(values), site)
    named = [f for f in result.schemes if f.name == true or (true in STRUCTURES and f.name.startswith(true))]
    count["all"] += 1
    count["missed"] += not named
    count["wrong"] += any(not 0.5 < f.variance / variance < 2 for f in result.schemes) if variance else False
    count["size"] += len(result.schemes)
    count[result.verdict] += 1


def holds(dtype: np.dtype[Any], values: Array, std: float) -> bool:
    """Whether a dtype has digits for these values."""
    return dtype != np.float16 or std >= FINEST or (std == 0 and (values.flat[0] == 0 or abs(values.flat[0]) >= 2.0**-14))


def fresh(task: str) -> Mapping[str, Any]:
    """The counts of one scheme at one shape, by dtype, over the seeds of one round."""
    _, label, name, seeds = task.split("|")
    site = SITES[label]
    scheme = next((s for s in catalogue(site) if s.name == name), None)
    counts = {d.name: collections.Counter[str]() for d in DTYPES}
    alike = name in ("identity", "dirac") or (scheme is not None and scheme.distribution == "constant")
    for seed in span(seeds)[: 1 if alike else None]:
        # The number of the task is part of the seed: no two schemes share a draw.
        rng = np.random.default_rng([seed, site.size, sum(name.encode()), len(name)])
        if scheme is None:
            torch.manual_seed(int(rng.integers(2**31)))
            values = STRUCTURES[name](torch.empty(site.shape), site.groups).numpy()
        else:
            values = draw(scheme, site.shape, rng)
        std = float(np.std(values)) if scheme is None else scheme.variance**0.5
        for dtype in DTYPES:
            if holds(dtype, values, std):
                judged(values.astype(dtype), site, name, scheme.variance if scheme is not None else 0.0, counts[dtype.name])
    return {"counts": counts}


def tenth(task: str) -> Mapping[str, Any]:
    """How often a scheme is in the set of a tensor whose variance is 1.1 times its own, or its own divided by that."""
    _, label, name, seeds = task.split("|")
    site = MILLION[label]
    scheme = next(s for s in catalogue(site) if s.name == name)
    counts = {d.name: collections.Counter[str]() for d in DTYPES}
    for seed in span(seeds):
        values = draw(scheme, site.shape, np.random.default_rng([seed, site.size, sum(name.encode()), len(name)]))
        for factor in (1.1, 1 / 1.1):
            scaled = values * np.float32(factor**0.5)
            for dtype in DTYPES:
                if holds(dtype, scaled, scheme.variance**0.5):
                    result = recognise(observe(scaled.astype(dtype)), site)
                    counts[dtype.name]["all"] += 1
                    counts[dtype.name]["taken"] += any(f.name == name for f in result.schemes)
    return {"counts": counts}


def work(task: str) -> Mapping[str, Any]:
    """One task, by its first word."""
    return {"fresh": fresh, "tenth": tenth}[task.partition("|")[0]](task)


def span(seeds: str) -> range:
    """The seeds of a task, written as first-beyond."""
    return range(*map(int, seeds.split("-")))


def tasks(seeds: int) -> Iterator[str]:
    """Round by round, small shapes first; what has no chance in it is drawn in the first round only."""
    for first in range(0, seeds, ROUND):
        part = f"{first}-{min(first + ROUND, seeds)}"
        for label, site in SITES.items():
            alike = {"identity", "dirac", *(s.name for s in catalogue(site) if s.distribution == "constant")}
            for name in (*structures(site), *(s.name for s in catalogue(site))):
                if first == 0 or name not in alike:
                    yield f"fresh|{label}|{name}|{part}"
        # Seventy standard errors apart: the draws of one round are enough.
        for label, site in MILLION.items() if first == 0 else ():
            for scheme in catalogue(site):
                if scheme.distribution != "constant":
                    yield f"tenth|{label}|{scheme.name}|{part}"


def summed(rows: Mapping[str, Row], word: str, key: Callable[[str, str, str], object]) -> dict[Any, collections.Counter[str]]:
    """The counts of all rows of a kind, by a key of (shape, scheme, dtype)."""
    sums: dict[Any, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for task, row in rows.items():
        kind, label, name, _ = task.split("|")
        for dtype, counts in row.get("counts", {}).items() if kind == word else ():
            sums[key(label, name, dtype)].update(counts)
    return {k: c for k, c in sums.items() if c["all"]}


def tables(rows: Mapping[str, Row]) -> Iterator[str]:
    """Markdown, with the tasks that failed at the end."""
    head = "| {} | tensors | true one missed | 2x apart in the set | schemes in the set | called trained |"
    for title, key in (
        ("shape", lambda label, name, dtype: label),
        ("dtype", lambda label, name, dtype: dtype),
        ("family", lambda label, name, dtype: name.partition("(")[0]),
        ("all", lambda label, name, dtype: "all"),
        ("4096 weights or more", lambda label, name, dtype: SITES[label].size >= 4096),
    ):
        yield head.format(title)
        yield "|---|---|---|---|---|---|"
        for k, c in summed(rows, "fresh", key).items():
            shares = " | ".join(f"{c[x] / c['all']:.3%}" for x in ("missed", "wrong"))
            yield f"| {k} | {c['all']} | {shares} | {c['size'] / c['all']:.1f} | {c['trained'] / c['all']:.3%} |"
        yield ""
    yield "| variance 1.1 times or a 1.1th of a scheme's | tensors | that scheme in the set |"
    yield "|---|---|---|"
    for k, c in summed(rows, "tenth", lambda label, name, dtype: f"{label}, {dtype}").items():
        yield f"| {k} | {c['all']} | {c['taken'] / c['all']:.3%} |"
    yield ""
    worst = summed(rows, "fresh", lambda label, name, dtype: (label, name, dtype)).items()
    for (label, name, dtype), c in sorted(worst, key=lambda item: -item[1]["missed"] / item[1]["all"])[:12]:
        if c["missed"]:
            yield f"missed {c['missed']} of {c['all']}: {label}, {name}, {dtype}"
    for task, row in rows.items():
        if "failed" in row:
            yield f"failed: {task}: {row['failed']}"


def main() -> None:
    """Run what is left and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--state",
        type=Path,
        default=STATE,
        help="file of results, one line a task; in the folder where this is run unless told",
    )
    parser.add_argument("--only", default="", help="tasks whose name contains this, as in 'fresh|conv'")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--trained", action="store_true", help="trained tensors only")
    options = parser.parse_args()
    start = time.perf_counter()
    if not options.trained:
        chosen = [t for t in tasks(options.seeds) if options.only in t]
        if options.table:
            rows = rows_of(options.state)
        else:
            rows = run(chosen, work, options.state, workers=options.workers, limit=600.0)
        for line in tables({t: rows[t] for t in chosen if t in rows}):
            print(line)
    if options.trained or not (options.table or options.only):
        from trained_networks import table

        for line in table(options.seeds):
            print(line, flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
