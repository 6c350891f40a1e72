"""The moments against a float64 two-pass reference, and the laws of merging."""

from __future__ import annotations

import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from initaudit.measure import fused
from initaudit.measure.blocks import BLOCK, forget
from initaudit.measure.moments import Moments, measure, merge
from initaudit.measure.units import as_matrix, measure_units

DISTRIBUTIONS = {
    "normal(0, 0.02)": lambda rng, n: rng.normal(0, 0.02, n),
    "normal(1, 0.01)": lambda rng, n: rng.normal(1, 0.01, n),
    "normal(10, 0.01)": lambda rng, n: rng.normal(10, 0.01, n),
    "uniform(0.1)": lambda rng, n: rng.uniform(-0.1, 0.1, n),
}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(autouse=True, params=["numpy", "kernel"])
def implementation(request, monkeypatch):
    """The pass by numpy, and by the extension where it is installed (tests/test_kernel.py builds its own)."""
    if request.param == "numpy":
        monkeypatch.setattr(fused, "kernel", None)
    elif fused.kernel is None:
        pytest.skip("installed without the extension")


def reference(array):
    """(mean, variance, skewness, kurtosis) in two passes over a float64 copy."""
    x = array.astype(np.float64).ravel()
    d = x - x.mean()
    variance = np.mean(d**2)
    if variance == 0:  # float16 and bfloat16 may hold one value only near 10
        return x.mean(), 0.0, math.nan, math.nan
    return x.mean(), variance, np.mean(d**3) / variance**1.5, np.mean(d**4) / variance**2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [100, 5000, BLOCK, 3 * BLOCK + 17])
def test_moments_match_two_passes(name, dtype, n):
    array = DISTRIBUTIONS[name](np.random.default_rng(n), n).astype(dtype)
    mean, variance, skewness, kurtosis = reference(array)
    got = measure(array)
    if variance == 0:
        assert got.m2 == 0
        return
    assert got.mean == pytest.approx(mean, rel=1e-9, abs=1e-8 * math.sqrt(variance))
    assert got.variance == pytest.approx(variance, rel=1e-7)
    assert got.skewness == pytest.approx(skewness, abs=1e-6)
    assert got.kurtosis == pytest.approx(kurtosis, abs=1e-6)
    assert (got.count, got.min, got.max) == (n, float(array.min()), float(array.max()))


def test_blocks_may_drift():
    """Each block has its own pilot mean: a slow drift of the mean costs nothing."""
    array = (np.linspace(0, 1000, 5 * BLOCK) + np.random.default_rng(0).normal(0, 1, 5 * BLOCK)).astype(np.float32)
    _, variance, skewness, kurtosis = reference(array)
    got = measure(array)
    assert (got.variance, got.kurtosis) == (pytest.approx(variance, rel=1e-7), pytest.approx(kurtosis, abs=1e-6))
    assert got.skewness == pytest.approx(skewness, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-70, 1e-30, 1e-9, 1e9, 1e30, 1e70])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_scales_keep_the_shape(scale, dtype):
    if dtype == np.float32 and not 1e-31 < scale < 1e31:
        return
    array = (np.random.default_rng(0).normal(0, 1, 20_000) * scale).astype(dtype)
    unit = measure(array.astype(np.float64) / scale)
    got = measure(array)
    assert got.kurtosis == pytest.approx(unit.kurtosis, rel=1e-6)
    assert got.std == pytest.approx(unit.std * scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64, ml_dtypes.int4])
