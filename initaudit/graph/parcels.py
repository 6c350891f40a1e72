"""Objects of the user's own that carry tensors to forward: dataclasses, batches of a library, mappings that are no dict.

torch.export and `make_fx` look for tensors in tuples, lists and dicts, and take whatever lies in another object for a constant:
nothing would then depend on the inputs.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_DEEP = 4  # objects in objects in objects: what lies deeper is no batch


class _Like:
    """An object whose copies take the tensors; never compared with another, as its own comparison may be one of tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclasses.dataclass(frozen=True, eq=False)
class _Parcel:
    """The attributes `names` of an object, which the tracers then look into."""

    like: _Like
    names: tuple[str, ...]
    values: tuple[Any, ...]


pytree.register_pytree_node(
    _Parcel,
    lambda parcel: (list(parcel.values), (parcel.like, parcel.names)),
    lambda values, context: _Parcel(context[0], context[1], tuple(values)),
)


def opened(value: Any, deep: int = _DEEP) -> Any:
    """`value` with every object that carries tensors replaced by a container of them."""
    return pytree.tree_map(lambda leaf: _open(leaf, deep), value)


def closed(value: Any) -> Any:
    """What `opened` was given, with the tensors that are in the containers now; objects are copies of the opened ones."""
    return pytree.tree_map(lambda leaf: _close(leaf) if isinstance(leaf, _Parcel) else leaf, value, is_leaf=_is_parcel)


def _is_parcel(value: Any) -> bool:
    return isinstance(value, _Parcel)


def _open(leaf: Any, deep: int) -> Any:
    if deep == 0 or isinstance(leaf, (torch.Tensor, nn.Module, type)) or callable(leaf):
        return leaf
    held = dict(getattr(leaf, "__dict__", {}))
    if dataclasses.is_dataclass(leaf):  # with slots it has no __dict__
        held |= {entry.name: getattr(leaf, entry.name) for entry in dataclasses.fields(leaf) if hasattr(leaf, entry.name)}
    found = {name: opened(value, deep - 1) for name, value in held.items()}
    found = {name: value for name, value in found.items() if any(map(_is_tensor, pytree.tree_leaves(value)))}
    return _Parcel(_Like(leaf), tuple(found), tuple(found.values())) if found else leaf


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _close(parcel: _Parcel) -> Any:
    made = copy.copy(parcel.like.value)
    for name, value in zip(parcel.names, parcel.values, strict=True):
        object.__setattr__(made, name, closed(value))  # past what a frozen dataclass says
    return made
