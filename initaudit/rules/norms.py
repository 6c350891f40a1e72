"""Which tensors are the scale and the statistics of one normalization: by the graph, or by what stands together in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from initaudit.load.checkpoint import Array
from initaudit.rules.evidence import Evidence

# What frameworks call the vectors of a norm; asked only of tensors of one shape that stand alone under one parent.
_WORDS = (
    ("mean", re.compile(r"(^|_)mean$")),
    ("variance", re.compile(r"(^|_)(var|variance)$")),
    ("scale", re.compile(r"^(weight|gamma|scale)$")),
    ("shift", re.compile(r"^(bias|beta|shift|offset)$")),
)


@dataclass(frozen=True)
class Norm:
    """The names of a normalization's vectors, "" for one that it lacks; `batches` counts what has passed, None where untold."""

    scale: str = ""
    shift: str = ""
    mean: str = ""
    variance: str = ""
    batches: int | None = None


def norms(evidence: Evidence) -> list[Norm]:
    """The normalizations of the model: those that stand together in the checkpoint, then the further ones of the graph."""
    found = list(_stored(evidence))
    known = {norm.variance for norm in found} - {""}
    return found + [norm for norm in _of_graph(evidence) if norm.variance not in known]


def _stored(evidence: Evidence) -> Iterator[Norm]:
    """Vectors of one shape under one parent, alone but for a count of batches, each with a word of its own."""
    parents: dict[str, list[Array]] = {}
    for name, array in evidence.checkpoint.arrays.items():
        parents.setdefault(name.rpartition(".")[0], []).append(array)
    for group in parents.values():
        counts = [a for a in group if a.size == 1 and len(a.shape) < 2 and a.dtype.startswith(("int", "uint"))]
        vectors = [a for a in group if a not in counts]
        shapes = {a.shape for a in vectors}
        if len(shapes) != 1 or len(counts) > 1 or len(next(iter(shapes))) != 1 or not _floats(vectors):
            continue
        parts = {_part(array.name): array.name for array in vectors}
        if len(parts) == len(vectors) and "" not in parts and ("mean" in parts) == ("variance" in parts):
            yield Norm(**parts, batches=int(counts[0].read().reshape(())) if counts else None)


def _floats(arrays: list[Array]) -> bool:
    return all(a.dtype.startswith(("float", "bfloat")) for a in arrays)


def _part(name: str) -> str:
    last = name.rpartition(".")[2].lower()
    return next((part for part, words in _WORDS if words.search(last)), "")


def _of_graph(evidence: Evidence) -> Iterator[Norm]:
    """The norms of the graph with kept statistics; each operator takes data, scale, shift, mean, variance, in this order."""
    graph = evidence.graph
    if graph is None:
        return
    from torch import fx

    from initaudit.graph.calls import arguments, role_of

    for node in graph.fx.nodes:
        if node.op != "call_function" or role_of(node).name != "batch_norm":
            continue
        given = list(arguments(node).values())[1:5]
        constants = [
            graph.constants.get(str(g.target)) if isinstance(g, fx.Node) and g.op == "get_attr" else None for g in given
        ]
        if len(constants) == 4 and constants[2] is not None and constants[3] is not None:
            scale, shift, mean, variance = (c.name if c is not None else "" for c in constants)
            yield Norm(scale, shift, mean, variance)
