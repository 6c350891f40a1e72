"""What a module's own autograd reaches: the graph of its operators does not show everything that forward does to gradients.

`torch.no_grad`, `inference_mode` and `.data` leave no operator behind, and a `torch.autograd.Function` (a straight-through
estimator, a surrogate gradient, a reversed one) is traced as what its forward does, and not as the backward that it brings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from initaudit.graph.from_torch import as_found, float_tensors, silenced, switch
from initaudit.graph.graph import OwnBackward, Stray
from initaudit.graph.outside import held_outside


class _Wanted(Exception):
    """A backward pass asks for what was not kept."""


def own_backward(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> OwnBackward | None:
    """Runs forward as for evaluation and, where that misses a parameter, as for training; what both miss is missed.

    Tensors that either reaches beside the parameters are strays. The module is left as it was. None where forward cannot be run
    as it stands.
    """
    frozen = not any(p.requires_grad for p in module.parameters())
    if frozen and not held_outside(module):
        return OwnBackward(frozenset(), frozenset(), frozen=any(True for _ in module.parameters()))
    try:
        with as_found(module), silenced(), torch.enable_grad():
            switch(module, training=False)
            found = _reached(module, inputs, keywords)
            if found.missed:
                switch(module, training=True)
                again = _reached(module, inputs, keywords)
                strays = tuple(dict.fromkeys((*found.strays, *again.strays)))
                found = OwnBackward(found.missed & again.missed, found.called, found.fed, strays=strays)
            return replace(found, frozen=frozen and any(True for _ in module.parameters()))
    except Exception:  # noqa: BLE001 - a stranger's forward raises what it likes; its trace has been told of it
        return None


def _reached(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> OwnBackward:
    names = {p: n for n, p in module.named_parameters() if p.requires_grad}
    called = set[nn.Module]()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda part, _: called.add(part))
    try:
        leaves, custom = _leaves(module, inputs, keywords)
    finally:
        hook.remove()
    used = frozenset(names[p] for part in called for p in part.parameters(recurse=False) if p in names)
    strays = _strays(module, inputs, keywords, leaves)
    if not custom:
        return OwnBackward(frozenset(n for p, n in names.items() if p not in leaves), used, strays=strays)
    # What lies inside such a function (a block that is computed again, say) shows in a real backward pass only.
    with _own_gradients(names) as fed:
        ends = [x for x in float_tensors(module(*inputs, **keywords)) if x.requires_grad]
        torch.autograd.backward(ends, [torch.randn_like(x) for x in ends])
    some = frozenset(n for n, other in fed.items() if other)
    return OwnBackward(frozenset(names.values()) - fed.keys(), used, some, strays=strays)


def _leaves(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[dict[Tensor, None], bool]:
    """The leaves that autograd reaches from the outputs, in its order; and whether it goes through a function of its own."""
    # What the operators save is dropped: no backward pass follows, and a plain one would hold all activations.
    try:
        with torch.autograd.graph.saved_tensors_hooks(_forget, _never):
            results = module(*inputs, **keywords)
    except _Wanted:  # forward takes gradients itself
        results = module(*inputs, **keywords)
    ends = [x for x in float_tensors(results) if x.requires_grad]
    leaves, custom = dict[Tensor, None](), False
    for node in _nodes(ends):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves[leaf] = None
        custom = custom or isinstance(node, torch.autograd.function.BackwardCFunction)
    return leaves, custom


def _strays(
    module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any], leaves: Collection[Tensor]
) -> tuple[Stray, ...]:
    """What of these leaves is neither a parameter nor an input, and was there before forward or is drawn by it each time.

    What forward makes of its inputs (a position that forces are the gradient of) is another tensor in a second call, and no
    layer is drawn for it.
    """
    given = {id(x) for x in pytree.tree_leaves((inputs, dict(keywords)))}
    known = {id(p) for p in module.parameters()} | given
    other = [x for x in leaves if id(x) not in known]
    if not other:
        return ()
    names = held_outside(module)
    reached = {id(x) for x in other}
    found = [Stray(name, tuple(x.shape)) for x, name in names.items() if id(x) in reached]
    if unnamed := [x for x in other if x not in names]:
        again = [x for x in _leaves(module, inputs, keywords)[0] if id(x) not in known and x not in names]
        kept = {id(x) for x in again}
        found += [Stray("", tuple(x.shape)) for x in unnamed if id(x) in kept]
        drawn = [x for x in unnamed if id(x) not in kept and isinstance(x, nn.Parameter)]
        redrawn = [x for x in again if x not in leaves and isinstance(x, nn.Parameter)]
        if [x.shape for x in drawn] == [x.shape for x in redrawn]:
            pairs = zip(drawn, redrawn, strict=True)
            found += [Stray("", tuple(x.shape), drawn=True) for x, y in pairs if not torch.equal(x, y)]
    return tuple(found)


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
    raise _Wanted


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
