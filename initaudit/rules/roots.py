"""One cause, one finding: what follows from another finding is folded into it.

A NaN weight also makes forty activations dead and every gradient vanish; thirty layers under the wrong scheme also lose the
signal, the gradient and the difference between inputs. The finding at the root stays, says what it entails, and takes the
severity of the worst that it explains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from initaudit.meter import Meter, Say, silent
from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import SEVERITIES, Finding

_SIGNAL = ("IA301", "IA302", "IA303", "IA304", "IA305", "IA306", "IA307", "IA308", "IA309", "IA310", "IA311", "IA312", "IA313")
_DIES = ("IA301", "IA303", "IA305", "IA307", "IA311", "IA312", "IA313")
_GROWS = ("IA302", "IA304", "IA305", "IA306", "IA307", "IA308", "IA309", "IA310", "IA312", "IA313")
_SCALES = ("IA101", "IA102", "IA103")  # of other tensors, where these did no harm before: see `_alone`
_VALUES = ("IA101", "IA102", "IA103", "IA104", "IA105", "IA107", "IA108", "IA109", "IA110", "IA202", "IA204", "IA205", "IA402")

# Decades of power by which one weight is off, and all weights of a finding are, that harm by themselves. Usual schemes stand up
# to 2.7 from what an activation needs; 7 is the limit of IA301.
_ONE, _ALL = 3.0, 7.0

# Rules about what the probe saw: their findings carry the profile by depth, and hand it to the finding that explains them.
PROFILED = ("IA3", "IA402", "IA403")

# For each cause the findings that follow from it anywhere in the network, and those that follow for the same tensors. Earlier
# causes explain later ones.
CAUSES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("IA001", ("IA002", "IA004"), ("IA003",)),
    ("IA502", (), ("IA201", "IA311", "IA003", "IA601")),
    ("IA314", ("IA311", "IA313"), ()),
    ("IA206", (*_SIGNAL, *_SCALES, "IA401", "IA402", "IA601"), _VALUES),
    ("IA508", _GROWS, ("IA401",)),
    ("IA401", (*_SIGNAL, "IA004"), (*_VALUES, "IA201", "IA203", "IA601")),
    ("IA207", _DIES, ("IA201",)),
    ("IA208", (*_DIES, *_SCALES, "IA304"), ("IA205",)),
    ("IA209", (*_DIES, *_SCALES, "IA304"), ("IA205",)),
    ("IA201", (*_DIES, *_GROWS, *_SCALES), ("IA101", "IA109", "IA204", "IA205", "IA501")),
    ("IA203", (), ("IA201",)),  # zeros that choose between copies, as below
    ("IA111", (*_DIES, *_SCALES, "IA302", "IA304", "IA306", "IA310"), ()),
    ("IA112", (*_GROWS, *_DIES, *_SCALES, "IA601"), ("IA102", "IA108", "IA109")),
    ("IA403", (*_DIES, "IA101"), ("IA101", "IA109", "IA202", "IA204", "IA205")),
    ("IA107", (*_GROWS, *_DIES, *_SCALES), ("IA101", "IA102", "IA103", "IA109", "IA205")),
    ("IA104", (*_GROWS, *_DIES), ("IA101", "IA102", "IA103", "IA109")),
    ("IA105", (*_DIES, "IA101"), ("IA101", "IA103", "IA109")),
    ("IA110", _DIES, ("IA101", "IA103")),
    ("IA103", (*_DIES, *_GROWS), ("IA101", "IA102")),
    ("IA402", (*_GROWS, "IA101", "IA102", "IA106"), ("IA108", "IA109", "IA205", "IA601")),
    ("IA601", ("IA310",), ("IA102", "IA109", "IA501")),
    ("IA102", (*_GROWS, "IA106"), ("IA109",)),
    ("IA101", _DIES, ("IA109",)),
    ("IA109", ("IA106",), (*_GROWS, *_DIES)),
    ("IA204", ("IA305", "IA313"), ("IA202", "IA205")),
    ("IA202", ("IA313",), ("IA201", "IA205")),
    ("IA205", ("IA301", "IA303", "IA304", "IA307", "IA311", "IA313"), ()),
    # Without a cause among the weights the worst symptom speaks for the others.
    ("IA311", ("IA301", "IA303", "IA304", "IA305", "IA307", "IA313"), ()),
    ("IA301", ("IA303", "IA307", "IA313"), ()),
    ("IA303", ("IA307", "IA313"), ()),
    ("IA302", ("IA304", "IA306", "IA308", "IA309", "IA310", "IA313"), ()),
    ("IA304", ("IA308", "IA313"), ()),
    ("IA306", ("IA308", "IA313"), ()),
    ("IA305", ("IA313",), ()),
    ("IA307", ("IA313", "IA315"), ()),
    ("IA308", ("IA313",), ()),
    ("IA309", ("IA313",), ()),
)

_PLACES = {cause: float(place) for place, (cause, _, _) in enumerate(CAUSES)}
_SYMPTOMS = _PLACES["IA311"]


def findings_of(evidence: Evidence, say: Say = silent) -> list[Finding]:
    """The findings of all rules that the configuration asks for, each at its root, the worst first."""
    from initaudit.rules import all_rules

    wanted = [rule for rule in all_rules() if evidence.config.wants(rule.code)]
    meter = Meter(say, "judging by", "rules", len(wanted))
    raw: list[Finding] = []
    for rule in wanted:
        meter(rule.code)
        raw += rule.check(evidence)
    if evidence.trace is not None and any(f.code.startswith(PROFILED) for f in raw):
        from initaudit.rules.profile import profile_of

        profile = profile_of(evidence)
        raw = [dataclasses.replace(f, profile=profile) if f.code.startswith(PROFILED) else f for f in raw]
    return fold(raw)


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """What remains once every finding that another explains is folded into that; folding again changes nothing."""
    left = dict(enumerate(findings))
    for cause, anywhere, same in CAUSES:
        roots = [place for place, f in left.items() if f.code == cause and f.severity != "info"]
        if not roots:
            continue
        # The first root about each tensor; a damaged checkpoint may have a finding for every one of its tensors.
        about: dict[str, int] = {}
        for place in roots:
            for tensor in _tensors(left[place]):
                about.setdefault(tensor, place)
        follows = {*anywhere, *same}
        explained = [(place, f) for place, f in left.items() if f.code != cause and f.code in follows and not f.apart]
        for place, finding in explained:
            shared = (about[tensor] for tensor in _tensors(finding) if tensor in about)
            far = roots[0] if finding.code in anywhere and not _alone(finding) else None
            root = min(shared, default=far)
            if root is not None:
                left[root] = _with(left[root], left.pop(place))
    return sorted(left.values(), key=lambda f: (SEVERITIES.index(f.severity), _depth(f)))


def _depth(finding: Finding) -> float:
    """Causes before their consequences: the place among `CAUSES`, what is no cause of anything before the symptoms."""
    return _PLACES.get(finding.code, _SYMPTOMS if finding.code.startswith("IA3") else _SYMPTOMS - 0.5)


def _alone(finding: Finding) -> bool:
    """Whether the scale of these weights would do harm by itself, and not only because another fault stands beside it."""
    measured, expected = finding.measured, finding.expected
    if finding.code not in _SCALES or not measured or not expected or not 0 < measured / expected < math.inf:
        return False
    off = abs(math.log10(measured / expected))
    return off > _ONE or off * len(_tensors(finding)) > _ALL


def _tensors(finding: Finding) -> set[str]:
    return {finding.tensor, *finding.related} - {""}


def _with(root: Finding, consequence: Finding) -> Finding:
    root = dataclasses.replace(root, profile=root.profile or consequence.profile)
    severity = min(root.severity, consequence.severity, key=SEVERITIES.index)
    note = f"{consequence.name} ({consequence.code})"
    if note in root.message:
        return dataclasses.replace(root, severity=severity)
    joint = ", " if "; seen also as " in root.message else "; seen also as "
    return dataclasses.replace(root, severity=severity, message=root.message + joint + note)
