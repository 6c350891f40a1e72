"""The largest singular value of a block, and the schemes that are ruled out all at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from initaudit.expect import recognise
from initaudit.expect.laws import marchenko_pastur_edge
from initaudit.expect.scheme import Site, site_of
from initaudit.expect.schemes import catalogue
from initaudit.measure.observation import observe
from initaudit.measure.spectrum import largest_eigenvalue

SHAPES = ((1024, 1024), (1024, 96), (60, 1000), (33, 33), (16, 16), (300, 8), (2, 50), (1, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outlier", [0.0, 1.5, 3.0])
def test_largest_eigenvalue_against_numpy(shape: tuple[int, int], outlier: float) -> None:
    """Judge: numpy.linalg.svd. `outlier` is in units of the value from which one stands out (Baik, Ben Arous & Péché 2005)."""
    rng = np.random.default_rng(sum(shape))
    b = rng.normal(size=shape)
    u, v = (rng.normal(size=n) for n in shape)
    b += outlier * math.prod(shape) ** 0.25 * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    true = float(np.linalg.svd(b, compute_uv=False)[0]) ** 2
    found = largest_eigenvalue(b.astype(np.float32)) / true
    assert found < 1 + 1e-5
    assert found > (0.97 if outlier < 3 else 0.9999)


def test_low_rank_and_equal_values_end_the_search() -> None:
    rng = np.random.default_rng(0)
    low = (rng.normal(size=(200, 3)) @ rng.normal(size=(3, 100))).astype(np.float32)
    for b in (low, np.eye(100, dtype=np.float32), np.ones((50, 70), np.float32)):
        true = float(np.linalg.svd(b.astype(np.float64), compute_uv=False)[0]) ** 2
        assert math.isclose(largest_eigenvalue(b), true, rel_tol=1e-5)
    assert largest_eigenvalue(np.zeros((40, 40), np.float32)) == 0


def test_a_draw_is_no_false_alarm() -> None:
    """p-values of draws are no smaller than they should be: what is found is at most the largest value itself."""
    rng = np.random.default_rng(1)
    p = [marchenko_pastur_edge(largest_eigenvalue(rng.normal(size=(40, 80)).astype(np.float32)), 40, 80) for _ in range(400)]
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) < level) < level + 3 * math.sqrt(level / 400)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_scale_changes_nothing(scale: float) -> None:
    values = np.random.default_rng(2).normal(size=(200, 300))
    plain, scaled = observe(values.astype(np.float32)).spectrum, observe(values * scale).spectrum
    assert math.isclose(plain.largest, scaled.largest, rel_tol=1e-5)
    assert plain.shape == scaled.shape
    np.testing.assert_allclose([r for r, _ in plain.lags], [r for r, _ in scaled.lags], atol=1e-6)


def sites() -> dict[str, Site]:
    return {
        "linear": site_of((48, 32), ("o", "i")),
        "square": site_of((64, 64), ("o", "i"), depth=12, block=3),
        "conv": site_of((16, 8, 3, 3), ("o", "i", "k", "k"), operator="conv"),
        "table": site_of((100, 24), ("v", "d"), operator="embedding"),
    }


@pytest.mark.parametrize("name", sites())
@pytest.mark.parametrize("law", ["normal", "uniform", "shifted", "outlier"])
def test_schemes_that_are_ruled_out_at_once_would_be_one_at_a_time(name: str, law: str) -> None:
    site, rng = sites()[name], np.random.default_rng(3)
    for std in (0.02, 1 / math.sqrt(site.fan_in), math.sqrt(2 / site.fan_out), 0.5):
        values = rng.normal(0, std, site.shape) if law != "uniform" else rng.uniform(-1.73 * std, 1.73 * std, site.shape)
        values += std if law == "shifted" else 0
        values.flat[0] *= 100 if law == "outlier" else 1
        seen = observe(values.astype(np.float32))
        kept = {scheme.name for scheme in recognise._plausible(seen, site)}
        fitting = 0
        for scheme in catalogue(site):
            if scheme.distribution != "constant":
                tests = recognise._moment_tests(seen, recognise._law(scheme), scheme.variance)
                fits = min(tests) * len(tests) >= recognise.LEVEL
                fitting += fits
                assert scheme.name in kept or not fits
        assert len(kept) <= 3 * fitting + 20  # and hardly any is put to the slow tests in vain
