"""Weights without a program: how often names and shapes alone tell a weight's role and fans, over transformers and timm.

The judge is the graph of the real module (torch.export) with `--graph`, else the module's own layers; nothing of the judge is
shown to the inference, which sees names, shapes and dtypes only.

    python benchmarks/names.py [--graph] [--verbose] [ARCHITECTURE ...]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from architectures import TIMM, TRANSFORMERS, build, layers_of

from initaudit.graph.from_names import infer
from initaudit.load.checkpoint import Array


def arrays_of(module: nn.Module) -> dict[str, Array]:
    """The state dict as a loader would give it, without values."""
    state = module.state_dict(keep_vars=True)
    return {n: Array(n, tuple(v.shape), str(v.dtype).removeprefix("torch."), _none, f"{id(v)}") for n, v in state.items()}


def _none() -> Any:
    raise AssertionError("the inference asks for names and shapes only")


def of_graph(name: str) -> dict[str, tuple[str, int, int]]:
    """(role, fan_in, fan_out) of every weight as the module's graph uses it."""
    from test_pair_transformers import CASES, small

    from initaudit.graph.from_torch import from_module
    from initaudit.pair.pair import pair

    if name in CASES:
        module, inputs, keywords = small(name)
    else:
        module, inputs, keywords = build(name, real=True), (torch.randn(2, 3, 224, 224),), {}
    found: dict[str, tuple[str, int, int]] = {}
    for p in pair(from_module(module, inputs, keywords)):
        if p.stored:
            found.setdefault(p.tensor, (p.role, p.fan_in, p.fan_out))
    return found


def judged(name: str, graph: bool) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...], Any]]:
    """(tensor, what is so, what was inferred, its shape) of every weight."""
    module = build(name)
    arrays = arrays_of(module)
    inferred: Mapping[str, tuple[str, int, int]] = {w.name: (w.role, *w.use.fans(w.shape)) for w in infer(arrays)}
    truth = of_graph(name) if graph else layers_of(module)
    for tensor, array in arrays.items():
        if len(array.shape) < 2 or "float" not in array.dtype:
            continue
        so = truth.get(tensor, ("none", 0, 0))
        if so[0] == "none" and graph and tensor not in truth:
            tied = [other for other in arrays if other in truth and arrays[other].storage == array.storage]
            so = truth[tied[0]] if tied else so
        yield tensor, so, inferred.get(tensor, ("none", 0, 0)), array.shape


def main() -> None:
    graph, verbose = "--graph" in sys.argv, "--verbose" in sys.argv
    chosen = [a for a in sys.argv[1:] if not a.startswith("--")] or [*TRANSFORMERS, *TIMM]
    rows, right, total = [], 0, 0
    warnings.simplefilter("ignore")
    for name in chosen:
        results = list(judged(name, graph))
        wrong = [r for r in results if r[1] != r[2]]
        right, total = right + len(results) - len(wrong), total + len(results)
        rows.append((name, len(results), len(wrong), ", ".join(r[0] for r in wrong[:2])))
        for tensor, so, was, shape in wrong if verbose else ():
            print(f"{name:28} {tensor:60} {shape!s:20} is {so} inferred {was}", flush=True)
    print(tabulate(rows, headers=["architecture", "weights", "wrong", "such as"]))
    print(f"\n{len(chosen)} architectures, {total} weights, {100 * right / total:.2f} % right")


if __name__ == "__main__":
    main()
