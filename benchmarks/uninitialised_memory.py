"""How far IA206 is from alarming on what was drawn, trained, rounded or pruned, and how much of recycled memory it finds.

    python benchmarks/uninitialised_memory.py --seeds 50

asks the rule about tensors in memory. The margin of a healthy tensor is how much of the way to the limit its statistic went,
for each of the tests; 1 is the limit. For the test of bits, whose statistic is a mean of thousands of values, the probability
that the limit is passed is extrapolated by a normal law, and the bound of Hoeffding 1963 is given beside it.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from trained_networks import NETWORKS, OPTIMIZERS, train

from initaudit.config import Config
from initaudit.expect.schemes import catalogue, site_of
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.measure.moments import measure
from initaudit.rules import ia206_uninitialised_memory as memory
from initaudit.rules import ia401_nan_or_inf as finite
from initaudit.rules.evidence import Evidence, ModelPhase

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
SITES = {
    "linear": site_of((80, 64), ("o", "i")),
    "conv": site_of((48, 16, 3, 3), ("o", "i", "k", "k")),
    "depthwise": site_of((512, 1, 3, 3), ("o", "i", "k", "k"), groups=512),
    "packed": site_of((192, 64), ("o", "i"), packed=3, depth=12),
    "table": site_of((300, 32), ("v", "d"), operator="embedding"),
    "small": site_of((10, 6), ("o", "i")),
}
Values = np.ndarray[Any, Any]


def told(tensors: dict[str, Values], phase: ModelPhase) -> dict[str, set[str]]:
    """The codes of IA206 and IA401 about each tensor."""
    arrays = {
        n: Array(n, v.shape, str(v.dtype), lambda v=v: v)  # type: ignore[misc]
        for n, v in tensors.items()
    }
    moments = {n: measure(v) for n, v in tensors.items()}
    evidence = Evidence(Checkpoint("benchmark", "module", arrays), Config(), phase, (), moments)
    found: dict[str, set[str]] = collections.defaultdict(set)
    for rule in (memory.UninitialisedMemory(), finite.NanOrInf()):
        for finding in rule.check(evidence):
            for name in (finding.tensor or "", *finding.related):
                found[name].add(finding.code)
    return found


def margins(values: Values) -> dict[str, float]:
    """How near each test came to its limit; absent where it does not apply."""
    dtype = str(values.dtype)
    limits = memory._LIMITS_OF_HALF if dtype == "float16" else memory._LIMITS
    size = np.abs(values.astype(np.float64)).ravel()
    seen = {"both sides": min(memory._shares(values, *limits)) / memory._BOTH}
    if size.any():
        seen["integers"] = memory._NOTHING / float(size.max())
    if dtype != "float16":
        seen["tiny"] = memory._below(values, memory._NOTHING)[0] / memory._BOTH
    if size.size >= memory._FEWEST and dtype == "float32":
        picked = memory._picked(values)
        bits = picked[picked != 0].view(np.uint32)
        if bits.size >= memory._FEWEST // 2 and len(np.unique(bits)) >= memory._DIFFERENT * bits.size:
            share = float(((bits[:, None] >> memory._BITS) & 1).mean(axis=0).max())
            seen["bits"] = (share - 0.5) / (memory._OFTEN - 0.5)
    if size.size >= memory._FEWEST and dtype == "float16":
        seen["gap"] = (memory._free_of_zero(values, 0.0) or 0.0) / memory._GAP
    return seen


def draws(seeds: int) -> Iterator[tuple[str, Values]]:
    """Every scheme of the catalogue at every site in every type that has digits for it."""
    for site_name, site in SITES.items():
        for scheme, seed in itertools.product(catalogue(site), range(seeds)):
            if scheme.distribution == "constant":
                continue
            rng, std = np.random.default_rng(seed), math.sqrt(scheme.variance)
            unit = (
                rng.uniform(-(3**0.5), 3**0.5, site.shape) if scheme.distribution == "uniform" else rng.normal(size=site.shape)
            )
            if scheme.distribution == "truncated":
                unit = np.clip(unit, -scheme.bound / std, scheme.bound / std)
            for dtype in DTYPES:
                if dtype is np.float16 and std < 1e-5:
                    continue
                yield f"{site_name} {scheme.name} {np.dtype(dtype)} {seed}", (unit * std).astype(dtype)


def changed(w: torch.Tensor, g: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """What becomes of weights afterwards: pruned, rounded, quantised row by row and back, averaged, scaled."""
    yield "as it is", w
    flat = w.reshape(len(w), -1)
    yield "pruned", w * (w.abs() > w.abs().quantile(0.6))
    yield "bf16 and back", w.bfloat16().float()
    yield "fp16 times 0.3", w.half().float() * 0.3
    for bits in (4, 8):
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        yield f"int{bits} and back", ((flat / scale).round() * scale).reshape(w.shape)
    yield "fp8 and back", w.to(torch.float8_e4m3fn).float()
    yield "averaged", 0.9 * w + 0.1 * w * torch.randn(w.shape, generator=g)
    yield (
        "fused with scales",
        (flat * (torch.rand(len(w), 1, generator=g) * 10 ** torch.linspace(-4, 2, len(w))[:, None])).reshape(w.shape),
    )


def _lasso(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad.add_(1e-3 * p.sign())


def trained(seeds: int) -> Iterator[tuple[str, Values]]:
    """Weights of four kinds of network under three optimizers, with weight decay, with a lasso, and what is made of them."""
    for kind, optimizer, more, seed in itertools.product(NETWORKS, ("sgd", "adam"), ("", "decay", "lasso"), range(seeds)):
        torch.manual_seed(seed)
        net = NETWORKS[kind]()
        parameters = list(net.parameters())
        opt = OPTIMIZERS[optimizer](parameters)
        if more == "decay":
            opt.param_groups[0]["weight_decay"] = 0.05
        if more == "lasso":
            opt.register_step_pre_hook(_lasso)
        train(net, opt, 300)
        g = torch.Generator().manual_seed(seed)
        for name, p in net.named_parameters():
            if p.dim() > 1 and bool(torch.isfinite(p).all()):
                for what, w in changed(p.detach(), g):
                    for dtype in (torch.float32, torch.float16):
                        yield f"{kind} {optimizer} {more} {seed} {name} {what} {dtype}", copy.deepcopy(w.to(dtype).numpy())


def heavy(seeds: int) -> Iterator[tuple[str, Values]]:
    """Laws with tails far beyond any weight's, and rows of very different size, as of a table of rare and frequent words."""
    kinds: dict[str, Callable[[np.random.Generator], Values]] = {
        "normal cubed": lambda r: r.normal(size=(80, 64)) ** 3,
        "Student 1.5": lambda r: r.standard_t(1.5, (80, 64)),
        "log-normal 3": lambda r: np.exp(3 * r.normal(size=(80, 64))) * r.choice([-1, 1], (80, 64)),
        "Laplace": lambda r: r.laplace(size=(80, 64)),
        "rows by rank": lambda r: r.normal(size=(400, 16)) / np.arange(1, 401)[:, None],
        "rows decayed": lambda r: r.normal(size=(400, 16)) * np.exp(-r.exponential(6, (400, 1))),
        "sines": lambda r: np.sin(np.outer(np.arange(80), np.exp(-r.uniform(0, 9, 64)))),
    }
    for (kind, law), scale, seed in itertools.product(kinds.items(), (1e-3, 0.02, 1.0), range(seeds)):
        values = scale * law(np.random.default_rng(seed))
        for dtype in DTYPES:
            with np.errstate(over="ignore"):
                yield f"{kind} x{scale} {np.dtype(dtype)} {seed}", values.astype(dtype)