def test_integers_and_booleans(dtype):
    array = np.random.default_rng(1).integers(0, 2 if dtype == np.bool_ else 7, (13, 7, 5)).astype(dtype)
    mean, variance, _, kurtosis = reference(array)
    got = measure(array)
    assert (got.mean, got.variance, got.kurtosis) == (pytest.approx(mean), pytest.approx(variance), pytest.approx(kurtosis))
    assert got.zeros == np.count_nonzero(array.astype(np.int64) == 0)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.dtype(">f4"), np.dtype(">f2"), np.longdouble]
)
def test_unusual_floats(dtype):
    array = np.random.default_rng(2).normal(0, 1, 9999).astype(dtype)
    _, variance, _, kurtosis = reference(array)
    got = measure(array)
    assert (got.variance, got.kurtosis) == (pytest.approx(variance, rel=1e-7), pytest.approx(kurtosis, abs=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_counted_and_left_out(dtype):
    array = np.random.default_rng(3).normal(0, 1, BLOCK + 100).astype(dtype)
    array[[5, BLOCK + 3]], array[7], array[8], array[9] = np.nan, np.inf, -np.inf, 0
    got = measure(array)
    finite = measure(array[np.isfinite(array)])
    assert (got.nan, got.inf, got.count, got.size) == (2, 2, BLOCK + 96, BLOCK + 100)
    assert got.variance == pytest.approx(finite.variance, rel=2e-8)  # the same values in another order, summed in float32
    assert (got.min, got.max, got.zeros) == (finite.min, finite.max, finite.zeros)


def test_empty_scalar_and_constant():
    assert measure(np.empty((0, 3), np.float32)) == Moments()
    assert math.isnan(Moments().variance)
    assert math.isnan(Moments().min)
    assert measure(np.float32(2.5).reshape(())) == Moments(1, 2.5, 0, 0, 0, 2.5, 2.5)
    assert measure(np.full((3,), np.nan)) == Moments(nan=3) or math.isnan(measure(np.full((3,), np.nan)).min)
    constant = measure(np.full(10_000, 0.1, np.float32))
    assert constant.variance == 0
    assert math.isnan(constant.kurtosis)
    assert measure(np.array([0.0, -0.0, 1.0])).zeros == 2


@pytest.mark.parametrize("bad", [np.array(["a"]), np.array([object()])])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(TypeError, match="not of real numbers"):
        measure(bad)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2],
        lambda a: a[:, 3:9],
        lambda a: a[::-1, ::3],
        lambda a: a.reshape(30, 20, 50).transpose(2, 0, 1),
    ],
)
def test_views_are_read_as_they_are(view):
    array = view(np.random.default_rng(4).normal(2, 1, (600, 50)).astype(np.float32))
    mean, variance, _, kurtosis = reference(array)
    got = measure(array)
    assert (got.mean, got.variance) == (pytest.approx(mean), pytest.approx(variance, rel=1e-7))
    assert (got.kurtosis, got.count) == (pytest.approx(kurtosis, abs=1e-6), array.size)


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, np.dtype(">f4")])
@pytest.mark.parametrize("shape", [(64, 64), (300, 1000), (37, 4099), (5, 20_001), (1024, 9), (3, 12_290), (1, 9000)])
def test_sums_of_units_match_float64(dtype, shape):
    """Tiles of every kind: whole rows and pieces of them, even and odd numbers of columns, short rows and long ones."""
    array = (np.random.default_rng(len(shape)).normal(0.1, 1, shape) * 20).astype(dtype)
    wide = array.astype(np.float64)
    moments, sums = measure_units(array)
    assert moments.variance == pytest.approx(wide.var(), rel=1e-7)
    assert (moments.min, moments.max, moments.zeros) == (wide.min(), wide.max(), np.count_nonzero(wide == 0))
    for axis, (first, second) in enumerate([(sums.column_sums, sums.column_squares), (sums.row_sums, sums.row_squares)]):
        assert (np.abs(first - wide.sum(axis)) <= 1e-6 * np.abs(wide).sum(axis)).all()
        np.testing.assert_allclose(second, (wide**2).sum(axis), rtol=5e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_hashes_of_rows_tell_copies_from_others(dtype):
    array = np.random.default_rng(0).normal(0, 1, (400, 5001)).astype(dtype)
    array[[17, 399]] = array[3]
    _, sums = measure_units(array)
    assert np.flatnonzero(sums.row_hashes == sums.row_hashes[3]).tolist() == [3, 17, 399]
    assert len(np.unique(sums.row_hashes)) == 398


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, ml_dtypes.float8_e4m3fn])
def test_every_bit_pattern_is_read_as_the_cast_reads_it(dtype):
    """Values that are subnormal, infinite or NaN included, alone and beside finite ones."""
    patterns = np.arange(256 ** min(2, np.dtype(dtype).itemsize), dtype=f"u{min(2, np.dtype(dtype).itemsize)}")
    every = patterns.view(dtype) if np.dtype(dtype).itemsize < 4 else (patterns.astype(np.uint32) << 16).view(dtype)
    with np.errstate(invalid="ignore"):
        wide = every.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    got = measure(every)
    assert (got.count, got.nan, got.inf) == (finite.size, np.isnan(wide).sum(), np.isinf(wide).sum())
    assert (got.min, got.max, got.zeros) == (finite.min(), finite.max(), 2)
    only = measure(every[np.isfinite(wide)])
    assert (only.min, only.max, only.count) == (finite.min(), finite.max(), finite.size)
    assert only.m2 == pytest.approx(np.sum((finite - finite.mean()) ** 2), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_values_of_one_sign(dtype, sign):
    array = (sign * np.random.default_rng(0).uniform(0.5, 3, (70, 90))).astype(dtype)
    got = measure(array)
    assert (got.min, got.max) == (float(array.min()), float(array.max()))


def test_pages_of_a_map_are_let_go(tmp_path):
    """What has been read does not stay in resident memory, and reads the same again; writable maps keep what was written."""
    array = np.random.default_rng(5).normal(0, 1, (9000, 1000)).astype(np.float32)
    array.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float32, "r", shape=array.shape)
    mapped[::4].sum()
    held = _resident(mapped)
    forget(mapped)
    assert held > mapped.nbytes // 2
    assert _resident(mapped) < mapped.nbytes // 50
    assert np.array_equal(mapped, array)
    writable = np.memmap(tmp_path / "weights", np.float32, "c", shape=array.shape)
    writable[:] = 1
    forget(writable)
    assert (writable == 1).all()


