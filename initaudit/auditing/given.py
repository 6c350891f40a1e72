"""The inputs that a user gives for a module, as the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from initaudit.config import Config
from initaudit.probe.inputs import load_data


def given_inputs(module: nn.Module, config: Config, inputs: Any) -> Any:
    """`inputs`, or else those of --data: by name where forward has an argument for each, else in order. None for neither."""
    if inputs is not None or config.data is None:
        return inputs
    data = load_data(config.data)
    by_name = "" not in data and set(data) <= set(inspect.signature(module.forward).parameters)
    return data if by_name else tuple(data.values())


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of forward, by position and by name, that `inputs` stand for: a mapping, a sequence, or the only one."""
    if isinstance(inputs, Mapping):
        return (), inputs
    several = isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields")
    return (tuple(inputs) if several else (inputs,)), {}
