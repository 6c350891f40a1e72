"""From what torch.export or make_fx wrote to our one graph: constants by name, regions inlined, noise off."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from initaudit.graph.aten import base_name
from initaudit.graph.execute import note_shape
from initaudit.graph.graph import Constant, Graph, Input, location_of
from initaudit.graph.outside import held_outside, same_place
from initaudit.graph.probability import certain
from initaudit.graph.steps import dropped
from initaudit.location import Location

ConstantKind = Literal["parameter", "buffer", "literal"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Frames of torch and of this package say nothing about the user's model.
_NOT_HIS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
# Regions that switch a mode for their body, and how many arguments stand before the body.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
_SWITCHES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class Constants:
    """The constants of a module under the names its author gave them; ties are known by their storage.

    A complex parameter is kept as its real and imaginary parts, on one more axis: these are what an optimizer moves.
    """

    def __init__(self, module: nn.Module) -> None:
        self.found: dict[str, Constant] = {}
        self.complex: set[str] = set()
        self._module = module
        self._all_frozen = not any(p.requires_grad for p in module.parameters())
        self._names: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        for name, p in module.named_parameters(remove_duplicate=False):
            self._names.setdefault((p.data_ptr(), tuple(p.shape)), []).append(name)

    def add(self, name: str, kind: ConstantKind, value: torch.Tensor) -> str:
        """Registers a tensor and returns its key.

        A literal that is a tensor which the module holds by a way of its own is called by that way, and the `.data` of a
        parameter is that parameter: the module's own autograd says that no step moves it.
        """
        if kind == "literal" and value.is_floating_point() and value.numel():
            if same := self._names.get((value.data_ptr(), tuple(value.shape))):
                return self.add(same[0], "parameter", self._module.get_parameter(same[0]))
            name = self._outside.get(same_place(value), name)
        if name not in self.found:
            same = self._names.get((value.data_ptr(), tuple(value.shape)), []) if kind == "parameter" and value.numel() else []
            # A module that is frozen as a whole was frozen for inference: its weights are judged as weights all the same.
            trainable = kind == "parameter" and (self._all_frozen or value.requires_grad)
            tied = tuple(other for other in same if other != name)
            if kind == "parameter" and value.is_complex():
                value = torch.view_as_real(value.detach().resolve_conj())
                self.complex.add(name)
            self.found[name] = Constant(name, kind, tuple(value.shape), value.dtype, value.detach, trainable, tied)
        return name

    @functools.cached_property
    def _outside(self) -> dict[tuple[int, tuple[int, ...]], str]:
        return {same_place(value): name for value, name in held_outside(self._module, frozen=True).items() if value.numel()}


def location(node: fx.Node) -> Location:
    """The innermost source line outside torch that called `node`, and the module path."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_NOT_HIS)]
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if entry[0]]
    site = re.sub(r"^(L\['self'\]\.?|inner\.?)", "", paths[-1]) if paths else ""
    if frames:
        return Location(site, frames[-1][0], int(frames[-1][1]))
    return Location(site)


