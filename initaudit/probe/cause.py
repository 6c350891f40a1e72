"""The sentence that names the likeliest cause of a risk and its place, with the rate at which the damage is done."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from initaudit.graph.graph import Graph, location_of
from initaudit.probe.features import (
    OPTIMIZERS,
    changes,
    dead_share,
    gradient_powers,
    lowest_loss,
    rehearsal_decides,
    signal_powers,
)
from initaudit.probe.response import STEPS
from initaudit.probe.trace import Trace

# A single step that does so much of the damage is its place; else it is spread over the stretch.
_MOST = 0.7
_CUT = 0.5  # of the weights: what has no gradient at all explains everything else
_BLOCK = re.compile(r"^(.*?(?:^|[./])\d+)(?=[./]|$)")


@dataclass(frozen=True)
class Stretch:
    """From which place to which a quantity changes most, by how many decades of power, over how many layers or blocks."""

    first: str
    last: str
    decades: float
    steps: int
    unit: str

    @property
    def factor(self) -> float:
        """The factor in amplitude of one layer or block."""
        return float(10 ** (self.decades / (2 * max(self.steps, 1))))


def worst_stretch(powers: list[tuple[str, float]], *, falls: bool) -> Stretch | None:
    """The stretch of the way (place, power), in order, over which the power falls (or rises) most; None where it never does.

    Blocks are counted where places share the part of their names up to a number, layers elsewhere.
    """
    logs = [math.log10(p) * (-1 if falls else 1) for _, p in powers]
    best, low, found = 0.0, 0, None
    for i, value in enumerate(logs):
        if value < logs[low]:
            low = i
        if value - logs[low] > best:
            best, found = value - logs[low], (low, i)
    if found is None:
        return None
    a, b = found
    jumps = [(logs[i + 1] - logs[i], i) for i in range(a, b)]
    if max(jumps)[0] > _MOST * best:
        a = max(jumps)[1]
        return Stretch(powers[a][0], powers[a + 1][0], max(jumps)[0], 1, "layer")
    blocks = list(dict.fromkeys(m.group(1) for name, _ in powers[a : b + 1] if (m := _BLOCK.match(name))))
    if 3 <= len(blocks) < b - a:
        return Stretch(blocks[0], blocks[-1], best, len(blocks) - 1, "block")
    return Stretch(powers[a][0], powers[b][0], best, b - a, "layer")


def cause_of(graph: Graph, trace: Trace, symmetry: float, weighed: Mapping[str, float], least: float) -> str:
    """One sentence. `weighed` holds each feature's part in the score, `least` the decades from which a change is a cause."""
    sites = _sites(graph)
    for place, what in ((trace.first_non_finite, "signal"), (trace.first_non_finite_gradient, "gradient")):
        if place is not None and trace.broken:
            return f"the {what} is not finite from {sites.get(place, place)} on"
    moved = changes(trace)
    worst = max(moved, key=lambda name: moved[name])
    if moved[worst] >= least:
        return _moving(trace, worst, sites) + _stepped(trace)
    if dead_share(trace) >= _CUT:
        return _sentence(trace, "dead", sites) + _stepped(trace)
    for name in sorted(weighed, key=lambda n: -weighed[n]):
        if text := _sentence(trace, name.removesuffix("_sgd").removesuffix("_adam"), sites):
            return text + _stepped(trace)
    if symmetry > 0:
        return f"{symmetry:.0%} of the units of a layer are copies of each other"
    return ""


def moving(graph: Graph, trace: Trace, change: str, least: float) -> str:
    """ "the gradient loses a factor 3.1 per block from 9 back to 0", for one of `changes`; empty below `least` decades."""
    return _moving(trace, change, _sites(graph), least)


def _sites(graph: Graph) -> Mapping[str, str]:
    return {n.name: location_of(n).site or n.name for n in graph.fx.nodes}


def _sentence(trace: Trace, feature: str, sites: Mapping[str, str]) -> str:
    """What a feature says in words; empty where it says no more than the steps that were taken."""
    gram = trace.gram
    if feature == "faded_gradient":
        return _moving(trace, "gradient_loss", sites)
    if feature == "dead":
        return f"{dead_share(trace):.0%} of the weights have no gradient, now and after two steps"
    if feature == "chaos":
        return "small differences between inputs grow beyond all bounds: neighbouring inputs become unrelated"
    if gram is None or not gram.sgd.eigenvalues:
        return ""
    top, centred = gram.sgd.eigenvalues[0], gram.sgd.centred_share
    if feature == "sharpness" and top > 0:
        return f"the loss is so steep along its gradient that gradient descent is stable only below a step of {2 / top:.1g}"
    if feature == "slow":
        return f"all inputs ask for the same change: examples differ in {centred:.2g} of the gradient's squared norm"
    if feature == "rank_loss":
        rank, n = gram.sgd.effective_rank, len(gram.sgd.centred)
        return f"{n} inputs ask for {rank:.2g} different changes: the network sees few of the directions in which they differ"
    return ""


def _stepped(trace: Trace) -> str:
    """What the virtual steps say, where the verdict relies on them."""
    if any(rehearsal_decides(trace, name) for name in OPTIMIZERS):
        return _rehearsed(trace)
    left = [x for name in OPTIMIZERS if (x := lowest_loss(trace, name)) is not None]
    if not left or min(left) < 0.9:
        return ""
    return f"; {STEPS} virtual steps of any customary size leave {min(left):.2g} of the loss of guessing"


def _rehearsed(trace: Trace) -> str:
    """What a rehearsal says, where the verdict relies on it."""
    rehearsal = trace.rehearsal
    assert rehearsal is not None
    parts = []
    for name in OPTIMIZERS:
        runs = [r for r in rehearsal.runs if r.optimizer == name]
        broken = [r for r in runs if r.broke_at is not None]
        if runs and len(broken) == len(runs):
            where = f" in {broken[0].broke_in}" if broken[0].broke_in else ""
            parts.append(f"{name} broke after {broken[0].broke_at} steps{where}")
        elif (left := rehearsal.left(name)) is not None:
            parts.append(f"{name} left {left:.2g} of the loss of guessing")
    return f"; this relies on the rehearsal of {rehearsal.steps} steps, in which " + " and ".join(parts)


def _moving(trace: Trace, change: str, sites: Mapping[str, str], least: float = 0.0) -> str:
    what, falls = change.split("_")[0], change.endswith("loss")
    way = signal_powers(trace) if what == "signal" else gradient_powers(trace)[::-1]
    found = worst_stretch([(sites.get(node, node), power) for node, power in way], falls=falls)
    if found is None or found.decades < least:
        return ""
    verb, back = "loses" if falls else "gains", "" if what == "signal" else "back "
    if found.steps == 1:
        return f"the {what} {verb} a factor {found.factor:.3g} between {found.first} and {found.last}"
    return (
        f"the {what} {verb} a factor {found.factor:.3g} per {found.unit} from {found.first} {back}to {found.last}, "
        f"{found.decades:.1f} decades of power in all"
    )
