"""Example inputs that hold no variation: zeros, ones, one row repeated, as exporters are given them.

What a probe sees of a network on such inputs is the inputs' doing: a first layer gets no gradient from zeros, and equal
examples ask for one change. They are varied within their shapes and dtypes, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from initaudit.graph.calls import role_of, weight_uses
from initaudit.graph.constness import constant_nodes
from initaudit.graph.graph import Graph
from initaudit.probe.graph_inputs import tables
from initaudit.probe.inputs import draw
from initaudit.probe.passes import batch_of


def varied(graph: Graph, inputs: Sequence[Tensor], seed: int) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The inputs, with those that are alike varied where no input tells examples apart; and the names of these.

    A single example is enough of a variation in itself, unless its floating-point numbers are one number. Numbers drawn are
    N(0, 1), ids lie below the rows of their table, and for an example that was repeated its own numbers are drawn anew. Masks
    and whole numbers that pick nothing stay, and so do positions that are counted up.
    """
    batch = batch_of(inputs)
    if not inputs or any(_varies(x, batch) for x in inputs):
        return tuple(inputs), ()
    rows = tables(graph)
    signals = _signals(graph) or (() if rows else range(len(inputs)))
    generator = torch.Generator().manual_seed(seed)
    made, names = list(inputs), []
    for place, (known, x) in enumerate(zip(graph.inputs, inputs, strict=True)):
        table = rows.get(known.name)
        if x.numel() < 2 or x.dtype == torch.bool or x.is_complex() or _counts_up(x):
            continue
        if table is None and (not x.is_floating_point() or place not in signals):
            continue
        if table is not None and batch < 2:
            continue  # what one example of ids asks for is what it is
        if bool((x == x.flatten()[0]).all()):
            made[place] = draw(tuple(x.shape), x.dtype, table, generator).to(x.device)
        else:
            # Drawn with replacement: a mean over an example does not see in which order its numbers stand.
            picked = torch.randint(x[0].numel(), (len(x), x[0].numel()), generator=generator).to(x.device)
            made[place] = x.reshape(len(x), -1).gather(1, picked).view(x.shape)
        names.append(known.name)
    return tuple(made), tuple(names)


def _varies(x: Tensor, batch: int) -> bool:
    """Whether an input tells examples apart; one of another first axis, or a single one, whether it is not one number."""
    if x.numel() == 0:
        return False
    if batch > 1 and x.dim() > 0 and x.shape[0] == batch:
        return bool((x != x[:1]).any())
    if batch == 1 and not x.is_floating_point():
        return x.dtype != torch.bool  # as it was given
    return bool((x != x.flatten()[0]).any())


def _counts_up(x: Tensor) -> bool:
    last = torch.arange(x.shape[-1], device=x.device) if x.dim() else x
    return not x.is_floating_point() and x.dim() > 0 and x.shape[-1] > 1 and bool((x - x[..., :1] == last).all())


def _signals(graph: Graph) -> frozenset[int]:
    """The places of the inputs that a layer reads, whatever moves, norms or maps them before.

    A mask is multiplied with a signal, and read by no layer.
    """
    constant = constant_nodes(graph.fx)
    places = [n for n in graph.fx.nodes if n.op == "placeholder"]
    return frozenset(i for i, n in enumerate(places) if _is_read(n, constant))


def _is_read(start: fx.Node, constant: frozenset[fx.Node]) -> bool:
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.op != "call_function" or user in seen:
                continue
            role = role_of(user)
            if role.kind in ("contraction", "recurrent", "attention") and weight_uses(user, constant):
                return True
            alone = all(a is node or a in constant or a in seen for a in user.all_input_nodes)
            if role.kind in ("passthrough", "merge", "normalization") or (role.kind in ("pointwise", "pooling") and alone):
                seen.add(user)
                stack.append(user)
    return False
