"""Does the output of an example depend on which others stand beside it in the batch, and where do examples meet?

One example is exchanged and everything else kept: whatever changes for the others came from it. Batch normalization does so by
design, and is held at what it made of the batch as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import role_of, signal_inputs
from initaudit.graph.graph import Graph
from initaudit.graph.reach import upstream
from initaudit.probe.axes import UNKNOWN, Axes, main_of
from initaudit.probe.passes import Pass, batch_of, writes

# A share of the largest number: what products summed in another order differ by is a hundredth of it.
_ROUNDING = 1e-4


def company(graph: Graph, constant: frozenset[fx.Node], inputs: Sequence[Tensor], seen: Pass, seed: int) -> str:
    """The name of the node at which examples first meet whose outputs then depend on each other; "" for none.

    `seen` is a pass over the same inputs, which knows the axes. Examples are counted by the first axis of all inputs: where
    inputs do not agree in it (the nodes and the edges of a graph), nothing is said. Rows and columns that both count examples
    (the similarities of a contrastive loss) are meant.
    """
    batch = batch_of(inputs)
    sizes = {int(x.shape[0]) for x in inputs if x.dim() > 0} - {1}
    changed = _exchanged(inputs, batch) if batch > 1 and sizes == {batch} else None
    if changed is None:
        return ""
    run = _Pair(graph, constant, changed, seen.axes, batch, seed, splits=False, device=seen.device)
    run.run(*inputs)
    hurt = [n for n, values in run.pairs.items() if _mixed(*values, batch)]
    if not hurt:
        return ""
    again = _Pair(graph, constant, changed, seen.axes, batch, seed, splits=True, device=seen.device)
    again.run(*inputs)
    behind = upstream(hurt)
    found = [n for n in graph.fx.nodes if n in behind and (n in again.met or _lost(n, seen.axes, constant))]
    return found[0].name if found else hurt[0].name


def _exchanged(inputs: Sequence[Tensor], batch: int) -> list[Tensor] | None:
    """The inputs with another example in the first one's place; None where all are the same."""
    whole = [x for x in inputs if x.dim() > 0 and x.shape[0] == batch]
    other = next((i for i in range(1, batch) if any(not torch.equal(x[i], x[0]) for x in whole)), None)
    if other is None:
        return None

    def exchange(x: Tensor) -> Tensor:
        return torch.cat([x[other : other + 1], x[1:]]) if x.dim() > 0 and x.shape[0] == batch else x

    return [exchange(x) for x in inputs]


class _Pair(Pass):
    """Runs a graph on two batches side by side, without gradients.

    `met` are the nodes at which examples are seen to meet; with `splits`, those that were not exchanged are put back there to
    what they are without it. `pairs` are both values of each output.
    """

    def __init__(
        self,
        graph: Graph,
        constant: frozenset[fx.Node],
        changed: Sequence[Tensor],
        known: dict[fx.Node, Axes],
        batch: int,
        seed: int,
        *,
        splits: bool,
        device: torch.device | None,
    ) -> None:
        super().__init__(graph, constant, device=device)
        self.changed = iter(changed)
        self.known, self.batch, self.seed, self.splits = known, batch, seed, splits
        self.other: dict[fx.Node, Any] = {}
        self.met: set[fx.Node] = set()
        self.pairs: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def _trained(self, key: str) -> bool:
        return False

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = next(self.args_iter)
        return value.detach().clone() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """The value for the batch as it is; that for the other is kept beside it."""
        torch.manual_seed(self.seed)  # what a node draws is the same for both
        if n.op == "output":
            mine = [(a, main_of(a, self.env.get(a)), main_of(a, self.other.get(a))) for a in n.all_input_nodes]
            self.pairs = {a: (x, y) for a, x, y in mine if isinstance(x, Tensor) and isinstance(y, Tensor)}
            return super().run_node(n)
        value = super().run_node(n)
        if n in self.constant or n in self.missing:
            return value
        if n.op == "placeholder":
            self.other[n] = next(self.changed).detach().clone()
        else:
            torch.manual_seed(self.seed)
            first = self.env
            self.env = {a: self.other.get(a, first.get(a)) for a in n.all_input_nodes}
            try:
                self.other[n] = super().run_node(n)
            finally:
                self.env = first
            if n in self.missing:
                return value
            self._compare(n, value)
        for gone in self.user_to_last_uses.get(n, ()):
            self.other.pop(gone, None)
        return value

    def _compare(self, n: fx.Node, value: Any) -> None:
        mine, other = main_of(n, value), main_of(n, self.other[n])
        if not isinstance(mine, Tensor) or not isinstance(other, Tensor) or mine.shape != other.shape:
            return
        if role_of(n).name == "batch_norm":
            self.other[n] = self._held(n, mine, other)
            return
        axes = self.known.get(n, UNKNOWN)
        if not self.splits or axes.batch is None or axes.examples != self.batch:
            return
        own = _of_first(mine, axes)
        if bool((differs(mine, other) & ~own).any()):
            self.met.add(n)
            if value is mine and not writes(n):  # of several results each that is read comes by itself
                self.other[n] = torch.where(own, other, mine)

    def _held(self, n: fx.Node, mine: Tensor, other: Tensor) -> Tensor:
        """What a norm that scales and shifts each channel makes of the other batch, scaled and shifted as for this one."""
        source = signal_inputs(n)[0]
        x, changed = (main_of(source, env.get(source)) for env in (self.env, self.other))
        if not isinstance(x, Tensor) or not isinstance(changed, Tensor) or x.shape != mine.shape or x.dim() < 2:
            return other
        over = [i for i in range(x.dim()) if i != 1]
        a, b = x.double(), mine.double()
        centred = a - a.mean(over, keepdim=True)
        slope = (centred * b).sum(over, keepdim=True) / centred.square().sum(over, keepdim=True).clamp_min(1e-300)
        moved = mine + ((changed.double() - a) * slope).to(mine.dtype)
        return torch.where(x == changed, mine, moved)


def differs(mine: Tensor, other: Tensor) -> Tensor:
    """Where two values differ by more than rounding."""
    if not mine.is_floating_point():
        return mine != other
    finite = torch.where(mine.isfinite(), mine, torch.zeros_like(mine)).abs()
    return ~((mine - other).abs() <= _ROUNDING * finite.max()) & (mine != other) if mine.numel() else mine != other


def _of_first(value: Tensor, axes: Axes) -> Tensor:
    """A mask, broadcast to the shape of `value`, of what belongs to the first example."""
    axis = axes.batch or 0
    places = torch.arange(value.shape[axis], device=value.device) // axes.inner % axes.examples == 0
    return places.view([-1 if i == axis else 1 for i in range(value.dim())])


def _mixed(mine: Tensor, other: Tensor, batch: int) -> bool:
    """Whether an output with one row an example has other rows changed than the first one, and not in one column alone."""
    if mine.shape != other.shape or mine.dim() == 0 or mine.shape[0] != batch:
        return False
    changed = differs(mine, other)[1:]
    if mine.dim() > 1 and mine.shape[1] == batch:
        changed = changed[:, 1:]
    return bool(changed.any())


def _lost(n: fx.Node, known: dict[fx.Node, Axes], constant: frozenset[fx.Node]) -> bool:
    """Whether a node takes signals whose examples are known apart, and none of its own are."""
    before = [known[a] for a in n.all_input_nodes if a in known and a not in constant]
    return n.op == "call_function" and n in known and known[n].batch is None and any(a.batch is not None for a in before)
