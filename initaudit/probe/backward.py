"""Backward passes over a graph that has been run: to the weights, along the signals alone, on to the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from initaudit.probe.passes import Pass, Site


def leading(ends: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
    """One number whose gradient at each end is what is given for it.

    To compare the shape of a gradient that it is handed, torch imports sympy, a quarter of what it takes to import itself.
    """
    with torch.enable_grad():
        # For a complex z, torch's gradient g is that of Re(z conj(g)); a real number is its own conjugate.
        return torch.stack([(z * g.conj()).sum().real for z, g in zip(ends, given, strict=True)]).sum()


def backward(
    run: Pass, ends: list[Tensor], given: list[Tensor], *, keep: bool, take: Callable[[Site, Tensor], None] | None = None
) -> dict[Site, Tensor]:
    """The gradient at every leaf that the outputs depend on. With `keep`, another backward pass can follow.

    `take` is handed each gradient as soon as it is there, the last weight's first, and none is returned: all of them together
    are as large as the model. As in training, the pass ends at the first weights; `on_to_inputs` takes it from there to the
    inputs. Only where a way from the inputs to the outputs leads past all weights, all of it is gone at once.
    """
    found: dict[Site, Tensor] = {}
    to = found.__setitem__ if take is None else take
    leaves = {site: leaf for site, leaf in run.leaves.items() if leaf.requires_grad}
    wanted = [*leaves.values(), *(run.inputs if _lead_past_weights(run) else [])]
    if run.lending is not None:
        run.lending.take = to
        wanted += [run.lending.anchor] if len(leaves) < len(run.leaves) else []
    hooks = []
    for site, leaf in leaves.items():
        hooks.append(leaf.register_post_accumulate_grad_hook(_hands_over(site, to)))  # type: ignore[no-untyped-call]
    try:
        if ends and wanted:
            torch.autograd.backward(leading(ends, given), retain_graph=keep, inputs=wanted)
    finally:
        for hook in hooks:
            hook.remove()
        if run.lending is not None:
            run.lending.take = None
    for leaf in run.inputs:
        leaf.grad = None
    return {site: found[site] for site in run.leaves if site in found}


def _hands_over(site: Site, to: Callable[[Site, Tensor], None]) -> Callable[[Tensor], None]:
    def hand_over(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            to(site, gradient)

    return hand_over


def _lead_past_weights(run: Pass) -> bool:
    """Whether a way from the inputs does not lead through the one result of each first node that a weight takes part in."""
    return run.several or any(
        u.op == "output" or (u in run.trained and u not in run.roots) for n in run.upstream for u in n.users
    )


def on_to_inputs(run: Pass) -> None:
    """Takes the gradient of a `backward` that was kept on, from the first weights to the inputs: observers see it there."""
    starts = [n for n in run.copies if n in run.steep]
    if starts and not _lead_past_weights(run):
        start = leading([run.copies[n] for n in starts], [run.steep[n] for n in starts])
        torch.autograd.grad(start, run.inputs, retain_graph=True, allow_unused=True)
    run.steep.clear()
    run.copies.clear()


def through_signals(run: Pass, ends: list[Tensor], given: list[Tensor]) -> None:
    """A backward pass along the signals alone: every observer sees its gradients, no weight's gradient is computed.

    That is a third of the arithmetic of a forward and backward pass, where `backward` costs two thirds.
    """
    if ends and run.roots:
        torch.autograd.grad(leading(ends, given), list(run.roots.values()), allow_unused=True)


def pushed_by_reverse(
    results: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What a change of the leaves along `directions` does to each result, by reverse mode taken twice; None where nothing.

    Jᵀu is linear in u, so its derivative in u along v is J v. Raises what torch raises where an operator's backward pass has no
    derivative of its own. To be called with gradients enabled.
    """
    weights = [torch.zeros_like(r, requires_grad=True) for r in results]
    back = torch.autograd.grad(results, leaves, weights, create_graph=True, allow_unused=True)
    used = [(g, v) for g, v in zip(back, directions, strict=True) if g is not None]
    return torch.autograd.grad([g for g, _ in used], weights, [v for _, v in used], allow_unused=True)
