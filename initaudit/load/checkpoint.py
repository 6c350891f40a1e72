"""The records that every loader makes: named lazy arrays, where each came from, and perhaps a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Array:
    """A tensor that is read when it is asked for, memory-mapped wherever the file allows.

    `dtype` is numpy's or ml_dtypes' name ("float32", "bfloat16", "float8_e4m3fn"). Two arrays with the same `storage` share
    their bytes: tied parameters. `quantized` names the packing of a weight that is stored as integers ("gptq", "q4_k").
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    open: Callable[[], np.ndarray[Any, Any]] = field(repr=False, compare=False)
    storage: str = ""
    quantized: str = ""
    trainable: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray[Any, Any]:
        """The values, of `shape` and `dtype`; raises `UnreadableModel` where the bytes are missing or do not fit."""
        return self.open()


@lru_cache(maxsize=64)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype for a name that numpy or ml_dtypes knows; raises TypeError for another."""
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name, name))
    return dtype


@dataclass(frozen=True)
class Problem:
    """Something a loader noticed and that a rule reports: `code` is the rule's ("IA001", "IA502", "IA505").

    `severity` is given where it is less than the rule's own; `related` are the other tensors that it is about.
    """

    code: str
    tensor: str
    message: str
    severity: Literal["error", "warning", "info"] | None = None
    related: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """What was found at one source.

    `format` is the loader's name ("onnx", "safetensors", "torch_zip", "module"). `program` is an onnx.ModelProto without its
    external data, a torch.nn.Module, or None where the file holds weights only. `optimizer` holds the arrays of an optimizer's
    state, kept aside as evidence. `notes` are one-line remarks for the report ("prefix 'module.' stripped"). `resident` is
    the module of which `program` is a copy on the host; None for what lies on the host itself.
    """

    source: str
    format: str
    arrays: Mapping[str, Array]
    program: Any = None
    problems: tuple[Problem, ...] = ()
    optimizer: Mapping[str, Array] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resident: Any = None
