"""How far IA206 is from alarming on what was drawn or trained."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from initaudit.config import Config
from initaudit.expect.schemes import catalogue, site_of
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.measure.moments import measure
from initaudit.rules import ia206_uninitialised_memory as memory
from initaudit.rules.evidence import Evidence

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def test_uninitialised_memory_is_far_from_every_law_of_the_catalogue():
    """The largest share of ones among ten bits has mean 0.512 and standard deviation 0.0045 over draws: the limit, 0.625, is
    25 of them away. Values above and below the limits at once do not occur in any law whose standard deviation is below 220."""
    rng = np.random.default_rng(0)
    largest, judged = 0.0, 0
    for scheme in catalogue(site_of((80, 64), ("o", "i"), packed=3, depth=12)):
        if scheme.distribution == "constant":
            continue
        std = math.sqrt(scheme.variance)
        unit = rng.uniform(-(3**0.5), 3**0.5, (80, 64)) if scheme.distribution == "uniform" else rng.standard_normal((80, 64))
        for dtype in DTYPES:
            values = (unit * std).astype(dtype)
            limits = memory._LIMITS_OF_HALF if dtype is np.float16 else memory._LIMITS
            assert min(memory._shares(values, *limits)) < memory._BOTH
        assert memory._free_of_zero((unit * std).astype(np.float16), memory._GAP) is None
        # What is stored as bfloat16 and read as float16 has a gap, whatever the law and its scale.
        assert memory._free_of_zero((unit * std).astype(ml_dtypes.bfloat16).view(np.float16), memory._GAP) is not None
        values = (unit * std).astype(np.float32)
        assert memory._low_bits(values, memory._OFTEN) is None
        bits = values.reshape(-1).view(np.uint32)
        largest, judged = max(largest, float(((bits[:, None] >> memory._BITS) & 1).mean(axis=0).max())), judged + 1
    assert judged > 100
    assert largest < 0.5 + (memory._OFTEN - 0.5) / 3


def findings(values, phase="init", **limits):
    arrays = {"w": Array("w", values.shape, str(values.dtype), lambda: values)}
    config = Config(thresholds={f"IA206.{name}": limit for name, limit in limits.items()})
    evidence = Evidence(Checkpoint("test", "module", arrays), config, phase, (), {"w": measure(values)})
    return list(memory.UninitialisedMemory().check(evidence))


@pytest.mark.parametrize("gap", [1 / 32, 0.2])
def test_the_gap_in_force_is_the_one_that_is_reported(gap):
    values = np.random.default_rng(0).normal(0, 0.02, (80, 64)).astype(ml_dtypes.bfloat16).view(np.float16)
    (found,) = findings(values, gap=gap)
    assert found.expected == gap
    # Of 4096 uniform values gap/sqrt(3) of them lie within the gap; their number is a Poisson one.
    assert found.standard_errors == pytest.approx(math.sqrt(4096 * gap / math.sqrt(3)))
    assert f"below {gap:.2g} of it" in found.message


@pytest.mark.parametrize("phase", ["init", "trained"])
def test_addresses_are_found_in_either_phase(phase):
    addresses = np.array([id(object()) & ~0xFFF | 0x7F00_0000_0000 for _ in range(1000)], np.int64)
    addresses += 16 * np.random.default_rng(0).integers(0, 10_000, 1000)
    assert [f.code for f in findings(addresses.view(np.float32).reshape(40, 50), phase)] == ["IA206"]


def test_what_decays_to_nothing_in_training_is_no_memory():
    """Units or inputs that get no gradient under weight decay shrink together, through the subnormal numbers to zero."""
    rng = np.random.default_rng(0)
    for axis in (0, 1):
        decayed = np.exp(-rng.exponential(60, (64, 1)))
        values = (rng.normal(0, 0.02, (64, 64)) * (decayed if axis == 0 else decayed.T)).astype(np.float32)
        assert (np.abs(values) < 1e-30).mean() > 0.1
        assert findings(values, "trained") == []
