"""The pass in C: built by the package's own setup, held to float64 and to numpy at every instruction set, and optional."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import broken, build, hold, normal

from initaudit.measure import fused, spectrum
from initaudit.measure.moments import Moments, measure, merge
from initaudit.measure.units import measure_units

WIDE = [np.float32, np.float16, ml_dtypes.bfloat16]
NARROW = [
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e8m0fnu,
    np.int8,
    np.uint8,
]
SHAPES = [(1, 1), (3, 5), (17, 16), (40, 64), (33, 1000), (7, 1025), (5, 2049), (200, 9), (100, 300), (1, 4099), (20, 1024)]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=lambda dtype: np.dtype(dtype).name)
def test_the_kernel_agrees_with_float64_and_counts_as_numpy_does(dtype):
    tolerance = 1e-12 if np.dtype(dtype).itemsize > 1 else 1e-7
    for shape in SHAPES:
        matrix = normal(shape, dtype)
        hold(matrix, tolerance)
        hold(np.ones(shape, dtype), tolerance)
        if np.dtype(dtype).kind not in "iu":
            hold(broken(matrix), tolerance)
            hold(np.full(shape, np.nan).astype(dtype), tolerance)
        if dtype != ml_dtypes.float8_e8m0fnu:  # which has no zero
            hold(np.zeros(shape, dtype), tolerance)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("mean", [1, 10, -3])
@pytest.mark.parametrize("dtype", WIDE, ids=lambda dtype: np.dtype(dtype).name)
def test_values_far_from_zero_keep_their_digits(dtype, mean):
    for shape in ((1000, 1030), (100, 30), (60_001, 1)):
        hold(normal(shape, dtype, mean, 0.01), 1e-12)


@pytest.mark.usefixtures("fast")
def test_a_head_unlike_the_rest_misleads_nobody():
    matrix = normal((40, 1000), np.float32, 1000, 0.01)
    matrix[:2] = 0
    hold(matrix, 1e-12)
    drifting = (np.linspace(0, 1000, 3 << 20) + np.random.default_rng(0).normal(0, 1, 3 << 20)).astype(np.float32)
    hold(drifting.reshape(3, -1), 1e-12)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_every_bit_pattern_is_read_as_the_cast_reads_it(dtype):
    size = np.dtype(dtype).itemsize
    patterns = np.arange(256 ** min(2, size), dtype=f"u{min(2, size)}")
    every = patterns.view(dtype) if size < 4 else (patterns.astype(np.uint32) << 16).view(dtype)
    for pattern in np.array_split(every, 512 // size):
        with np.errstate(all="ignore"):
            wide = pattern.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        got = measure(pattern)
        assert (got.count, got.nan, got.inf) == (finite.size, np.isnan(wide).sum(), np.isinf(wide).sum())
        if finite.size:
            assert (got.min, got.max, got.zeros) == (finite.min(), finite.max(), np.count_nonzero(finite == 0))
            assert got.mean == pytest.approx(finite.mean(), rel=1e-6)


@pytest.mark.usefixtures("fast")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDE), st.integers(1, 70), st.integers(1, 70), st.data())
def test_neither_order_nor_partition_tells(seed, dtype, rows, columns, data):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(rng.normal(0, 3), 10.0 ** rng.integers(-3, 3), (rows, columns)).astype(dtype)
    cuts = sorted(data.draw(st.sets(st.integers(0, matrix.size), max_size=6)))
    parts = [measure(part) for part in np.split(matrix.reshape(-1), cuts)]
    rng.shuffle(parts)
    got, whole = merge(*parts), measure_units(matrix)[0]
    assert (got.count, got.zeros, got.nan, got.inf) == (whole.count, whole.zeros, whole.nan, whole.inf)
    wide = matrix.astype(np.float64)
    if not np.isfinite(wide).all():
        return
    d = np.abs(wide - wide.mean())
    assert got.mean == pytest.approx(whole.mean, abs=1e-12 * (abs(whole.mean) + d.std() + 1e-300))
    for power in (2, 3, 4):
        assert abs(getattr(got, f"m{power}") - getattr(whole, f"m{power}")) <= 1e-12 * (np.sum(d**power) + 1e-300)


@pytest.mark.usefixtures("fast")
def test_views_and_other_orders_of_bytes_are_read_as_they_are():
    matrix = normal((60, 90), np.float32)
    for view in (matrix.T, matrix[::2], matrix[:, 3:9], matrix[::-1, ::3], matrix.astype(">f4"), matrix.astype(np.float16).T):
        hold(view, 1e-12)
    unaligned = np.frombuffer(b"x" + matrix.tobytes(), np.uint8)[1:].view(np.float32).reshape(60, 90)
    assert not unaligned.flags.aligned
    assert measure_units(unaligned)[0] == measure_units(matrix)[0]


@pytest.mark.usefixtures("fast")
def test_empty_scalar_and_constant():
    assert measure(np.empty((0, 3), np.float32)) == Moments()
    assert measure(np.float32(2.5).reshape(())) == Moments(1, 2.5, 0, 0, 0, 2.5, 2.5)
    constant = measure(np.full(100_000, 0.1, np.float32))
    assert (constant.m2, constant.m4) == (0, 0)
    assert math.copysign(1, measure(np.array([-0.0, -0.0], np.float32)).min) == 1
    for shape in ((0, 4), (4, 0), (0, 0)):
        moments, sums = measure_units(np.empty(shape, np.float16))
        assert (moments, sums.row_sums.size, sums.column_sums.size) == (Moments(), *shape)


@pytest.mark.usefixtures("fast")
def test_threads_find_the_same():
    matrices = [normal((300, 400 + i), dtype, seed=i) for i in range(8) for dtype in WIDE]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda m: measure_units(m)[0], matrices))
    assert together == [measure_units(m)[0] for m in matrices]


def test_nothing_is_written_beside_the_sums(kernel):
    """Rows and columns of every remainder of a vector's length, between guards."""
    for rows, columns in ((1, 1), (3, 17), (2, 31), (5, 1023), (4, 1037)):
        room = np.full(3 * rows + 2 * columns + 32, 7.0)
        room[16:-16] = 0
        matrix = normal((rows, columns), np.float32)
        odd = np.ones(columns, np.uint64)
        kernel.measure(0, matrix, rows, columns, None, odd, room[16:-16], 0, rows, -1)
        assert (room[:16] == 7).all()
        assert (room[-16:] == 7).all()
        np.testing.assert_allclose(room[16 : 16 + rows], matrix.sum(1, dtype=np.float64))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 4}, {"kind": -1}, {"rows": 9}, {"columns": 17}, {"rows": -1}, {"columns": -1}, {"rows": 2**62},
        {"factors": np.zeros(7, np.uint64)}, {"sums": np.zeros(55)}, {"sums": np.zeros(57).view(np.uint8)[1:-7]}, {"top": 1},
        {"top": -1}, {"all_rows": 7}, {"kind": 3, "table": np.zeros(255, np.uint16)}, {"rows": 2**40}, {"all_rows": 2**62},
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(kernel, change):
    given = {"kind": 0, "data": np.ones((8, 16), np.float32), "rows": 8, "columns": 16, "table": None}
    given |= {"factors": np.zeros(8, np.uint64), "sums": np.zeros(56), "top": 0, "all_rows": 8, "level": -1}
    assert kernel.measure(*given.values())[0] == 128
    with pytest.raises(ValueError):
        kernel.measure(*(given | change).values())


