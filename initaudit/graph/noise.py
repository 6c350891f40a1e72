"""What training makes of a signal at random, and where that is no chance: a dropout of probability 1 hands on zeros always."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from initaudit.graph.probability import certain

# Where each of these takes the probability that an element is zero; an LSTM and an attention drop what they hand on inside.
_DROPPING = ("dropout", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "native_dropout")
_DROPOUTS = (*_DROPPING, "dropout1d", "dropout2d", "dropout3d", "dropout_", "alpha_dropout_", "feature_dropout_")
_INSIDE = {"scaled_dot_product_attention": (5, "dropout_p"), "lstm": (5, "dropout"), "gru": (5, "dropout")}


def drops(ratio: torch.Tensor | None = None, training: torch.Tensor | None = None) -> bool:
    """Whether a dropout of an ONNX graph drops everything: its ratio is 1, and the graph was written down for training."""
    return ratio is not None and training is not None and bool((ratio >= 1).all()) and bool(training.all())


def drops_everything(module: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether forward, as training will run it, drops something with probability 1, or keeps it with probability 0.

    Stochastic depth leaves no operator behind in evaluation, so a module that is held for training is called once as it stands,
    with tensors that have shapes and no values: what training does to parameters at the first call (ActNorm) is done to none.
    False where it cannot be called so.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from initaudit.graph.from_torch import as_found, silenced

    if not any(m.training for m in module.modules()):
        return False
    watch, fake = _Watch(), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with as_found(module), _kept(module), silenced(), torch.no_grad():
            _hollow(module, fake)
            args, named = pytree.tree_map_only(torch.Tensor, fake.from_tensor, (tuple(inputs), dict(keywords)))
            with fake, watch:
                module(*args, **named)
    except Exception:  # noqa: BLE001 - a forward that wants targets in training, or more than one example
        return watch.found
    return watch.found


def _hollow(module: nn.Module, fake: Any) -> None:
    """Puts tensors without values in the place of parameters and buffers; the same one where one is used twice.

    (torch.func.functional_call leaves them in a module that is reached by two ways.)
    """
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({k: fake.from_tensor(v) for k, v in held.items() if v is not None})


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Afterwards everything that the modules hold is as before: flags of a first call, and what forward keeps for the next."""
    kept, lists = [], []
    for part in module.modules():
        own = vars(part)
        kept.append((own, dict(own)))
        kept += [(value, dict(value)) for value in own.values() if isinstance(value, dict)]
        lists += [(value, list(value)) for value in own.values() if isinstance(value, list)]
    try:
        yield
    finally:
        for held, before in reversed(kept):
            held.clear()
            held.update(before)
        for items, as_before in lists:
            items[:] = as_before


class _Watch(TorchFunctionMode):
    """Sees every call of forward's with the numbers that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            self.found = self.found or _drops(func, args, given)
        elif name in _INSIDE:
            place, word = _INSIDE[name]
            self.found = self.found or certain(args[place] if len(args) > place else given.get(word, 0.0))
        elif name in ("bernoulli", "bernoulli_"):
            kept = args[1] if len(args) > 1 else given.get("p")
            self.found = self.found or (isinstance(kept, (int, float)) and kept <= 0)
        return func(*args, **given)


def _drops(func: Callable[..., Any], args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
    """Whether a call of a dropout is one of training and drops everything."""
    names: tuple[str, ...] = ("input", "p", "training")
    if inspect.isfunction(func):
        names = tuple(inspect.signature(func).parameters)
    bound = {**dict(zip(names, args, strict=False)), **given}
    return certain(bound.get("p", 0.5)) and bool(bound.get("training", bound.get("train", True)))
