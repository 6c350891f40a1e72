"""What a probe feeds a model: inputs that were described, inputs that were given as data, and inputs that are made up.

Made-up inputs: floating-point values are N(0, 1), ids uniform below the number of rows of the table that they index, masks
ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from initaudit.errors import UnreadableModel, UsageError
from initaudit.meter import Say, silent
from initaudit.probe.graph_inputs import for_graph
from initaudit.probe.guesses import Guess

__all__ = ["InputSpec", "draw", "for_graph", "for_module", "load_data", "match_data", "parse_spec"]

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}
# Torch has to be told how to take what numpy does not know.
_AS_BITS = {"bfloat16": (np.uint16, torch.bfloat16)}
# A table that was not seen to be indexed: two rows are the fewest that any has.
_UNKNOWN_ROWS = 2
_EXAMPLE = "--input NAME=2x3x224x224:float32"
# What Python says where a tensor is looked up by a name, or taken apart into several.
_NESTED = ("invalid data type 'str'", "values to unpack", "no attribute 'keys'", "no attribute 'items'")


@dataclass(frozen=True)
class InputSpec:
    """The shape and dtype of one input, as `--input` describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def parse_spec(name: str, text: str) -> InputSpec:
    """`2x3x224x224:float32` (the dtype may be left out: float32; `scalar:int64` has no axes); raises UsageError."""
    shape, _, dtype = text.strip().partition(":")
    where = f"--input {name}={text}"
    if dtype and dtype not in _DTYPES:
        raise UsageError(where, f"dtype {dtype!r} is not known", "one of " + ", ".join(_DTYPES))
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*|scalar", shape):
        raise UsageError(where, f"shape {shape!r} is not sizes with an x between", "as in 2x3x224x224:float32")
    sizes = () if shape == "scalar" else tuple(int(n) for n in shape.split("x"))
    if math.prod(sizes) > 2**31:
        raise UsageError(where, f"{math.prod(sizes):,} elements are too many for a probe", "at most 2,147,483,648")
    return InputSpec(sizes, _DTYPES[dtype or "float32"])


def load_data(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a .npz, .npy or .safetensors file by name ("" for the one of a .npy); pickled objects are refused.

    Raises UsageError for a file that is missing, damaged, of another kind, or holds objects.
    """
    file = Path(path)
    where = f"--data {path}"
    try:
        if file.suffix == ".npz":
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
        elif file.suffix == ".npy":
            arrays = {"": np.load(file, allow_pickle=False)}
        elif file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = load_file(file)
        else:
            raise UsageError(where, f"data of kind {file.suffix or 'unknown'} are not read", ".npz, .npy or .safetensors")
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(where, error.strerror or str(error), "a file that can be read") from None
    except Exception as error:  # noqa: BLE001 - zipfile, numpy and safetensors each have errors of their own for damage
        raise UsageError(where, f"cannot be read: {error}", "arrays of numbers; pickled objects are never loaded") from None
    return {name: _tensor(array, f"{where} {name}".rstrip()) for name, array in arrays.items()}


def _tensor(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        bits, dtype = _AS_BITS["bfloat16"]
        return torch.from_numpy(np.ascontiguousarray(array).view(bits).copy()).view(dtype)
    if array.dtype.kind not in "fiub" or array.dtype.name not in _DTYPES:
        raise UsageError(where, f"values of type {array.dtype} are not fed to a model", "one of " + ", ".join(_DTYPES))
    return torch.from_numpy(np.array(array, order="C", dtype=array.dtype.newbyteorder("=")))


def match_data(data: Mapping[str, Tensor], expected: Mapping[str, torch.dtype | None]) -> dict[str, Tensor]:
    """`data` under the names of a model's inputs: by name where any name agrees, else in their order.

    `expected` maps the inputs in order to the dtype they must have (None: any). Raises UsageError, one line, for an input of
    the wrong dtype or data that belong to no input. Integers of another width, and floats, are converted.
    """
    if any(name in expected for name in data):
        strangers = [name for name in data if name not in expected]
        if strangers:
            raise UsageError("--data", f"the model has no input {strangers[0]!r}", "one of " + ", ".join(expected))
        matched = dict(data)
    else:
        if len(data) > len(expected):
            raise UsageError("--data", f"{len(data)} arrays for {len(expected)} inputs", ", ".join(expected))
        matched = dict(zip(expected, data.values(), strict=False))
    return {name: _converted(value, expected[name], name) for name, value in matched.items()}


def _converted(value: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or value.dtype == dtype:
        return value
    if value.is_floating_point() != dtype.is_floating_point:
        given, wanted = (str(d).removeprefix("torch.") for d in (value.dtype, dtype))
        raise UsageError(f"--data {name}", f"the values are {given}", wanted)
    return value.to(dtype)


def for_module(
    module: nn.Module, *, shapes: Mapping[str, InputSpec] | None = None, batch: int = 8, seed: int = 0, say: Say = silent
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs that `module.forward` accepts, of `batch` examples.

    They are found from forward's signature and the layers that the module holds, by runs without arithmetic; `shapes` fixes
    inputs by name, and `say` is told what is tried. Neither the module nor the random state is changed. Raises UnreadableModel
    where nothing fits, UsageError where `shapes` names an input that forward does not have.
    """
    # Only here: torch's symbolic shapes import sympy, half as long as torch itself; a graph's inputs are known.
    from initaudit.probe.search import NotFound, Search, describe

    given = {name: _as_guess(spec) for name, spec in (shapes or {}).items()}
    name = type(module).__name__
    search = Search(module, batch, given, say)
    known = [a.name for a in search.arguments]
    for wanted in given:
        if wanted not in known:
            raise UsageError(f"--input {wanted}", f"forward of {name} has no such argument", "one of " + ", ".join(known))
    try:
        found = search.found()
    except NotFound as nothing:
        tried = describe(nothing.tried)
        mend = f"say what it takes with {_EXAMPLE.replace('NAME', known[0])}"
        if any(sign in tried for sign in _NESTED):
            mend = "it takes a mapping or a tuple of tensors: give one as `inputs` of initaudit.audit from Python"
        raise UnreadableModel(
            name, f"no inputs were found that forward({', '.join(known)}) accepts", advice=f"tried {tried}; {mend}"
        ) from None
    generator = torch.Generator().manual_seed(seed)

    def make(argument: str, guess: Guess) -> Any:
        if guess.kind == "value":
            return guess.value
        dtype, rows = guess.dtype, found.outcome.rows.get(argument)
        if rows is None and not dtype.is_floating_point and guess.kind != "ids":
            return torch.ones(guess.shape, dtype=dtype)
        return draw(guess.shape, dtype, rows, generator)

    positional, keywords, _ = search.call(found.assignment, make)
    return tuple(positional), keywords


def _as_guess(spec: InputSpec) -> Guess:
    if spec.dtype == torch.bool:
        return Guess("mask", spec.shape, spec.dtype)
    return Guess("flat" if spec.dtype.is_floating_point else "ids", spec.shape, spec.dtype)


def draw(shape: tuple[int, ...], dtype: torch.dtype, rows: int | None, generator: torch.Generator) -> Tensor:
    """N(0, 1) for floats, ids below `rows` for integers and for floats that index a table, ones for booleans."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if rows is not None or not dtype.is_floating_point:
        most = rows if rows is not None else _UNKNOWN_ROWS
        if not dtype.is_floating_point:
            most = min(most, torch.iinfo(dtype).max)
        return torch.randint(0, max(1, most), shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
