"""The Jacobian's gain in forward mode: a random direction of the input pushed through the graph, edge by edge.

A tangent t = J v says what a small change v of the input becomes, as the gradient Jᵀg says what a small change of a signal does
to the output. Both see one matrix: for independent N(0, 1) entries E|J v|² = E|Jᵀ u|² = E (uᵀ J v)² = |J|² (Hutchinson 1990):
so |J v|² / |v|² is |J|² over the inputs' number and the gain of the backward pass is |J|² over that of the outputs.

Every operator is differentiated by torch's dual numbers (Griewank & Walther 2008, chapter 3), and one without them by reverse
mode taken twice: Jᵀu is linear in u, so its derivative in u, along v, is J v. An operator that has neither is named, and what
lies downstream of it is not measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad as forward
from torch.nn.attention import SDPBackend, sdpa_kernel

from initaudit.graph.calls import role_of
from initaudit.graph.constness import constant_nodes
from initaudit.graph.execute import Executor
from initaudit.graph.graph import Graph
from initaudit.probe.axes import first_tensor, main_of
from initaudit.probe.backward import pushed_by_reverse
from initaudit.probe.passes import FAILURES, single, writes
from initaudit.probe.run import floated, undisturbed
from initaudit.probe.statistics import power
from initaudit.probe.trace import Trace

_SEED = 4  # apart from the probe's other draws


@dataclass(frozen=True)
class ForwardGains:
    """What a direction drawn from N(0, 1) at the inputs becomes: of integers, at the rows that embeddings look up for them.

    `moment2` is the tangent's second moment at each data node, 0 where nothing of the input arrives. `blocks` holds |t|² at the
    end over |t|² at the start of each block of the trace's measures, `gain` the same end to end; None where either is not known
    or the start's is 0. `missing` maps the nodes whose tangent is not known to the reason.
    """

    gain: float | None
    blocks: tuple[float | None, ...]
    moment2: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)


class Tangents(Executor):
    """Runs `graph` in float32 on dual numbers. To be used inside `duals`, once."""

    def __init__(
        self, graph: Graph, constant: frozenset[fx.Node], differentiable: frozenset[str], seed: int, device: torch.device | None
    ) -> None:
        super().__init__(graph, device=device)
        self.constant, self.differentiable = constant, differentiable
        self.generator = torch.Generator().manual_seed(seed + _SEED)
        self.size: dict[str, float] = {}
        self.elements: dict[str, int] = {}
        self.missing: dict[str, str] = {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The constant in float32."""
        value: Tensor = single(super().get_attr(target, args, kwargs))
        return value.detach()

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An input; one of numbers with a direction."""
        value = super().placeholder(target, args, kwargs)
        # A copy, because the graph may write to its input.
        return self._with_direction(value) * 1 if isinstance(value, Tensor) and value.is_floating_point() else value

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """The arguments of `n`: copies of weights where it would write to them."""

        def load(node: fx.Node) -> Any:
            value = self.env[node]
            return value.clone() if isinstance(value, Tensor) and node in self.constant and writes(n) else value

        return fx.node.map_arg(args, load)

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; what has no derivative is missing from there on."""
        if n.op == "output":
            return None
        lost = next((a for a in n.all_input_nodes if a.name in self.missing), None)
        if lost is not None:
            self.missing[n.name] = f"downstream of {lost.name}"
            return None
        try:
            value = single(self._run(n))
        except FAILURES as error:
            self.missing[n.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return None
        return value if n in self.constant else self._look(n, value)

    def _run(self, n: fx.Node) -> Any:
        # The fused kernels of recurrent layers have no forward mode, those that they replace have.
        plain = n.op == "call_function" and role_of(n).kind == "recurrent"
        try:
            with torch.backends.mkldnn.flags(enabled=False) if plain else contextlib.nullcontext():
                return super().run_node(n)
        except (RuntimeError, NotImplementedError):
            if n.op != "call_function" or writes(n):
                raise
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return twice_reversed(lambda a, k: self.call_function(n.target, a, k), args, kwargs)

    def _look(self, n: fx.Node, value: Any) -> Any:
        """Notes the tangent of a data node's value, and gives one to what an embedding looked up."""
        signal = first_tensor(main_of(n, value))
        if signal is None:
            return value
        tangent = forward.unpack_dual(signal).tangent  # type: ignore[no-untyped-call]
        if tangent is None and isinstance(value, Tensor) and self._looks_up(n):
            value = self._with_direction(value)
            tangent = forward.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
        if tangent is None and n.name in self.differentiable and any(self.size.get(a.name) for a in n.all_input_nodes):
            # Reverse mode has found a way through: that nothing arrives would be wrong.
            self.missing[n.name] = "the operator keeps no tangent"
            return None
        self.size[n.name] = 0.0 if tangent is None else power(tangent)
        self.elements[n.name] = signal.numel()
        return value

    def _looks_up(self, n: fx.Node) -> bool:
        return (
            n.op == "call_function"
            and role_of(n).kind == "embedding"
            and any(a not in self.constant and isinstance(self.env.get(a), Tensor) for a in n.all_input_nodes)
        )

    def _with_direction(self, value: Tensor) -> Tensor:
        drawn = torch.randn(tuple(value.shape), generator=self.generator).to(value.device)
        made: Tensor = forward.make_dual(value.detach().clone().float(), drawn)  # type: ignore[no-untyped-call]
        return made


def twice_reversed(call: Any, args: Any, kwargs: Any) -> Any:
    """The value of `call(args, kwargs)` with its tangents, from those of the arguments, by reverse mode taken twice.

    Raises what torch raises where reverse mode cannot be taken twice.
    """
    leaves: list[Tensor] = []
    tangents: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        value, tangent = forward.unpack_dual(x)  # type: ignore[no-untyped-call]
        if tangent is None:
            return value.detach()
        leaves.append(value.detach().clone().requires_grad_(True))
        tangents.append(tangent)
        return leaves[-1]

    plain_args, plain_kwargs = torch.utils._pytree.tree_map(leaf, (tuple(args), dict(kwargs)))
    with torch.enable_grad():
        value = call(plain_args, plain_kwargs)
        many = isinstance(value, (tuple, list))
        results = list(value) if many else [value]
        moving = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if not leaves or not moving:
            raise NotImplementedError("no derivative in either mode")
        along = pushed_by_reverse(moving, leaves, tangents)
    found = {id(r): t for r, t in zip(moving, along, strict=True) if t is not None}

    def dual(x: Any) -> Any:
        plain = x.detach() if isinstance(x, Tensor) else x
        return forward.make_dual(plain, found[id(x)].detach()) if id(x) in found else plain  # type: ignore[no-untyped-call]

    return type(value)([dual(r) for r in results]) if many else dual(value)


@contextlib.contextmanager
def duals(seed: int, graph: Graph) -> Iterator[None]:
    """Where `Tangents` runs: one dual level, attention by kernels that have a forward mode, the caller's state kept."""
    with undisturbed(seed, graph), torch.no_grad(), forward.dual_level(), sdpa_kernel(SDPBackend.MATH):
        yield


def forward_gains(
    graph: Graph, inputs: Sequence[Tensor], trace: Trace, *, seed: int = 0, device: torch.device | str | None = None
) -> ForwardGains:
    """Pushes one direction for each example through `graph` on the inputs that `trace` is of; `seed` draws it.

    The caller's weights, buffers and random state are left as they were.
    """
    place = None if device is None else torch.device(device)
    given = frozenset(name for name, s in trace.signals.items() if s.gradient_moment2)
    with duals(seed, graph):
        run = Tangents(graph, constant_nodes(graph.fx), given, seed, place)
        run.run(*floated(inputs, place))
    blocks = trace.measures.blocks if trace.measures is not None else ()

    def gain(start: str, end: str) -> float | None:
        before, after = run.size.get(start), run.size.get(end)
        ratio = after / before if before and after is not None else math.nan
        return ratio if math.isfinite(ratio) else None

    moments = {name: size / run.elements[name] for name, size in run.size.items() if run.elements[name]}
    whole = gain(blocks[0].start, blocks[-1].end) if blocks else None
    return ForwardGains(whole, tuple(gain(b.start, b.end) for b in blocks), moments, run.missing)
