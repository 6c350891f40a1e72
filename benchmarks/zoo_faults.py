"""Faults that are put into healthy models, one at a time, at three depths.

Whether a change is a fault is judged by what the model does, not by the audit: a scale counts where outputs or gradients follow
it (no norm absorbs it), a zero where it cuts the way from inputs to outputs, a mean where outputs notice that all units of the
layer are shifted alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Inputs

Layer = tuple[str, nn.Module]  # the name of its weight and the layer
Change = Callable[[Sequence[Layer], int], "list[str] | None"]
_ABSORBED = 1e-2  # of the outputs: rounding, and what epsilon leaves
_FOLLOWS = 0.5  # of a change of scale, in decades: what outputs or gradients have to follow
_MATTERS = 30.0  # a change of outputs or gradients by less is one that most networks get over


@dataclass(frozen=True)
class Fault:
    """`change` is told the layers in the order of their calls and the place; it returns the tensors that it changed.

    `codes` are the right ones, any of them. `judged` asks for proof that the change matters; `once` that it needs no place.
    """

    name: str
    codes: tuple[str, ...]
    change: Change
    judged: str = ""
    once: bool = False


@dataclass(frozen=True)
class Behaviour:
    """What is seen of a model from outside: how outputs differ between examples, and the gradient of every weight."""

    spread: float
    gradients: dict[str, float]


def run(module: nn.Module, inputs: Inputs) -> Any:
    """Calls a module with its inputs."""
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of whatever forward returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim() > 0:
            yield output
    elif isinstance(output, dict):
        yield from (t for v in output.values() for t in tensors_of(v))
    elif isinstance(output, (tuple, list)):
        yield from (t for v in output for t in tensors_of(v))


def behaviour(module: nn.Module, inputs: Inputs) -> Behaviour:
    """One forward and one backward pass in evaluation mode with norms over the batch."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.train()
    module.zero_grad()
    first = next(tensors_of(run(module, inputs)))
    generator = torch.Generator().manual_seed(0)
    (first * torch.randn(first.shape, generator=generator)).sum().backward()
    gradients = {n: float(p.grad.norm()) for n, p in module.named_parameters() if p.grad is not None}
    module.eval()
    for b, value in buffers:
        b.copy_(value)
    return Behaviour(float((first - first.mean(0)).detach().std()), gradients)


