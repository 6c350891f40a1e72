"""The pass in C as the sources have it now, matrices to try it on, and what judges it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from initaudit.measure import fused
from initaudit.measure.units import measure_units

ROOT = Path(__file__).parent.parent


def build(folder: Path, **environment: str) -> list[Path]:
    """What the package's setup makes of the extension, in a copy of nothing but its sources."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True, timeout=300)
    suffixes = (".so", ".pyd")
    return [path for path in (folder / "lib").rglob("*") if path.suffix in suffixes]


def built(folder: Path, other: Path) -> ModuleType:
    """The extension as it is in the sources now, whatever is installed; made in `folder`, a compiler tried in `other`."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools")
    made = build(folder)
    if not made:
        assert not _compiles(other), "there is a compiler, yet it does not build the extension"
        pytest.skip("no compiler")
    spec = importlib.util.spec_from_file_location("initaudit.measure._kernel", made[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiles(folder: Path) -> bool:
    (folder / "empty.c").write_text("#ifndef __GNUC__\n#error\n#endif\n#include <Python.h>\n")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    try:
        done = subprocess.run(
            [compiler, "-c", f"-I{sysconfig.get_paths()['include']}", "empty.c"],
            cwd=folder,
            capture_output=True,
            timeout=60,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0


def by_numpy(matrix):
    """(moments, sums) without the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "kernel", None)
        return measure_units(matrix)


def normal(shape, dtype, mean=0.3, std=1.0, seed=0):
    values = np.random.default_rng(seed).normal(mean, std, shape)
    if np.dtype(dtype).kind in "iu":
        values = np.abs(values * 20)
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def broken(matrix):
    """The same with values that are not finite, in some rows and at the end."""
    matrix = matrix.copy()
    with np.errstate(all="ignore"):
        matrix.reshape(-1)[:: max(7, matrix.shape[1] + 1)] = np.nan
        matrix.reshape(-1)[-1] = np.inf
    return matrix


def hold(matrix, tolerance):
    """Asserts that the pass agrees with float64 within `tolerance` of the magnitudes, and exactly in what is counted."""
    moments, sums = measure_units(matrix)
    expected, others = by_numpy(matrix)
    for name in ("count", "zeros", "nan", "inf"):
        assert getattr(moments, name) == getattr(expected, name), name
    assert (moments.min, moments.max) == (expected.min, expected.max) or not moments.count
    assert np.array_equal(sums.row_hashes, others.row_hashes)
    with np.errstate(all="ignore"):
        wide = matrix.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        if finite.size:
            d = finite - finite.mean()
            assert abs(moments.mean - finite.mean()) <= tolerance * (abs(finite.mean()) + d.std())
            for power in (2, 3, 4):
                assert abs(getattr(moments, f"m{power}") - np.sum(d**power)) <= 4 * tolerance * np.sum(np.abs(d) ** power)
        for got, axis, terms in (
            (sums.row_sums, 1, wide),
            (sums.row_squares, 1, wide**2),
            (sums.column_sums, 0, wide),
            (sums.column_squares, 0, wide**2),
        ):
            reference = terms.sum(axis)
            known = np.isfinite(reference)
            assert np.array_equal(np.isfinite(got), known)
            assert (np.abs(got - reference)[known] <= 10 * tolerance * np.abs(terms).sum(axis)[known]).all()
