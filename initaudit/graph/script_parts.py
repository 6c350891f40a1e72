"""What stands around the code of a TorchScript archive: its parsed text, shells of its layers, marks of its modules."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping

from torch import fx, nn

from initaudit.errors import UnreadableModel
from initaudit.load.script_code import Instance
from initaudit.load.spans import show

# Layers by whose sizes inputs are guessed, and what is asked of them; they are never called
SHELLS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    **{
        kind.__name__: (kind, ("in_channels", "kernel_size", "transposed"))
        for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
    "Linear": (nn.Linear, ("in_features",)),
    "Embedding": (nn.Embedding, ("num_embeddings",)),
    "EmbeddingBag": (nn.EmbeddingBag, ("num_embeddings",)),
    **{kind.__name__: (kind, ("input_size", "batch_first")) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    "MultiheadAttention": (nn.MultiheadAttention, ("embed_dim", "batch_first")),
}


def shell_of(kind: type[nn.Module], needed: tuple[str, ...], instance: Instance, definition: ast.ClassDef) -> nn.Module:
    """A module of that kind that knows its sizes and nothing else; a bare one where the archive does not tell them."""
    known = dict(instance.attributes)
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None:
            with contextlib.suppress(ValueError):
                known[statement.target.id] = ast.literal_eval(statement.value)
    if not all(isinstance(known.get(name), (bool, int, tuple)) for name in needed):
        return nn.Module()
    shell = kind.__new__(kind)
    nn.Module.__init__(shell)
    vars(shell).update({name: known[name] for name in needed})
    return shell


def parsed(name: str, text: str) -> dict[str, ast.stmt]:
    """The classes and functions of one source by name; raises UnreadableModel for text that is no code."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableModel(show(name), f"its code cannot be parsed ({type(error).__name__})") from error
    return {node.name: node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def marker(path: str) -> fx.Node:
    """A node whose meta says which module a call is of."""
    node = fx.Graph().placeholder("of")
    parts = path.split(".") if path else []
    paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
    node.meta["nn_module_stack"] = {"L__self__": ("", ""), **{f"L__self__{each}": (each, "") for each in paths}}
    return node
