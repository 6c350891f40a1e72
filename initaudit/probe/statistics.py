"""The statistics of one tensor that the probe takes at every edge, cheap enough to take them all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from initaudit.probe.axes import Axes

# Squares of float32 numbers lose precision below 1e-38 and overflow above 3e38: outside this range a sum is taken in float64.
_SAFE = (1e-24, 1e36)
_EXAMPLES, _FEATURES = 32, 1024


def moments(x: Tensor) -> tuple[float, float, bool]:
    """(mean, second moment, all finite?) of a tensor with at least one element."""
    x = x.detach()
    square = power(x)
    if not math.isfinite(square):
        return math.nan, math.nan, False
    total = x.sum().item() if square < _SAFE[1] else x.double().sum().item()
    return total / x.numel(), square / x.numel(), True


def peak(x: Tensor) -> float:
    """The largest absolute value."""
    low, high = torch.aminmax(x.detach())
    return float(max(-low.item(), high.item()))


def power(x: Tensor) -> float:
    """The sum of squares; not finite exactly when an element is not."""
    x = x.detach()
    flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
    if flat.dtype == torch.float32:
        total = float(torch.dot(flat, flat).item())
        if _SAFE[0] < total < _SAFE[1]:
            return total
    return float(flat.double().square().sum().item())


def by_example(x: Tensor, axes: Axes) -> Tensor:
    """The signal as one row an example; its batch axis must be known."""
    assert axes.batch is not None
    x = x.detach().movedim(axes.batch, 0)
    if x.shape[0] == axes.examples:
        return x.reshape(x.shape[0], -1)
    apart = x.reshape(-1, axes.examples, axes.inner, *x.shape[1:])
    return apart.movedim(1, 0).reshape(axes.examples, -1)


def thin(rows: Tensor) -> Tensor:
    """At most 32 rows by 1024 columns, evenly picked."""
    step = max(1, -(-rows.shape[1] // _FEATURES))
    return rows[:_EXAMPLES, ::step]


def similarity(rows: Tensor) -> tuple[float | None, float | None]:
    """`similarities` of one (n, d) matrix, or the mean over the groups of (groups, n, d)."""
    return similarities((rows if rows.dim() == 3 else rows.unsqueeze(0)).unsqueeze(0))[0]


def similarities(rows: Tensor) -> list[tuple[float | None, float | None]]:
    """(mean cosine between rows, variance over rows as a share of the second moment) of each of k times (groups, n, d) rows.

    Sums over pairs follow from the sum of the unit vectors: |Σ u|² = n + Σ_{i≠j} cos. The spread is taken in float64, where
    rows that differ only in the last float32 digits still show a difference of zero or of rounding size. Groups without a
    signal are left out; rows of zeros count as unlike all others.
    """
    n = rows.shape[2]
    if n < 2 or rows.numel() == 0:
        return [(None, None)] * rows.shape[0]
    rows = rows.double()
    squares = rows.square().sum(3)
    total = squares.sum(2)
    between = (rows - rows.mean(2, keepdim=True)).square().sum((2, 3))
    weight = torch.where(squares > 0, squares, 1).rsqrt().unsqueeze(2)
    pairs = ((weight @ rows).square().sum((2, 3)) - (squares > 0).sum(2)) / (n * (n - 1))
    alive = (total > 0) & torch.isfinite(total)
    count = alive.sum(1)
    safe = torch.where(alive, total, 1)
    cosine = torch.where(alive, pairs, 0).sum(1) / count
    spread = torch.where(alive, between / safe, 0).sum(1) / count
    found = zip(count.tolist(), cosine.tolist(), spread.tolist(), strict=True)
    return [(c, s) if some else (None, None) for some, c, s in found]


def token_rows(x: Tensor, batch: int, unit: int) -> Tensor:
    """At most 4 examples by 32 positions by 1024 features of a rank-3 tensor."""
    (tokens,) = {0, 1, 2} - {batch, unit}
    examples = x.detach().permute(batch, tokens, unit)[:4, :_EXAMPLES]
    return examples[:, :, :: max(1, -(-examples.shape[2] // _FEATURES))]


def participation(rows: Tensor) -> list[float | None]:
    """(Σλ)²/Σλ² of the Gram matrices of (k, groups, n, d): how many directions the n rows share, averaged over groups.

    1 where all rows are multiples of one vector, min(n, d) where they are orthogonal and equally long.
    """
    rows = rows.double()
    # The scale is taken out first: fourth powers of 1e-90 are none.
    rows = rows / rows.abs().amax((2, 3), keepdim=True).clamp_min(1e-300)
    gram = rows @ rows.transpose(2, 3)
    top, total = gram.diagonal(dim1=2, dim2=3).sum(2), gram.square().sum((2, 3))
    alive = (total > 0) & torch.isfinite(total)
    count = alive.sum(1)
    rank = torch.where(alive, top.square() / torch.where(alive, total, 1), 0).sum(1) / count
    return [r if some else None for some, r in zip(count.tolist(), rank.tolist(), strict=True)]


def row_entropy(p: Tensor, axis: int) -> float | None:
    """Mean over rows of -Σ p ln p / ln(number of entries above zero); rows with one entry (masked) say nothing."""
    p = p.detach().movedim(axis, -1)
    rows = p.reshape(-1, p.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // 4096)].double()
    support = (rows > 0).sum(1)
    # An entry that underflowed is as good as masked for the sum, but not for the support: a one-hot row of a long,
    # unmasked softmax must not count as masked, so the support is that of the widest row among neighbours.
    widest = support.max().item()
    open_rows = support > 1 if widest > 1 else torch.ones_like(support, dtype=torch.bool)
    if widest <= 1:
        return 0.0 if p.shape[-1] > 1 else None
    entropy = -torch.special.xlogy(rows, rows).sum(1)
    share = entropy[open_rows] / support[open_rows].double().log()
    return float(share.mean().item()) if share.numel() else None
