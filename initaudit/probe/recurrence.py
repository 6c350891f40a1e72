"""A recurrent layer along time: how large its state is at each step, and what of a gradient at the last step reaches each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import arguments, role_of, signal_inputs
from initaudit.probe.axes import first_tensor
from initaudit.probe.passes import Observer, Pass
from initaudit.probe.trace import TimeRecord

_STEPS = 64  # as many are kept, evenly picked with both ends


class TimeObserver(Observer):
    """Fills `records` while a pass runs: each recurrent layer is run once more, forward and back."""

    def __init__(self, seed: int) -> None:
        self.records: list[TimeRecord] = []
        self.generator = torch.Generator().manual_seed(seed + 2)

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        """Never."""
        return False

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        """Measures a recurrent layer."""
        if role_of(node).kind != "recurrent":
            return
        source = next((n for n in signal_inputs(node) if n not in run.constant), None)
        given = run.env.get(source) if source is not None else None
        if source is None or not isinstance(given, Tensor) or given.dim() != 3 or not given.is_floating_point():
            return
        # aten says `batch_first`, ONNX `layout`; both begin with the sequence where they do not say so.
        bound = arguments(node)
        along = 1 if bound.get("batch_first") or bound.get("layout") else 0
        measured = self._gradient(run, node, source, given, along) if given.shape[along] > 1 else None
        if measured is None:
            return
        states, gradient = measured
        others = [i for i in range(states.dim()) if i != along]
        signal = states.double().square().mean(others)
        steep = gradient.double().square().sum([i for i in range(3) if i != along])
        keep = torch.linspace(0, len(signal) - 1, min(_STEPS, len(signal))).round().long()
        self.records.append(
            TimeRecord(node.name, len(signal), tuple(signal.cpu()[keep].tolist()), tuple(steep.cpu()[keep].tolist()))
        )

    def _gradient(self, run: Pass, node: fx.Node, source: fx.Node, given: Tensor, along: int) -> tuple[Tensor, Tensor] | None:
        leaf = given.detach().clone().requires_grad_(True)

        def load(a: fx.Node) -> Any:
            value = run.weights[a] if a in run.constant else run.env[a]
            return leaf if a is source else value.detach() if isinstance(value, Tensor) else value

        with torch.enable_grad():
            args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
            result = first_tensor(node.target(*args, **kwargs))  # type: ignore[operator]
            if result is None or not result.requires_grad or result.dim() < 3 or result.shape[along] != given.shape[along]:
                return None
            last = result.select(along, result.shape[along] - 1)
            drawn = torch.randn(last.shape, generator=self.generator).to(last.device)
            (gradient,) = torch.autograd.grad((last * drawn).sum(), leaf)
        return result.detach(), gradient
