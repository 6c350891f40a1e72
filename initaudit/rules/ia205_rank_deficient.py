"""IA205: far fewer independent directions than the shape allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.places import units_by_place
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, fresh_layers, initial, is_head

# A weight is projected to this many rows and columns, which keeps its rank up to that.
_SIDE = 96
_BLOCK = 128  # rows and columns that are looked at first
_LARGEST = 1 << 24  # elements looked at
# Singular values below this share of the largest are rounding in float32; in a 16-bit weight its own.
_ROUNDING = {"float16": 2e-3, "bfloat16": 1.6e-2}
_HALF = 0.5
_LEAST = 8  # directions: of fewer, half can be missing in a weight that is made by hand


class RankDeficient(Rule):
    """A weight has far fewer independent directions than its shape allows.

    What it does: counts the singular values, of the weight or of a random projection of it to 96 by 96, that are not rounding
    errors. A drawn matrix has full rank; less than half of it is reported.

    Why it is bad: what the layer sends on lies in a few directions. The other units are combinations of them, and the gradient
    reaches the layers before in as few.

    Example: an outer product of two vectors; a matrix made of a few repeated blocks.

    Instead: `nn.init.orthogonal_(w)`, or any independent draw.

    Source: Saxe et al. 2014, section 3; Marchenko & Pastur 1967 for the spectrum of a draw.
    """

    code = "IA205"
    name = "rank-deficient"
    severity = "warning"
    phase = "init"
    summary = "far fewer independent directions than the shape allows"
    thresholds = (Threshold("rank", _HALF, "of the largest rank", "a matrix that was drawn has full rank"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each weight."""
        if not initial(evidence):
            return
        for layer in fresh_layers(evidence, "contraction"):
            if (
                not layer.moments.m2 > 0
                or is_head(evidence, layer)
                or not layer.pair.trainable
                or layer.moments.nan
                or layer.moments.inf
            ):
                continue
            found = _rank(evidence, layer) if _counted(layer) else None
            if found is None:
                continue
            rank, most = found
            if rank < self.limit(evidence, "rank") * most and not self._apart(evidence, layer):
                yield self.finding(
                    f"its units span only {rank} direction{'' if rank == 1 else 's'}, where a draw of this shape spans "
                    f"{'at least ' if most == _SIDE else ''}{most} (singular values above rounding): what the layer sends on "
                    "lies in these few, and so does the gradient behind it",
                    init_line(layer),
                    measured=float(rank),
                    expected=float(most),
                    law=EXACT + "a drawn matrix has full rank",
                    **fields(layer),
                )

    def _apart(self, evidence: Evidence, layer: LayerEvidence) -> bool:
        """Whether units that are copies are sent to different places, and those of each place are independent.

        So is a convolution that a pixel shuffle spreads over space (ICNR, Aitken et al. 2017): what it sends on is the signal
        of a smaller layer, upsampled to its nearest neighbours, and each place has a gradient of its own.
        """
        rows, share = _matrix(layer), self.limit(evidence, "rank")
        found = [_rank(evidence, layer, rows[list(units)], 1) for units in units_by_place(evidence, layer)]
        return bool(found) and all(f is not None and f[0] >= share * f[1] for f in found)

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A draw, and an identity."""
        return (
            example("copies that a pixel shuffle sends to different places", _shuffled),
            example("He", lambda: mlp(32, 64, 64, 5)),
            example(
                "the identity", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].weight.fill_(0).fill_diagonal_(1))
            ),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """An outer product."""
        return (example("an outer product", lambda: mlp(32, 64, 64, 5, change=_outer)),)


def _counted(layer: LayerEvidence) -> bool:
    """Whether a weight is a matrix with units of its own, and none too large to look at."""
    return "o" in layer.pair.axes and layer.pair.groups == 1 and layer.moments.count <= _LARGEST


def _matrix(layer: LayerEvidence) -> np.ndarray[Any, Any]:
    """The values with one unit a row."""
    values, axes = layer.read(), [i for i, a in enumerate(layer.pair.axes) if a == "o"]
    others = [i for i in range(values.ndim) if i not in axes]
    return values.transpose(*axes, *others).reshape(int(np.prod([values.shape[i] for i in axes])), -1)


def _rank(
    evidence: Evidence, layer: LayerEvidence, stored: np.ndarray[Any, Any] | None = None, least: int = _LEAST
) -> tuple[int, int] | None:
    """(independent directions, how many there could be), both up to 96, of a layer's rows or of some `stored` ones of them.

    None for fewer than `least`.
    """
    pair = layer.pair
    stored = _matrix(layer) if stored is None else stored
    rows = len(stored)
    array = evidence.checkpoint.arrays.get(layer.tensor)
    rounding = _ROUNDING.get(array.dtype if array is not None else "", 1e-5)
    if min(stored.shape) >= _BLOCK:
        # A matrix has no fewer directions than any block of it, and nearly all tell by a small one. Rows that lie together
        # are fetched from a file at once.
        top, columns = (rows - _BLOCK) // 2, np.linspace(0, stored.shape[1] - 1, _BLOCK).astype(np.int64)
        block = stored[top : top + _BLOCK][:, columns].astype(np.float64)
        if _surely(block, rounding) or _directions(block, rounding) >= _SIDE:
            return _SIDE, _SIDE
    matrix = stored.astype(np.float32)
    matrix /= np.abs(matrix).max()  # squares of what uninitialised memory holds would be infinite
    if not pair.stored:
        # What a mask keeps at zero is no direction that the weight could have had.
        matrix = matrix[matrix.any(1)][:, matrix.any(0)]
    most = min(*matrix.shape, _SIDE)
    if most < least:
        return None
    generator = np.random.default_rng(0)
    if matrix.shape[1] > _SIDE:
        matrix = matrix @ generator.standard_normal((matrix.shape[1], _SIDE)).astype(np.float32)
    if matrix.shape[0] > _SIDE:
        matrix = generator.standard_normal((_SIDE, matrix.shape[0])).astype(np.float32) @ matrix
    return _directions(matrix.astype(np.float64), rounding), most


def _surely(block: np.ndarray[Any, Any], rounding: float) -> bool:
    """Whether a block has _SIDE directions, in a twentieth of the time that counting them takes; False says nothing.

    A Gram matrix has no fewer eigenvalues above a bound than a part of it along the diagonal (Cauchy's interlacing), and all
    of the part's are where what the bound leaves of it has a Cholesky factor. No eigenvalue is larger than a row's sum.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        gram = block @ block.T
        bound = rounding**2 * float(np.abs(gram).sum(axis=1).max())
    if not 0 < bound < math.inf:
        return False
    try:
        np.linalg.cholesky(gram[:_SIDE, :_SIDE] - bound * np.eye(_SIDE))
    except np.linalg.LinAlgError:
        return False
    return True


def _directions(matrix: np.ndarray[Any, Any], rounding: float) -> int:
    """How many singular values are above `rounding` of the largest."""
    largest = float(np.abs(matrix).max())
    if not 0 < largest < math.inf:
        return 0
    # Scaled: squares of what uninitialised memory holds would be infinite.
    matrix = matrix / largest
    # The squares of the singular values: their rounding is 1e-15 of the largest, what is looked for 1e-10 at least.
    squares = np.linalg.eigvalsh(matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix)
    return int(np.count_nonzero(squares > rounding**2 * squares[-1]))


def _outer(model: Any) -> None:
    import torch

    weight = linear(model)[1].weight
    weight.copy_(torch.outer(torch.randn(64), torch.randn(64)) / 6)


def _shuffled() -> Any:
    import torch
    from torch import nn

    wide = nn.Conv2d(16, 64, 3, padding=1)
    with torch.no_grad():
        wide.weight.copy_(torch.randn(16, 16, 3, 3).div_(9).repeat_interleave(4, 0))
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), wide, nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    return nn.Sequential(*layers), (torch.randn(8, 3, 8, 8),)
