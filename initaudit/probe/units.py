"""Units that are copies of each other: equal incoming weights, equal biases and equal gradients stay equal for ever."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from initaudit.probe.trace import Units
from initaudit.roles import WeightUse

# Rows are equal when they differ by less than this share of the largest row's norm. Values are copies or they are not: only the
# rounding of one product (normalised weights) lies between. Gradients are sums of up to a million float32 products in different
# orders, with cancellation: 2**-24 * sqrt(1e6) = 6e-5. Rows that differ at all differ by far more.
_VALUE, _GRADIENT = 1e-6, 1e-4
_ROWS = 65_536
_SAFE = (1e-20, 1e30)


def rows(x: Tensor, use: WeightUse) -> Tensor | None:
    """A weight (or its gradient) as a matrix with one row a unit, gates side by side in the row; None without units."""
    if "o" not in use.axes or len(use.axes) != x.dim():
        return None
    axes = [i for i, a in enumerate(use.axes) if a == "o"]
    others = [i for i in range(x.dim()) if i not in axes]
    flat = x.permute(*axes, *others).reshape(int(torch.tensor([x.shape[i] for i in axes]).prod()), -1)
    gates = max(1, len(use.gates))
    if gates > 1 and flat.shape[0] % gates == 0:
        flat = flat.view(gates, flat.shape[0] // gates, -1).movedim(0, 1).flatten(1)
    return flat


def keys_of(matrix: Tensor) -> Tensor | None:
    """(rows, 8): the projections of every row on random directions, over the largest row's norm; None where there is none.

    Equal rows have equal projections. A difference of norm d projects to N(0, d²), so different rows pass for equal with a
    probability of about tolerance / d in one direction; eight directions at once leave none.
    """
    if matrix.numel() == 0:
        return None
    keys = matrix.float() @ _directions(matrix.shape[1]).to(matrix.device)
    top = keys.abs().max()
    if not _SAFE[0] < float(top) < _SAFE[1]:
        # Beyond the range in which float32 keeps its digits, or zero: the scale is taken out first.
        peak = matrix.abs().max()
        if not torch.isfinite(peak) or peak == 0:
            return None
        keys = (matrix / peak).float() @ _directions(matrix.shape[1]).to(matrix.device)
    # Eight N(0, |row|²) numbers tell the largest row's norm within a quarter.
    return keys / keys.square().mean(1).max().sqrt()


def classes(keys: Tensor | None, tolerance: float, count: int) -> Tensor:
    """For each of `count` rows the number of its class of equal rows: sorted by one key and cut where neighbours differ."""
    if keys is None:
        return torch.zeros(count, dtype=torch.long)
    order = torch.argsort(keys[:, 0])
    ordered = keys[order]
    new = (ordered[1:] - ordered[:-1]).abs().amax(1) > 4 * tolerance
    labels = torch.zeros(count, dtype=torch.long)
    labels[order.cpu()] = torch.cat([torch.zeros(1, dtype=torch.long), new.long().cumsum(0).cpu()])
    return labels


@lru_cache(maxsize=64)
def _directions(features: int) -> Tensor:
    return torch.randn((features, 8), generator=torch.Generator().manual_seed(0))


def compare_units(weight: Tensor, gradient: Tensor, bias: Tensor | None, use: WeightUse) -> Units | None:
    """How many units of a weight differ in values (and bias), in gradients, and in either.

    A unit and its negative are the same unit behind an odd activation, if whatever reads them has opposite signs too: values,
    bias and gradient then are all each other's negatives, which they are for no other pair.
    """
    if "v" in use.axes:
        return None
    values, slopes = rows(weight.detach(), use), rows(gradient, use)
    if values is None or slopes is None or values.shape[0] > _ROWS or values.shape[0] < 2:
        return None
    count = values.shape[0]
    by_value, by_slope, by_bias = keys_of(values), keys_of(slopes), None
    if bias is not None and bias.dim() == 1 and bias.numel() == count:
        # A bias stands apart from the weights' scale: it is compared on its own.
        by_bias = keys_of(bias.detach().view(-1, 1))
    if by_value is not None:
        # A row and its negative project to opposite sides: turned to one side, they are equal rows.
        sign = torch.where(by_value[:, :1] < 0, -1.0, 1.0)
        by_value, by_slope, by_bias = (None if k is None else k * sign for k in (by_value, by_slope, by_bias))
    by_gradient = classes(by_slope, _GRADIENT, count)
    by_value_and_bias = torch.stack([classes(by_value, _VALUE, count), classes(by_bias, _VALUE, count)], 1)
    both = torch.cat([by_value_and_bias, by_gradient.view(-1, 1)], 1)
    return Units(count, _distinct(by_value_and_bias), int(by_gradient.max()) + 1, _distinct(both))


def _distinct(labels: Tensor) -> int:
    code = labels[:, 0]
    for column in labels.T[1:]:
        code = code * (int(column.max()) + 1) + column
    return int(torch.unique(code).numel())
