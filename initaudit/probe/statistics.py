"""The statistics of one tensor that the probe takes at every edge, cheap enough to take them all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from initaudit.measure.fused import survey
from initaudit.probe.axes import Axes

# Squares of float32 numbers lose precision below 1e-38 and overflow above 3e38: outside this range a sum is taken in float64.
_SAFE = (1e-24, 1e36)
_EXAMPLES, _FEATURES = 32, 1024
_BLOCK = 1 << 18  # elements: 1 MiB of float32 fits a core's second-level cache
# Squares of sums of squares stay in the range of float64.
_GRAM = (1e-140, 1e140)
# 1 - Σ⟨x_i, x_j⟩/(n Σ|x|²) has an error of some 1e-16: above this share it has ten digits.
_CANCELLED = 1e-6
# Float32 products of 1024 numbers err by some 1e-6: rows with less of a spread than this are compared in float64.
_ALIKE = 1e-2
Comparison = tuple[float | None, float | None, float | None]


def moments(x: Tensor, *, extremes: bool = False) -> tuple[float, float, float | None, bool]:
    """(mean, second moment, largest absolute value if asked for, all finite?) of a tensor with at least one element."""
    if (whole := _surveyed(x)) is not None:
        mean, moment2, largest = whole
        return mean, moment2, largest if extremes else None, True
    total, square, peak = 0.0, 0.0, 0.0
    for block in _blocks(x):
        part = _power(block)
        square += part
        if not math.isfinite(square):
            return math.nan, math.nan, None, False
        total += block.sum().item() if part < _SAFE[1] else block.double().sum().item()
        if extremes:
            low, high = torch.aminmax(block)
            peak = max(peak, -low.item(), high.item())
    return total / x.numel(), square / x.numel(), peak if extremes else None, True


def _surveyed(x: Tensor) -> tuple[float, float, float] | None:
    """(mean, second moment, largest absolute value) by one pass in C.

    None without the kernel, for another type or device, and for squares beyond the range of float32.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    # One step of a sequence is flat and yet not dense.
    found = survey(_flat(x).contiguous().numpy())
    if found is None or not _SAFE[0] < found[1] < _SAFE[1]:
        return None
    total, square, low, high = found
    return total / x.numel(), square / x.numel(), max(-low, high)


def peak(x: Tensor) -> float:
    """The largest absolute value."""
    low, high = torch.aminmax(x.detach())
    return float(max(-low.item(), high.item()))


def power(x: Tensor) -> float:
    """The sum of squares; not finite exactly when an element is not."""
    return sum(map(_power, _blocks(x)))


def _power(block: Tensor) -> float:
    if block.dtype == torch.float32:
        total = float(torch.dot(block, block).item())
        if _SAFE[0] < total < _SAFE[1]:
            return total
    return float(block.double().square().sum().item())


def _blocks(x: Tensor) -> Sequence[Tensor]:
    """The elements in pieces that stay in the cache from one statistic to the next, in the order of memory."""
    flat = _flat(x)
    return torch.split(flat, _BLOCK) if x.device.type == "cpu" else (flat,)


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    # Dense in another order of its axes (channels last, a transposed matrix) is no reason for a copy.
    return x.view(-1) if x.is_contiguous() else x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


def by_example(x: Tensor, axes: Axes) -> Tensor:
    """The signal as one row an example; its batch axis must be known."""
    assert axes.batch is not None
    x = x.detach().movedim(axes.batch, 0)
    if x.shape[0] == axes.examples:
        return x.reshape(x.shape[0], -1)
    apart = x.reshape(-1, axes.examples, axes.inner, *x.shape[1:])
    return apart.movedim(1, 0).reshape(axes.examples, -1)


def example_rows(x: Tensor, axes: Axes) -> Tensor:
    """At most 32 of the rows of `by_example` by 1024 columns, evenly picked."""
    assert axes.batch is not None
    if x.shape[axes.batch] == axes.examples and x.dim() > 1 and not x.movedim(axes.batch, 0).is_contiguous():
        # Only what is kept is gathered: the rows of a transposed signal would be a copy of all of it.
        x = x.detach().movedim(axes.batch, 0)[:_EXAMPLES]
        columns = math.prod(x.shape[1:])
        picked = torch.arange(0, columns, _step(columns), device=x.device)
        places: list[Tensor | slice] = [slice(None), *torch.unravel_index(picked, x.shape[1:])]
        return x[tuple(places)]
    rows = by_example(x, axes)
    return rows[:_EXAMPLES, :: _step(rows.shape[1])]


