"""Where the units of a layer end up: a pixel shuffle, or a reshape between two transposes, spreads them over places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.support import view

if TYPE_CHECKING:
    import torch
    from torch import fx

_LARGEST = 1 << 24  # numbers of a signal that is sent through once more, 64 MiB


def units_by_place(evidence: Evidence, layer: LayerEvidence) -> tuple[tuple[int, ...], ...]:
    """The units that a reader of the layer adds up at each place, where these are not the same units everywhere.

    Numbers that count the units are sent through whatever moves elements behind the layer, up to the layers that read them,
    and looked at along the axis over which these add up. Empty where all units stand at every place, where readers differ, or
    where what lies between is not followed.
    """
    from initaudit.graph.calls import weight_uses

    seen = view(evidence)
    start = seen.nodes.get(layer.pair.node)
    if evidence.graph is None or evidence.trace is None or start is None or start.name not in evidence.trace.signals:
        return ()
    shape = evidence.trace.signals[start.name].shape
    own = [u.use.unit_axis for u in weight_uses(start, seen.constant) if u.use.unit_axis is not None]
    if len(own) != 1 or math.prod(shape) > _LARGEST:
        return ()

    import torch

    axis = own[0] % len(shape)
    numbers = torch.arange(shape[axis], dtype=torch.float32)
    codes = numbers.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape).contiguous()
    found = {_groups(value, along) for value, along in _read(evidence, start, codes)}
    return found.pop() if len(found) == 1 else ()


def _read(evidence: Evidence, start: fx.Node, codes: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """What becomes of `codes` where layers read them, and the axis over which each adds up; a scalar where it is not followed.

    Numbers of other signals that are laid beside them are -1.
    """
    from initaudit.graph.calls import role_of, weight_uses

    constant = view(evidence).constant
    lost = codes.new_zeros(()), 0
    values, stack = {start: codes}, [start]
    while stack:
        node = stack.pop()
        for user in (u for u in node.users if u not in values):
            role = role_of(user) if user.op == "call_function" else None
            uses = weight_uses(user, constant) if role is not None else ()
            if role is None:
                yield lost
            elif uses and role.kind == "contraction":
                yield values[node], uses[0].use.unit_axis or 0
            elif role.kind == "pooling":
                yield values[node], 1  # whatever it averages, it does so for each channel
            elif role.kind in ("pointwise", "normalization"):
                values[user] = values[node]
                stack.append(user)
            elif role.kind in ("passthrough", "merge"):
                try:
                    values[user] = _moved(evidence, user, node, values[node])
                except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
                    yield lost
                else:
                    stack.append(user)
            else:
                yield lost


def _moved(evidence: Evidence, node: fx.Node, source: fx.Node, codes: torch.Tensor) -> torch.Tensor:
    """What a node that moves elements makes of the numbers in place of `source`."""
    import torch
    from torch import fx

    from initaudit.pair.evaluate import ConstantReader

    assert evidence.graph is not None
    assert evidence.trace is not None
    reader, constant, signals = ConstantReader(evidence.graph), view(evidence).constant, evidence.trace.signals

    def load(a: fx.Node) -> Any:
        if a is source:
            return codes
        return reader.value(a) if a in constant else torch.full(signals[a.name].shape, -1.0)

    with torch.no_grad():
        value = node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator]
    if not isinstance(value, torch.Tensor):
        raise TypeError("one of several parts is not followed")
    return value


def _groups(value: torch.Tensor, axis: int) -> tuple[tuple[int, ...], ...]:
    import torch

    if value.dim() == 0:
        return ()
    lines = value.movedim(axis, -1).reshape(-1, value.shape[axis])
    found = torch.unique(lines.sort(1).values, dim=0).long().tolist()
    groups = {tuple(u for u in units if u >= 0) for units in found} - {()}
    return tuple(sorted(groups)) if len(groups) > 1 else ()