class Lowering:
    """Copies a traced graph into `out`. `constant_of` gives the constant behind a placeholder; the others are inputs.

    `training` is the mode in which the caller holds the module: with it, norms use the statistics of the batch.
    """

    def __init__(self, traced: fx.GraphModule, constants: Constants, constant_of: Mapping[str, str], *, training: bool) -> None:
        self.traced, self.constants, self.training = traced, constants, training
        self.out = fx.Graph()
        self.inputs: list[fx.Node] = []
        self._of: dict[fx.Node, Any] = {}
        self._read: dict[str, fx.Node] = {}
        self._top(constant_of)

    def _top(self, constant_of: Mapping[str, str]) -> None:
        for node in self.traced.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in constant_of:
                self._of[node] = constant_of[node.name]  # read where it is first used
            elif isinstance(node.meta.get("val"), torch.Tensor):
                self._of[node] = self._noted(self.out.placeholder(node.name), node)
                self.inputs.append(self._of[node])
            else:
                self._of[node] = node.meta.get("val")
        results = self._body(self.traced, self.traced.graph)
        floats = [r for r in results if isinstance(r, fx.Node)]
        self.out.output(tuple(floats))
        self._drop_unused()

    def _noted(self, new: fx.Node, old: fx.Node) -> fx.Node:
        note_shape(new, old.meta.get("val"))
        new.meta["location"] = location(old)
        return new

    def _constant(self, key: str) -> fx.Node:
        if key not in self._read:
            node = self.out.create_node("get_attr", key)
            constant = self.constants.found[key]
            node.meta.update(shape=constant.shape, dtype=constant.dtype, location=Location(key))
            if key in self.constants.complex:
                node = self.out.call_function(torch.ops.aten.view_as_complex.default, (node,))
                node.meta.update(shape=constant.shape[:-1], dtype=constant.dtype.to_complex(), location=Location(key))
            self._read[key] = node
        return self._read[key]

    def _value(self, argument: Any) -> Any:
        """What an argument of the traced graph has become in ours."""
        if isinstance(argument, fx.Node):
            found = self._of[argument]
            return self._constant(found) if isinstance(found, str) else found
        if isinstance(argument, (list, tuple)):
            items = [self._value(a) for a in argument]
            return type(argument)(items) if type(argument) in (list, tuple) else items
        if isinstance(argument, slice):
            return slice(self._value(argument.start), self._value(argument.stop), self._value(argument.step))
        if isinstance(argument, dict):
            return {k: self._value(v) for k, v in argument.items()}
        return argument

    def _body(self, owner: nn.Module, graph: fx.Graph) -> tuple[Any, ...]:
        """Copies the nodes of one graph and returns its outputs."""
        for node in graph.nodes:
            if node.op == "get_attr":
                self._attribute(owner, node)
            elif node.op == "call_function":
                self._call(owner, node)
            elif node.op == "output":
                result = self._value(node.args[0])
                return tuple(result) if isinstance(result, (list, tuple)) else (result,)
        return ()

    def _attribute(self, owner: nn.Module, node: fx.Node) -> None:
        value: Any = owner
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            self._of[node] = self.constants.add(str(node.target), "literal", value)
        else:
            self._of[node] = value

    def _call(self, owner: nn.Module, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", str(node.target))
        if name in _SWITCHES or name.endswith("_guards_fn"):
            self._of[node] = None
        elif name in _REGIONS:
            self._region(node, _REGIONS[name])
        elif node.target is operator.getitem and isinstance(self._value(node.args[0]), (list, tuple)):
            self._of[node] = self._value(node.args[0])[node.args[1]]  # a region's outputs are already apart
        else:
            new = self.out.call_function(node.target, self._value(node.args), self._value(node.kwargs))  # type: ignore[arg-type]
            self._noted(new, node)
            if isinstance(node.target, torch._ops.OpOverload):
                self._settle(new)
            self._of[node] = new
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                self._in_place(node)

    def _region(self, node: fx.Node, before: int) -> None:
        body = self._value(node.args[before])
        given = [self._of[a] if isinstance(a, fx.Node) else a for a in node.args[before + 1 :]]
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        self._of.update(zip(places, given, strict=True))
        self._of[node] = self._body(body, body.graph)

    def _in_place(self, node: fx.Node) -> None:
        """What reads the tensor after it was written to depends on the write."""
        written = node.args[0] if node.args else None
        if isinstance(written, fx.Node):
            result = self._of[node]
            before = self._of.get(written)
            for key, value in self._of.items():
                if value is before and before is not None:
                    self._of[key] = result
            if isinstance(before, str):
                self._of[written] = result

    def _settle(self, node: fx.Node) -> None:
        """Noise off, but for what is dropped always; norms with running statistics as training will see them."""
        name = base_name(node.target)  # type: ignore[arg-type]
        if name in _DROPOUTS and node.args[2] and certain(node.args[1]):
            node.target, node.args, node.kwargs = dropped, (node.args[0],), {}
        elif name in _DROPOUTS:
            node.args, node.kwargs = (node.args[0], 0.0, False), {}
        elif name == "scaled_dot_product_attention":
            node.args = tuple(0.0 if i == 4 and not certain(a) else a for i, a in enumerate(node.args))
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dropout_p" or certain(v)}
        elif name in _RECURRENT:
            node.args = tuple(0.0 if isinstance(a, float) and not certain(a) else a for a in node.args)
        elif name == "bernoulli" and len(node.args) > 1 and isinstance(node.args[1], float):
            # Stochastic depth keeps a branch with probability p and divides by p: its mean keeps the branch as it is.
            node.target = torch.ops.aten.full_like.default if node.args[1] > 0 else dropped
            node.args = node.args if node.args[1] > 0 else node.args[:1]
        elif name == "batch_norm":
            self._batch_norm(node)

    def _batch_norm(self, node: fx.Node) -> None:
        data, scale, shift, mean, variance, training, momentum, eps, *rest = list(node.args)
        shape: tuple[int, ...] = node.meta.get("shape") or ()
        single = len(shape) > 1 and shape[0] * (torch.Size(shape[2:]).numel() if len(shape) > 2 else 1) <= 1
        batch = (
            bool(training)
            if mean is None
            else (self.training or self._holds((mean, 0), (variance, 1)) or self._holds((scale, 1), (shift, 0)))
        )
        if batch and not single:
            node.args = (data, scale, shift, None, None, True, momentum, eps, *rest)
        elif mean is not None:
            node.args = (data, scale, shift, mean, variance, False, momentum, eps, *rest)

    def _holds(self, *constants: tuple[Any, int]) -> bool:
        """Whether every constant has one value throughout; None stands for that value.

        Running statistics at 0 and 1 have seen no data, scales at 1 and shifts at 0 no step of training, whatever data has
        passed: either way training will use the statistics of the batch.
        """
        for node, value in constants:
            if node is None:
                continue
            known = self.constants.found.get(getattr(node, "target", None))  # type: ignore[arg-type]
            if known is None or not bool((known.value() == value).all()):
                return False
        return True

    def _drop_unused(self) -> None:
        """Drops what nobody reads, updates of a module's own state included."""
        for node in reversed(list(self.out.nodes)):
            if node.users or node.op in ("output", "placeholder"):
                continue
            mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
            state = mutable and all(a.op == "get_attr" for a in node.all_input_nodes[:1])
            if not mutable or state:
                self.out.erase_node(node)

    def graph(self, names: Sequence[str], examples: tuple[torch.Tensor, ...], notes: tuple[str, ...], unused: Any) -> Graph:
        """The finished graph."""
        inputs = tuple(
            Input(name, tuple(node.meta["shape"]), node.meta["dtype"]) for name, node in zip(names, self.inputs, strict=False)
        )
        for name, node in zip(names, self.inputs, strict=False):
            if not location_of(node).site:
                node.meta["location"] = Location(name)  # torch's own name for it says nothing to who wrote forward
        read = {str(n.target) for n in self.out.nodes if n.op == "get_attr"}
        constants = {key: value for key, value in self.constants.found.items() if key in read}
        return Graph(self.out, constants, inputs, "module", tuple(unused(read)), notes, examples)