def recycled(seeds: int, size: int = 8192) -> Iterator[tuple[str, Values]]:
    """Bytes that lie in memory, read as float32; wholly, or in the second half of a tensor whose first half was written."""
    words = re.findall(rb"[ -~\n]+", Path(argparse.__file__).read_bytes() + Path(random.__file__).read_bytes())
    text = b"".join(words)
    keep = [object() for _ in range(4 * size)]
    for seed in range(seeds):
        r = np.random.default_rng(seed)
        start = int(r.integers(0, max(1, len(text) - 4 * size)))
        lot: dict[str, Values] = {
            "random bytes": r.integers(0, 256, 4 * size, np.uint8),
            "text": np.frombuffer((text[start:] + text)[: 4 * size], np.uint8),
            "pointers": np.array([id(o) for o in r.permutation(np.array(keep, object))[: size // 2]], np.int64).view(np.uint8),
            "indices, 32 bits": r.integers(0, 50_000, size, np.int32).view(np.uint8),
            "indices, 64 bits": r.integers(0, 50_000, size // 2, np.int64).view(np.uint8),
            "images": (r.normal(120, 50, 4 * size)).clip(0, 255).astype(np.uint8),
            "float64": r.normal(0, 0.1, size // 2).view(np.uint8),
            "float16": r.normal(0, 0.1, 2 * size).astype(np.float16).view(np.uint8),
            "bfloat16": r.normal(0, 0.1, 2 * size).astype(ml_dtypes.bfloat16).view(np.uint8),
            "compressed int4": r.integers(0, 256, 4 * size, np.uint8),
        }
        for kind, raw in lot.items():
            values = np.ascontiguousarray(raw).view(np.float32).reshape(64, -1)
            yield f"{kind}: whole {seed}", values
            half = r.normal(0, 0.02, values.shape).astype(np.float32)
            half[32:] = values[32:]
            yield f"{kind}: half of it {seed}", half
    yield from _heap(seeds, size)


def _heap(windows: int, size: int) -> Iterator[tuple[str, Values]]:
    """Windows out of this process's own memory, less what is mostly zeros."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, _, *name = line.split()
        low, high = (int(x, 16) for x in span.split("-"))
        if rights.startswith("rw") and (not name or name[0] == "[heap]") and high - low > 8 * size:
            regions.append((low, high))
    r = np.random.default_rng(0)
    found = 0
    with Path("/proc/self/mem").open("rb", 0) as source:
        for _ in range(200 * windows):
            low, high = regions[int(r.integers(len(regions)))]
            source.seek(int(r.integers(low // 64, (high - 4 * size) // 64)) * 64)
            try:
                values = np.frombuffer(source.read(4 * size), np.float32).copy().reshape(64, -1)
            except OSError:
                continue
            if np.count_nonzero(values.view(np.uint32)) < values.size // 4:
                continue
            found += 1
            yield f"this process's memory: whole {found}", values
            if found == windows:
                return


def healthy(title: str, tensors: Iterator[tuple[str, Values]], phase: ModelPhase) -> None:
    """Prints false alarms and the margins."""
    most: dict[str, tuple[float, str]] = {}
    shares: list[float] = []
    count = alarms = 0
    while batch := dict(itertools.islice(tensors, 500)):
        found = {n: c for n, c in told(batch, phase).items() if "IA206" in c}
        count, alarms = count + len(batch), alarms + len(found)
        for name in list(found)[:5]:
            print("  ALARM", name)
        for name, values in batch.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                seen = margins(values)
            shares += [seen["bits"]] if "bits" in seen else []
            for test, margin in seen.items():
                if margin > most.get(test, (-1.0, ""))[0]:
                    most[test] = margin, name
    print(f"{title}: {alarms} alarms on {count} tensors")
    for test, (margin, name) in most.items():
        print(f"  {test}: {margin:.3g} of the limit, {name}")
    if shares:
        mean, std = float(np.mean(shares)), float(np.std(shares))
        far = (1 - mean) / std
        chance = math.erfc(far / math.sqrt(2)) / 2
        hoeffding = len(memory._BITS) * math.exp(-2 * memory._FEWEST * 0.9 * (memory._OFTEN - 0.5 - 2**-6) ** 2)
        print(
            f"  bits: {len(shares)} judged, mean {mean:.3f}, std {std:.4f}: {far:.0f} std, p = {chance:.1g}; <= {hoeffding:.1g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--nets", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    tensors = dict(recycled(options.seeds))
    found = told(tensors, "init")
    for name in tensors:
        kind = name.rsplit(" ", 1)[0]
        codes = found.get(name, set())
        for i, hit in enumerate((True, "IA206" in codes, bool(codes))):
            groups[kind][i] += hit
    print("recycled memory: tensors, found by IA206, found by it or IA401")
    for kind, (n, by_rule, by_any) in groups.items():
        print(f"  {kind}: {n}, {by_rule}, {by_any}")
    healthy("heavy tails", heavy(options.seeds), "trained")
    healthy("trained", trained(options.nets), "trained")
    healthy("catalogue", draws(options.seeds), "init")


if __name__ == "__main__":
    main()
