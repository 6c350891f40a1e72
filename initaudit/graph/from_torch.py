"""A PyTorch module as a graph: torch.export, which brings module paths and source lines, or a trace by running."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from initaudit.errors import UnreadableModel
from initaudit.graph.graph import Graph
from initaudit.graph.lower import ConstantKind, Constants, Lowering
from initaudit.graph.parcels import closed, opened
from initaudit.meter import Meter, Say, silent

_PREFIX = "inner."
# Numbers that forward takes out of tensors: torch.export makes a symbol of each, at 5 to 20 milliseconds. More are seconds of
# waiting for what running the module shows as well: no gradient passes through a number.
_NUMBERS = 100
_MANY = f"forward takes more than {_NUMBERS} numbers out of tensors"
_TAKE_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
_TAKES = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")
_PARTS = ("unbind", "__iter__")
# A trace as for training would meet the same numbers.
_AGAIN = (_MANY, "GuardOnDataDependent")


class _Flat(nn.Module):
    """Calls the module and returns its floating-point outputs as one flat tuple, whatever object they came in.

    Caches and other objects that hold tensors but are not outputs of the computation are left out.
    """

    def __init__(self, inner: nn.Module, keywords: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.keywords = inner, tuple(keywords)

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        args = closed(args)
        split = len(args) - len(self.keywords)
        result = self.inner(*args[:split], **dict(zip(self.keywords, args[split:], strict=True)))
        found = tuple(float_tensors(result))
        if not found:
            raise UnreadableModel(type(self.inner).__name__, "forward returned no floating-point tensor", "at least one")
        return found


def float_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of nested containers, dataclasses and distributions, in order."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from float_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from float_tensors(item)
    elif isinstance(value, torch.distributions.Distribution):
        # Its parameters as forward gave them; those that it would compute from them (probs of logits) are properties.
        yield from float_tensors([v for k, v in vars(value).items() if k in value.arg_constraints])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from float_tensors(getattr(value, entry.name))


def switch(module: nn.Module, *, training: bool) -> None:
    """Evaluation or training mode, of whatever has one: an exported program stays in that in which it was exported."""
    with contextlib.suppress(NotImplementedError):
        module.train(training)


@contextlib.contextmanager
def as_found(module: nn.Module) -> Iterator[None]:
    """Puts back what tracing may change: training flags, buffers, gradients, the random state, a config's cache switch."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    config = getattr(module, "config", None)
    cached = getattr(config, "use_cache", None)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if cached is True:
                config.use_cache = False  # type: ignore[union-attr]
            # The fused encoder layer hides the weights from the graph.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if cached is True:
            config.use_cache = cached  # type: ignore[union-attr]
        for m, training in modes:
            m.training = training
        with torch.no_grad():
            for b, value in buffers:
                b.copy_(value)


@contextlib.contextmanager
def _told(module: nn.Module, say: Say) -> Iterator[None]:
    """Inside, `say` is told which layer a trace has come to."""
    names = {part: name for name, part in module.named_modules()}
    meter = Meter(say, "tracing", "layers")

    def reached(part: nn.Module, _: Any) -> None:
        if part in names:
            meter(names[part])

    hook = nn.modules.module.register_module_forward_pre_hook(reached)
    try:
        yield
    finally:
        hook.remove()


def from_module(
    module: nn.Module,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
    *,
    say: Say = silent,
    dropping: bool = False,
) -> Graph:
    """The graph of `module` called with `inputs` (nested structures, and objects that carry tensors, become placeholders).

    Dropout and other noise are off; norms with running statistics that training will replace by those of the batch use the
    batch's (see `lower`). The module is traced as for evaluation, and as for training where only that reaches all parameters
    (auxiliary heads); as it is held where it is known to be `dropping` with certainty (see `noise`), which only training shows.
    `say` is told where the trace is. Raises UnreadableModel where forward cannot be run on these inputs.
    """
    inputs, keywords = opened((tuple(inputs), dict(keywords or {})))
    flat, _ = pytree.tree_flatten((inputs, keywords))
    training = module.training
    with as_found(module), _told(module, say):
        if dropping:
            with contextlib.suppress(UnreadableModel):
                graph = _trace(module, inputs, keywords, flat, training)
                if not graph.notes:
                    return graph
        switch(module, training=False)
        graph = _trace(module, inputs, keywords, flat, training)
        if graph.unused and not any(sign in note for sign in _AGAIN for note in graph.notes):
            # An auxiliary head that only training uses is not an unused parameter.
            switch(module, training=True)
            with contextlib.suppress(UnreadableModel):
                second = _trace(module, inputs, keywords, flat, training)
                # A trace by running would fix what training draws at random (masks, dropped layers) as it fell this once.
                graph = second if len(second.unused) < len(graph.unused) and not second.notes else graph
    return graph


def _trace(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any], flat: list[Any], training: bool) -> Graph:
    wrapped = _Flat(module, list(keywords))
    wrapped.training = module.training
    args = (*inputs, *keywords.values())
    constants = Constants(module)
    notes: tuple[str, ...] = ()
    try:
        with silenced(), _FewNumbers():
            program = torch.export.export(wrapped, args, strict=False)
        if _levels(program.graph_module):
            raise NotImplementedError("levels of torch.func transforms are no operators")
    except UnreadableModel:
        raise
    except Exception as error:  # noqa: BLE001 - torch.export raises whatever the traced code raises; running it decides
        traced = _by_running(wrapped, args, error)
        of = _state_placeholders(traced, wrapped, constants)
        notes = (f"torch.export could not trace this module ({_first_line(error)}); traced by running it instead",)
    else:
        traced = program.graph_module
        of = _lifted_placeholders(program, constants)
    lowering = Lowering(traced, constants, of, training=training)

    def unused(read: Set[str]) -> list[str]:
        reached = read | {tied for key in read if key in constants.found for tied in constants.found[key].tied}
        return [name for name, p in module.named_parameters() if p.requires_grad and name not in reached]

    examples = tuple(v for v in flat if isinstance(v, torch.Tensor))
    return lowering.graph(_names(module, inputs, keywords), examples, notes, unused)


