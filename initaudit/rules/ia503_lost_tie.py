"""IA503: weights that should be one and are two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example
from initaudit.rules.rule import Example, Finding, Rule


class LostTie(Rule):
    """The configuration ties the output layer to the input embedding, and the two differ.

    What it does: asks the module for its configuration, its input and its output embedding, and compares their values where the
    configuration says that they are one; for a checkpoint without a module, what its loader found.

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

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each tie."""
        for problem in evidence.checkpoint.problems:
            if problem.code == self.code:
                yield self.finding(problem.message, "tie the weights again: model.tie_weights()", tensor=problem.tensor)
        found = _untied(evidence.checkpoint.program)
        if found is not None:
            name, difference = found
            yield self.finding(
                "the configuration ties the output layer to the input embedding, but their values differ by "
                f"{difference:.2g} of their "
                "norm: one of them was not loaded, or loaded over",
                "model.tie_weights()",
                tensor=name,
                measured=difference,
                expected=0.0,
            )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """One parameter."""
        return (example("tied", lambda: _model(tied=True)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Two, and a configuration that says one."""
        return (example("a head of its own", lambda: _model(tied=False)),)


def _untied(module: Any) -> tuple[str, float] | None:
    """(name of the output weight, relative difference) of a module that says it ties its embeddings and does not."""
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
    name = next((n for n, p in module.named_parameters() if p is second), "output embedding")
    return (name, difference) if difference > 0 else None


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
