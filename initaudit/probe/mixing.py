"""Mean-field predictions for operators that mix positions: products of signals, softmax, attention, pooling, averages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import arguments, role_of, signal_inputs
from initaudit.graph.graph import shape_of
from initaudit.pair.evaluate import run
from initaudit.probe import fields
from initaudit.probe.fields import Field

if TYPE_CHECKING:
    from initaudit.probe.propagation import Walk

# Scores are lowered by at least this where a mask shuts them out; the lowest float16 is -65504.
MASK = -1e4
_LONG = 2048  # positions up to which a mask is looked at entry by entry


class NoFormula(Exception):
    """Says why a node's moments are not predicted."""


def product(walk: Walk, node: fx.Node) -> Field:
    """A product of two signals over one axis: scores, or a softmax's rows times values."""
    sources = [n for n in signal_inputs(node) if n not in walk.constant]
    if len(sources) != 2:
        raise NoFormula("a contraction without one weight has no formula")
    first, second = shape_of(sources[0]), shape_of(sources[1])
    if first is None or second is None or not first or first[-1] != second[max(len(second) - 2, 0)]:
        raise NoFormula("a product over another axis than the last has no formula")
    a, b, n = walk.of(sources[0]), walk.of(sources[1]), first[-1]
    if a.keys is not None:
        # Rows that add up to 1 average the values.
        own = min(1.0, n * a.moment2)
        joint = min(b.across, b.along)
        shared = b.along + (b.moment2 - b.along) / n
        return Field(b.mean, b.along + (b.moment2 - b.along) * own, joint + (b.across - joint) * own, shared, True)
    mean = n * a.mean * b.mean
    rest = n * (n - 1) * (a.mean * b.mean) ** 2
    made = (n * a.moment2 * b.moment2 + rest, n * a.across * b.across + rest, n * a.along * b.along + rest)
    return Field(mean, *made, True)


def softmax(walk: Walk, node: fx.Node) -> Field:
    """Shares of a row that sum to 1; scores are normal within a row."""
    source, shape = walk.single(node), shape_of(node)
    if "log" in role_of(node).name.lower() or shape is None:
        raise NoFormula("no formula for log_softmax")
    axis = arguments(node).get("dim", arguments(node).get("axis", -1))
    x, n = walk.of(source), shape[axis if isinstance(axis, int) else -1]
    keys = x.keys if x.keys is not None else 1 / n
    # The second moment of a log-normal share, up to one-hot.
    own = min(1.0, keys * math.exp(min(max(x.moment2 - x.along, 0.0), 50.0)))
    base = keys / n
    return Field(1 / n, own / n, max(base, n**-2.0), n**-2.0, True, keys=keys)


def attention(walk: Walk, node: fx.Node) -> Field:
    """Fused attention."""
    bound, names = arguments(node), role_of(node).data[:3]
    if len(names) < 3:
        raise NoFormula("no formula for a packed attention")
    q, k, v = (bound.get(name) for name in names)
    shape = shape_of(k) if isinstance(k, fx.Node) else None
    if shape is None or len(shape) < 3:
        raise NoFormula("an attention of unknown shape")
    length, width = shape[-2], shape[-1]
    scale = bound.get("scale")
    keys, pairs = _keys(walk, bound, length)
    factor = float(scale) if isinstance(scale, (int, float)) else width**-0.5
    return fields.attention(walk.of(q), walk.of(k), walk.of(v), width, factor, keys, pairs)


def _keys(walk: Walk, bound: Mapping[str, Any], length: int) -> tuple[float, float]:
    """The mean Σp² of a uniform row, and the overlap Σp p' of two rows, under the mask."""
    mask = bound.get("attn_mask")
    if length > _LONG:
        # Long rows in closed form: 1/n each, or H(n)/n and 2/n where row i looks at i keys.
        causal = bool(bound.get("is_causal")) or isinstance(mask, fx.Node)
        return ((math.log(length) + 0.5772) / length, 2 / length) if causal else (1 / length, 1 / length)
    opened = torch.ones(length, length, dtype=torch.float64)
    if bound.get("is_causal"):
        opened = opened.tril()
    elif isinstance(mask, fx.Node) and mask in walk.constant:
        value = walk.constants.value(mask)
        allowed = value if value.dtype == torch.bool else value > MASK
        opened = allowed.reshape(-1, allowed.shape[-2], allowed.shape[-1])[0].double()
    rows = opened / opened.sum(1, keepdim=True).clamp_min(1)
    gram = rows @ rows.T
    own = float(gram.diagonal().mean())
    count = len(gram)
    return own, float((gram.sum() - gram.diagonal().sum()) / max(count * (count - 1), 1))


def pooling(walk: Walk, node: fx.Node) -> Field:
    """Averages and maxima over windows, whose positions count as independent but for what all share."""
    source, name = walk.single(node), getattr(node.target, "__name__", "").lower()
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None:
        raise NoFormula("pooling of unknown shape")
    kernel = arguments(node).get("kernel_size", arguments(node).get("kernel_shape"))
    covered = math.prod(before[2:]) / max(math.prod(after[2:]), 1)
    window = covered
    if "adaptive" not in name and isinstance(kernel, (list, tuple)) and all(isinstance(n, int) for n in kernel):
        window = float(math.prod(kernel) if len(kernel) > 1 else kernel[0] ** (len(before) - 2))
    x = walk.of(source)
    if "lp" in name or "unpool" in name:
        raise NoFormula(f"no formula for {name}")
    if "max" in name:
        root = walk.roots.get(source)
        nodes = walk.parts.get(source, ())
        held = walk.found.get(root) if root is not None else None

        def phi(z: Tensor) -> Tensor:
            return run(nodes, root, z, walk.constants)[source]  # type: ignore[arg-type, no-any-return]

        return fields.largest(x, max(1, round(window)), phi if held is not None else None, held)
    return fields.averaged(x, window)


def reduction(walk: Walk, node: fx.Node) -> Field:
    """Means and sums over positions."""
    source, name = walk.single(node), role_of(node).name.lower()
    before, after = shape_of(source), shape_of(node)
    if name not in ("mean", "sum", "reduce_mean", "reduce_sum") or before is None or after is None:
        raise NoFormula(f"no formula for {name}")
    count = math.prod(before) / max(math.prod(after), 1)
    unit = walk.unit_axis(source)
    dims = arguments(node).get("dim", arguments(node).get("axes"))
    reduced = [dims] if isinstance(dims, int) else dims if isinstance(dims, (list, tuple)) else None
    if reduced is None or not all(isinstance(d, int) for d in reduced):
        raise NoFormula(f"{name} over unknown axes")
    if unit in [d % len(before) for d in reduced]:
        raise NoFormula(f"no formula for {name} over units")
    x = fields.averaged(walk.of(source), count)
    return x if "mean" in name else x.scaled(count)
