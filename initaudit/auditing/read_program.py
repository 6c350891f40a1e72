"""The program that a file of torch.export or TorchScript describes: read, and run by PyTorch itself only with `--trust`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from initaudit.auditing.architecture import as_tensor, joined, quietly
from initaudit.auditing.program import BATCH, Program, open_program
from initaudit.config import Config
from initaudit.errors import InitauditError, UsageError
from initaudit.graph.from_exported import declared, exported_module
from initaudit.graph.from_script import ScriptModule, script_inputs
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.exported_graph import ExportedGraph
from initaudit.load.script_code import ScriptProgram
from initaudit.load.spans import reason, show

_PAIRED = "paired through the file's own graph, of which nothing was run but PyTorch's operators"
_HINT = "; --trust lets PyTorch load and run it"


def with_program(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    """`checkpoint` with the module that its own graph describes; with a remark that says why not where it cannot be read.

    With `config.trust` PyTorch loads the file, which runs what is in it.
    """
    graph = checkpoint.metadata.get("graph")
    if isinstance(graph, ExportedGraph):
        inputs = declared(graph, config.probe_batch or BATCH)
        checkpoint = dataclasses.replace(checkpoint, metadata={**checkpoint.metadata, "inputs": inputs})
    elif isinstance(graph, ScriptProgram) and graph.examples:
        inputs = script_inputs(graph)
        checkpoint = dataclasses.replace(checkpoint, metadata={**checkpoint.metadata, "inputs": inputs})
    if config.trust:
        return _trusted(checkpoint)
    if graph is None:
        return _without(checkpoint, str(checkpoint.metadata.get("no_program", "it was not read")))
    try:
        tensors = {name: as_tensor(array) for name, array in checkpoint.arrays.items()}
        with quietly():
            module = _built(graph, tensors)
    except InitauditError as error:
        return _without(checkpoint, str(error))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        return _without(checkpoint, f"it is not what PyTorch writes ({type(error).__name__})")
    return joined(checkpoint, module, checkpoint.arrays, list(checkpoint.problems), (_PAIRED,))


def _built(graph: Any, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    if isinstance(graph, ExportedGraph):
        return exported_module(graph, tensors)
    if isinstance(graph, ScriptProgram):
        return ScriptModule(graph, tensors)
    raise InitauditError("graph", "a description of an unknown kind")


def opened(
    checkpoint: Checkpoint, config: Config, inputs: Any, progress: Callable[[str], None]
) -> tuple[Checkpoint, Program | None]:
    """The program traced; where that fails the checkpoint without it, so that names and shapes are left."""
    try:
        return checkpoint, open_program(checkpoint, config, inputs, progress)
    except UsageError:
        raise
    except InitauditError as error:
        notes = tuple(note for note in checkpoint.notes if note != _PAIRED)
        bare = dataclasses.replace(checkpoint, program=None, notes=notes)
        return _without(bare, str(error), "" if config.trust else _HINT), None


def _without(checkpoint: Checkpoint, why: str, hint: str = _HINT) -> Checkpoint:
    text = f"the file's graph gives no program: {why.removeprefix(f'{checkpoint.source}: ')}"
    note = f"{text}; the audit falls back to names and shapes{hint}"
    return dataclasses.replace(
        checkpoint, metadata={**checkpoint.metadata, "no_program": text}, notes=(*checkpoint.notes, note)
    )


def _exported(path: str) -> nn.Module:
    module: nn.Module = torch.export.load(path).module()
    for name in ("train", "eval"):  # it refuses to be switched; whoever traces it only asks
        vars(module).pop(name, None)
    return module


def _trusted(checkpoint: Checkpoint) -> Checkpoint:
    """The module as PyTorch loads it; where that fails the remark says why."""
    loaders: Mapping[str, Callable[[str], nn.Module]] = {
        "exported_program": _exported,
        "torchscript": lambda path: torch.jit.load(path, map_location="cpu"),  # type: ignore[no-untyped-call]
    }
    name = {"exported_program": "torch.export.load", "torchscript": "torch.jit.load"}[checkpoint.format]
    try:
        with quietly():
            module = loaders[checkpoint.format](checkpoint.source)
    except Exception as error:  # noqa: BLE001 - loading runs what the file holds, which may raise whatever it likes
        return _without(checkpoint, f"{name} raised {type(error).__name__}: {show(reason(error), 200)}", "")
    return joined(checkpoint, module, checkpoint.arrays, list(checkpoint.problems), (f"loaded and run by {name} (--trust)",))
