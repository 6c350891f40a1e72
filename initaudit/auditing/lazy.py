"""Modules whose layers take their sizes from the first batch that they see."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from initaudit.auditing.given import arguments_of, given_inputs
from initaudit.config import Config
from initaudit.errors import UnreadableModel
from initaudit.graph.from_torch import silenced
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.module import from_module
from initaudit.load.spans import reason
from initaudit.randomness import random_state_kept


def settled(checkpoint: Checkpoint, config: Config, inputs: Any) -> Checkpoint:
    """The checkpoint as it is where all parameters have a shape; else that of a copy of the module that has seen `inputs`.

    The module itself sees nothing. Raises UnreadableModel where there are no inputs, or forward does not run on them.
    """
    module = checkpoint.program
    if not isinstance(module, nn.Module) or not any(map(torch.nn.parameter.is_lazy, (*module.parameters(), *module.buffers()))):
        return checkpoint
    name = type(module).__name__
    inputs = given_inputs(module, config, inputs)
    if inputs is None:
        found = "it has parameters without a shape, which lazy layers take from their first batch"
        raise UnreadableModel(name, found, advice="give example inputs, or run one forward pass first")
    args, keywords = arguments_of(inputs)
    try:
        # Not seeded: the numbers would be those of other layers, where these were drawn with the same seed.
        with random_state_kept(), silenced(), torch.no_grad():
            copied = copy.deepcopy(module, _uncopied(module))
            copied(*args, **keywords)
    except Exception as error:
        raise UnreadableModel(
            name, f"forward, which gives its lazy layers their sizes, raised {type(error).__name__}: {reason(error)}",
            advice="give example inputs that forward accepts",
        ) from error  # fmt: skip
    seen = from_module(copied)
    note = "lazy layers took their sizes, and the weights drawn for them, from a pass of a copy over the inputs"
    return replace(seen, source=checkpoint.source, notes=(*checkpoint.notes, note))


def _uncopied(module: nn.Module) -> dict[int, Any]:
    """What stands for buffers without a shape in a copy: torch copies such parameters, but not these."""
    lazy = torch.nn.parameter.UninitializedBuffer
    return {id(b): lazy(device=b.device, dtype=b.dtype) for b in module.buffers() if isinstance(b, lazy)}  # type: ignore[call-arg]
