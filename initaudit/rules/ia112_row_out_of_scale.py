"""IA112: a row of a table that is many times as large as the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.measure.units import measure_units
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example
from initaudit.rules.remedy import expression_of
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, initial

# As far as a single weight has to lie from the others (IA108): norms of drawn rows differ by less than single values do.
_FAR = 12.0
_POWER = 0.5  # of all other rows together: below, a table on average is what its law made it
_FEW = 0.01  # of the rows, or one: more are a second law
# Of the variance that norms of rows of one draw have: those of trained rows go with how often each was met.
_SPREAD = 2.0
# A row so far out in a table that it holds a third of the power of, of four rows or more, sends the kurtosis beyond 3.
_KURTOSIS = 4.0


class RowOutOfScale(Rule):
    """A row of a drawn table is many times as large as all the others.

    What it does: compares the norms of the rows of each embedding with their median. A row that is 12 times as large, where the
    others are as equal as drawn rows are, was written by hand or by mistake. It is a warning where it holds half as much power
    as all other rows together.

    Why it is bad: where such a row is averaged or summed with others, as a padding row is, it is all that is left of the sum;
    read alone, it drives activations and gates into their flat parts. Layers behind it are not to blame for what comes of it.

    Example: `embedding.weight.data[0] = 60` for padding; an extra row appended without the factor of the others.

    Instead: `embedding.weight.data[0] = 0` (or `padding_idx=0`); draw appended rows with the spread of the others.

    Source: padding_idx of torch.nn.Embedding, whose row is zero.
    """

    code = "IA112"
    name = "row-out-of-scale"
    severity = "warning"
    phase = "init"
    summary = "a row of a drawn table is many times as large as all the others"
    thresholds = (
        Threshold("far", _FAR, "times the median norm", "the largest of a billion normal values lies at 6"),
        Threshold("power", _POWER, "of all other rows together", "below, the table is what its law made it: a remark"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each table."""
        if not initial(evidence):
            return
        for layer in evidence.layers:
            if layer.pair.role != "embedding" or not layer.pair.stored or not layer.moments.kurtosis > _KURTOSIS:
                continue
            values = layer.read()
            norms = _norms(values)
            far = _far(norms, self.limit(evidence, "far"))
            others = np.delete(norms, far)
            if not 0 < len(far) <= max(1.0, _FEW * len(norms)) or not _drawn(np.delete(values, far, 0), others):
                continue
            largest, typical = float(norms[far].max()), float(np.median(others[others > 0]))
            power = float((norms[far] ** 2).sum() / (others**2).sum())
            shown = ", ".join(map(str, far[:4])) + (" ..." if len(far) > 4 else "")
            what = f"row {shown} of {len(norms):,} is" if len(far) == 1 else f"rows {shown} of {len(norms):,} are up to"
            yield self.finding(
                f"{what} {largest / typical:.3g} times as large as the others (norm {largest:.3g}, median {typical:.3g}), with "
                f"{power:.2g} times their power in all: averaged or summed with others, it is all that is left of the signal",
                f"{_zeroed(expression_of(layer), far.tolist())}  # padding; a row that is to be learned: draw it as the others",
                severity="warning" if power > self.limit(evidence, "power") else "info",
                measured=largest,
                expected=typical,
                law="rows of one draw differ in norm by a few standard deviations of all",
                standard_errors=(largest - typical) / max(float(others[others > 0].std()), 1e-7 * typical),
                **fields(layer),
            )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A table as it is drawn, and a padding row of zeros."""
        return (example("a drawn table", lambda: _mean(1.0)), example("a padding row of zeros", lambda: _mean(0.0)))

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A padding row of 60 times the others."""
        return (example("a padding row of 60 times the others", lambda: _mean(60.0)),)


def _zeroed(weight: str, rows: list[int]) -> str:
    if len(rows) == 1:
        return f"torch.nn.init.zeros_({weight}[{rows[0]}])"
    return f"for i in ({', '.join(map(str, rows))}): torch.nn.init.zeros_({weight}[i])"


def _norms(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each row, in float64."""
    return measure_units(values.reshape(values.shape[0], -1))[1].row_norms


def _far(norms: np.ndarray[Any, Any], times: float) -> np.ndarray[Any, Any]:
    """The places of the norms that are so many times the median of those that are not zero; none where one is not finite."""
    alive = norms[norms > 0]
    return np.flatnonzero(norms > times * np.median(alive)) if alive.size and np.isfinite(norms).all() else np.zeros(0, int)


def _drawn(rows: np.ndarray[Any, Any], norms: np.ndarray[Any, Any]) -> bool:
    """Whether rows are as equal in norm as those of one draw: the variance of a mean of d squares is (kurtosis - 1)/d."""
    kept = rows[norms > 0].reshape(int((norms > 0).sum()), -1).astype(np.float64)
    if kept.shape[0] < 2 or not np.isfinite(kept).all():
        return False
    powers = np.square(kept).mean(1)
    kurtosis = float(np.mean(kept**4) / powers.mean() ** 2)
    allowed = _SPREAD * powers.mean() ** 2 * max(kurtosis - 1, 0.1) / kept.shape[1]
    return bool(powers.var() <= allowed)


def _mean(times: float) -> Any:
    import torch
    from torch import nn

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
            self.table.weight.detach()[0].mul_(times)

        def forward(self, words: torch.Tensor) -> Any:
            return self.head(self.table(words).mean(1))

    words = torch.randint(1, 50, (64, 32))
    words[:, 8:] = 0
    return Mean(), (words,)
