"""The records of the zoo: an architecture as its library initialises it, small, with inputs for it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
Built = tuple[nn.Module, Inputs]


@dataclass(frozen=True)
class Model:
    """`build` makes the module, its weights drawn by its library's own initialization, and one batch of inputs."""

    name: str
    family: str
    build: Callable[[], Built]
    package: str = "own"


def built(model: Model) -> Built:
    """The module and its inputs, the same at every call."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(zlib.crc32(model.name.encode()))
        module, inputs = model.build()
    return module, inputs


def zoo() -> dict[str, Model]:
    """All models whose packages are installed, families mixed, by name."""
    make_torchvision_importable()
    import zoo_language
    import zoo_own
    import zoo_vision

    models = [*zoo_vision.models(), *zoo_language.models(), *zoo_own.models()]
    by_family: dict[str, list[Model]] = {}
    for model in models:
        by_family.setdefault(model.family, []).append(model)
    queues = list(by_family.values())
    mixed = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    found = {model.name: model for model in mixed}
    if len(found) != len(models):
        raise ValueError("two models of the zoo have the same name")
    return found


@functools.cache
def make_torchvision_importable() -> object:
    """Declares the operators that torchvision looks up at import, where its compiled ones do not fit the installed torch.

    Returns the declarations, which end with the object that made them.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in ("roi_align", "_roi_align_backward", "deform_conv2d"):
            library.define(name + "(Tensor x) -> Tensor")
        return library
    return None


def image(size: int, batch: int = 8, channels: int = 3) -> torch.Tensor:
    """(batch, channel, height, width), N(0, 1) as a normalised image is."""
    return torch.randn(batch, channels, size, size)


def ids(length: int = 16, batch: int = 8, rows: int = 200) -> torch.Tensor:
    """(batch, time) of token numbers."""
    return torch.randint(3, rows, (batch, length))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries and exporters warn and log about themselves: none of it is about what is measured."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def options(text: str) -> Mapping[str, Any]:
    """`depth=4 img_size=64` as keyword arguments: numbers, or tuples of numbers written with commas."""
    found: dict[str, Any] = {}
    for item in text.split():
        key, _, value = item.partition("=")
        numbers = tuple(_number(part) for part in value.split(",") if part)
        found[key] = numbers if "," in value else numbers[0]
    return found


def _number(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