@pytest.mark.parametrize(
    "change", [{"data": None}, {"data": np.ones((16, 8), np.float32).T}, {"sums": b"\0" * 448}, {"rows": "8"}]
)
def test_what_is_no_buffer_is_refused(kernel, change):
    given = {"kind": 0, "data": np.ones((8, 16), np.float32), "rows": 8, "columns": 16, "table": None}
    given |= {"factors": np.zeros(8, np.uint64), "sums": np.zeros(56), "top": 0, "all_rows": 8, "level": -1}
    with pytest.raises((TypeError, ValueError, BufferError)):
        kernel.measure(*(given | change).values())


def test_without_a_compiler_the_package_is_still_built(tmp_path):
    """And then numpy does the work: tests/test_measure_moments.py asks it everything."""
    assert build(tmp_path, CC="/bin/false", CXX="/bin/false") == []
    assert fused.reader_of(np.dtype(np.float64)) is None


@pytest.mark.parametrize("size", [1, 15, 64, 65, 4099, 300_001])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_survey_sums_and_bounds_float32(fast, size, start):
    line = normal(size + start, np.float32)[start:]
    total, squares, low, high = fused.survey(line)
    wide = line.astype(np.float64)
    assert total == pytest.approx(wide.sum(), rel=1e-6, abs=1e-6 * np.abs(wide).sum())
    assert squares == pytest.approx(np.square(wide).sum(), rel=1e-6)
    assert (low, high) == (line.min(), line.max())


@pytest.mark.parametrize("values", ["usual", "tiny", "huge", "equal", "one step", "one NaN", "one infinity"])
@pytest.mark.parametrize("extremes", [True, False])
def test_moments_of_a_signal_are_the_same_with_and_without_the_kernel(fast, values, extremes, monkeypatch):
    import torch

    from initaudit.probe.statistics import moments

    x = torch.from_numpy(normal((6, 5, 171), np.float32)).transpose(0, 2)
    x = {"tiny": x * 1e-25, "huge": x * 1e25, "equal": torch.full_like(x, 0.1)}.get(values, x).clone()
    if values == "one step":
        x = x[..., -1]
    elif values.startswith("one"):
        x[3, 2, 1] = float("nan") if values == "one NaN" else float("inf")
    fast_ones = moments(x, extremes=extremes)
    monkeypatch.setattr(fused, "kernel", None)
    for found, expected in zip(fast_ones, moments(x, extremes=extremes), strict=True):
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-5, nan_ok=True))