def _resident(mapped):
    """Bytes of this process's mapping of a file that are in memory, as Linux tells."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("no /proc/self/smaps")
    found = re.search(rf"^[^\n]*{re.escape(mapped.filename.name)}\n(?:.*\n)*?Rss: +(\d+) kB", maps.read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def test_a_memory_map_is_not_copied(tmp_path):
    array = np.random.default_rng(5).normal(0, 1, 300_000).astype(np.float32)
    array.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float32, "r", shape=(300, 1000))
    assert measure(mapped) == measure(array)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(-100, 100), st.floats(1e-3, 100)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.integers(0, 2**32 - 1),
)
def test_merging_does_not_depend_on_order_or_partition(specs, random, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(mean, std, n) for n, mean, std in specs]
    whole = merge(*(measure(a) for a in arrays))
    parts = [measure(a) for a in arrays]
    random.shuffle(parts)
    while len(parts) > 1:
        at = random.randrange(len(parts) - 1)
        parts[at : at + 2] = [merge(parts[at], parts[at + 1])]
    got = parts[0]
    assert (got.count, got.zeros) == (whole.count, whole.zeros)
    if not whole.count:
        return
    spread = math.sqrt(whole.m2 / whole.count) + abs(whole.mean)
    assert got.mean == pytest.approx(whole.mean, abs=1e-12 * spread)
    for power, name in enumerate(("m2", "m3", "m4"), 2):
        largest = max(np.max(np.abs(np.concatenate(arrays) - whole.mean)), 1e-300)
        # A mean far from zero is itself rounded, and with it every deviation from it.
        rounding = 1e-12 * largest + power * 2**-52 * abs(whole.mean)
        allowed = whole.count * largest ** (power - 1) * rounding
        assert getattr(got, name) == pytest.approx(getattr(whole, name), abs=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 11), (1000, 300), (3, BLOCK + 5), (200_000, 2), (1, 1), (0, 4), (4, 0)])
def test_unit_sums(shape, dtype):
    matrix = np.random.default_rng(6).normal(0.1, 1, shape).astype(dtype)
    moments, sums = measure_units(matrix)
    x = matrix.astype(np.float64)
    assert moments.count == matrix.size
    if matrix.size:
        assert moments.variance == pytest.approx(x.var(), rel=1e-7, abs=1e-12)
    np.testing.assert_allclose(sums.row_norms, np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(sums.column_norms, np.linalg.norm(x, axis=0), rtol=1e-5)
    np.testing.assert_allclose(sums.row_sums, x.sum(1), atol=1e-5 * np.abs(x).sum(1).max(initial=1))
    np.testing.assert_allclose(sums.column_sums, x.sum(0), atol=1e-5 * np.abs(x).sum(0).max(initial=1))


def test_unit_sums_of_views_and_extremes():
    matrix = np.random.default_rng(7).normal(0, 1e25, (50, 60)).astype(np.float32)
    _, sums = measure_units(matrix.T)
    np.testing.assert_allclose(sums.row_norms, np.linalg.norm(matrix.astype(np.float64), axis=0), rtol=1e-6)
    matrix[3, 4] = np.nan
    _, sums = measure_units(matrix)
    assert np.flatnonzero(np.isnan(sums.row_norms)).tolist() == [3]
    assert as_matrix(np.zeros((4, 3, 2))).shape == (4, 6)
    assert as_matrix(np.zeros(5)).shape == (1, 5)
    with pytest.raises(ValueError, match="two axes"):
        measure_units(np.zeros(3))
