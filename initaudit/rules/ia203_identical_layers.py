"""IA203: layers that hold the same values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import fields, fresh_layers, init_line, initial, names

# A drawn weight of this many elements has nearly as many different values; tables of a formula and identities have few.
_LEAST = 64
_VARIED = 0.1


class IdenticalLayers(Rule):
    """Two layers hold the same values without being the same parameter.

    What it does: compares the bytes of all weights of one shape that are not tied. Constants and identities are left out: they
    are equal on purpose.

    Why it is bad: the layers start as one layer applied several times. They learn apart, but begin with a fraction of the
    random features that were paid for, and every run repeats the same draw.

    Example: `nn.TransformerEncoder` deep-copies the layer that it is given; a generator seeded inside the initializer.

    Instead: initialise every layer after it was copied: `for layer in encoder.layers: layer.apply(init)`.

    Source: https://github.com/pytorch/pytorch/issues/72253.
    """

    code = "IA203"
    name = "identical-layers"
    severity = "warning"
    phase = "init"
    summary = "two layers hold the same values without being the same parameter"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all the groups."""
        if not initial(evidence):
            return
        groups = [g for g in self._groups(evidence) if len({x.tensor for x in g}) > 1]
        if not groups:
            return
        first = groups[0][0]
        others = [x for g in groups for x in g if x is not first]
        more = f"; so do {len(groups) - 1} other groups of weights" if len(groups) > 1 else ""
        yield self.finding(
            f"{names(groups[0])} hold the same {first.moments.count:,} values without being one parameter{more}: the "
            "layers were copied, or "
            "drawn from the same seed, and start as one layer repeated",
            f"{init_line(first)}  # and each of the others, after they were made",
            related=tuple(dict.fromkeys(x.tensor for x in others)),
            **fields(first),
        )

    def _groups(self, evidence: Evidence) -> Iterator[list[LayerEvidence]]:
        # Moments of equal values are equal: only what agrees in them is read again.
        alike: dict[tuple[Any, ...], list[LayerEvidence]] = {}
        for layer in fresh_layers(evidence, "contraction", "recurrent", "embedding"):
            m = layer.moments
            if m.m2 > 0 and m.count >= _LEAST and layer.pair.stored and m.zeros < m.count / 2:
                alike.setdefault((layer.pair.shape, m.mean, m.m2, m.min, m.max), []).append(layer)
        for candidates in alike.values():
            if len({x.tensor for x in candidates}) < 2:
                continue
            equal: dict[bytes, list[LayerEvidence]] = {}
            storages: set[str] = set()
            for layer in candidates:
                values = layer.read()
                array = evidence.checkpoint.arrays.get(layer.tensor)
                storage = array.storage if array is not None else ""
                if (storage and storage in storages) or len(set(values.ravel()[:4096].tolist())) < _VARIED * min(
                    values.size, 4096
                ):
                    continue
                storages.add(storage)
                equal.setdefault(hashlib.sha256(values.tobytes()).digest(), []).append(layer)
            yield from equal.values()

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Layers of one shape, and one layer used twice."""
        return (
            example("drawn one by one", lambda: mlp(32, 32, 32, 32, 5)),
            example("one layer used twice", _shared),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A copy."""
        return (example("a copied layer", lambda: mlp(32, 32, 32, 32, 5, change=_copy)),)


def _copy(model: Any) -> None:
    layers = linear(model)
    layers[1].weight.copy_(layers[0].weight)


def _shared() -> Any:
    import torch
    from torch import nn

    layer = nn.Linear(32, 32)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(32, 4)), (torch.randn(16, 32),)