def _step(features: int) -> int:
    return max(1, -(-features // _FEATURES))


def comparisons(rows: Tensor) -> list[Comparison]:
    """(mean cosine, spread, rank) of the n rows of each of k times (groups, n, d), averaged over the groups that have a signal.

    The cosine is that between different rows; rows of zeros count as unlike all others. The spread is the variance over rows as
    a share of the second moment. The rank is the participation ratio (Σλ)²/Σλ² of the Gram matrix, how many directions the rows
    share: 1 where all are multiples of one vector, min(n, d) where they are orthogonal and equally long. One row alone has a
    rank only.
    """
    if rows.numel() == 0:
        return [(None, None, None)] * rows.shape[0]
    gram = rows @ rows.transpose(2, 3)
    low, high = torch.aminmax(gram.diagonal(dim1=2, dim2=3).sum(2))
    if rows.dtype != torch.float32 or not (_SAFE[0] < low and high < _SAFE[1]):
        return _compared(rows.double())
    found = _spectra(gram.double(), rows)
    alike = [i for i, (_, spread, _) in enumerate(found) if spread is not None and spread < _ALIKE]
    if alike:
        for i, exact in zip(alike, _compared(rows[alike].double()), strict=True):
            found[i] = exact
    return found


def _compared(rows: Tensor) -> list[Comparison]:
    gram = rows @ rows.transpose(2, 3)
    low, high = torch.aminmax(gram.diagonal(dim1=2, dim2=3).sum(2))
    if not (_GRAM[0] < low and high < _GRAM[1]):
        rows = rows / rows.abs().amax((2, 3), keepdim=True).clamp_min(1e-300)
        gram = rows @ rows.transpose(2, 3)
    return _spectra(gram, rows)


def _spectra(gram: Tensor, rows: Tensor) -> list[Comparison]:
    n = rows.shape[2]
    squares = gram.diagonal(dim1=2, dim2=3)
    total = squares.sum(2)
    alive = (total > 0) & torch.isfinite(total)
    count, safe = alive.sum(1), torch.where(alive, total, 1)

    def mean(of_groups: Tensor) -> list[float]:
        return list((torch.where(alive, of_groups, 0).sum(1) / count).tolist())

    rank = mean(safe.square() / torch.where(alive, gram.square().sum((2, 3)), 1))
    if n < 2:
        return [(None, None, r if some else None) for some, r in zip(count.tolist(), rank, strict=True)]
    weight = torch.where(squares > 0, squares, 1).rsqrt()
    cosine = ((weight.unsqueeze(3) * gram * weight.unsqueeze(2)).sum((2, 3)) - (squares > 0).sum(2)) / (n * (n - 1))
    spread = 1 - gram.sum((2, 3)) / (n * safe)
    if rows.dtype == torch.float64 and (spread < _CANCELLED).any():
        # Rows that differ only in the last float32 digits still show a difference of zero or of rounding size.
        spread = (rows - rows.mean(2, keepdim=True)).square().sum((2, 3)) / safe
    found = zip(count.tolist(), mean(cosine), mean(spread), rank, strict=True)
    return [(c, s, r) if some else (None, None, None) for some, c, s, r in found]


def token_rows(x: Tensor, batch: int, unit: int) -> Tensor:
    """At most 4 examples by 32 positions by 1024 features of a rank-3 tensor."""
    (tokens,) = {0, 1, 2} - {batch, unit}
    examples = x.detach().permute(batch, tokens, unit)[:4, :_EXAMPLES]
    return examples[:, :, :: _step(examples.shape[2])]


def row_entropy(p: Tensor, axis: int) -> float | None:
    """Mean over rows of -Σ p ln p / ln(number of entries above zero); rows with one entry (masked) say nothing."""
    p = p.detach().movedim(axis, -1)
    rows = p.reshape(-1, p.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // 4096)]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    support = (rows > 0).sum(1)
    # An entry that underflowed is as good as masked for the sum, but not for the support: a one-hot row of a long,
    # unmasked softmax must not count as masked, so the support is that of the widest row among neighbours.
    widest = support.max().item()
    open_rows = support > 1 if widest > 1 else torch.ones_like(support, dtype=torch.bool)
    if widest <= 1:
        return 0.0 if p.shape[-1] > 1 else None
    # The logarithm of a zero is never asked for; xlogy, which knows that 0 ln 0 = 0, is not vectorized.
    entropy = -(rows * rows.clamp_min(torch.finfo(rows.dtype).tiny).log()).sum(1, dtype=torch.float64)
    share = entropy[open_rows] / support[open_rows].double().log()
    return float(share.mean().item()) if share.numel() else None
