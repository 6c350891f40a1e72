"""RNN, GRU and LSTM.

`x` is `t n i` (layout 0) or `n t i` (layout 1); `w` is `d (g h) i`, `r` is `d (g h) h`, `b` is `d (2 g h)`; d counts
directions, g gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.conv import constant_bias
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import together
from initaudit.roles import Role, WeightUse

State = tuple[Tensor, ...]
Function = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, State], State]

# Name -> the function, and the defaults of alpha and beta (None: it has none), as the standard's operators have them.
_FUNCTIONS: dict[str, tuple[Callable[[Tensor, Any, Any], Tensor], float | None, float | None]] = {
    "relu": (lambda x, a, b: torch.relu(x), None, None),
    "tanh": (lambda x, a, b: torch.tanh(x), None, None),
    "sigmoid": (lambda x, a, b: torch.sigmoid(x), None, None),
    "softsign": (lambda x, a, b: F.softsign(x), None, None),
    "softplus": (lambda x, a, b: F.softplus(x), None, None),
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, None),
    "thresholdedrelu": (lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)), 1.0, None),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
    "hardsigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0, 1), 0.2, 0.5),
    "elu": (lambda x, a, b: F.elu(x, a), 1.0, None),
}


def _functions(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None, clip: float | None
) -> list[Function]:
    """The activation functions; alphas and betas are handed out in order to those that have one, `clip` bounds what goes in."""
    more_alphas, more_betas = iter(alphas or ()), iter(betas or ())
    found: list[Function] = []
    for name in names:
        if name.lower() not in _FUNCTIONS:
            raise UnsupportedOperator("recurrent layer", f"the activation {name!r}", "one of " + ", ".join(_FUNCTIONS))
        function, alpha, beta = _FUNCTIONS[name.lower()]
        a = None if alpha is None else next(more_alphas, alpha)
        b = None if beta is None else next(more_betas, beta)

        found.append(functools.partial(_clipped, function, a, b, clip))
    return found


def _clipped(function: Callable[[Tensor, Any, Any], Tensor], a: Any, b: Any, clip: float | None, x: Tensor) -> Tensor:
    return function(x if clip is None else x.clamp(-clip, clip), a, b)


@dataclass(frozen=True)
class _Layer:
    """The tensors of one call, sorted: `x` is `t n i`, states are `d n h`."""

    x: Tensor
    w: Tensor
    r: Tensor
    b: Tensor
    states: tuple[Tensor, ...]
    lengths: Tensor | None
    batch_first: bool
    directions: tuple[bool, ...]


def _layer(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    direction: str,
    layout: int,
) -> _Layer:
    kinds = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    if direction not in kinds:
        raise UnsupportedOperator("recurrent layer", f"the direction {direction!r}", "one of " + ", ".join(kinds))
    x, w, r = together(x, w, r)
    x = x.transpose(0, 1) if layout else x
    count, hidden = len(kinds[direction]), r.shape[-1]
    bias = w.new_zeros(count, 2 * w.shape[1]) if b is None else together(b, w)[0]
    states = []
    for state in initial:
        if state is None:
            states.append(x.new_zeros(count, x.shape[1], hidden))
        else:
            states.append(together(state.transpose(0, 1) if layout else state, x)[0])
    layer = _Layer(x, w, r, bias, tuple(states), lengths, bool(layout), kinds[direction])
    _check(layer)
    return layer


def _check(layer: _Layer) -> None:
    """Raises UnsupportedOperator for shapes that do not fit: torch's fused loops would read beyond the end of a tensor."""
    count, gates = len(layer.directions), layer.w.shape[1] if layer.w.ndim == 3 else 0
    if layer.x.ndim != 3 or layer.r.ndim != 3:
        raise UnsupportedOperator("recurrent layer", "an input or recurrent weights of another rank", "`t n i` and `d (g h) h`")
    batch, hidden = layer.x.shape[1], layer.r.shape[2]
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("w", layer.w, (count, gates, layer.x.shape[2])),
        ("r", layer.r, (count, gates, hidden)),
    ]
    wanted += [("b", layer.b, (count, 2 * gates))] + [("a state", s, (count, batch, hidden)) for s in layer.states]
    wanted += [("sequence_lens", layer.lengths, (batch,))] if layer.lengths is not None else []
    for name, found, shape in wanted:
        if tuple(found.shape) != shape:
            raise UnsupportedOperator("recurrent layer", f"{name} of shape {tuple(found.shape)}", f"{shape}")