def _lifted_placeholders(program: torch.export.ExportedProgram, constants: Constants) -> dict[str, str]:
    """The constants behind the placeholders that torch.export lifted out of the module."""
    signature, of = program.graph_signature, {}
    held: Mapping[str, Any] = {**program.constants, **program.state_dict}
    groups: tuple[tuple[Mapping[str, str], ConstantKind], ...] = (
        (signature.inputs_to_parameters, "parameter"),
        (signature.inputs_to_buffers, "buffer"),
        (signature.inputs_to_lifted_tensor_constants, "literal"),
    )
    for group, kind in groups:
        for placeholder, name in group.items():
            of[placeholder] = constants.add(name.removeprefix(_PREFIX), kind, held[name])
    return of


def _state_placeholders(traced: fx.GraphModule, wrapped: nn.Module, constants: Constants) -> dict[str, str]:
    """make_fx's first placeholders are the parameters and buffers, in the order in which they were given."""
    state = {
        **{n: ("parameter", p) for n, p in wrapped.named_parameters()},
        **{n: ("buffer", b) for n, b in wrapped.named_buffers()},
    }
    places = [n for n in traced.graph.nodes if n.op == "placeholder"]
    of = {}
    for place, (name, (kind, value)) in zip(places, state.items(), strict=False):
        of[place.name] = constants.add(name.removeprefix(_PREFIX), "parameter" if kind == "parameter" else "buffer", value)
    return of


def _by_running(wrapped: nn.Module, args: tuple[Any, ...], cause: Exception) -> fx.GraphModule:
    """A trace of the operators that one real call executes: data-dependent control flow takes the branch it takes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    state = {**dict(wrapped.named_parameters()), **dict(wrapped.named_buffers())}
    if any(isinstance(part, torch.jit.ScriptModule) for part in wrapped.modules()):
        # Once TorchScript has seen values that need gradients, it keeps a plan for such values that takes these gradients
        # itself, behind a detach; for others it runs the operators as they are written.
        state = {name: value.detach() for name, value in state.items()}

    def call(state: dict[str, torch.Tensor], *tensors: Any) -> Any:
        return torch.func.functional_call(wrapped, state, tensors)

    def trace(whole: bool) -> fx.GraphModule:
        made: fx.GraphModule = make_fx(
            call, pre_dispatch=whole, tracing_mode="real", record_module_stack=True, _error_on_data_dependent_ops=False
        )(state, *args)
        return made

    try:
        # Whole operators, as the module calls them; of gradients and of transforms (torch.vmap) what they come to.
        with silenced(), _Gradients() as seen:
            traced = trace(True)
            if seen.taken or _levels(traced):
                traced = _without_saved(trace(False))
            return traced
    except UnreadableModel:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the traced code raises is the caller's to mend
        name = type(wrapped.inner).__name__
        raise UnreadableModel(
            name, f"forward cannot be traced: {_first_line(error)}", advice="give example inputs that forward accepts"
        ) from cause


def _levels(traced: fx.GraphModule) -> bool:
    """Whether a trace shows the levels of torch.func transforms, or tensors inside them, instead of operators."""
    for node in traced.graph.nodes:
        if node.users and getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
            return True
        held = getattr(traced, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(held):
            return True
    return False


class _Gradients(TorchFunctionMode):
    """Notes whether forward takes gradients itself, and marks what it detaches, as autograd detaches tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken = self.taken or func in _TAKE_GRADIENTS
        result = func(*args, **(kwargs or {}))
        return torch.ops.aten.alias.default(result) if getattr(func, "__name__", "") == "detach" else result


def _without_saved(traced: fx.GraphModule) -> fx.GraphModule:
    """The trace of a backward pass without the detaching of what the forward pass saved for it: gradients go through that."""
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten.detach.default and not any(
            u.target is torch.ops.aten.alias.default for u in node.users
        ):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    return traced


class _FewNumbers(TorchFunctionMode):
    """Inside, forward may take so many numbers out of tensors, and no gradients; raises ValueError where it takes more.

    A line that is taken apart into single values counts at once: each of them costs a node before it is a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TAKE_GRADIENTS:
            raise ValueError("forward takes gradients")
        name = getattr(func, "__name__", "")
        single = name in _PARTS and args and isinstance(args[0], torch.Tensor) and args[0].dim() == 1
        if single and args[0].numel() > _NUMBERS:
            raise ValueError(_MANY)
        if name in _TAKES and args and isinstance(args[0], torch.Tensor):
            self.taken += args[0].numel()
            if self.taken > _NUMBERS:
                raise ValueError(_MANY)
        return func(*args, **(kwargs or {}))


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else 'no message'}"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """torch.export reports its difficulties through loggers, warnings and whole graphs printed; ours go into the report."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _names(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> list[str]:
    """A name for every flat tensor input: the parameter of forward that it belongs to."""
    try:
        known = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        known = []
    names = []
    entries = [(known[i] if i < len(known) else f"input_{i}", v) for i, v in enumerate(inputs)] + list(keywords.items())
    for name, value in entries:
        leaves = pytree.tree_leaves(value)
        names += [name] if len(leaves) == 1 else [f"{name}.{i}" for i in range(len(leaves))]
    return names
