"""The rules: one class in one file, found by their folder.

`all_rules()` and `rule(code)` import the rule files when they are first called, never when this package is imported.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable
from types import ModuleType
from typing import get_args

from initaudit.errors import UsageError
from initaudit.rules.rule import Phase, Rule, Severity
from initaudit.suggest import did_you_mean

_CODE = re.compile(r"IA[0-9]{3}")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, by code. Raises TypeError where a rule file is malformed: that is a fault of ours, not of the user."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if re.match(r"ia[0-9]", m.name))
    return register(rule_of(importlib.import_module(f"{__name__}.{name}")) for name in names)


def rule(code: str) -> Rule:
    """The rule with this code or name ("IA101", "ia101", "variance-too-small"); raises `UsageError` with the nearest one."""
    by_key = {key: r for r in all_rules() for key in (r.code.lower(), r.name)}
    try:
        return by_key[code.lower()]
    except KeyError:
        known = [key for r in all_rules() for key in (r.code, r.name)]
        raise UsageError(code, "no such rule", advice=did_you_mean(code, known) or "`initaudit rules` lists them") from None


def check_codes(prefixes: Iterable[str], where: str) -> None:
    """Raises `UsageError` for a prefix with which no rule's code begins."""
    # The rules are imported only where there is something to check: `initaudit config` needs none of them.
    for prefix in prefixes:
        codes = [r.code for r in all_rules()]
        if not prefix or not any(code.startswith(prefix) for code in codes):
            families = sorted({code[:3] for code in codes})
            advice = did_you_mean(prefix, [*codes, *families]) or "`initaudit rules` lists them"
            raise UsageError(f"{where}: {prefix!r}", "no rule has such a code", advice=advice)


def rule_of(module: ModuleType) -> Rule:
    """The one rule that a rule file defines; raises TypeError for none, several, or a field that is missing or malformed."""
    classes = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Rule) and thing.__module__ == module.__name__
    ]
    classes = [c for c in classes if not c.__name__.startswith("_")]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define one rule, not {len(classes)}")
    cls = classes[0]
    for name in ("code", "name", "severity", "phase", "summary"):
        if not isinstance(getattr(cls, name, None), str) or not getattr(cls, name):
            raise TypeError(f"{cls.__qualname__} in {module.__name__} has no {name}")
    if not (cls.__doc__ or "").strip():
        raise TypeError(f"{cls.code} has no docstring, which is its page")
    if not _CODE.fullmatch(cls.code) or not module.__name__.rpartition(".")[2].startswith(cls.code.lower()):
        raise TypeError(f"{module.__name__}: the file is named after the code, and {cls.code!r} is not its code")
    if not _NAME.fullmatch(cls.name):
        raise TypeError(f"{cls.code}: {cls.name!r} is not a name such as 'variance-too-small'")
    if cls.severity not in get_args(Severity) or cls.phase not in get_args(Phase):
        raise TypeError(f"{cls.code}: severity {cls.severity!r} or phase {cls.phase!r} does not exist")
    if cls.check is Rule.check:
        raise TypeError(f"{cls.code} has no check")
    return cls()


def register(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules by code; raises TypeError where two share a code or a name."""
    seen: dict[str, Rule] = {}
    for each in rules:
        for key in (each.code, each.name):
            if key in seen:
                raise TypeError(f"{type(each).__module__} and {type(seen[key]).__module__} are both {key!r}")
            seen[key] = each
    return tuple(sorted({id(r): r for r in seen.values()}.values(), key=lambda r: r.code))
