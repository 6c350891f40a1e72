"""What a file of a rule must define, and that no two rules share a code or a name."""

from __future__ import annotations

import pytest
from test_cli import SampleRule

from initaudit.rules import Rule, rule_of


def test_rule_files_are_refused_when_something_is_missing():
    import types

    module = types.ModuleType("initaudit.rules.ia301_forward_vanishing")
    with pytest.raises(TypeError, match="must define one rule, not 0"):
        rule_of(module)
    for field, value, message in [
        ("name", "Not A Name", "is not a name"),
        ("summary", "", "has no summary"),
        ("code", "IA302", "named after the code"),
        ("severity", "bad", "does not exist"),
        ("__doc__", "", "has no docstring"),
        ("check", Rule.check, "has no check"),
    ]:
        cls = type("Broken", (SampleRule,), {"__doc__": "x", "__module__": module.__name__, field: value})
        module.Broken = cls
        with pytest.raises(TypeError, match=message):
            rule_of(module)


def test_two_rules_may_not_share_a_code_or_a_name():
    from initaudit.rules import register

    with pytest.raises(TypeError, match="both 'IA301'"):
        register([SampleRule(), SampleRule()])
