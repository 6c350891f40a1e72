"""The one graph that both front doors make: a torch.fx graph whose constants are read by name.

    placeholder     an input of the model            meta: "shape", "dtype"
    get_attr        a constant; `target` is a key of `Graph.constants`
    call_function   an operator: an ATen overload, or a function of `initaudit.onnx_ops`
    output          a flat tuple of the floating-point outputs

Every node carries `meta["location"]` (a `Location`); nodes whose shape is known without running carry `meta["shape"]` (a tuple
of ints) and `meta["dtype"]` (a torch.dtype).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from initaudit.location import Location


@dataclass(frozen=True)
class Constant:
    """A parameter, buffer or literal. `value` reads it (a torch tensor that nobody else writes to).

    `name` is what the report calls it. `kind` is "parameter" for what training changes, "buffer" for what a module keeps
    (running statistics), "literal" for numbers written into the graph. Names in `tied` are other names of the same storage.
    """

    name: str
    kind: Literal["parameter", "buffer", "literal"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    trainable: bool = True
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """An input of the model: a size is an int, or the name of a symbolic dimension."""

    name: str
    shape: tuple[int | str, ...] | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Stray:
    """A leaf tensor that forward computes with, that asks for a gradient, and that no `parameters()` holds.

    `name` is the way to it in Python, its steps joined by dots; "" where the module does not hold it. `drawn` says that it is a
    parameter that each call of forward makes anew, with other values.
    """

    name: str
    shape: tuple[int, ...]
    drawn: bool = False


@dataclass(frozen=True)
class OwnBackward:
    """What a module's own autograd reaches: `missed` are the trainable parameters that get no gradient at all.

    `called` are the parameters of the layers that forward calls. `fed` are those that get a gradient that is not zero, known
    only where forward calls a `torch.autograd.Function`; else None. `frozen` says that no parameter asks for a gradient.
    `strays` are what it reaches beside the parameters.
    """

    missed: frozenset[str]
    called: frozenset[str]
    fed: frozenset[str] | None = None
    frozen: bool = False
    strays: tuple[Stray, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A program as a graph. `unused` names the trainable parameters that no path of the graph reaches.

    `notes` are one-line remarks for the report: what was assumed while the graph was made. `refused` says which limit running
    it would pass, where that showed without running it. `own` is what the autograd of a module that could be run reaches.
    """

    fx: fx.Graph = field(repr=False)
    constants: Mapping[str, Constant] = field(repr=False)
    inputs: tuple[Input, ...]
    source: Literal["module", "onnx"]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    examples: tuple[torch.Tensor, ...] | None = field(default=None, repr=False, compare=False)
    refused: str = ""
    own: OwnBackward | None = None


def location_of(node: fx.Node) -> Location:
    """The location recorded for `node`; an empty one where nothing is known."""
    found: Any = node.meta.get("location")
    return found if isinstance(found, Location) else Location()


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the node's value where it is known without running the graph."""
    found: Any = node.meta.get("shape")
    return found if isinstance(found, tuple) else None