def _turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`t n …` backwards in time, every sequence within its own length."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    ends = lengths.to(x.device, torch.int64).reshape(1, -1)
    source = torch.where(steps < ends, ends - 1 - steps, steps)
    return x.gather(0, source.reshape(*source.shape, *(1,) * (x.ndim - 2)).expand(x.shape))


def _unrolled(layer: _Layer, cell: Callable[[int], Step]) -> tuple[Tensor, ...]:
    """All hidden states `t d n h` and the last states `d n h`; beyond a sequence's length the outputs are zero."""
    results, finals = [], []
    for d, backwards in enumerate(layer.directions):
        step = cell(d)
        gates = layer.w.shape[1]
        # The input's part of all gates is one product over all time steps.
        driven = layer.x @ layer.w[d].T + layer.b[d, :gates]
        driven = _turned(driven, layer.lengths) if backwards else driven
        state = tuple(s[d] for s in layer.states)
        hidden = []
        for t in range(driven.shape[0]):
            new = step(driven[t], state)
            if layer.lengths is None:
                state = new
                hidden.append(new[0])
            else:
                alive = (t < layer.lengths.to(driven.device)).reshape(-1, 1)
                state = tuple(torch.where(alive, after, before) for after, before in zip(new, state, strict=True))
                hidden.append(torch.where(alive, new[0], torch.zeros_like(new[0])))
        y = torch.stack(hidden) if hidden else driven.new_zeros(0, driven.shape[1], layer.r.shape[-1])
        results.append(_turned(y, layer.lengths) if backwards else y)
        finals.append(state)
    last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return torch.stack(results, 1), *last


def _wanted(layer: _Layer, results: tuple[Tensor, ...], outputs: int) -> Tensor | tuple[Tensor, ...]:
    if layer.batch_first:
        # `t d n h` to `n t d h`, `d n h` to `n d h`.
        results = (results[0].permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in results[1:]))
    return results[0] if outputs == 1 else results


def _fused(layer: _Layer, kind: str, order: Sequence[int]) -> tuple[Tensor, ...] | None:
    """torch's own loop, where the layer is one that torch knows; `order` is torch's order of the gates in the standard's.

    The weights are rearranged by differentiable views, so gradients arrive in the standard's layout.
    """
    if layer.w.shape[1] != len(order) * layer.r.shape[2]:
        found = f"{layer.w.shape[1]} rows of weights for {layer.r.shape[2]} units"
        raise UnsupportedOperator("recurrent layer", found, f"{len(order)} for a unit")
    if layer.lengths is not None or layer.directions == (True,) or layer.x.shape[0] == 0:
        return None

    def sorted_gates(value: Tensor) -> Tensor:
        parts = value.chunk(len(order))
        return torch.cat([parts[place] for place in order]) if len(order) > 1 else value

    parameters = []
    for d in range(len(layer.directions)):
        bias_w, bias_r = layer.b[d].chunk(2)
        parameters += [sorted_gates(v) for v in (layer.w[d], layer.r[d], bias_w, bias_r)]
    start: Any = layer.states if len(layer.states) > 1 else layer.states[0]
    run: Any = getattr(torch, kind)
    y, *last = run(layer.x, start, parameters, True, 1, 0.0, False, len(layer.directions) == 2, False)
    return y.reshape(*y.shape[:2], len(layer.directions), -1).transpose(1, 2), *last


def _default(names: Sequence[str] | None, expected: Sequence[str], directions: int) -> bool:
    return names is None or [n.lower() for n in names] == [e.lower() for e in expected] * directions


def _weights(gates: tuple[str, ...], name: str) -> Callable[[Mapping[str, Any]], tuple[WeightUse, ...]]:
    def weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
        bias = constant_bias(call, "b")
        return tuple(WeightUse(a, ("n", "o", "i"), name, bias=bias, gates=gates) for a in ("w", "r") if call[a].constant)

    return weights


