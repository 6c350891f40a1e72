"""IA503: weights that should be one and are two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from initaudit.measure.blocks import blocks, forget
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example
from initaudit.rules.remedy import expression_of, parameter
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.structure import is_tie
from initaudit.rules.support import fields, to_output

# Two tables that were drawn or trained apart share no row; half of the rows survive a resized vocabulary or some training.
_SHARED = 0.5
# What the configurations of transformers call the width of the embedding.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")

# Of a tie that is said to have been there: parameters that hold the values.
_LOST: dict[str, Any] = {"measured": 2.0, "expected": 1.0, "law": EXACT + "one parameter under two names"}


class LostTie(Rule):
    """The output layer and the input embedding should be one parameter, and are two.

    What it does: asks the module for its configuration, its input and its output embedding, and compares their values where the
    configuration says that they are one; for a folder with a config.json, compares the tables of that size. Without a
    configuration it reports a table and an output layer of one shape that still share most of their rows.

    Why it is bad: the head is not what the model was trained with. Generated text is noise, or a little worse than it was.

    Example: a head that was saved on its own and loaded into a tied model, or the other way round.

    Instead: `model.tie_weights()` after loading.

    Source: https://github.com/huggingface/transformers/issues/48154 and /42612; Press & Wolf 2017 for the tie.
    """

    code = "IA503"
    name = "lost-tie"
    severity = "warning"
    phase = "any"
    summary = "weights that should be tied differ"
    thresholds = (
        Threshold("shared", _SHARED, "of the rows", "tables drawn apart share no row; half survive a resized vocabulary"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each tie."""
        for problem in evidence.checkpoint.problems:
            if problem.code == self.code:
                text = f"{problem.message}; the two drift apart in training"
                yield self.finding(text, "model.tie_weights()", tensor=problem.tensor, **_LOST)
        for change in evidence.base.of("untied") if evidence.base is not None else ():
            yield self.finding(
                "this weight shares its values with another in the base and no longer does here: the tie was lost",
                "model.tie_weights()",
                tensor=change.tensor,
                **_LOST,
            )
        for change in evidence.base.of("tied again") if evidence.base is not None else ():
            yield self.finding(
                "this weight is a parameter of its own in the base and is tied to another here: one of the two was dropped",
                "{0} = torch.nn.Parameter({0}.detach().clone())  # or tune from a base that is tied".format(
                    parameter(evidence, change.tensor)
                ),
                severity="info",
                tensor=change.tensor,
                measured=1.0,
                expected=2.0,
                law=EXACT + "the base keeps two parameters",
            )
        yield from self._copies(evidence)
        found = _untied(evidence.checkpoint.program) or _in_folder(evidence)
        if found is not None:
            name, other, difference = found
            yield self.finding(
                "the configuration ties the output layer to the input embedding, but their values differ by "
                f"{difference:.2g} of their "
                "norm: one of them was not loaded, or loaded over",
                _tie(evidence, name, other),
                tensor=name,
                measured=difference,
                expected=0.0,
                law=EXACT + "two names of one parameter hold the same values",
            )

    def _copies(self, evidence: Evidence) -> Iterator[Finding]:
        """A table and an output layer that are two parameters with the same rows: copied, where they were to be shared."""
        arrays = evidence.checkpoint.arrays
        config = getattr(evidence.checkpoint.program, "config", None)
        if evidence.checkpoint.format != "module" or getattr(config, "tie_word_embeddings", None) is not None:
            return
        tables = [x for x in evidence.layers if x.pair.role == "embedding" and x.moments.m2 > 0 and x.tensor in arrays]
        heads = [x for x in evidence.layers if x.pair.role == "contraction" and to_output(x) and x.tensor in arrays]
        for table, head in ((t, h) for t in tables for h in heads if t.pair.shape == h.pair.shape and is_tie((t, h))):
            if arrays[table.tensor].storage == arrays[head.tensor].storage or not (table.pair.stored and head.pair.stored):
                continue
            a, b = table.read(), head.read()
            same = float(np.mean((a == b).all(axis=1) & a.astype(bool).any(axis=1)))
            if same > self.limit(evidence, "shared"):
                yield self.finding(
                    f"{100 * same:.0f} % of the rows of {head.tensor} and of {table.tensor} are equal, but the two are "
                    "separate parameters: copied where they were to be shared, they drift apart with the first step",
                    f"{expression_of(head)} = {expression_of(table)}",
                    measured=same,
                    expected=0.0,
                    law=EXACT + "two parameters that were drawn have no row in common",
                    related=(table.tensor,),
                    **fields(head),
                )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """One parameter."""
        return (example("tied", lambda: _model(tied=True)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Two, and a configuration that says one."""
        return (example("a head of its own", lambda: _model(tied=False)),)


def _tie(evidence: Evidence, name: str, other: str) -> str:
    """The line that makes two parameters one: the module's own, where it has one."""
    if hasattr(evidence.checkpoint.program, "tie_weights") or not other or evidence.checkpoint.program is None:
        return "model.tie_weights()"
    return f"{parameter(evidence, name)} = {parameter(evidence, other)}"


def _untied(module: Any) -> tuple[str, str, float] | None:
    """(output weight, input weight, relative difference) of a module that says it ties its embeddings and does not."""
    config = getattr(module, "config", None)
    if config is None or getattr(config, "tie_word_embeddings", False) is not True:
        return None
    getters = [getattr(module, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    if not all(callable(g) for g in getters):
        return None
    layers = [g() for g in getters if g is not None]
    weights = [getattr(layer, "weight", None) for layer in layers]
    first, second = weights
    if first is None or second is None or first is second or first.shape != second.shape:
        return None
    if first.data_ptr() == second.data_ptr():
        return None
    a, b = first.detach().float(), second.detach().float()
    difference = float((a - b).norm() / max(float(a.norm()), 1e-30))
    known = {id(p): n for n, p in module.named_parameters()}
    name, other = known.get(id(second), "output embedding"), known.get(id(first), "")
    return (name, other, difference) if difference > 0 else None


def _in_folder(evidence: Evidence) -> tuple[str, str, float] | None:
    """The same for weights beside a config.json: tables of vocabulary by width that are not one and not equal."""
    config = evidence.checkpoint.metadata.get("config")
    if evidence.checkpoint.program is not None or not isinstance(config, Mapping):
        return None
    if config.get("tie_word_embeddings") is not True:
        return None
    width = next((config[k] for k in _WIDTHS if isinstance(config.get(k), int)), None)
    tables = [
        a for a in evidence.checkpoint.arrays.values() if a.shape == (config.get("vocab_size"), width) and "float" in a.dtype
    ]
    single = list({a.storage or a.name: a for a in tables}.values())
    # More than a table for each side and a head are other matrices that happen to have this shape.
    if not 1 < len(single) < 5:
        return None
    for other in single[1:]:
        difference = _difference(single[0].read(), other.read())
        if difference > 0:
            return other.name, single[0].name, difference
    return None


def _difference(first: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The norm of the difference of two arrays of one shape over that of the first; a table may be too large to be copied."""
    apart = size = 0.0
    for a, b in zip(blocks(first), blocks(other), strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        apart, size = apart + float(np.sum((x - y) ** 2)), size + float(np.sum(x**2))
        forget(a)
        forget(b)
    return math.sqrt(apart / max(size, 1e-60))


def _model(*, tied: bool) -> Any:
    import torch
    from torch import nn

    class Config:
        tie_word_embeddings = True

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            nn.init.normal_(self.embed.weight, 0, 0.1)
            if tied:
                self.head.weight = self.embed.weight

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, ids: torch.Tensor) -> Any:
            return self.head(self.embed(ids))

    return Model(), (torch.randint(0, 30, (4, 8)),)
