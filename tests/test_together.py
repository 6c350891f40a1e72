"""Many small tensors of a file, read and measured together: what is found of each is what it is found to be alone."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from kernels import hold, normal
from safetensors.torch import save_file

from initaudit.auditing import tensors
from initaudit.auditing.run import audit
from initaudit.config import Config
from initaudit.load import load
from initaudit.load.stretches import stretches
from initaudit.measure import fused
from initaudit.measure.hashes import factors
from initaudit.measure.moments import measure
from initaudit.measure.together import measure_together
from initaudit.measure.units import measure_units

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, np.int8, np.float64)


def shapes_of_all_remainders():
    """Matrices from none to two vectors and one wide, single rows and columns among them."""
    return [(r, c) for r in (0, 1, 2, 3, 4, 5, 11, 600) for c in (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_many_tensors_in_one_call_are_measured_as_each_is(fast, dtype):
    """Healthy ones, norm-like ones, constants, zeros, and values that are not finite, wherever they stand."""
    matrices = []
    for i, shape in enumerate(shapes_of_all_remainders()):
        matrix = normal(shape, dtype, mean=(0.0, 1.0, 100.0)[i % 3], std=(1.0, 0.01)[i % 2], seed=i)
        line = matrix.reshape(-1)
        if line.size and i % 5 == 0 and np.dtype(dtype).kind not in "iu":
            line[(0, line.size // 2, -1)[i % 3]] = (np.nan, np.inf)[i % 2]
        if i % 7 == 0:
            line[::3] = 0
        matrices.append(matrix if i % 11 else np.ones_like(matrix))
    found = measure_together(*laid_out(matrices))
    for i, matrix in enumerate(matrices):
        moments, sums = measure_units(matrix)
        if min(matrix.shape) < 2:
            moments, sums = measure(matrix.reshape(-1)), None
        np.testing.assert_array_equal(dataclasses.astuple(found.moments(i)), dataclasses.astuple(moments))
        own = found.unit_sums(i)
        assert (own is None) == (sums is None)
        if sums is not None:
            for name in ("row_sums", "row_squares", "row_hashes", "column_sums", "column_squares"):
                np.testing.assert_array_equal(getattr(own, name), getattr(sums, name), err_msg=f"{name} of {matrix.shape}")
            hold(matrix, {1: 1e-5, 8: 1e-10}.get(np.dtype(dtype).itemsize, 1e-12))


def laid_out(matrices):
    """Bytes that hold all of them behind one odd byte, their dtype, and the places."""
    data, places = b"\0", []
    for matrix in matrices:
        rows, columns = matrix.shape if min(matrix.shape) > 1 else (1, matrix.size)
        places.append((len(data), rows, columns))
        data += matrix.tobytes()
    return np.frombuffer(data, np.uint8), matrices[0].dtype, np.array(places, np.int64).reshape(-1, 3)


def test_many_tensors_are_measured_without_the_kernel_as_with_it(fast, monkeypatch):
    matrices = [normal(shape, np.float32, seed=i) for i, shape in enumerate(shapes_of_all_remainders())]
    given = laid_out(matrices)
    fast_found = measure_together(*given)
    monkeypatch.setattr(fused, "kernel", None)
    found = measure_together(*given)
    np.testing.assert_array_equal(found.counts, fast_found.counts)
    np.testing.assert_allclose(found.numbers, fast_found.numbers, rtol=1e-5, atol=1e-4)
    for i, matrix in enumerate(matrices):
        if min(matrix.shape) > 1:
            np.testing.assert_array_equal(found.unit_sums(i).row_hashes, fast_found.unit_sums(i).row_hashes)
            np.testing.assert_allclose(found.unit_sums(i).column_sums, fast_found.unit_sums(i).column_sums, atol=1e-4)


def test_no_tensors_at_all(fast):
    assert measure_together(np.zeros(0, np.uint8), np.dtype(np.float32), np.zeros((0, 3), np.int64)).numbers.shape == (0, 6)


def test_the_factors_of_short_rows_begin_those_of_long_ones():
    assert np.array_equal(factors(80), factors(8000)[:10])


MANY = {"kind": 0, "data": np.ones(64, np.float32), "table": None, "factors": np.zeros(2, np.uint64)}
MANY |= {"places": np.array([[0, 4, 4], [64, 2, 3], [252, 1, 1]], np.int64), "numbers": np.zeros(18)}
MANY |= {"counts": np.zeros(12, np.int64), "sums": np.zeros(20 + 12), "level": -1}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 4}, {"kind": -1}, {"factors": np.zeros(1, np.uint64)}, {"sums": np.zeros(31)}, {"numbers": np.zeros(17)},
        {"counts": np.zeros(11, np.int64)}, {"kind": 3, "table": np.zeros(255, np.uint16)}, {"data": np.ones(63, np.float32)},
        *({"places": np.array([place], np.int64)} for place in (
            (-1, 1, 1), (257, 0, 0), (256, 1, 1), (0, -1, 4), (0, 4, -4), (0, 1, 65), (0, 65, 1), (0, 2**62, 4),
            (0, 2**40, 2**40), (2**63 - 1, 1, 1), (0, 0, 2**41),
        )),
    ],
)  # fmt: skip
def test_places_that_lie_outside_are_refused(kernel, change):
    kernel.measure_many(*MANY.values())
    with pytest.raises(ValueError):
        kernel.measure_many(*(MANY | change).values())


def test_the_sums_of_each_start_where_those_before_it_end(kernel):
    starts = np.empty(4, np.int64)
    assert kernel.lay_out(np.array([[0, 4, 3], [9, 1, 7], [2, 5, 2], [0, 0, 0]], np.int64), starts) == 18 + 0 + 19 + 0
    assert starts.tolist() == [0, 18, 18, 37]


@pytest.mark.parametrize("shape", [(-1, 2), (2, -1), (2**41, 0), (2**40, 2**40), (2**63 - 1, 2)])
def test_impossible_shapes_have_no_sums(kernel, shape):
    with pytest.raises(ValueError):
        kernel.lay_out(np.array([[0, 2, 2], [0, *shape]], np.int64), np.empty(2, np.int64))
    with pytest.raises(ValueError):
        kernel.lay_out(np.array([[0, 2, 2]] * 2, np.int64), np.empty(1, np.int64))


def test_nothing_is_written_beside_the_sums_of_many(kernel):
    room, numbers, counts = np.full(64, 7.0), np.full(50, 7.0), np.full(44, 7, np.int64)
    own = {"sums": room[16:-16], "numbers": numbers[16:-16], "counts": counts[16:-16]}
    kernel.measure_many(*(MANY | own).values())
    for guarded in (room, numbers, counts):
        assert (guarded[:16] == 7).all()
        assert (guarded[-16:] == 7).all()
    assert numbers[16] == 1
    assert counts[16] == 16


def mixed_weights():
    """Small and large tensors of several types and shapes; some share a storage, one is transposed."""
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(16 + i, 9) / 3 for i in range(30)}
    weights |= {f"layers.{i}.bias": torch.zeros(16 + i) for i in range(30)}
    weights |= {f"half.{i}.weight": torch.randn(8, 5).to(torch.bfloat16) for i in range(4)}
    weights |= {
        "wide.weight": torch.randn(300, 80) / 9,
        "embed.weight": torch.randn(20, 8, 3, 3),
        "one.weight": torch.randn(1, 40),
    }
    return weights | {
        "scale": torch.tensor(1.0),
        "dead.weight": torch.zeros(12, 12),
        "nan.weight": torch.full((4, 4), torch.nan),
    }


@pytest.fixture(params=["safetensors", "pt"])
def mixed(request, tmp_path):
    weights, path = mixed_weights(), tmp_path / f"mixed.{request.param}"
    if request.param == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights | {"turned.weight": torch.randn(12, 30).T, "tied.weight": weights["layers.3.weight"]}, path)
    return path


def test_a_stretch_holds_what_each_tensor_holds(mixed):
    arrays = load(mixed).arrays
    seen = {}
    for stretch in stretches(arrays):
        data = stretch.read()
        for i, name in enumerate(stretch.names):
            seen[name] = stretch.values(data, i)
    assert set(arrays) - set(seen) <= {"wide.weight", "turned.weight"}
    assert {"layers.3.weight", "half.0.weight", "scale"} <= set(seen)
    for name, values in seen.items():
        assert (values.dtype, values.shape) == (arrays[name].read().dtype, arrays[name].shape)
        assert values.tobytes() == arrays[name].read().tobytes()


def test_stretches_are_bounded_in_number_and_in_reach(tmp_path, monkeypatch):
    path = tmp_path / "many.safetensors"
    save_file({f"{i}.weight": torch.randn(16, 16) for i in range(3000)}, path)
    arrays = load(path).arrays
    found = list(stretches(arrays))
    assert max(len(s.names) for s in found) <= 1024
    assert sorted(name for s in found for name in s.names) == sorted(arrays)
    monkeypatch.setattr("initaudit.load.stretches._REACH", 10_000)
    assert max(s.span.length for s in stretches(arrays)) <= 10_000 + 1024


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_report_is_the_same_as_when_each_tensor_is_read_alone(mixed, jobs, monkeypatch):
    together = json.dumps(audit(mixed, config=Config(jobs=jobs)).to_dict(), sort_keys=True)
    assert list(stretches(load(mixed).arrays))
    monkeypatch.setattr(tensors, "stretches", lambda arrays: iter(()))
    assert json.dumps(audit(mixed, config=Config(jobs=jobs)).to_dict(), sort_keys=True) == together


def test_a_file_that_is_cut_while_it_is_audited_costs_the_tensors_that_are_gone(tmp_path, monkeypatch):
    path = tmp_path / "cut.safetensors"
    save_file({f"{i}.weight": torch.randn(16, 16) for i in range(8)}, path)
    checkpoint = load(path)
    path.write_bytes(path.read_bytes()[:-1500])
    seen = tensors.survey_all(checkpoint, lambda label: None)
    assert len(seen.moments) == 6
    assert {p.code for p in seen.problems} == {"IA001"}
    assert len(seen.problems) == 2
    assert "has become shorter" in seen.problems[0].message
