"""ONNX's own backend suite, loaded in memory and compared strictly."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test import loader
from onnx_exclusions import exclusion

from initaudit.errors import InitauditError
from initaudit.onnx_ops.backend import Backend

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    model: onnx.ModelProto
    data: tuple[tuple[list[np.ndarray], list[np.ndarray]], ...]
    rtol: float
    atol: float


def normal(value):
    """A value of the suite as an array: it may be a tensor, a number or a list."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, (list, tuple, onnx.SequenceProto, onnx.OptionalProto)):
        return value
    return np.asarray(value)


def _from_folder(case):
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    data = []
    for part in sorted(folder.glob("test_data_set_*")):
        sides = []
        for side in ("input", "output"):
            files = sorted(part.glob(f"{side}_*.pb"), key=lambda p: int(p.stem.rpartition("_")[2]))
            values = []
            for file in files:
                proto = onnx.TensorProto()
                proto.ParseFromString(file.read_bytes())
                values.append(numpy_helper.to_array(proto))
            sides.append(values)
        data.append(tuple(sides))
    return model, data


# Excluded from the pass rate, yet executed here: quantised and narrow types, bit patterns.
EXECUTED = ("quantised", "a type of 8 or fewer bits", "bit patterns")


def relevant() -> tuple[Case, ...]:
    """Every test that `onnx_exclusions` lets through."""
    return tuple(case for case, why in _loaded() if why is None)


def executed() -> tuple[Case, ...]:
    """The tests that do not count and yet should pass; complex and string values aside."""
    return tuple(case for case, why in _loaded() if why is not None)


@functools.cache
def _loaded() -> tuple[tuple[Case, str | None], ...]:
    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            for case in loader.load_model_tests(kind=kind):
                model = case.model
                if model is None:
                    model = onnx.load(Path(case.model_dir) / "model.onnx")
                why = exclusion(case.name, model)
                if why is not None and not why.startswith(EXECUTED):
                    continue
                data = case.data_sets if case.data_sets is not None else _from_folder(case)[1]
                sets = tuple(([normal(v) for v in i], [normal(v) for v in o]) for i, o in data)
                cases.append((Case(case.name, kind, model, sets, case.rtol, case.atol), why))
    return tuple(cases)


def difference(actual, expected, rtol, atol) -> str | None:
    """What sets the outputs apart from those expected: their number, a type, a shape or a value."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.dtype != e.dtype:
            return f"output {place}: type {a.dtype} instead of {e.dtype}"
        if a.shape != e.shape:
            return f"output {place}: shape {a.shape} instead of {e.shape}"
        if a.dtype.kind not in "biuf" or a.dtype.name == "bfloat16":
            a, e = a.astype(np.float32), e.astype(np.float32)
        if not np.allclose(a, e, rtol=rtol, atol=atol, equal_nan=True):
            return f"output {place}: values differ by up to {np.nanmax(np.abs(a.astype(float) - e.astype(float)))}"
    return None


def run(case: Case) -> str | None:
    """Why the case fails, or None."""
    try:
        prepared = Backend.prepare(case.model)
        for inputs, outputs in case.data:
            found = difference(prepared.run(inputs), outputs, case.rtol, case.atol)
            if found:
                return found
    except InitauditError as error:
        return str(error)
    return None
