"""Equal rows are found, whatever their place, and nothing else is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initaudit.measure.symmetry import duplicate_rows, row_hashes


def brute_force(matrix, same):
    groups, seen = [], set()
    for i in range(len(matrix)):
        if i not in seen:
            group = [i, *(j for j in range(i + 1, len(matrix)) if j not in seen and same(matrix[i], matrix[j]))]
            seen.update(group)
            if len(group) > 1:
                groups.append(tuple(group))
    return tuple(groups)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_]),
    st.integers(0, 2**32 - 1),
)
def test_equal_rows_are_those_of_brute_force(rows, columns, dtype, seed):
    matrix = np.random.default_rng(seed).integers(0, 2, (rows, columns)).astype(dtype)
    assert duplicate_rows(matrix) == brute_force(matrix, lambda a, b: a.tobytes() == b.tobytes())
    assert duplicate_rows(matrix.T) == brute_force(matrix.T, lambda a, b: a.tobytes() == b.tobytes())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 50), st.integers(0, 2**32 - 1))
def test_copies_up_to_sign_and_rounding(rows, columns, seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, (rows, columns))
    pick = rng.integers(0, rows, rows + 5)
    signs = rng.choice([-1.0, 1.0], rows + 5)
    matrix = (base[pick] * signs[:, None] * (1 + rng.uniform(-1, 1, (rows + 5, columns)) * 1e-7)).astype(np.float64)
    expected = {tuple(np.flatnonzero(pick == i)) for i in range(rows) if np.sum(pick == i) > 1}
    assert set(duplicate_rows(matrix, sign=True, tolerance=1e-6)) == expected
    with_sign = {
        tuple(np.flatnonzero((pick == i) & (signs == s)))
        for i in range(rows)
        for s in (-1, 1)
        if np.sum((pick == i) & (signs == s)) > 1
    }
    assert set(duplicate_rows(matrix, tolerance=1e-6)) == with_sign


def test_fresh_rows_are_all_different():
    matrix = np.random.default_rng(0).normal(0, 0.02, (50_000, 16)).astype(np.float32)
    assert duplicate_rows(matrix) == ()
    assert duplicate_rows(matrix, sign=True, tolerance=1e-6) == ()
    assert len(np.unique(row_hashes(matrix))) == len(matrix)


def test_zero_rows_empty_and_not_finite():
    matrix = np.zeros((5, 4), np.float32)
    matrix[1] = 1
    assert duplicate_rows(matrix) == ((0, 2, 3, 4),)
    assert duplicate_rows(matrix, tolerance=1e-6) == ((0, 2, 3, 4),)
    matrix[2:4] = np.nan
    assert duplicate_rows(matrix, tolerance=1e-6) == ((0, 4),)
    assert duplicate_rows(np.zeros((0, 3))) == duplicate_rows(np.zeros((3, 0))) == duplicate_rows(np.zeros((1, 3))) == ()
    with pytest.raises(ValueError, match="two axes"):
        duplicate_rows(np.zeros(3))
