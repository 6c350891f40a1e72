"""What somebody says a tensor was drawn from, put to its values: "normal(0.02)", "kaiming_uniform(fan_in, relu)", a plain std.

Recognition asks which law explains the values; here the law is given, and only a plain contradiction counts. The level is so
low that a test suite which asks this on every commit does not fail by chance.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from initaudit.errors import UsageError
from initaudit.expect.laws import chi_square, two_sided
from initaudit.expect.recognise import moment_p_value
from initaudit.expect.scheme import Scheme, Site, normal, truncated, uniform
from initaudit.expect.schemes import FIRST_WORDS, catalogue
from initaudit.measure.observation import Observation
from initaudit.suggest import did_you_mean

# Of one tensor of one model; a suite of a thousand runs over a thousand tensors then fails by chance once in a thousand times.
LEVEL = 1e-9
_STDS = 2  # shown of a claim that leaves its parameters open
_CALL = re.compile(r"([a-z_]+)\s*(?:\((.*)\))?")
_DRAWN: Mapping[str, Callable[[str, float], Scheme]] = {
    "normal": lambda name, value: normal(name, value, "any", "given"),
    "uniform": lambda name, value: uniform(name, value, "any", "given"),
    "trunc_normal": lambda name, value: truncated(name, value, 2.0, "any", "given"),
}
_STRUCTURES = ("orthogonal", "delta_orthogonal", "identity", "dirac")


@dataclass(frozen=True)
class Verdict:
    """Whether the values contradict a claim; `expected` says it with its numbers, as in "kaiming_normal, std 0.0625"."""

    holds: bool
    expected: str


def judge(claim: str | float, seen: Observation, site: Site | None) -> Verdict:
    """What the values seen say about a claim.

    A number is a standard deviation of a law of any shape and mean 0, and 0 means zeros. A string is the name of a scheme as
    reports write it, with or without its parameters, or normal(std), uniform(bound), trunc_normal(std), constant(value),
    orthogonal(gain) with any number, sqrt allowed. `site` is None for a tensor without fans. Raises UsageError for a claim that
    means nothing.
    """
    if isinstance(claim, str):
        return _named(claim.strip(), seen, site)
    if isinstance(claim, bool) or not math.isfinite(claim) or claim < 0:
        raise UsageError("expect_init", f"{claim!r}", "a standard deviation or the name of a scheme")
    if claim == 0:
        return Verdict(_is_constant(seen, 0.0), "zeros")
    return Verdict(_has_std(seen, float(claim)), f"std {claim:.4g}")


def _named(claim: str, seen: Observation, site: Site | None) -> Verdict:
    match = _CALL.fullmatch(claim)
    word, inside = (match[1], match[2]) if match is not None else ("", None)
    if word not in FIRST_WORDS:
        advice = did_you_mean(word if word else claim, FIRST_WORDS)
        raise UsageError("expect_init", f"{claim!r} is no scheme", f"one of {', '.join(FIRST_WORDS)}, or a number", advice)
    if word in ("zeros", "ones"):
        return Verdict(_is_constant(seen, float(word == "ones")), word)
    if word in _STRUCTURES:
        same = seen.structure == word
        gain = _number(inside) if inside else None
        return Verdict(same and (gain is None or math.isclose(seen.gain, gain, rel_tol=1e-3)), claim)
    value = _number(inside) if inside else None
    if word == "constant" and value is not None:
        return Verdict(_is_constant(seen, value), claim)
    known = [s for s in catalogue(site) if _is_meant(claim, s.name)] if site is not None else []
    if value is not None and word in _DRAWN:
        known = [_DRAWN[word](claim, value)]
    if not known and site is None:
        raise UsageError("expect_init", f"{claim!r} depends on fans, which are not known here", "normal(std) and the like")
    if not known:
        names = [s.name for s in catalogue(site) if s.name.startswith(word)] if site is not None else []
        raise UsageError("expect_init", f"{claim!r} is not known for this weight", "one of " + ", ".join(names[:8]))
    stds = list(dict.fromkeys(f"{math.sqrt(s.variance):.4g}" for s in known))
    more = ", ..." if len(stds) > _STDS else ""
    # Orthogonal rows have the moments of independent ones; no draw is that regular by chance.
    holds = not seen.structure and any(moment_p_value(seen, s) > LEVEL for s in known if s.distribution != "constant")
    return Verdict(holds, f"{claim}, std {', '.join(stds[:_STDS])}{more}")


def _is_meant(claim: str, name: str) -> bool:
    """The scheme itself, or one of those that the claim leaves open: "kaiming_normal" means each of its forms."""
    if name == claim:
        return True
    start = claim[:-1] + ", " if claim.endswith(")") else claim + "("
    return name.startswith(start)


def _number(text: str) -> float | None:
    """The value of an arithmetic expression such as 0.02/sqrt(2*12); None for anything else."""
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sqrt" and len(node.args) == 1:
        return math.sqrt(_value(node.args[0]))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.Pow) and abs(right) <= 8:
            return float(left**right)
        if isinstance(node.op, ast.Add | ast.Sub):
            return left + right if isinstance(node.op, ast.Add) else left - right
    raise ValueError("no number")


def _is_constant(seen: Observation, value: float) -> bool:
    m = seen.moments
    # 16-bit types round what was filled in.
    slack = seen.spacing + 1e-6
    return not m.nan and not m.inf and m.m2 == 0 and math.isclose(m.mean, value, rel_tol=slack, abs_tol=0.0)


def _has_std(seen: Observation, std: float) -> bool:
    m = seen.moments
    if m.nan or m.inf or m.count < 2 or m.m2 == 0:
        return False
    # The variance of a sample variance is (kurtosis - 1)/n of its square; no law of weights is flatter than a uniform one.
    degrees = 2 * m.count / (max(1.8, m.kurtosis) - 1)
    tests = (chi_square(m.variance / std**2 * degrees, degrees), two_sided(m.mean * math.sqrt(m.count) / std))
    return min(tests) > LEVEL
