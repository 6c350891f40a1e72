"""What the inputs of an unknown forward may look like: guesses in a sensible order, from the layers that a module holds.

Sizes are written with B the batch, C channels, S a side of an image, T positions of a sequence, F features.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["grid", "sequence", "wave", "flat", "ids", "mask", "square", "step", "value"]

# Small first: a probe needs statistics, not resolution. The last ones are what strict architectures were published with.
SIDES = (32, 64, 28, 96, 128, 160, 192, 224, 256, 299, 384, 512)
# A waveform passes a few hundredfold striding before a transformer sees it; 3000 are the frames of Whisper's 30 seconds.
LENGTHS = (64, 256, 1024, 4096, 16000, 3000)
DEPTHS = (16, 32, 64)
POSITIONS = 16
# Layers looked at: the entry is among the first few that a module defines.
_FIRST = 8
_PRODUCT = re.compile(r"(?:\((\d+)x(\d+) and (\d+)x(\d+)\))|(?:\[(\d+), (\d+)\] X \[(\d+), (\d+)\])")


@dataclass(frozen=True)
class Guess:
    """One input: what it is taken for, its shape and dtype; `value` of a Python argument that is no tensor."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    value: Any = None

    def resized(self, size: int) -> Guess | None:
        """The same with another side, length or number of positions; None where there is none to change."""
        if self.kind == "grid":
            return dataclasses.replace(self, shape=(*self.shape[:2], *[size] * (len(self.shape) - 2)))
        if self.kind in ("sequence", "wave") or (self.kind in ("ids", "mask") and len(self.shape) == 2):
            return dataclasses.replace(self, shape=(self.shape[0], size, *self.shape[2:]))
        return None

    def refeatured(self, count: int) -> Guess | None:
        """The same with another number of channels or features."""
        if self.kind == "grid":
            return dataclasses.replace(self, shape=(self.shape[0], count, *self.shape[2:]))
        if self.kind in ("sequence", "flat"):
            return dataclasses.replace(self, shape=(*self.shape[:-1], count))
        return None

    @property
    def size(self) -> int | None:
        """The side, length or number of positions."""
        if self.kind == "grid":
            return self.shape[2] if len(self.shape) > 2 else None
        return self.shape[1] if self.kind in ("sequence", "wave", "ids", "mask") and len(self.shape) > 1 else None

    def ladder(self) -> tuple[int, ...]:
        """The sizes to go through, the preferred one first."""
        if self.kind == "grid":
            return {3: LENGTHS, 4: SIDES, 5: DEPTHS}.get(len(self.shape), ())
        return LENGTHS if self.kind == "wave" else (POSITIONS, 64, 8, 128)


@dataclass(frozen=True)
class Argument:
    """A parameter of forward: whether it must be given, and whether it may be passed by position."""

    name: str
    required: bool
    positional: bool
    annotation: str
    default: Any = None


def signature_of(module: nn.Module) -> tuple[Argument, ...]:
    """The parameters of forward in order. A wrapper that passes everything on has the signature of what it wraps."""
    current: Any = module
    schema = getattr(module.forward, "schema", None)
    if schema is not None:  # a compiled TorchScript module has no signature of Python's
        own_arguments = schema.arguments[1:]  # the first is the module
        return tuple(Argument(a.name, not a.has_default_value(), True, str(a.type), a.default_value) for a in own_arguments)
    for _ in range(4):
        parameters = list(inspect.signature(current.forward).parameters.values())
        own = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        inner = [c for c in current.children() if any(True for _ in c.parameters())] if isinstance(current, nn.Module) else []
        if own or len(inner) != 1 or isinstance(current, nn.Sequential):
            break
        current = inner[0]
    return tuple(
        Argument(
            p.name,
            p.default is p.empty,
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD),
            "" if p.annotation is p.empty else str(getattr(p.annotation, "__name__", p.annotation)),
            None if p.default is p.empty else p.default,
        )
        for p in own
    ) or (Argument("input", True, True, ""),)


