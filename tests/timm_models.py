"""timm without torchvision, which does not fit the small CPU build of torch from the same registry: timm imports it at the top.

What timm takes from it are image transforms and operators that no model is made of, so stand-ins that can be imported will do.
They are gone again afterwards: transformers asks whether torchvision is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any


class _Named(type):
    """A class in which every name is a text."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(types.ModuleType):
    """A module in which every name is a class of its own."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        made = _Anything(spec.name)
        if spec.name == "torchvision":
            made.__version__ = "0.0.0"
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def import_timm() -> types.ModuleType | None:
    """timm, or None where it is not installed."""
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("PIL") is None:
        return None
    if importlib.util.find_spec("torchvision") is not None or "timm" in sys.modules:
        import timm

        return timm
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import timm
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    return timm
