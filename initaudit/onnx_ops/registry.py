"""Which function computes an ONNX operator, and what it does to a signal.

A family is a module of this package; importing it declares its operators. They are all imported at the first lookup, so
a new operator is one function in one file. The calling convention:

* inputs are positional, in the order of the standard, None for an omitted optional one; attributes are keyword arguments;
* `opset` and `outputs` are passed only to functions that ask for them (`wants_opset`, `wants_outputs`);
* an operator that can have several outputs asks for `outputs`: it returns a tensor when one is wanted, otherwise a tuple
  of at least as many entries;
* a body (If, Loop, Scan) is a callable from tensors to a tuple of tensors.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from initaudit.roles import Kind, Role

NEWEST_OPSET = 28

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One ONNX operator: `function` computes it, `role` says what it does to a signal. The default domain is ""."""

    name: str
    domain: str
    function: Callable[..., Any]
    role: Role

    @functools.cached_property
    def parameters(self) -> tuple[inspect.Parameter, ...]:
        """The function's parameters, in order."""
        return tuple(inspect.signature(self.function).parameters.values())

    @property
    def wants_opset(self) -> bool:
        """Whether the meaning depends on the opset, so that the caller passes `opset=`."""
        return any(p.name == "opset" for p in self.parameters)

    @property
    def wants_outputs(self) -> bool:
        """Whether the operator can have several outputs, so that the caller passes `outputs=`, how many are used."""
        return any(p.name == "outputs" for p in self.parameters)

    @property
    def attributes(self) -> frozenset[str]:
        """The names of the attributes that the function understands."""
        return frozenset(p.name for p in self.parameters if p.kind is p.KEYWORD_ONLY) - {"opset", "outputs"}


_operators: dict[tuple[str, str], Operator] = {}
_roles: dict[Callable[..., Any], Role] = {}


def operator(role: Role, domain: str = "", name: str | None = None) -> Callable[[F], F]:
    """Declare the decorated function to be the ONNX operator of its name (or `name`) in `domain`.

    Raises ValueError for a duplicate, for a function without a docstring and for a role of no known kind.
    """

    def declare(function: F) -> F:
        key = (domain, name or function.__name__)
        where = f"{domain or 'ai.onnx'}::{key[1]}"
        if key in _operators:
            raise ValueError(f"{where} is declared twice: {_operators[key].function.__module__} and {function.__module__}")
        if not (function.__doc__ or "").strip():
            raise ValueError(f"{where} has no docstring")
        if role.kind not in get_args(Kind):
            raise ValueError(f"{where} has a role of the unknown kind {role.kind!r}")
        if _roles.setdefault(function, role) != role:
            raise ValueError(f"{where} gives one function two roles")
        _operators[key] = Operator(key[1], domain, function, role)
        return function

    return declare


@functools.cache
def _import_families() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def lookup(op_type: str, domain: str = "") -> Operator | None:
    """The operator of that name, or None where there is no function of ours. "ai.onnx" is the default domain ""."""
    _import_families()
    return _operators.get(("" if domain == "ai.onnx" else domain, op_type))


def operators() -> tuple[Operator, ...]:
    """Every declared operator, sorted by domain and name."""
    _import_families()
    return tuple(_operators[key] for key in sorted(_operators))


def role_of(function: Callable[..., Any]) -> Role:
    """The role of an operator's function. Raises KeyError for any other function."""
    _import_families()
    return _roles[function]