def guesses_for(module: nn.Module, batch: int) -> list[Guess]:
    """Guesses for one input of `module`, the likeliest first, from the first layers that it defines."""
    found: dict[Guess, None] = {}
    layers = [m for m in module.modules() if _own_parameters(m)][:_FIRST]
    sequential = any(isinstance(m, (nn.RNNBase, nn.MultiheadAttention)) for m in module.modules())
    for layer in layers:
        for guess in _wanted(layer, batch, sequential):
            found.setdefault(guess)
    for guess in _usual(batch, module):
        found.setdefault(guess)
    return list(found)


def _own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _wanted(layer: nn.Module, b: int, sequential: bool) -> Iterator[Guess]:
    """What would fit if `layer` came first."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        yield from _grids(b, layer.in_channels, len(layer.kernel_size), layer.transposed)
    elif isinstance(layer, nn.Linear):
        yield from _features(b, layer.in_features, sequential)
    elif isinstance(layer, nn.Bilinear):
        yield Guess("flat", (b, layer.in1_features))
        yield Guess("flat", (b, layer.in2_features))
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        yield Guess("ids", (b, POSITIONS), torch.int64)
        yield Guess("ids", (b,), torch.int64)
    elif isinstance(layer, nn.RNNBase):
        yield Guess("sequence", (b, POSITIONS, layer.input_size))
    elif isinstance(layer, nn.RNNCellBase):
        yield Guess("flat", (b, layer.input_size))
    elif isinstance(layer, nn.MultiheadAttention):
        yield Guess("sequence", (b, POSITIONS, layer.embed_dim))
    elif isinstance(layer, nn.LayerNorm):
        shape = tuple(layer.normalized_shape)
        yield Guess("sequence", (b, POSITIONS, *shape)) if sequential else Guess("flat", (b, *shape))
        yield Guess("flat", (b, *shape)) if sequential else Guess("sequence", (b, POSITIONS, *shape))
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        rank = {"BatchNorm1d": 0, "BatchNorm3d": 3}.get(type(layer).__name__, 2)
        yield from _grids(b, layer.num_features, rank, False) if rank else _features(b, layer.num_features, False)
    elif isinstance(layer, nn.GroupNorm):
        yield from _grids(b, layer.num_channels, 2, False)
    else:
        for parameter in layer.parameters(recurse=False):
            yield from _of_parameter(tuple(parameter.shape), b, sequential)


def _grids(b: int, channels: int, rank: int, transposed: bool) -> Iterator[Guess]:
    sides = {1: LENGTHS, 2: SIDES, 3: DEPTHS}[rank]
    for side in (1, 8, sides[0]) if transposed else (sides[0],):
        yield Guess("grid", (b, channels, *[side] * rank))
    if rank == 1:
        yield Guess("sequence", (b, POSITIONS, channels))  # transposed to channels first by forward
    if channels == 1:
        # Unsqueezed by forward.
        yield Guess("wave", (b, sides[0])) if rank == 1 else Guess("sequence", (b, *[sides[0]] * rank))
    if rank == 2:
        yield Guess("sequence", (b, sides[0], sides[0], channels))


def _features(b: int, features: int, sequential: bool) -> Iterator[Guess]:
    pair = [Guess("flat", (b, features)), Guess("sequence", (b, POSITIONS, features))]
    yield from reversed(pair) if sequential else pair
    for channels in (1, 3):  # an image that forward flattens
        side = math.isqrt(features // channels)
        if side > 1 and channels * side * side == features:
            yield Guess("grid", (b, channels, side, side))
    side = math.isqrt(features)
    if side > 1 and side * side == features:
        yield Guess("flat", (b, side, side))
    yield Guess("sequence", (b, POSITIONS, POSITIONS, features))


def _of_parameter(shape: tuple[int, ...], b: int, sequential: bool) -> Iterator[Guess]:
    """A parameter that forward uses by itself: a matrix either way round, a kernel, a table, a scale."""
    if len(shape) == 2:
        for features in dict.fromkeys(shape):
            yield from _features(b, features, sequential)
        yield Guess("ids", (b, POSITIONS), torch.int64)
    elif 3 <= len(shape) <= 5 and shape[0] > 1:  # one row is a token or a position, not a kernel
        yield from _grids(b, shape[1], len(shape) - 2, False)
        for features in dict.fromkeys(shape):
            yield Guess("sequence", (b, POSITIONS, features))
    elif len(shape) == 1 and shape[0] > 1:
        yield from _features(b, shape[0], sequential)


def _usual(b: int, module: nn.Module) -> Iterator[Guess]:
    """What an input often is whatever the layers are."""
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in module.modules()):
        yield Guess("ids", (b, POSITIONS), torch.int64)
        yield Guess("ids", (b,), torch.int64)
    yield Guess("step", (b,))
    yield Guess("mask", (b, POSITIONS), torch.bool)
    yield Guess("mask", (b, POSITIONS), torch.float32)
    yield Guess("square", (POSITIONS, POSITIONS), torch.bool)
    yield Guess("grid", (b, 3, SIDES[0], SIDES[0]))
    yield Guess("sequence", (b, POSITIONS, 64))


# A name is a weak hint: it moves a kind to the front of the queue, and nothing is left out because of it.
_HINTS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("mask",), "mask"),
    (("_id", "ids", "token", "index", "idx"), "ids"),
    (("time", "step", "sigma"), "step"),
    (("pixel", "image", "img", "frame", "voxel"), "grid"),
    (("feature", "embed", "value", "audio"), "sequence"),
)
_WHOLE: dict[str, Kind] = {"t": "step"}


def ordered_for(argument: Argument, guesses: Sequence[Guess], module: nn.Module) -> list[Guess]:
    """The guesses for one argument: those that its annotation or its name suggests first."""
    simple = {"int": 1, "float": 1.0, "bool": False, "str": ""}
    if argument.annotation in simple:
        return [Guess("value", (), value=simple[argument.annotation])]
    name = argument.name.lower()
    hinted = [kind for words, kind in _HINTS if any(word in name for word in words)]
    kind = next(iter(hinted), _WHOLE.get(name))
    return sorted(guesses, key=lambda g: g.kind != kind) if kind is not None else list(guesses)


def sizes_in(config: Any, depth: int = 0) -> Iterator[int]:
    """Sizes that a module's configuration object mentions under names of images, inputs or sources."""
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in entries.items():
        if any(word in str(name) for word in ("image_size", "img_size", "input_size", "source_positions", "num_frames")):
            numbers = list(value) if isinstance(value, (tuple, list)) else [value]
            yield from (int(n) for n in numbers if isinstance(n, int) and 4 <= n <= 4096)
        elif depth < 2 and (isinstance(value, Mapping) or hasattr(value, "model_type")):
            yield from sizes_in(value, depth + 1)


def channels_in(config: Any, depth: int = 0) -> Iterator[int]:
    """Numbers of channels and of filter-bank features that a configuration object mentions."""
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in entries.items():
        if any(word in str(name) for word in ("channels", "mel_bins", "feat_per_channel", "input_dim")) and isinstance(
            value, int
        ):
            yield value
        elif depth < 2 and (isinstance(value, Mapping) or hasattr(value, "model_type")):
            yield from channels_in(value, depth + 1)


def mismatch(error: str) -> tuple[int, int] | None:
    """(features given, features wanted) of a matrix product that did not fit, from torch's error."""
    found = _PRODUCT.search(error)
    if found is None:
        return None
    numbers = [int(n) for n in found.groups() if n is not None]
    return (numbers[1], numbers[2]) if numbers[1] != numbers[2] else None
