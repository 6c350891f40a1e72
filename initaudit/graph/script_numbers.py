"""What TorchScript's operators do where no tensor is among their arguments: numbers, text, lists and dictionaries.

Source: torch/csrc/jit/runtime/register_prim_ops.cpp; the names are those that the archive's code writes after `torch.`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from initaudit.errors import LimitExceeded

MOST_ITEMS = 1 << 20


def short(value: Any) -> Any:
    """`value`, unless it is a list, a text or a whole number beyond what a size can need; raises LimitExceeded."""
    if isinstance(value, (list, str)) and len(value) > MOST_ITEMS:
        raise LimitExceeded("TorchScript", f"a list of {len(value)} items", f"at most {MOST_ITEMS}")
    if isinstance(value, int) and value.bit_length() > 64:
        raise LimitExceeded("TorchScript", "a whole number of more than 64 bits")
    return value


def leaves(value: Any) -> list[Any]:
    """What is in lists, tuples and dictionaries, however deep; raises LimitExceeded for more than a million.

    A list that holds another twice, which holds another twice, has more leaves than could ever be counted: whatever goes
    through all of them (comparing, printing) has to come after this.
    """
    found: list[Any] = []
    waiting, parts = [value], 0
    while waiting:
        one = waiting.pop()
        if not isinstance(one, (list, tuple, dict)):
            found.append(one)
            continue
        parts += len(one)
        if parts > MOST_ITEMS:
            raise LimitExceeded("TorchScript", f"a value of more than {MOST_ITEMS} parts")
        waiting.extend([*one, *one.values()] if isinstance(one, dict) else one)
    return found


def _times(a: Any, b: Any) -> Any:
    if isinstance(a, (list, str)) and isinstance(b, int) and len(a) * max(b, 0) > MOST_ITEMS:
        raise LimitExceeded("TorchScript", f"a list of {len(a) * b} items", f"at most {MOST_ITEMS}")
    return short(a * b)


def _power(a: Any, b: Any) -> Any:
    return float(a) ** float(b) if isinstance(a, float) or isinstance(b, float) or b < 0 or b > 64 else short(int(a) ** int(b))


def append(items: list[Any], item: Any) -> list[Any]:
    """The list, one longer."""
    items.append(item)
    short(items)
    return items


def extend(items: list[Any], more: Sequence[Any]) -> None:
    """Puts `more` at the end of the list."""
    items.extend(more)
    short(items)


def _slice(items: Any, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return items[start:end:step]


def _set(items: Any, place: Any, value: Any) -> Any:
    items[place] = value
    return items


def _format(text: str, *values: Any) -> str:
    for value in values:  # str.format would look up attributes that the text names
        text = text.replace("{}", str(value)[:200] if isinstance(value, (int, float, str, list)) else "...", 1)
    return str(short(text))


def bounded_range(*ends: int) -> range:
    """`range(*ends)`; raises LimitExceeded for more numbers than a list may have."""
    made = range(*ends)
    if made and (made[-1] - made[0]) // made.step >= MOST_ITEMS:
        raise LimitExceeded("TorchScript", f"a range of more than {MOST_ITEMS} numbers")
    return made


def _nothing(*_: Any, **__: Any) -> None:
    return None


_TABLE: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("sub", "neg", "eq", "ne", "lt", "le", "gt", "ge", "floordiv", "mod")},
    "add": lambda a, b: short(a + b), "mul": _times, "div": operator.truediv, "truediv": operator.truediv,
    "remainder": operator.mod, "pow": _power, "fmod": math.fmod,
    "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor, "__not__": operator.not_, "not_": operator.not_,
    "__is__": operator.is_, "__isnot__": operator.is_not, "__contains__": lambda items, item: item in items,
    "__getitem__": operator.getitem, "__range_length": lambda a, b, c: len(range(a, b, c)),
    "ceil": math.ceil, "floor": math.floor, "sqrt": math.sqrt, "log": math.log, "exp": math.exp, "sin": math.sin,
    "cos": math.cos, "tanh": math.tanh, "abs": abs, "round": round, "min": min, "max": max, "sum": sum,
    "len": len,
    "Int": int, "Float": float, "Bool": bool, "str": str, "format": _format, "list": list, "copy": lambda x: x.copy(),
    "append": append, "extend": extend, "insert": lambda items, place, item: items.insert(place, item), "_set_item": _set,
    "pop": lambda items, *place: items.pop(*place), "keys": lambda d: list(d), "values": lambda d: list(d.values()),
    "items": lambda d: list(d.items()), "get": lambda d, *key: d.get(*key), "update": lambda d, more: d.update(more),
    "slice": _slice, "reverse": lambda items: items.reverse(), "clear": lambda items: items.clear(),
    "warn": _nothing, "device": lambda *_: torch.device("cpu"), "is_scripting": lambda: True,
    "is_autocast_enabled": lambda: False,
    "__derive_index": lambda index, start, step: start + index * step,
    "startswith": lambda text, head: text.startswith(head), "endswith": lambda text, tail: text.endswith(tail),
    "lower": lambda text: text.lower(), "upper": lambda text: text.upper(),
}  # fmt: skip


def on_numbers(name: str) -> Callable[..., Any] | None:
    """The operator `name` for arguments without a tensor; None where it has no such form."""
    return _TABLE.get(name)
