"""The depth profile behind a finding about signals: how large signal and gradient are, block by block."""

from __future__ import annotations

import itertools
import math

from initaudit.probe.trace import Trace
from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Block
from initaudit.rules.support import view

_FEWEST = 2


def profile_of(evidence: Evidence) -> tuple[Block, ...]:
    """In forward order: the stretches between places that all gradients pass, else from each weight to the next; () unprobed.

    The gain of a block is norm(Jᵀg)²/norm(g)² for the gradient g that arrives behind it; its product over blocks that follow
    one another is the gain end to end.
    """
    trace = evidence.trace
    if trace is None or evidence.graph is None:
        return ()
    sites = {name: _site(evidence, name) for name in trace.signals}
    known = trace.measures.blocks if trace.measures is not None else ()
    if len(known) >= _FEWEST:
        return tuple(_block(trace, sites[b.start], sites[b.end], b.end, b.gain) for b in known)
    places = list(dict.fromkeys(w.output for w in trace.weights if w.output in trace.signals))
    return tuple(_block(trace, sites[a], sites[b], b, _gain(trace, a, b)) for a, b in itertools.pairwise(places))


def _site(evidence: Evidence, name: str) -> str:
    from initaudit.graph.graph import location_of

    node = view(evidence).nodes.get(name)
    return (location_of(node).site or name) if node is not None else name


def _block(trace: Trace, start: str, end: str, node: str, gain: float | None) -> Block:
    seen = trace.signals[node]
    return Block(start, end, _finite(seen.moment2), _finite(seen.gradient_moment2), _finite(gain))


def _gain(trace: Trace, start: str, end: str) -> float | None:
    before, behind = trace.signals[start], trace.signals[end]
    if before.gradient_moment2 is None or not behind.gradient_moment2:
        return None
    return before.gradient_moment2 * math.prod(before.shape) / (behind.gradient_moment2 * math.prod(behind.shape))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
