"""Asks of every weight where its values came from, and of the whole model whether it has been trained."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.config import Config
from initaudit.errors import InitauditError
from initaudit.expect.phase import BIAS_LAWS, PhaseEvidence, TensorRecord, phase_of
from initaudit.expect.recognise import LEVEL, Fit, Recognition, moment_p_value, recognise
from initaudit.expect.scheme import Site, site_of, uniform
from initaudit.load.checkpoint import Array
from initaudit.measure.blocks import BLOCK, distinct, forget
from initaudit.measure.moments import Moments
from initaudit.measure.observation import Observation, observe, survey
from initaudit.measure.units import UnitSums
from initaudit.meter import Meter, Say, silent
from initaudit.pair.records import Pair
from initaudit.rules.evidence import LayerEvidence, ModelPhase
from initaudit.rules.structure import sum_behind

if TYPE_CHECKING:
    from torch import fx

    from initaudit.graph.graph import Graph

_COPIED = 4_000_000  # elements
_FAR = 12.0  # times the median deviation, 8 standard deviations: no draw of this many normal values comes that far
_HANDFUL = 1e-3  # as a share
_FLAT_KURTOSIS = 2.2  # between 1.8, a uniform law's, and 3
_FEW_BITS = 8  # integers of more are as good as floating-point numbers to a test of their law
_ENOUGH = 1000  # values: fewer may fit some law by chance
_PARTS = (2, 3)  # a value and its gate; queries, keys and values
_APART = 2.0  # of standard deviations: training does not spread equal parts so far from each other
_SHORT = 65_536  # values of a vector that are looked at one by one
_UNIFORM = 0.1  # distance of a kurtosis from a uniform law's 1.8


# The values of a tensor, their moments, and the sums of a matrix.
Known = tuple[np.ndarray[Any, Any], Moments, UnitSums | None]


@dataclasses.dataclass(frozen=True)
class Stack:
    """How many residual blocks of two branches each a model has, and from which each matrix that ends a branch returns."""

    depth: int | None = None
    blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _stack(layers: tuple[LayerEvidence, ...], graph: Graph) -> Stack:
    nodes: dict[str, fx.Node] = {n.name: n for n in graph.fx.nodes}
    streams: set[fx.Node] = set()
    writers: dict[str, int] = {}
    for layer in layers:
        end = sum_behind(nodes.get(layer.pair.node), streams) if layer.pair.role == "contraction" else None
        if end is not None:
            streams.add(end)
            writers.setdefault(layer.tensor, len(writers))
    if not writers:
        return Stack()
    branches = 1 if len(writers) % 2 else 2
    return Stack(len(writers) // branches, {tensor: place // branches for tensor, place in writers.items()})


def with_recognition(
    layers: tuple[LayerEvidence, ...], arrays: Mapping[str, Array], graph: Graph, say: Say = silent
) -> tuple[LayerEvidence, ...]:
    """The layers with the schemes that fit their values; a tensor used in two ways is looked at once."""
    stack = _stack(layers, graph)
    known: dict[tuple[object, ...], Recognition | None] = {}
    found = []
    meter = Meter(say, "recognising", "weights", len(layers))
    for layer in layers:
        meter(layer.tensor)
        key = (layer.pair.tensor, layer.pair.axes, layer.pair.shape, layer.pair.value if not layer.pair.stored else "")
        if key not in known:
            known[key] = _recognition(layer, arrays, stack)
        found.append(dataclasses.replace(layer, recognition=known[key]))
    return tuple(found)


def surveyed(
    array: Array, arrays: Mapping[str, Array], layer_of: Callable[[Moments], LayerEvidence], known: Known | None = None
) -> tuple[Moments, LayerEvidence]:
    """The moments of a stored weight, and the layer that `layer_of` makes of them with the schemes that fit, of one reading.

    `known` are its values, moments and sums, where it has been read. Raises InitauditError where it cannot be read.
    """
    values = known[0] if known is not None else array.read()
    moments, seen = survey(values, _bits(array), known[1:] if known is not None else None)
    layer = layer_of(moments)
    recognition = _judged(values, seen, layer, arrays, Stack()) if moments.size else None
    return moments, dataclasses.replace(layer, recognition=recognition)


def _bits(array: Array | None) -> int:
    """The bits of the integers that a weight was dequantised from; 0 where it was not, or where they tell no more."""
    found = re.search(r"\d+", array.quantized) if array is not None else None
    return bits if found is not None and (bits := int(found[0])) <= _FEW_BITS else 0


def _recognition(layer: LayerEvidence, arrays: Mapping[str, Array], stack: Stack) -> Recognition | None:
    if layer.moments.size == 0:
        return None
    try:
        values = layer.read()
        return _judged(values, observe(values, _bits(arrays.get(layer.pair.tensor))), layer, arrays, stack)
    except InitauditError:
        return None  # its bytes cannot be read: the loader has said so


def _judged(
    values: np.ndarray[Any, Any], seen: Observation, layer: LayerEvidence, arrays: Mapping[str, Array], stack: Stack
) -> Recognition:
    place = dataclasses.replace(site(layer.pair), depth=stack.depth, block=stack.blocks.get(layer.tensor))
    found = recognise(seen, place)
    if found.verdict == "trained" and not layer.pair.stored:
        found = _as_stored(layer, arrays, found)
    if found.verdict == "trained" and (folded := _without_copies(values)).shape != values.shape:
        found = recognise(observe(folded), _part(layer.pair, folded.shape))
    if found.verdict == "trained":
        found = _in_parts(values, layer, found)
    if found.verdict == "trained":
        return _second_look(values, layer, found)
    return found


def _as_stored(layer: LayerEvidence, arrays: Mapping[str, Array], found: Recognition) -> Recognition:
    """Whether the stored tensor was drawn, where what the layer uses was computed from it: a mask, a norm of weights, a
    standardization follow no law, yet training would have moved what they are computed from."""
    pair = layer.pair
    stored = arrays.get(pair.tensor)
    if stored is None or stored.shape != pair.shape or stored.size > _COPIED:
        return found
    again = recognise(observe(stored.read()), site(pair))
    return again if again.verdict == "trained" else dataclasses.replace(found, verdict=again.verdict)


def _in_parts(values: np.ndarray[Any, Any], layer: LayerEvidence, found: Recognition) -> Recognition:
    """Layers that share one matrix, each drawn by a law of its own: a gate beside the values that it scales."""
    pair = layer.pair
    axes = [i for i, a in enumerate(pair.axes) if a == "o"]
    if len(axes) != 1 or values.size > _COPIED:
        return found
    for parts in _PARTS:
        if values.shape[axes[0]] % parts or values.size // parts < _ENOUGH:
            continue
        pieces = [np.ascontiguousarray(v) for v in np.split(values, parts, axes[0])]
        spreads = [float(v.astype(np.float64).std()) for v in pieces]
        if not max(spreads) > _APART * min(spreads):
            continue  # of one scale: then what the whole does not follow, the parts hide only because they are fewer values
        seen = [recognise(observe(v), _part(pair, v.shape)) for v in pieces]
        if all(part.schemes for part in seen) and any(part.verdict == "init" for part in seen):
            return dataclasses.replace(found, verdict="init", decisive=any(part.decisive for part in seen))
    return found


def _part(pair: Pair, shape: tuple[int, ...]) -> Site:
    return site_of(shape, pair.axes, operator=pair.operator, groups=pair.groups)


def _without_copies(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What was drawn, where a tensor is made of it: one of stacked copies, and one half of two that are equal but for the sign
    (units beside their negatives, Balduzzi et al. 2017; units repeated to widen a layer)."""
    for axis in range(min(values.ndim, 2)):
        while (half := values.shape[axis] // 2) and values.shape[axis] == 2 * half:
            first, second = np.split(values, 2, axis)
            # One row tells nearly all tensors apart.
            if not np.array_equal(np.abs(first[:1]), np.abs(second[:1])):
                break
            if not (_equal(first, second, 1) or _equal(first, second, -1)):
                break
            values = first
    copies = values.ndim > 1 and len(values) > 1 and all(np.array_equal(v, values[0]) for v in values[1:])
    return np.ascontiguousarray(values[:1] if copies else values)


def _equal(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], sign: int) -> bool:
    """Whether `first` is `second` times `sign`, compared piece by piece: the two may be gigabytes of a file."""
    height = max(1, BLOCK * len(first) // max(1, first.size))
    for top in range(0, len(first), height):
        a, b = first[top : top + height], second[top : top + height]
        if not np.array_equal(a, b if sign > 0 else -b):
            return False
        forget(a)
        forget(b)
    return True


def _second_look(values: np.ndarray[Any, Any], layer: LayerEvidence, found: Recognition) -> Recognition:
    """Values that no law drew as they are: were they drawn with a mean, or did something pin a handful of them afterwards?

    Then they are a faulty initialization and no trained weight. Both questions are put to a copy, so large tensors are spared.
    """
    if values.size > _COPIED or not np.isfinite(values.astype(np.float32)).all():
        return found
    wide = values.astype(np.float64)
    core = np.abs(wide - np.median(wide))
    far = core > _FAR * np.median(core)
    pinned = 0 < far.sum() <= max(_HANDFUL * wide.size, 8)
    shifted = abs(float(wide.mean())) * math.sqrt(wide.size) > _FAR * float(wide.std())
    if not pinned and not shifted:
        return found
    # The middle of a uniform law is known better from its ends than from its mean.
    flat = layer.moments.kurtosis < _FLAT_KURTOSIS
    centre = 0.0 if not shifted else float(wide.min() + wide.max()) / 2 if flat else float(wide[~far].mean())
    clean = np.where(far & pinned, 0.0, wide - centre).astype(values.dtype)
    again = recognise(observe(clean), site(layer.pair))
    if not again.schemes:
        return found
    names = tuple(dataclasses.replace(f, name=f"{f.name} + {centre:.4g}") for f in again.schemes) if shifted else again.schemes
    return dataclasses.replace(again, schemes=names, verdict="init" if wide.size >= _ENOUGH else "unknown")


def site(pair: Pair) -> Site:
    """What a scheme may know of a weight."""
    packed = max(1, len(pair.gates))
    hidden = pair.fan_out if pair.gates else None
    return site_of(pair.shape, pair.axes, operator=pair.operator, groups=pair.groups, packed=packed, hidden=hidden)


def in_company(
    layers: tuple[LayerEvidence, ...],
    arrays: Mapping[str, Array],
    tensors: Mapping[str, Moments],
    scales: frozenset[str],
    config: Config,
) -> tuple[ModelPhase, tuple[LayerEvidence, ...]]:
    """The model's phase, and the layers with what their values say corrected by their biases and by the rest of the model.

    `scales` names the scales and shifts of normalizations. The user's `phase` overrules that of the model.
    """
    evidence = phase_of(list(_records(layers, arrays, tensors, scales)))
    corrected = tuple(_corrected(layer, evidence) for layer in layers)
    return (evidence.phase if config.phase == "auto" else config.phase), corrected


def _corrected(layer: LayerEvidence, evidence: PhaseEvidence) -> LayerEvidence:
    phase = evidence.tensors.get(layer.pair.tensor)
    if layer.recognition is None or phase is None or phase == layer.recognition.verdict:
        return layer
    return dataclasses.replace(layer, recognition=dataclasses.replace(layer.recognition, verdict=phase))


def _records(
    layers: tuple[LayerEvidence, ...], arrays: Mapping[str, Array], tensors: Mapping[str, Moments], scales: frozenset[str]
) -> Iterator[TensorRecord]:
    seen: set[str] = set()
    for layer in layers:
        pair = layer.pair
        if pair.tensor in seen:
            continue
        seen.add(pair.tensor)
        yield TensorRecord(pair.tensor, "weight", layer.moments, layer.recognition)
        bias = arrays.get(pair.bias) if pair.bias is not None else None
        # ONNX keeps the biases of a recurrent layer as `directions, gates`
        vector = bias is not None and (len(bias.shape) == 1 or pair.role == "recurrent")
        if bias is not None and vector and bias.name in tensors and bias.name not in seen:
            seen.add(bias.name)
            yield TensorRecord(
                bias.name, "bias", tensors[bias.name], _of_bias(bias, layer), pair.tensor, levels=_levels(arrays.get(bias.name))
            )
    for name in sorted(scales):
        if name in tensors and name not in seen:
            yield TensorRecord(name, "scale", tensors[name], levels=_levels(arrays.get(name)))


def _levels(array: Array | None) -> int | None:
    """How many different values a vector has; None where it is too long to look, or cannot be read."""
    if array is None or not 0 < array.size <= _SHORT:
        return None
    try:
        return distinct(array.read())
    except InitauditError:
        return None  # its bytes cannot be read: the loader has said so


def _of_bias(bias: Array, layer: LayerEvidence) -> Recognition | None:
    """What a bias was drawn from: by the fans of its weight, or within the bound of its weight.

    torch draws both within one bound, which is not always 1/sqrt(fan_in) as the axes count it: a transposed convolution takes
    the other axis, a recurrent cell its width.
    """
    if bias.size == 0:
        return None
    pair, shape = layer.pair, (bias.size,)
    candidates = [dataclasses.replace(site(pair), shape=shape, axes=("o",), convention=(pair.fan_in, pair.fan_out))]
    if pair.operator.startswith("conv_transpose"):
        candidates.append(dataclasses.replace(candidates[0], convention=(pair.fan_out, pair.fan_in)))
    try:
        seen = observe(bias.read().reshape(shape))
    except InitauditError:
        return None
    found = [recognise(seen, candidate) for candidate in candidates]
    named = next((f for f in found if {fit.name for fit in f.schemes} & set(BIAS_LAWS)), None)
    return named or _within_bound(seen, layer) or found[0]


def _within_bound(seen: Observation, layer: LayerEvidence) -> Recognition | None:
    """torch's default by the bound that the weight has, whatever factor both were multiplied by; None where it does not fit."""
    weight, known = layer.moments, layer.recognition
    if (
        known is None
        or not known.schemes
        or not weight.m2 > 0
        or abs(weight.kurtosis - 1.8) > _UNIFORM + 4 * math.sqrt(1 / weight.count)
    ):
        return None
    # The largest of n values is below the bound by about one part in n.
    law = uniform(BIAS_LAWS[0], max(abs(weight.min), abs(weight.max)) * (1 + 2 / weight.count), "any", "")
    p_value = moment_p_value(seen, law)
    return Recognition((Fit(law.name, p_value, law.variance),), "unknown") if p_value >= LEVEL else None
