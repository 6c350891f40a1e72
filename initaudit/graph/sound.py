"""Shapes that some of ATen's CPU kernels take for granted: a graph out of a file is checked before it reaches them.

Called by their names, these operators read (and in a backward pass write) beyond the end of a tensor that is too small, where
torch.nn's own functions would have refused it. Seen with torch 2.13: an LSTM whose state has one row and whose input fifty ends
the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from initaudit.errors import UnreadableModel

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def check(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises UnreadableModel where the arguments of `aten.NAME` do not have the shapes that it needs."""
    if name in _GATES:
        _recurrent(name, *_given(name, args, kwargs, _RECURRENT))
    elif name in _CHECKS:
        names, look = _CHECKS[name]
        look(name, *_given(name, args, kwargs, names))


def _given(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
    missing = [n for n in names if n not in given]
    if missing:
        raise UnreadableModel(f"aten.{name}", f"no argument {missing[0]}")
    return [given[n] for n in names]


def _need(name: str, what: str, found: Any, shape: Sequence[int]) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != tuple(shape):
        size = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UnreadableModel(f"aten.{name}", f"{what} of shape {size}", f"{tuple(shape)}")


_RECURRENT = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def _recurrent(
    name: str, x: Any, hx: Any, params: Any, biases: Any, layers: Any, _: Any, __: Any, both: Any, batch_first: Any
) -> None:
    """torch.nn.LSTM's own checks: x is `t n i` or `n t i`, states are `(layers d) n h`, weights `(g h) i` and `(g h) h`."""
    where, gates, directions = f"aten.{name}", _GATES[name], 2 if both else 1
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    tensors = [x, *states, *(params if isinstance(params, (list, tuple)) else [None])]
    if not all(isinstance(t, Tensor) and t.dtype == x.dtype for t in tensors) or x.dim() != 3 or not isinstance(layers, int):
        raise UnreadableModel(where, "arguments that are not tensors of one type, the input of rank 3")
    if any(s.dim() != 3 for s in states) or len(states) != (2 if name == "lstm" else 1):
        raise UnreadableModel(where, "states of another number or rank", "`(layers d) n h`")
    batch = x.shape[0 if batch_first else 1]
    carried, inner = states[0].shape[2], states[-1].shape[2]
    step = (4 if biases else 2) + (1 if carried != inner else 0)
    if len(params) != layers * directions * step:
        raise UnreadableModel(where, f"{len(params)} weights", f"{layers * directions * step}")
    for state, size in zip(states, (carried, inner), strict=False):
        _need(name, "a state", state, (layers * directions, batch, size))
    for place in range(layers * directions):
        w_ih, w_hh, *rest = params[place * step : (place + 1) * step]
        width = x.shape[2] if place < directions else carried * directions
        _need(name, "a weight of the input", w_ih, (gates * inner, width))
        _need(name, "a weight of the state", w_hh, (gates * inner, carried))
        for bias in rest[: 2 if biases else 0]:
            _need(name, "a bias", bias, (gates * inner,))
        if carried != inner:
            _need(name, "a projection", rest[-1], (carried, inner))


def _cell(name: str, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> None:
    gates = _GATES[name.removesuffix("_cell")]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (x, *states)):
        raise UnreadableModel(f"aten.{name}", "an input or a state that is no matrix")
    hidden = states[0].shape[1]
    for state in states:
        _need(name, "a state", state, (x.shape[0], hidden))
    _need(name, "a weight of the input", w_ih, (gates * hidden, x.shape[1]))
    _need(name, "a weight of the state", w_hh, (gates * hidden, hidden))
    for bias in (b_ih, b_hh):
        if bias is not None:
            _need(name, "a bias", bias, (gates * hidden,))


def _attention(name: str, query: Any, key: Any, value: Any) -> None:
    tensors = (query, key, value)
    if not all(isinstance(t, Tensor) and t.dim() >= 2 for t in tensors) or len({t.dim() for t in tensors}) > 1:
        raise UnreadableModel(f"aten.{name}", "queries, keys and values of different ranks")
    if key.shape[-1] != query.shape[-1] or value.shape[:-1] != key.shape[:-1]:
        shapes = [tuple(t.shape) for t in tensors]
        raise UnreadableModel(f"aten.{name}", f"queries, keys and values of shapes {shapes}", "as many values as keys")
    if query.dim() == 4 and (query.shape[0] != key.shape[0] or query.shape[1] % max(1, key.shape[1])):
        raise UnreadableModel(f"aten.{name}", "queries and keys of different batches or heads")


def _weight_norm(name: str, v: Any, g: Any, dim: Any) -> None:
    if not isinstance(v, Tensor) or not isinstance(dim, int) or not -v.dim() <= dim < v.dim():
        raise UnreadableModel(f"aten.{name}", f"an axis {dim}")
    _need(name, "a length", g, [v.shape[a] if a == dim % v.dim() else 1 for a in range(v.dim())])


def _table(name: str, weight: Any, indices: Any) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(indices, Tensor):
        raise UnreadableModel(f"aten.{name}", "a table that is no matrix")


_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_CHECKS: Mapping[str, tuple[tuple[str, ...], Callable[..., None]]] = {
    **{f"{name}_cell": (_CELL, _cell) for name in _GATES},
    "scaled_dot_product_attention": (("query", "key", "value"), _attention),
    "_weight_norm": (("v", "g", "dim"), _weight_norm),
    "embedding": (("weight", "indices"), _table),
}
