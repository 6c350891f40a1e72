"""A module that computes what the graph of an exported program describes, without anything of the file being run.

Its parameters have the names of the archive, so that it goes through the same door as a module of the user's own.
"""

from __future__ import annotations

import inspect
import keyword
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback

from initaudit.errors import UnreadableModel, UnsupportedOperator
from initaudit.graph.allowed import exported_target
from initaudit.graph.sound import check
from initaudit.load.exported_graph import Body, ExportedGraph, Place, Ref, Step, Word
from initaudit.load.spans import show

# Regions that switch a mode for their body: how many arguments stand before the body
_REGIONS = {"torch.ops.higher_order.wrap_with_set_grad_enabled": 1, "torch.ops.higher_order.wrap_with_autocast": 4}
_SEQUENCE, _BATCH = 16, 8
# Kernels that trust their callers, written by torch's decompositions: the function that checks, and its arguments by the names
# that the kernel gives them ("=" before a value). Only the first result means the same.
_CALLED_INSTEAD: Mapping[str, tuple[str, str]] = {
    "torch.ops.aten._native_batch_norm_legit_no_training.default": (
        "torch.ops.aten.batch_norm.default",
        "input weight bias running_mean running_var =False momentum eps =False",
    ),
    "torch.ops.aten._native_batch_norm_legit_functional.default": (
        "torch.ops.aten.batch_norm.default",
        "input weight bias running_mean running_var training momentum eps =False",
    ),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default": (
        "torch.ops.aten.scaled_dot_product_attention.default",
        "query key value attn_mask dropout_p is_causal",
    ),
    "torch.ops.aten._fused_rms_norm.default": ("torch.ops.aten.rms_norm.default", "input normalized_shape weight eps"),
    "torch.ops.aten._weight_norm_interface.default": ("torch.ops.aten._weight_norm.default", "v g dim"),
}


