"""Virtual steps: does a parameter without a gradient get one once the others have moved?

A zero gradient is healthy where another zero explains it (the branch behind a zero gate, LoRA's A beside B = 0): that other
parameter moves in the first step, and the gradient is there in the second. Two zeros in series, or a dead ReLU, never move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from initaudit.graph.graph import Graph
from initaudit.probe.passes import Pass, backward, batch_of, cotangents

# A step as large as a hundredth of a parameter's own size, or of 0.01 where it is zero: enough to leave zero, too little to
# change what the network is. Adam's first step moves every element by 1e-3 however small it is, and so does this one.
_STEP, _SMALL = 0.01, 0.1
_STEPS = 2


def revived(
    graph: Graph,
    constant: frozenset[fx.Node],
    inputs: Sequence[Tensor],
    gradients: Mapping[str, Tensor],
    silent: Sequence[str],
    seed: int,
    device: torch.device | None,
) -> dict[str, int | None]:
    """For every silent parameter the step (1 or 2) after which its gradient is not zero, or None.

    The steps descend the same cotangent loss for which `gradients` were taken. The caller's weights are not touched.
    """
    shift: dict[str, Tensor] = {}
    after: dict[str, int | None] = dict.fromkeys(silent)
    current = gradients
    for step in range(1, _STEPS + 1):
        for key, gradient in current.items():
            move = _move(graph, key, gradient)
            if move is not None:
                shift[key] = shift[key] + move if key in shift else move
        run = Pass(graph, constant, device=device, shift=shift)
        run.run(*inputs)
        ends = run.ends()
        drawn = cotangents(ends, batch_of(inputs), torch.Generator().manual_seed(seed))
        current = run.parameter_gradients(backward(run, ends, drawn, keep=False))
        for key in silent:
            found = current.get(key)
            if after[key] is None and found is not None and bool(found.any()):
                after[key] = step
        if all(s is not None for s in after.values()):
            break
    return after


def _move(graph: Graph, key: str, gradient: Tensor) -> Tensor | None:
    """Half of the step along the gradient, half along its sign: SGD and Adam each move what the other might leave in place."""
    rms = gradient.double().square().mean().sqrt()
    if not torch.isfinite(rms) or rms == 0:
        return None
    value = graph.constants[key].value().to(gradient.device)
    size = float(value.double().square().mean().sqrt())
    scale = _STEP * (max(size, _SMALL) if size > 0 else 1.0)
    return -scale * 0.5 * ((gradient / rms).float() + gradient.sign())
