"""Weights that are made anew whenever they are asked for, and lent to one consumer at a time.

In float32 a module of 16-bit numbers is twice as large again, and so is any module whose weights have all been moved; and what
the consumers of weights save for the backward pass would keep every one of them until the end. Here the value goes as soon as
its consumer has run, and what was saved of it is made once more when the backward pass asks for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from initaudit.graph.graph import Graph

# Bytes of trainable weights in float32 from which memory counts: below it time does, and everything is held.
LARGE = 1 << 26
_TRIM, _TRIMMED = 1 << 25, 1 << 28  # bytes; of the weights below the second, trimming took a tenth of the probe's time
K = TypeVar("K")


def is_large(graph: Graph) -> bool:
    """Whether the weights of a graph are so many that no second copy of all of them should be held."""
    return _size(graph) >= LARGE


def is_trimmed(graph: Graph) -> bool:
    """Whether they are so many that freed memory is worth the time in which it is given back and fetched again."""
    return _size(graph) >= _TRIMMED


def _size(graph: Graph) -> int:
    return 4 * sum(math.prod(c.shape) for c in graph.constants.values() if c.kind == "parameter")


class _Heap:
    """Memory that has been let go and that the allocator keeps, because small things were put down above it.

    Of weights of some megabytes glibc so keeps more than the model takes. `malloc_trim` gives every free page back.
    """

    def __init__(self) -> None:
        self.passed = 0
        # Found in what the process has loaded already; other systems' allocators have no such function.
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def __call__(self, used: int) -> None:
        """To be told how many bytes come and go; trims after every `_TRIM` of them."""
        self.passed += used
        if self.trim is not None and self.passed >= _TRIM:
            self.passed = 0
            self.trim(0)


comes_and_goes = _Heap()


def order_of(x: Tensor) -> list[int]:
    """The axes in the order of memory, in which the elements of a dense tensor are one row."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def shaped(row: Tensor, like: Tensor) -> Tensor:
    """A row of as many elements as `like` has, in its shape and in its order of axes."""
    order = order_of(like)
    return row.view([like.shape[i] for i in order]).permute(sorted(range(like.dim()), key=order.__getitem__))


class Values(Mapping[K, Any]):
    """Values by key, each held or made anew whenever it is asked for."""

    def __init__(self) -> None:
        self.lent: dict[K, Callable[[], Tensor]] = {}
        self._held: dict[K, Any] = {}

    def __getitem__(self, key: K) -> Any:
        return self.lent[key]() if key in self.lent else self._held[key]

    def __setitem__(self, key: K, value: Any) -> None:
        self._held[key] = value

    def lend(self, key: K, make: Callable[[], Tensor]) -> None:
        """Has a value made whenever it is asked for."""
        self.lent[key] = make
        self._held[key] = None  # its place in the order

    def __iter__(self) -> Iterator[K]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def laid(gradient: Tensor, like: tuple[torch.Size, tuple[int, ...]]) -> Tensor:
    """A gradient in the sizes and strides of its leaf, which are those that autograd gives it."""
    if (gradient.size(), gradient.stride()) == like:
        return gradient
    return torch.empty_strided(*like, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


@dataclass(frozen=True)
class _Saved:
    """What stands for a lent weight, or a view of it, among what an operator has saved."""

    make: Callable[[], Tensor]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Lending:
    """Hands out weights and takes the gradients that come back to them."""

    def __init__(self) -> None:
        # All that is lent hangs on one leaf, so that a backward pass to this leaf reaches every weight.
        self.anchor = torch.zeros((), requires_grad=True)
        self.take: Callable[[Any, Tensor], None] | None = None
        self.unread = False  # while nothing that runs reads matrices that have been lent
        self._out: dict[int, Callable[[], Tensor]] = {}  # by address, while the consumer runs

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, operators save no weight that is lent to them, but how to make it."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def lend(self, site: Any, make: Callable[[], Tensor], *, trained: bool) -> Tensor:
        """A weight for one consumer; to be `returned` after its run."""
        value = make()
        if value.numel():
            self._out[value.untyped_storage().data_ptr()] = make
        return _Lent.apply(self.anchor, value, self, site) if trained else value  # type: ignore[no-untyped-call]

    def returned(self) -> None:
        """The consumer has run. A result that is a view of the weight keeps it, and is saved as any other."""
        self._out.clear()

    def _pack(self, value: Tensor) -> Tensor | _Saved:
        make = self._out.get(value.untyped_storage().data_ptr()) if self._out else None
        if make is None:
            return value
        return _Saved(make, tuple(value.shape), value.stride(), int(value.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if self.unread and len(saved.size) == 2:
            return torch.full((), math.nan).expand(saved.size)  # if something did read it, it would show
        return saved.make().as_strided(saved.size, saved.stride, saved.offset)


class _Lent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, lending: Lending, site: Any) -> Tensor:
        ctx.lending, ctx.site, ctx.layout = lending, site, (value.size(), value.stride())
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.lending.take is not None:
            ctx.lending.take(ctx.site, laid(gradient, ctx.layout))
        return None, None, None, None