class ReadProgram(nn.Module):
    """A program out of a file: its tensors under the file's names, and a forward with the parameters that `signature` has."""

    def __init__(self, signature: inspect.Signature) -> None:
        super().__init__()
        # A class of its own for each program: a copy of the module must call itself, not the original
        self.__class__ = type(type(self).__name__, (type(self),), {"forward": _signed(signature)})

    def run(self, *inputs: Any) -> Any:
        """What the program computes of its inputs, given by position."""
        raise NotImplementedError

    def hold(self, name: str, value: torch.Tensor, trainable: bool) -> None:
        """Registers `value` as the parameter or buffer `name`; raises UnreadableModel for a name that no module can have."""
        *path, leaf = name.split(".")
        if not all(path) or not leaf:
            raise UnreadableModel(show(name), "a name with an empty part", "one that a module could have")
        owner: nn.Module = self
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        if trainable and value.is_floating_point():
            owner._parameters[leaf] = nn.Parameter(value)
        else:
            owner._buffers[leaf] = value

    def held(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name, as it is now: whoever traces the module puts others in its place."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            owner = owner._modules[part]  # type: ignore[assignment]
        found: Any = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if found is None:
            raise UnreadableModel(show(name), "a tensor that the module does not hold")
        return found  # type: ignore[no-any-return]


class ExportedModule(ReadProgram):
    """Runs an fx graph whose first placeholders are the tensors that the archive holds."""

    def __init__(self, made: fx.Graph, held: list[str], names: list[str]) -> None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        super().__init__(inspect.Signature([inspect.Parameter(name, kind) for name in names]))
        self.made, self.names = made, held

    def run(self, *inputs: Any) -> Any:
        """Runs the graph on the tensors that the module holds now; whoever traces it learns which module each call is of."""
        with traceback.preserve_node_meta():
            return _Checked(nn.Module(), graph=self.made).run(*map(self.held, self.names), *inputs)


class _Checked(fx.Interpreter):
    """Looks at the shapes that an operator of ATen does not look at itself."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            check(target._schema.name.partition("::")[2], args, kwargs)
        return super().call_function(target, args, kwargs)


def _signed(signature: inspect.Signature) -> Any:
    """A forward with the parameters that the file names, so that inputs can be given by name."""

    def forward(self: ReadProgram, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(*bound.args)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


def exported_module(graph: ExportedGraph, tensors: Mapping[str, torch.Tensor]) -> ExportedModule:
    """The module of `graph` over the archive's `tensors` by name.

    Raises UnsupportedOperator for a call that is not allowed, UnreadableModel for a graph that names what is not there.
    """
    made = fx.Graph()
    copy = _Copy(made)
    held: list[str] = []
    for value in graph.body.inputs:
        if isinstance(value, Ref) and value.name in graph.held:
            copy.known[value.name] = made.placeholder(f"held_{len(held)}")
            held.append(graph.held[value.name][1])
    places = _named(graph)
    for name, place in places.items():
        copy.known[place.name] = made.placeholder(name)
    outputs = [value for value in copy.body(graph.body) if isinstance(value, fx.Node)]
    made.output(tuple(outputs))
    module = ExportedModule(made, held, list(places))
    kinds = {name: kind for kind, name in graph.held.values()}
    for name in held:
        if name not in tensors:
            raise UnreadableModel(show(name), "a tensor that the graph uses and the archive does not hold")
        module.hold(name, tensors[name], kinds[name] == "parameter")
    return module


def declared(graph: ExportedGraph, batch: int = _BATCH) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every input by the name that it has in `exported_module`'s forward."""
    return {name: (_sizes(place, batch), getattr(torch, place.dtype)) for name, place in _named(graph).items()}


def _named(graph: ExportedGraph) -> dict[str, Place]:
    """The inputs that are tensors, each under a name that a Python function could give it."""
    tensors = [place for place in graph.places if place.shape is not None]  # the program was specialised to other values
    names = [place.name for place in tensors]
    if len(set(names)) < len(names) or not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        names = [f"input_{index}" for index in range(len(tensors))]
    return dict(zip(names, tensors, strict=True))


def _sizes(place: Place, batch: int) -> tuple[int, ...]:
    """Sizes to run with: those that are fixed, `batch` examples where the file leaves that open, a short sequence elsewhere."""
    found = []
    for axis, size in enumerate(place.shape or ()):
        if isinstance(size, int):
            found.append(size)
        else:
            least, hint, most = size
            found.append(min(max(batch if axis == 0 else hint or _SEQUENCE, least), most))
    return tuple(found)


class _Copy:
    """Writes the steps of a body into an fx graph; `known` are the values by the names of the file."""

    def __init__(self, made: fx.Graph) -> None:
        self.made = made
        self.known: dict[str, Any] = {}

    def body(self, body: Body) -> list[Any]:
        for step in body.steps:
            if step.target in _REGIONS:
                self._region(step)
            else:
                self._call(step)
        return [self._value(value) for value in body.outputs]

    def _call(self, step: Step) -> None:
        if step.target in _CALLED_INSTEAD:
            self._instead(step)
            return
        target = exported_target(step.target)
        args = tuple(self._value(value) for _, named, value in step.arguments if not named)
        kwargs = {name: self._value(value) for name, named, value in step.arguments if named}
        if isinstance(target, torch._ops.OpOverload):
            args, kwargs = _by_schema(target, [(name, self._value(value)) for name, _, value in step.arguments])
        node = self.made.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = {key: (path, "") for key, path in step.modules}
        self._results(node, step.results)

    def _instead(self, step: Step) -> None:
        name, words = _CALLED_INSTEAD[step.target]
        given = {key: self._value(value) for key, _, value in step.arguments}
        defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "dim": 0}
        target = exported_target(name)
        args: list[Any] = []
        for word in words.split():
            if word.startswith("="):
                args.append(word == "=True")
            elif word in given or word in defaults:
                args.append(given.get(word, defaults.get(word)))
            else:
                raise UnreadableModel(show(step.target), f"no argument {word}")
        kwargs = {"scale": given["scale"]} if given.get("scale") is not None else {}
        node = self.made.call_function(target, tuple(args), kwargs)
        node.meta["nn_module_stack"] = {key: (path, "") for key, path in step.modules}
        first, *_ = step.results[0] if isinstance(step.results[0], list) else step.results
        if isinstance(first, Ref):
            self.known[first.name] = node

    def _results(self, node: fx.Node, results: tuple[Any, ...]) -> None:
        if len(results) == 1 and isinstance(results[0], Ref):
            self.known[results[0].name] = node
            return
        parts = results[0] if len(results) == 1 and isinstance(results[0], list) else results
        for index, part in enumerate(parts):
            if isinstance(part, Ref):
                taken = self.made.call_function(operator.getitem, (node, index))
                taken.meta.update(node.meta)
                self.known[part.name] = taken

    def _region(self, step: Step) -> None:
        before = _REGIONS[step.target]
        values = [value for _, _, value in step.arguments]
        inner = values[before] if len(values) > before else None
        if not isinstance(inner, Body):
            raise UnreadableModel(show(step.target), "a region without a body")
        given = values[before + 1 :]
        for place, value in zip(inner.inputs, given, strict=True):
            if isinstance(place, Ref):
                self.known[place.name] = self._value(value)
        made = self.body(inner)
        names = step.results[0] if len(step.results) == 1 and isinstance(step.results[0], list) else step.results
        for name, value in zip(names, made, strict=False):
            if isinstance(name, Ref):
                self.known[name.name] = value

    def _value(self, value: Any) -> Any:
        if isinstance(value, Ref):
            if value.name not in self.known:
                raise UnreadableModel(show(value.name), "a value that nothing in the graph makes")
            return self.known[value.name]
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, Word):
            return torch.device("cpu") if value.kind == "device" else getattr(torch, value.name)
        if isinstance(value, Body):
            raise UnsupportedOperator("a graph within the graph", "control flow that is not read")
        return value


def _by_schema(target: torch._ops.OpOverload, given: list[tuple[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments by position as far as they go, the others by keyword; raises UnreadableModel for one that it has not."""
    named = dict(given)
    known = [argument.name for argument in target._schema.arguments]
    if strangers := [name for name in named if name not in known]:
        raise UnreadableModel(str(target), f"an argument {show(strangers[0])}", "one of " + ", ".join(known))
    args: list[Any] = []
    for argument in target._schema.arguments:
        if argument.name not in named or argument.kwarg_only:
            break
        args.append(named.pop(argument.name))
    return tuple(args), named
