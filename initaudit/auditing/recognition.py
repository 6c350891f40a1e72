"""Asks of every weight where its values came from, and of the whole model whether it has been trained."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from initaudit.config import Config
from initaudit.errors import InitauditError
from initaudit.expect.phase import PhaseEvidence, TensorRecord, phase_of
from initaudit.expect.recognise import Recognition, recognise
from initaudit.expect.scheme import Site, site_of
from initaudit.load.checkpoint import Array
from initaudit.measure.moments import Moments
from initaudit.measure.observation import observe
from initaudit.pair.records import Pair
from initaudit.rules.evidence import LayerEvidence, ModelPhase

_COPIED = 4_000_000  # elements
_FAR = 12.0  # times the median deviation, 8 standard deviations: no draw of this many normal values comes that far
_HANDFUL = 1e-3  # as a share
_FLAT_KURTOSIS = 2.2  # between 1.8, a uniform law's, and 3
_FEW_BITS = 8  # integers of more are as good as floating-point numbers to a test of their law
_ENOUGH = 1000  # values: fewer may fit some law by chance


def with_recognition(layers: tuple[LayerEvidence, ...], arrays: Mapping[str, Array]) -> tuple[LayerEvidence, ...]:
    """The layers with the schemes that fit their values; a tensor used in two ways is looked at once."""
    known: dict[tuple[object, ...], Recognition | None] = {}
    found = []
    for layer in layers:
        key = (layer.pair.tensor, layer.pair.axes, layer.pair.shape, layer.pair.value if not layer.pair.stored else "")
        if key not in known:
            known[key] = _recognition(layer, _bits(arrays.get(layer.pair.tensor)))
        found.append(dataclasses.replace(layer, recognition=known[key]))
    return tuple(found)


def _bits(array: Array | None) -> int:
    """The bits of the integers that a weight was dequantised from; 0 where it was not, or where they tell no more."""
    found = re.search(r"\d+", array.quantized) if array is not None else None
    return bits if found is not None and (bits := int(found[0])) <= _FEW_BITS else 0


def _recognition(layer: LayerEvidence, bits: int) -> Recognition | None:
    if layer.moments.size == 0:
        return None
    try:
        values = layer.read()
        found = recognise(observe(values, bits), site(layer.pair))
        if found.verdict == "trained":
            return _second_look(values, layer, found)
        return found
    except InitauditError:
        return None  # its bytes cannot be read: the loader has said so


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
        if bias is not None and bias.name in tensors and bias.name not in seen and len(bias.shape) == 1:
            seen.add(bias.name)
            yield TensorRecord(bias.name, "bias", tensors[bias.name], _of_bias(bias, pair), pair.tensor)
    for name in scales:
        if name in tensors and name not in seen:
            yield TensorRecord(name, "scale", tensors[name])


def _of_bias(bias: Array, pair: Pair) -> Recognition | None:
    if bias.size == 0:
        return None
    place = dataclasses.replace(site(pair), shape=bias.shape, axes=("o",), convention=(pair.fan_in, pair.fan_out))
    try:
        return recognise(observe(bias.read()), place)
    except InitauditError:
        return None
