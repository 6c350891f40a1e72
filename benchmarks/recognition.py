"""How often the scheme that drew a tensor is recognised, how often another is, and how often training is seen.

    python benchmarks/recognition.py [--fresh] [--trained] [--seeds 20]

Prints one table for fresh tensors (every scheme of the catalogue, twelve shapes, three dtypes) and one for tensors of small
networks trained on scikit-learn's digits. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from initaudit.expect.recognise import recognise
from initaudit.expect.scheme import truncated_moments
from initaudit.expect.schemes import Scheme, Site, catalogue, site_of
from initaudit.measure.observation import observe

LINEAR, KERNEL = ("o", "i"), ("o", "i", "k", "k")
SITES: dict[str, Site] = {
    "linear 8x8": site_of((8, 8), LINEAR),
    "linear 10x64": site_of((10, 64), LINEAR),
    "depthwise 64": site_of((64, 1, 3, 3), KERNEL, groups=64),
    "conv 16x3x3x3": site_of((16, 3, 3, 3), KERNEL),
    "linear 64x64": site_of((64, 64), LINEAR, depth=12),
    "transposed 32x16x4x4": site_of((32, 16, 4, 4), ("i", "o", "k", "k"), operator="conv_transpose"),
    "depthwise 512x7x7": site_of((512, 1, 7, 7), KERNEL, groups=512),
    "packed QKV 576x192": site_of((576, 192), LINEAR, packed=3, depth=12),
    "linear 1000x512": site_of((1000, 512), LINEAR, depth=24),
    "conv 256x256x3x3": site_of((256, 256, 3, 3), KERNEL),
    "embedding 30000x128": site_of((30_000, 128), ("v", "d"), operator="embedding"),
    "linear 4096x2500": site_of((4096, 2500), LINEAR),
}
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def standard(distribution: str, cut: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A draw of variance 1, float32; a truncated law by drawing again, which is another way than any formula of the package."""
    if distribution == "uniform":
        return ((rng.random(shape, np.float32) * 2 - 1) * np.float32(np.sqrt(3))).astype(np.float32)
    z = rng.standard_normal(shape, np.float32)
    if distribution == "truncated":
        while (bad := np.abs(z) > cut).any():
            z[bad] = rng.standard_normal(int(bad.sum()), np.float32)
        z /= np.float32(np.sqrt(truncated_moments(cut)[0]))
    return z


def kinds(site: Site) -> dict[tuple[str, float], list[Scheme]]:
    """The schemes of a site by (distribution, cut in standard deviations of the parent)."""
    found: dict[tuple[str, float], list[Scheme]] = collections.defaultdict(list)
    for scheme in catalogue(site):
        if scheme.distribution != "constant":
            three = scheme.distribution == "truncated" and scheme.bound**2 / scheme.variance > 6
            found[scheme.distribution, (3.0 if three else 2.0) if scheme.distribution == "truncated" else 0.0].append(scheme)
    return found


def fresh(seeds: int, most: int) -> Iterator[tuple[str, str, collections.Counter[str]]]:
    """Tables of (shape, dtype, counts). Of each draw at most `most` schemes are tried, in turn, so that all have theirs."""
    for label, site in SITES.items():
        counts = {d.name: collections.Counter[str]() for d in DTYPES}
        for (distribution, cut), schemes in kinds(site).items():
            for seed in range(seeds):
                z = standard(distribution, cut, site.shape, np.random.default_rng([seed, site.size]))
                tried = most if site.size < 1e6 else 1
                for turn in range(min(tried, len(schemes))):
                    scheme = schemes[(seed * tried + turn) % len(schemes)]
                    for dtype in DTYPES:
                        judge(z, scheme, site, dtype, counts[dtype.name])
        for name, count in counts.items():
            yield label, name, count


def judge(z: np.ndarray[Any, Any], scheme: Scheme, site: Site, dtype: np.dtype[Any], count: collections.Counter[str]) -> None:
    """Count what becomes of `z` drawn by `scheme`; one that a dtype cannot hold is left out."""
    std = np.float32(np.sqrt(scheme.variance))
    if dtype == np.float16 and std < 1e-3:
        return
    result = recognise(observe((z * std).astype(dtype)), site)
    names = {f.name: f.variance for f in result.schemes}
    count["all"] += 1
    count["missed"] += scheme.name not in names
    count["wrong"] += any(not 0.5 < v / scheme.variance < 2 for v in names.values())
    count["size"] += len(names)
    count[result.verdict] += 1


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--most", type=int, default=8, help="schemes tried on each draw of a distribution")
    parser.add_argument("--fresh", action="store_true", help="fresh tensors only")
    parser.add_argument("--trained", action="store_true", help="trained tensors only")
    options = parser.parse_args()
    both = options.fresh == options.trained
    start = time.perf_counter()
    if options.fresh or both:
        print(f"{'shape':24}{'dtype':10}{'tensors':>8}{'true one missed':>17}{'2x apart in set':>17}{'set':>6}{'trained':>9}")
        total: collections.Counter[str] = collections.Counter()
        for label, dtype, c in fresh(options.seeds, options.most):
            line = f"{label:24}{dtype:10}{c['all']:8}{c['missed'] / c['all']:17.3%}"
            print(f"{line}{c['wrong'] / c['all']:17.3%}{c['size'] / c['all']:6.1f}{c['trained'] / c['all']:9.3%}", flush=True)
            total += c
        print(f"{'all':34}{total['all']:8}{total['missed'] / total['all']:17.3%}")
    if options.trained or both:
        from trained_networks import table

        for line in table(options.seeds):
            print(line, flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
