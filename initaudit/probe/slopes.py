"""What is kept of the weights' gradients: numbers, taken of each as soon as the backward pass has it.

All gradients together are as large as the model. A weight that is used in one place is its parameter, and so is its gradient;
of parameters that are used in several, or that weights are made of, it is a sum that is complete with the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import Use, arguments, role_of
from initaudit.probe.lending import comes_and_goes, laid
from initaudit.probe.passes import Observer, Pass, Site, writes
from initaudit.probe.statistics import power
from initaudit.probe.trace import Units
from initaudit.probe.units import compare_units

# Elements from which it is worth an operator's run not to hold a gradient: 1 MiB.
RECALLED = 1 << 18


@dataclass(frozen=True)
class Slope:
    """The gradient of a weight at one place of use: its norm, and its units for each use that the consumer makes of it."""

    norm: float
    units: Mapping[Use, Units | None]


@dataclass(frozen=True)
class ParameterSlope:
    """The gradient of a parameter: its norm, and whether it is zero throughout."""

    norm: float
    zero: bool


@dataclass(eq=False)
class Group:
    """Places of use whose gradients make up those of the parameters `keys` together. `held` are gradients that have come."""

    sites: list[Site]
    keys: set[str]
    come: set[Site] = field(default_factory=set)
    held: dict[Site, Tensor] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is one weight in one place, which is the parameter itself."""
        return len(self.sites) == 1 and self.sites[0][1].op == "get_attr"


def constants_of(weight: fx.Node) -> tuple[str, ...]:
    """The keys of the constants that a weight is made of."""
    found, stack, seen = [], [weight], {weight}
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            found.append(str(node.target))
        for a in node.all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return tuple(sorted(found))


def groups_of(run: Pass) -> dict[Site, Group]:
    """The group of every place of use of a pass that has been run; whoever shares a parameter is in one."""
    of_key: dict[str, Group] = {}
    for site in run.leaves:
        keys = {k for k in constants_of(site[1]) if k in run.parameters} or {site[1].name}
        joined = Group([site], keys)
        for old in {id(g): g for k in sorted(keys) if (g := of_key.get(k)) is not None}.values():
            joined.sites += old.sites
            joined.keys |= old.keys
        for key in joined.keys:
            of_key[key] = joined
    groups = {id(g): g for g in of_key.values()}
    order = {site: i for i, site in enumerate(run.leaves)}
    for group in groups.values():
        group.sites.sort(key=order.__getitem__)
    return {site: group for group in groups.values() for site in group.sites}


class Recall(Observer):
    """Takes the gradient of a weight once more, from that at its consumer's output, which of few examples is small beside it.

    Whatever else the consumer needs it has saved, as long as the pass is kept. With `everything`, all weights that are large
    enough can be asked for, else only those with several places of use.
    """

    def __init__(self, *, everything: bool = False) -> None:
        self.everything = everything
        self.starts: dict[fx.Node, torch.autograd.graph.GradientEdge] = {}
        self.steep: dict[fx.Node, Tensor] = {}

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        """Notes where a consumer's own backward pass begins."""
        several = any(role_of(u).name == "getitem" for u in node.users)
        if not value.requires_grad or several or writes(node):
            return
        for source in node.all_input_nodes:
            leaf = run.leaves.get((node, source))
            if leaf is None or not (leaf.numel() >= RECALLED and leaf.numel() > value.numel()):
                continue
            if self.everything or sum(u not in run.constant for u in source.users) > 1:
                self.starts[node] = torch.autograd.graph.get_gradient_edge(value)

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        """Where a weight may be asked for."""
        return node in self.starts

    def gradient(self, run: Pass, node: fx.Node, gradient: Tensor) -> None:
        """Holds the gradient at a consumer's output."""
        self.steep[node] = gradient

    def knows(self, run: Pass, site: Site) -> bool:
        """Whether this gradient can be taken once more."""
        leaf = run.leaves[site]
        return site[0] in self.steep and leaf.numel() >= RECALLED and leaf.numel() > self.steep[site[0]].numel()

    def close(self) -> None:
        """Lets go of the pass."""
        self.starts.clear()
        self.steep.clear()

    def __call__(self, run: Pass, site: Site) -> Tensor:
        """The gradient at a place of use, as `backward` handed it over."""
        start, steep = self.starts[site[0]], self.steep[site[0]]
        with run.apart(unread=_is_product(run, site[0])):
            inlets: Any = [run.inlets[site]]
            (gradient,) = torch.autograd.grad([start], inlets, [steep], retain_graph=True)
        leaf = run.leaves[site]
        return laid(gradient, run.layouts.get(site, (leaf.size(), leaf.stride())))


