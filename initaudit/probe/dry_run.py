"""A run of forward without arithmetic: shapes only, on a copy whose tensors hold no numbers; nothing of the module changes.

What is watched: how far it gets, which tables its inputs index, how small the maps become that convolutions see.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from initaudit.errors import LimitExceeded, UnsupportedOperator
from initaudit.graph.from_torch import switch
from initaudit.load.host import device_of

_UNDECIDED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
    NotImplementedError,
)
# Code that asks for the numbers themselves (NumPy, a data pointer) gets them in a real run only.
_WANTS_NUMBERS = re.compile(r"tensor subclass|data pointer|FakeTensor|fake tensor")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution")
_SEQUENCE_OPERATORS = ("softmax", "attention", "lstm", "gru", "rnn")


@dataclass
class Outcome:
    """What a run came to. `error` is empty where it ended well.

    `progress` counts the operators reached; `rows` the smallest table that each input indexes; `positions` is a bound on the
    length of sequences (a position table that is too short), `smallest` the smallest side that a convolution with several taps
    was given.
    """

    error: str = ""
    undecided: bool = False
    progress: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    positions: int | None = None
    smallest: float = math.inf
    mixes_positions: bool = False
    used: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Whether forward ended well."""
        return not self.error


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which inputs a value is made of, and looks at table look-ups and convolutions."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outcome = outcome

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        origins: frozenset[Any] = frozenset().union(*(_origins(t) for t in pytree.tree_leaves((args, kwargs))))
        self._look_up(name, args)
        _of_one_type(name, args)
        if name == "convolution" and not args[6] and args[1].shape[2:].numel() > 1:
            self.outcome.smallest = min(self.outcome.smallest, *args[0].shape[2:])
        self.outcome.mixes_positions |= any(word in name for word in _SEQUENCE_OPERATORS)
        self.outcome.used |= {o for o in origins if isinstance(o, str)}
        result = func(*args, **kwargs)
        self.outcome.progress += 1
        if name == "arange":
            origins = origins | {int(result.shape[0])}
        for leaf in pytree.tree_leaves(result):
            # What a comparison says no longer holds a row's number.
            if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.bool:
                leaf._initaudit_origins = _origins(leaf) | origins  # type: ignore[attr-defined]
        return result

    def _look_up(self, name: str, args: Sequence[Any]) -> None:
        if name in ("embedding", "_embedding_bag", "embedding_bag"):
            self._indexed(args[0].shape[0], args[1])
        elif name in ("index_select", "gather", "scatter", "scatter_") and args[0].dim():
            self._indexed(args[0].shape[args[1]], args[2])
        elif name == "index":
            for axis, index in enumerate(args[1]):
                if isinstance(index, torch.Tensor) and not index.dtype.is_floating_point and axis < args[0].dim():
                    self._indexed(args[0].shape[axis], index)

    def _indexed(self, rows: int, index: torch.Tensor) -> None:
        origins = _origins(index)
        for origin in origins:
            if isinstance(origin, str):
                self.outcome.rows[origin] = min(rows, self.outcome.rows.get(origin, rows))
            elif origin > rows and not any(isinstance(o, str) for o in origins):
                self.outcome.positions = min(rows, self.outcome.positions or rows)


def _of_one_type(name: str, args: Sequence[Any]) -> None:
    """Raises what a real product raises for factors of different types; one without arithmetic lets them pass."""
    if name in _PRODUCTS:
        types = [a.dtype for a in args if isinstance(a, torch.Tensor)]
        if len(set(types)) > 1:
            raise RuntimeError(f"{name} needs factors of one type, got " + " and ".join(map(str, dict.fromkeys(types))))


def _origins(value: Any) -> frozenset[Any]:
    return getattr(value, "_initaudit_origins", frozenset()) if isinstance(value, torch.Tensor) else frozenset()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The random state is put back; warnings and log lines of the code that is run are not passed on."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class DryRun:
    """Runs of one module on inputs without numbers, in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.copy = _hollow(module, self.mode)
        self.home = device_of(module) or "cpu"

    def run(
        self, positional: Sequence[Any], keywords: Mapping[str, Any], names: Sequence[str], *, training: bool = False
    ) -> Outcome:
        """One run. Of tensors only shape and dtype count; `names` are those of the positional arguments."""
        outcome = Outcome()
        named = {**dict(zip(names, positional, strict=True)), **keywords}
        with undisturbed():
            try:
                with self.mode:
                    fake = {n: self._fake(v, n) for n, v in named.items()}
                    target = self.copy
                    if target is None:
                        raise NotImplementedError("the module cannot be copied")
                    target.train(training)
                    with _Watch(outcome):
                        target(*(fake[n] for n in names), **{n: fake[n] for n in keywords})
            except (UnsupportedOperator, LimitExceeded):
                raise  # what a file's own program asks for does not hang on its inputs
            except _UNDECIDED as error:
                outcome.error, outcome.undecided = _line(error), True
            except Exception as error:  # noqa: BLE001 - forward raises what it likes on inputs it was not made for
                outcome.error = _line(error)
                outcome.undecided = _WANTS_NUMBERS.search(outcome.error) is not None
                cause: BaseException | None = error
                while cause is not None:
                    outcome.undecided |= isinstance(cause, _UNDECIDED)
                    cause = cause.__cause__
        return outcome

    def _fake(self, value: Any, name: str) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._fake(v, name) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        made = torch.empty(value.shape, dtype=value.dtype, device=self.home)
        made._initaudit_origins = frozenset({name})  # type: ignore[attr-defined]
        return made


def _hollow(module: nn.Module, mode: FakeTensorMode) -> nn.Module | None:
    """A copy of the module whose tensors have shapes only; None where it cannot be copied."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers, part.__dict__):
            for value in held.values():
                if isinstance(value, torch.Tensor):
                    memo[id(value)] = mode.from_tensor(value, static_shapes=True)
    keep = list(memo.values())
    try:
        hollow: nn.Module = copy.deepcopy(module, memo)
    except Exception:  # noqa: BLE001 - a module holds what it likes; one that cannot be copied is run for real instead
        return None
    assert keep is not None  # what the memo points to must outlive it
    switch(hollow, training=False)
    return hollow


def real_run(module: nn.Module, positional: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    """Runs forward on real tensors, in evaluation mode, and leaves the module as it was; returns the error or ""."""
    modes = [(m, m.training, dict(m.__dict__)) for m in module.modules()]
    state = {n: b.clone() for n, b in module.named_buffers()}
    home = device_of(module) or "cpu"
    positional, keywords = pytree.tree_map_only(torch.Tensor, lambda t: t.to(home), (tuple(positional), dict(keywords)))
    with undisturbed():
        try:
            switch(module, training=False)
            torch.func.functional_call(module, state, tuple(positional), dict(keywords))
        except Exception as error:  # noqa: BLE001 - forward raises what it likes on inputs it was not made for
            return _line(error)
        finally:
            for part, training, attributes in modes:
                part.__dict__.clear()
                part.__dict__.update(attributes)
                part.training = training
    return ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