def absorbs(module: nn.Module, inputs: Inputs, layer: nn.Module) -> bool:
    """Whether outputs stay what they are when all units of a layer are shifted alike, by a number for each example.

    That is what a mean of the weights adds. A norm over the units takes it away; one over the batch does not.
    """

    def shift(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(output.shape[0], *[1] * (output.dim() - 1), generator=generator)
        return output + output.detach().std() * drawn

    with torch.no_grad():
        before = next(tensors_of(run(module, inputs)))
        hook = layer.register_forward_hook(shift)
        after = next(tensors_of(run(module, inputs)))
        hook.remove()
    return bool((after - before).std() <= _ABSORBED * before.std())


def matters(before: Behaviour, after: Behaviour, changed: Sequence[str], how: str, factor: float = 1.0) -> bool:
    """Whether the model behaves otherwise.

    "cut" that nothing comes through, "scale" by a factor of 30 either way, "follows" by half of the `factor` (in decades) by
    which the weight itself has grown.
    """
    if how == "cut":
        # Behind a head of zeros nothing comes through whatever stands before it.
        return before.spread > 0 and not after.spread > 1e-6 * before.spread
    ratios = [after.spread / before.spread if before.spread > 0 else 1.0]
    others = [n for n, g in before.gradients.items() if n not in changed and g > 0 and after.gradients.get(n, 0.0) > 0]
    logs = sorted(math.log(after.gradients[n] / before.gradients[n]) for n in others)
    ratios += [math.exp(logs[len(logs) // 2])] if logs else []
    least = _MATTERS if how == "scale" else math.exp(_FOLLOWS * abs(math.log(factor)))
    return any(not math.isfinite(r) or r > least or r < 1 / least for r in ratios)


def layers_of(module: nn.Module, inputs: Inputs) -> list[Layer]:
    """The linear and convolutional layers that forward calls, in order, each once, without the last."""
    names = {id(m.weight): f"{n}.weight" for n, m in module.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    found: dict[int, Layer] = {}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)

    def called(m: nn.Module, *_: Any) -> None:
        if id(m.weight) in names:
            found.setdefault(id(m.weight), (names[id(m.weight)], m))

    hooks = [m.register_forward_hook(called) for m in module.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        run(module, inputs)
    for hook in hooks:
        hook.remove()
    return [(n, m) for n, m in list(found.values())[:-1] if m.weight.numel() >= 256 and min(m.weight.shape[:2]) > 1]


def _fill(draw: Callable[[Tensor], Tensor]) -> Change:
    """A change of one weight as a whole."""

    def change(layers: Sequence[Layer], place: int) -> list[str] | None:
        name, layer = layers[place]
        drawn = draw(layer.weight.clone())
        if torch.equal(drawn, layer.weight):
            return None
        layer.weight.copy_(drawn)
        return [name]

    return change


def _half(layers: Sequence[Layer], place: int) -> list[str] | None:
    """Half of the units are copies of the other half in what they read and in what reads them, so they stay copies."""
    (first, a), (second, b) = layers[place], layers[min(place + 1, len(layers) - 1)]
    if a is b or a.weight.shape[0] != b.weight.shape[1] or type(a) is not type(b) or not getattr(a, "feeds_next", False):
        return None
    half = a.weight.shape[0] // 2
    a.weight[half : 2 * half] = a.weight[:half]
    b.weight[:, half : 2 * half] = b.weight[:, :half]
    if a.bias is not None:
        a.bias[half : 2 * half] = a.bias[:half]
    return [first, second]


def _memory(w: Tensor) -> Tensor:
    bits = torch.randint(-(2**31), 2**31 - 1, w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), values, torch.zeros(()))


def _nan(w: Tensor) -> Tensor:
    w.view(-1)[w.numel() // 2] = math.nan
    return w


def _overflow(w: Tensor) -> Tensor:
    w.view(-1)[:: max(1, w.numel() // 3)] = 1e5
    return w


def _clone(layers: Sequence[Layer], place: int) -> list[str] | None:
    name, layer = layers[place]
    twin = next(((n, m) for n, m in layers if m is not layer and m.weight.shape == layer.weight.shape), None)
    if twin is None or torch.equal(twin[1].weight, layer.weight):
        return None
    layer.weight.copy_(twin[1].weight)
    return [name, twin[0]]


def _biases(layers: Sequence[Layer], place: int) -> list[str] | None:
    name, layer = layers[place]
    if layer.bias is None or not getattr(layer, "feeds_relu", False):
        return None
    layer.bias.fill_(-50.0)
    return [name, name.replace("weight", "bias")]


def _series(layers: Sequence[Layer], place: int) -> list[str] | None:
    """Two neighbours, the second of which takes what the first makes, both of them zero."""
    (first, a), (second, b) = layers[place], layers[min(place + 1, len(layers) - 1)]
    if a is b or a.weight.shape[0] != b.weight.shape[1] or type(a) is not type(b) or not getattr(a, "feeds_next", False):
        return None
    for m in (a, b):
        m.weight.zero_()
        if m.bias is not None:
            m.bias.zero_()
    return [first, second]


def _all(factor: float) -> Change:
    def change(layers: Sequence[Layer], _: int) -> list[str]:
        for _, m in layers:
            m.weight.mul_(factor)
        return [n for n, _ in layers]

    return change


class Stored(nn.Linear):
    """A linear layer whose weight is stored (in, out) and used as `x @ W`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def _fans(layers: Sequence[Layer], place: int) -> list[str] | None:
    """`kaiming_normal_` on a weight stored (in, out), where the fans are far apart and so many values tell it from any scheme.

    On a weight stored (out, in) He by fan-out is no fault: He et al. 2015 call either form sufficient.
    """
    name, layer = layers[place]
    if type(layer) is not nn.Linear or 1 / 4 < layer.in_features / layer.out_features < 4:
        return None
    n, o = layer.in_features, layer.out_features
    slack = 5 * math.sqrt(2 / (n * o))  # five standard errors of a normal law's variance
    if any(abs(math.log(c * o / (2 * n))) < 2 * slack for c in (2, 1, 1 / 3, 25 / 9, 2 * n / (n + o))):
        return None
    layer.__class__ = Stored
    layer.weight = nn.Parameter(torch.empty(n, o))
    nn.init.kaiming_normal_(layer.weight)
    return [name]


def undo_storage(module: nn.Module) -> None:
    """Linear layers again, of weights without values, for those that `swapped fans` has turned round."""
    for m in module.modules():
        if isinstance(m, Stored):
            m.__class__ = nn.Linear
            m.weight = nn.Parameter(torch.empty(m.out_features, m.in_features))


def _forgotten(layers: Sequence[Layer], place: int) -> list[str] | None:
    """The framework's default, where the model's own law is at least twice as wide or half as wide in variance."""
    name, layer = layers[place]
    before = float(layer.weight.var())
    fresh = torch.empty_like(layer.weight)
    nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
    if not before > 0 or 0.5 < float(fresh.var()) / before < 2:
        return None
    layer.weight.copy_(fresh)
    return [name]


# What a factor of 1/sqrt(3) makes of a uniform law is that of bounds that were given the standard deviation.
_THIRD = "IA110"
_UP = ("IA102", "IA103", "IA104", "IA109", "IA302", "IA304", "IA306", "IA308", "IA309", "IA310", "IA402", "IA601")
_DOWN = ("IA101", "IA103", "IA104", "IA109", "IA301", "IA303", "IA307", "IA403")
FAULTS: tuple[Fault, ...] = (
    Fault("zero", ("IA201", "IA204", "IA207", "IA301", "IA305", "IA307", "IA311"), _fill(torch.zeros_like), "cut"),
    Fault("constant", ("IA107", "IA201", "IA202", "IA205"), _fill(lambda w: torch.full_like(w, float(w.std())))),
    Fault("duplicated units", ("IA202", "IA205"), _fill(lambda w: w[:1].expand_as(w))),
    Fault("half-duplicated units", ("IA202", "IA205"), _half),
    Fault("x1000", (*_UP, "IA401"), _fill(lambda w: 1000 * w), "scale"),
    Fault("/1000", _DOWN, _fill(lambda w: w / 1000), "scale"),
    Fault("NaN", ("IA401",), _fill(_nan)),
    Fault("uninitialised memory", ("IA206", "IA401"), _fill(_memory)),
    Fault("positive mean", ("IA102", "IA107", "IA302", "IA307"), _fill(lambda w: w + 2 * w.std()), "mean"),
    Fault("cloned layer", ("IA203",), _clone),
    Fault("dead biases", ("IA111", "IA305"), _biases),
    Fault("half overflow", ("IA102", "IA108", "IA302", "IA401", "IA402"), _fill(_overflow)),
    Fault("zeros in series", ("IA201", "IA207", "IA311"), _series),
    Fault("swapped fans", (*_UP, *_DOWN), _fans, "follows"),
    Fault("forgotten layer", (*_UP, *_DOWN), _forgotten, "follows"),
    Fault("all x4", (*_UP, "IA401"), _all(4.0), "scale", once=True),
    Fault("wrong gain throughout", (*_DOWN, _THIRD), _all(1 / math.sqrt(3)), "scale", once=True),
)
