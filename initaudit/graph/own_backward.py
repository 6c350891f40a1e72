"""What a module's own autograd reaches: the graph of its operators does not show everything that forward does to gradients.

`torch.no_grad`, `inference_mode` and `.data` leave no operator behind, and a `torch.autograd.Function` (a straight-through
estimator, a surrogate gradient, a reversed one) is traced as what its forward does, and not as the backward that it brings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from initaudit.graph.from_torch import as_found, float_tensors, silenced, switch
from initaudit.graph.graph import OwnBackward


def own_backward(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> OwnBackward | None:
    """Runs forward as for evaluation and, where that misses a parameter, as for training; what both miss is missed.

    The module is left as it was. None where forward cannot be run as it stands.
    """
    if not any(p.requires_grad for p in module.parameters()):
        return OwnBackward(frozenset(), frozenset(), frozen=any(True for _ in module.parameters()))
    try:
        with as_found(module), silenced(), torch.enable_grad():
            switch(module, training=False)
            found = _reached(module, inputs, keywords)
            if found.missed:
                switch(module, training=True)
                again = _reached(module, inputs, keywords)
                found = OwnBackward(found.missed & again.missed, found.called, found.fed)
            return found
    except Exception:  # noqa: BLE001 - a stranger's forward raises what it likes; its trace has been told of it
        return None


def _reached(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> OwnBackward:
    names = {p: n for n, p in module.named_parameters() if p.requires_grad}
    called = set[nn.Module]()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda part, _: called.add(part))
    try:
        # What the operators save is dropped: no backward pass follows, and a plain one would hold all activations.
        with torch.autograd.graph.saved_tensors_hooks(_forget, _never):
            ends = [x for x in float_tensors(module(*inputs, **keywords)) if x.requires_grad]
    finally:
        hook.remove()
    used = frozenset(names[p] for part in called for p in part.parameters(recurse=False) if p in names)
    leaves, custom = set[Tensor](), False
    for node in _nodes(ends):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves.add(leaf)
        custom = custom or isinstance(node, torch.autograd.function.BackwardCFunction)
    if not custom:
        return OwnBackward(frozenset(n for p, n in names.items() if p not in leaves), used)
    # What lies inside such a function (a block that is computed again, say) shows in a real backward pass only.
    with _own_gradients(names) as fed:
        ends = [x for x in float_tensors(module(*inputs, **keywords)) if x.requires_grad]
        torch.autograd.backward(ends, [torch.randn_like(x) for x in ends])
    return OwnBackward(frozenset(names.values()) - fed.keys(), used, frozenset(n for n, some in fed.items() if some))


@contextlib.contextmanager
def _own_gradients(names: Mapping[nn.Parameter, str]) -> Iterator[dict[str, bool]]:
    """Inside, the parameters have no gradient; afterwards those that they had.

    Gives a record, by name, of whether the gradient that arrived was other than zero; where it arrives in parts (from blocks
    that are computed again), whether one of them was. Each is dropped as soon as it has been seen: together they are as large
    as the model.
    """
    fed: dict[str, bool] = {}
    held = [(p, p.grad) for p in names]

    def look(p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        if gradient is not None:
            name = names[p]  # type: ignore[index]
            fed[name] = fed.get(name, False) or bool(gradient.any())

    for p, _ in held:
        p.grad = None
    hooks = [p.register_post_accumulate_grad_hook(look) for p, _ in held]  # type: ignore[no-untyped-call]
    try:
        yield fed
    finally:
        for hook in hooks:
            hook.remove()
        for p, grad in held:
            p.grad = grad


def _forget(_: Tensor) -> None:
    return None


def _never(_: None) -> Tensor:
    raise RuntimeError("no backward pass was to follow")


def _nodes(ends: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of autograd's graph behind these tensors, once."""
    stack: list[Any] = [x.grad_fn for x in ends if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