def _per_direction(names: Sequence[str] | None, defaults: Sequence[str], count: int) -> list[str]:
    return list(defaults) * count if names is None else list(names)


@operator(Role("recurrent", "rnn", data=("x",), weights=_weights(("h",), "rnn")))
def RNN(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    output_sequence: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """h' = f(w x + r h + b): all states, then the last."""
    layer = _layer(x, w, r, b, sequence_lens, [initial_h], direction, layout)
    count = len(layer.directions)
    if clip is None:
        for kind, name in (("rnn_tanh", "Tanh"), ("rnn_relu", "Relu")):
            chosen = _per_direction(activations, ["Tanh"], count)
            fused = _fused(layer, kind, [0]) if _default(chosen, [name], count) else None
            if fused is not None:
                return _wanted(layer, fused, outputs)
    functions = _functions(_per_direction(activations, ["Tanh"], count), activation_alpha, activation_beta, clip)

    def cell(d: int) -> Step:
        bias = layer.b[d].chunk(2)[1]
        return lambda driven, state: (functions[d](driven + state[0] @ layer.r[d].T + bias),)

    return _wanted(layer, _unrolled(layer, cell), outputs)


@operator(Role("recurrent", "gru", data=("x",), weights=_weights(("z", "r", "h"), "gru")))
def GRU(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Cho et al. 2014, gates z r h: all states, then the last. `linear_before_reset` multiplies by r after the product."""
    layer = _layer(x, w, r, b, sequence_lens, [initial_h], direction, layout)
    count = len(layer.directions)
    if clip is None and linear_before_reset and _default(activations, ["Sigmoid", "Tanh"], count):
        fused = _fused(layer, "gru", [1, 0, 2])
        if fused is not None:
            return _wanted(layer, fused, outputs)
    names = _per_direction(activations, ["Sigmoid", "Tanh"], count)
    functions = _functions(names, activation_alpha, activation_beta, clip)

    def cell(d: int) -> Step:
        gate, candidate = functions[2 * d : 2 * d + 2]
        rz, rr, rh = layer.r[d].chunk(3)
        bz, br, bh = layer.b[d].chunk(2)[1].chunk(3)

        def step(driven: Tensor, state: State) -> State:
            h = state[0]
            xz, xr, xh = driven.chunk(3, -1)
            z, reset = gate(xz + h @ rz.T + bz), gate(xr + h @ rr.T + br)
            pulled = reset * (h @ rh.T + bh) if linear_before_reset else (reset * h) @ rh.T + bh
            return ((1 - z) * candidate(xh + pulled) + z * h,)

        return step

    return _wanted(layer, _unrolled(layer, cell), outputs)


@operator(Role("recurrent", "lstm", data=("x",), weights=_weights(("i", "o", "f", "c"), "lstm")))
def LSTM(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Hochreiter and Schmidhuber 1997, gates i o f c, peepholes `p` `d (i o f)`: all states, the last, the last cell."""
    layer = _layer(x, w, r, b, sequence_lens, [initial_h, initial_c], direction, layout)
    count = len(layer.directions)
    if clip is None and p is None and not input_forget and _default(activations, ["Sigmoid", "Tanh", "Tanh"], count):
        fused = _fused(layer, "lstm", [0, 2, 3, 1])
        if fused is not None:
            return _wanted(layer, fused, outputs)
    names = _per_direction(activations, ["Sigmoid", "Tanh", "Tanh"], count)
    functions = _functions(names, activation_alpha, activation_beta, clip)

    def cell(d: int) -> Step:
        gate, candidate, squash = functions[3 * d : 3 * d + 3]
        bias = layer.b[d].chunk(2)[1]
        peep_i, peep_o, peep_f = (0, 0, 0) if p is None else together(p, layer.x)[0][d].chunk(3)

        def step(driven: Tensor, state: State) -> State:
            h, c = state
            xi, xo, xf, xc = (driven + h @ layer.r[d].T + bias).chunk(4, -1)
            i = gate(xi + peep_i * c)
            f = 1 - i if input_forget else gate(xf + peep_f * c)
            new = f * c + i * candidate(xc)
            return gate(xo + peep_o * new) * squash(new), new

        return step

    return _wanted(layer, _unrolled(layer, cell), outputs)