def _is_product(run: Pass, node: fx.Node) -> bool:
    """Whether a call is a product of a signal and one matrix that is lent: a factor's gradient is made of the other factor."""
    lent = [a for a in node.all_input_nodes if a in run.weights.lent and len(run.weight_shape(a) or ()) > 1]
    return role_of(node).name in ("linear", "matmul", "gemm") and len(lent) == 1


class Sums:
    """Takes what `backward` hands over and tells `note` the gradient of each parameter, once it is complete.

    To be closed after the pass. Whatever `note` does not keep is gone.
    """

    def __init__(self, run: Pass, recall: Recall, note: Callable[[str, Tensor, Group], None]) -> None:
        self.run, self.recall, self.note = run, recall, note
        self.groups = groups_of(run)

    def __call__(self, site: Site, gradient: Tensor) -> None:
        """One gradient."""
        group = self.groups[site]
        if self.run.trims:
            comes_and_goes(gradient.nbytes)
        if group.plain:
            self.note(str(site[1].target), gradient, group)
            return
        group.come.add(site)
        if len(group.come) == len(group.sites):
            group.held[site] = gradient
            self._sum(group)
        elif not self.recall.knows(self.run, site):
            group.held[site] = gradient

    def close(self) -> None:
        """Sums what waits for places that no gradient reaches."""
        for group in {id(g): g for g in self.groups.values() if g.come}.values():
            self._sum(group)

    def _sum(self, group: Group) -> None:
        whole = self.run.summed(self._each(group), sorted(group.keys))
        group.come.clear()
        while whole:
            key, gradient = whole.popitem()
            self.note(key, gradient, group)

    def _each(self, group: Group) -> Iterator[tuple[Site, Tensor]]:
        for site in group.sites:
            if site in group.held:
                yield site, group.held.pop(site)
            elif site in group.come:
                yield site, self.recall(self.run, site)


class Slopes:
    """The numbers of each weight's gradient as `backward` hands it over; to be closed after that.

    With `hold`, `gradients` keeps those of the parameters.
    """

    def __init__(self, run: Pass, recall: Recall, *, hold: bool) -> None:
        self.run, self.hold = run, hold
        self.sites: dict[Site, Slope] = {}
        self.parameters: dict[str, ParameterSlope] = {}
        self.gradients: dict[str, Tensor] = {}
        self.sums = Sums(run, recall, self._note)

    def __call__(self, site: Site, gradient: Tensor) -> None:
        """One gradient, which is let go as soon as its sum has been taken."""
        self.sites[site] = Slope(power(gradient) ** 0.5, dict(self._units(*site, gradient)))
        self.sums(site, gradient)

    def close(self) -> None:
        """After the pass."""
        self.sums.close()

    def _note(self, key: str, gradient: Tensor, group: Group) -> None:
        norm = self.sites[group.sites[0]].norm if group.plain else power(gradient) ** 0.5
        # A norm of zero may be an underflow; what is not zero needs no second look.
        self.parameters[key] = ParameterSlope(norm, norm == 0 and not bool(gradient.any()))
        if self.hold:
            self.gradients[key] = gradient

    def _units(self, node: fx.Node, source: fx.Node, gradient: Tensor) -> Iterator[tuple[Use, Units | None]]:
        uses = [u for u in self.run.uses.get(node, ()) if u.weight is source]
        value = self.run.weights.get(source) if uses else None
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            return
        for use in uses:
            bound = arguments(node)
            bias = bound.get(use.use.bias) if use.use.bias is not None else None
            held = self.run.weights.get(bias) if isinstance(bias, fx.Node) else None
            yield use, compare_units(value, gradient, held if isinstance(held, Tensor) else None, use.use)