def test_a_survey_takes_what_is_a_buffer_only(kernel):
    with pytest.raises((TypeError, BufferError)):
        kernel.survey(None, -1)
    with pytest.raises((ValueError, BufferError)):
        kernel.survey(np.ones((4, 4), np.float32).T, -1)
    assert kernel.survey(np.ones(0, np.float32), -1) == (0.0, 0.0, float("inf"), float("-inf"))


@pytest.mark.parametrize("dtype", WIDE + NARROW, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("columns", "left", "width"), [(1, 0, 1), (40, 3, 17), (300, 40, 256), (70, 70, 0), (33, 0, 33)])
def test_rows_are_gathered_as_the_cast_reads_them(fast, dtype, columns, left, width):
    matrix = normal((9, columns), dtype)
    places = np.array([0, 3, 3, 8])
    found = np.full((4, width), 7.0, np.float32)
    assert fused.gather(matrix, places, left, found)
    np.testing.assert_array_equal(found, matrix[places, left : left + width].astype(np.float32))
    assert not fused.gather(matrix.T, places[:1], 0, found) or columns == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (35, 41), (64, 128), (130, 1024), (500, 77)])
@pytest.mark.parametrize("rank", [2, 1000])
def test_a_krylov_space_is_the_same_with_and_without_the_kernel(fast, shape, rank):
    rng = np.random.default_rng(0)
    b = rng.normal(size=(shape[0], min(rank, *shape))) @ rng.normal(size=(min(rank, *shape), shape[1]))
    start = rng.normal(size=shape[1])
    found = []
    for search in (fused.krylov, spectrum._krylov):
        basis, images = np.zeros((7, shape[1]), np.float32), np.zeros((6, shape[0]), np.float32)
        basis[0] = start
        made = search(b.astype(np.float32), basis, images)
        assert made is None or made <= min(6, rank + 1)
        wide = images.astype(np.float64)
        found.append(np.linalg.eigvalsh(wide @ wide.T)[-1])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_nothing_is_written_beside_a_block(kernel):
    """Between guards, for every remainder of a vector's length."""
    for rows, columns in ((1, 1), (3, 17), (5, 31), (6, 100), (9, 1023)):
        matrix = normal((rows, columns), np.float32)
        room = np.full(rows * columns + 32, 7, np.float32)
        kernel.gather(0, matrix, rows, columns, None, np.arange(rows), 0, columns, room[16:-16], -1)
        np.testing.assert_array_equal(room[16:-16].reshape(rows, columns), matrix)
        basis, images = np.full(3 * columns + 32, 7, np.float32), np.full(2 * rows + 32, 7, np.float32)
        basis[16 : 16 + columns] = 1
        kernel.krylov(matrix, rows, columns, 2, basis[16:-16], images[16:-16], -1)
        for guarded in (room, basis, images):
            assert (guarded[:16] == 7).all()
            assert (guarded[-16:] == 7).all()
        np.testing.assert_allclose(images[16 : 16 + rows], matrix.sum(1) / np.sqrt(columns), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 4}, {"rows": 9}, {"rows": -1}, {"columns": 2**60}, {"left": 9}, {"left": -1}, {"width": 17}, {"width": -1},
        {"places": np.array([8])}, {"places": np.array([0, -1])}, {"places": np.arange(6)}, {"to": np.zeros(39, np.float32)},
        {"kind": 3, "table": np.zeros(255, np.uint16)}, {"rows": 0}, {"rows": 0, "columns": 2**39, "width": 2**39},
    ],
)  # fmt: skip
def test_rows_that_are_not_there_are_refused(kernel, change):
    given = {"kind": 0, "data": np.ones((8, 16), np.float32), "rows": 8, "columns": 16, "table": None}
    given |= {"places": np.arange(5), "left": 8, "width": 8, "to": np.zeros(40, np.float32), "level": -1}
    assert kernel.gather(*given.values()) is None
    with pytest.raises(ValueError):
        kernel.gather(*(given | change).values())


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 9}, {"columns": 17}, {"rows": -1}, {"steps": -1}, {"steps": 3}, {"rows": 2**40}, {"columns": 2**62},
        {"basis": np.zeros(47, np.float32)}, {"images": np.zeros(15, np.float32)}, {"basis": np.zeros(200, np.uint8)[1:197]},
    ],
)  # fmt: skip
def test_a_space_without_room_is_refused(kernel, change):
    given = {"block": np.ones((8, 16), np.float32), "rows": 8, "columns": 16, "steps": 2}
    given |= {"basis": np.ones(48, np.float32), "images": np.zeros(16, np.float32), "level": -1}
    assert kernel.krylov(*given.values()) == 1
    with pytest.raises(ValueError):
        kernel.krylov(*(given | change).values())
