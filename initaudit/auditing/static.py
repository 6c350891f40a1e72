"""A checkpoint without a program: its weights by shape and name, measured against the laws. Loads no torch."""

from __future__ import annotations

from initaudit.expect.expectation import expected_variances, standard_error
from initaudit.graph.from_names import NamedWeight
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.location import Location
from initaudit.measure.moments import Moments
from initaudit.pair.records import Pair
from initaudit.rules.evidence import LayerEvidence
from initaudit.rules.remedy import attribute_path

NOTE = "no program: fans and roles are inferred from shapes and names, activations are unknown"


def named_layer(weight: NamedWeight, array: Array, moments: Moments) -> LayerEvidence:
    """The layer of a tensor that looks like a weight."""
    use = weight.use
    fan_in, fan_out = use.fans(weight.shape)
    module = weight.name.rpartition(".")[0]
    pair = Pair(
        tensor=weight.name,
        site=module,
        node="",
        value="",
        operator=use.operator,
        role=weight.role,
        shape=weight.shape,
        axes=use.axes,
        fan_in=fan_in,
        fan_out=fan_out,
        groups=use.groups,
        gates=use.gates,
        overlap=1.0,
        unit_axis=use.unit_axis,
        constants=(weight.name,),
        provenance=(f"inferred from {weight.confidence}", *((weight.part,) if weight.part else ())),
        stored=True,
        trainable=True,
        feeds=(),
        bias=weight.bias,
        location=Location(module),
    )
    error = standard_error(moments.variance, moments.kurtosis, moments.count) if moments.m2 > 0 else 0.0
    expectation = expected_variances(max(1, fan_in), max(1, fan_out), None, 1.0, error)
    return LayerEvidence(pair, (pair,), (), moments, expectation, None, array.read, expression=attribute_path(weight.name))


def norm_vectors(checkpoint: Checkpoint) -> frozenset[str]:
    """One-axis tensors without a weight of more axes beside them: scales and shifts of norms, as far as shapes tell.

    Where a counter of batches stands beside them, some are running statistics, which say nothing of training: all are left out.
    """
    parents: dict[str, list[Array]] = {}
    for name, array in checkpoint.arrays.items():
        parents.setdefault(name.rpartition(".")[0], []).append(array)
    found: set[str] = set()
    for group in parents.values():
        if all(len(a.shape) == 1 and a.dtype.startswith(("float", "bfloat")) for a in group):
            found.update(a.name for a in group)
    return frozenset(found)
