"""How far IA206 is from alarming on what was drawn or trained."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from initaudit.expect.schemes import catalogue, site_of
from initaudit.rules import ia206_uninitialised_memory as memory

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
