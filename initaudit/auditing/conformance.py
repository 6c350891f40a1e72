"""Whether every tensor of a model is drawn as its author says: the named recipe of a model, one scheme, or one a glob."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from initaudit.auditing.recognition import site
from initaudit.auditing.run import gather
from initaudit.config import Config
from initaudit.errors import InitauditError, UnreadableModel, UsageError
from initaudit.expect.claims import judge
from initaudit.expect.recipes import RECIPES
from initaudit.expect.recognise import recognise
from initaudit.expect.scheme import Site, site_of
from initaudit.load.checkpoint import Checkpoint
from initaudit.measure.observation import observe
from initaudit.rules.evidence import Evidence
from initaudit.rules.structure import sum_behind

Expected = str | float | Mapping[str, str | float | None]


@dataclass(frozen=True)
class Deviation:
    """A tensor that was not drawn as expected: what was expected, and what was found."""

    tensor: str
    expected: str
    found: str


@dataclass(frozen=True)
class _Place:
    """A tensor with its kind (see `recipes`) and what a scheme may know of it."""

    tensor: str
    kind: str
    site: Site | None


def deviations(checkpoint: Checkpoint, expected: Expected, inputs: Any = None) -> tuple[int, list[Deviation]]:
    """How many tensors were judged, and those that were not drawn as `expected` says.

    `expected` is a recipe ("gpt2"), a scheme or a standard deviation for every weight, or a mapping of globs over names to
    schemes and standard deviations (None: not judged), of which the first that matches counts. Raises UsageError for a glob
    that matches nothing or a scheme that does not exist, UnreadableModel where a recipe needs the graph of a model that cannot
    be traced.
    """
    recipe = RECIPES.get(expected) if isinstance(expected, str) else None
    evidence = _evidence(checkpoint, inputs, needed=recipe is not None and "writer" in recipe)
    places = _places(evidence)
    claims = list(_claims(places, expected, recipe, checkpoint))
    if not claims:
        raise UsageError("expect_init", "the model has no tensor that this is about")
    found = [deviation for place, allowed in claims if (deviation := _judge(evidence, place, allowed)) is not None]
    return len(claims), found


def _evidence(checkpoint: Checkpoint, inputs: Any, *, needed: bool) -> Evidence:
    config = Config(probe=False)
    try:
        return gather(checkpoint, config, inputs=inputs)
    except UnreadableModel:
        if needed:
            raise
        import dataclasses

        # What cannot be traced still has names, shapes and values.
        return gather(dataclasses.replace(checkpoint, program=None), config)


def _places(evidence: Evidence) -> dict[str, _Place]:
    """Every floating-point tensor by name."""
    places: dict[str, _Place] = {}
    scales: frozenset[str] = frozenset()
    nodes = {n.name: n for n in evidence.graph.fx.nodes} if evidence.graph is not None else {}
    if evidence.graph is not None:
        from initaudit.auditing.layers import norm_parameters

        scales = norm_parameters(evidence.graph)
    streams: set[Any] = set()
    for layer in evidence.layers:
        pair = layer.pair
        end = sum_behind(nodes.get(pair.node), streams) if pair.role == "contraction" else None
        if end is not None:
            streams.add(end)
        kind = "table" if pair.role == "embedding" else "writer" if end is not None else "weight"
        known = site(pair) if pair.stored else None
        if pair.tensor not in evidence.checkpoint.arrays:
            continue
        # A table that is also the matrix of the output is drawn as a table.
        if pair.tensor not in places:
            places[pair.tensor] = _Place(pair.tensor, kind, known)
        if pair.bias is not None and pair.bias not in places and pair.bias in evidence.checkpoint.arrays:
            shape = evidence.checkpoint.arrays[pair.bias].shape
            fans = (pair.fan_in, pair.fan_out)
            bias = site_of(shape, ("o",), operator=pair.operator, fans=fans) if len(shape) == 1 else None
            places[pair.bias] = _Place(pair.bias, "bias", bias)
    for name, array in evidence.checkpoint.arrays.items():
        if array.dtype.startswith(("float", "bfloat")) and array.size:
            places.setdefault(name, _Place(name, "scale" if name in scales else "other", None))
    return places


def _claims(
    places: Mapping[str, _Place], expected: Expected, recipe: Mapping[str, tuple[str, ...]] | None, checkpoint: Checkpoint
) -> Iterator[tuple[_Place, tuple[str | float, ...]]]:
    if recipe is not None:
        writers = max(1, sum(place.kind == "writer" for place in places.values()))
        for place in places.values():
            if place.kind in recipe:
                yield place, tuple(claim.format(writers=writers) for claim in recipe[place.kind])
        return
    if not isinstance(expected, Mapping):
        yield from ((place, (expected,)) for place in places.values() if place.kind in ("weight", "writer"))
        return
    unused = dict.fromkeys(expected)
    for place in places.values():
        glob = next((glob for glob in expected if fnmatchcase(place.tensor, glob)), None)
        if glob is None or (not checkpoint.arrays[place.tensor].trainable and place.kind == "other"):
            continue
        unused.pop(glob, None)
        claim = expected[glob]
        if claim is not None:
            yield place, (claim,)
    matched = {glob for glob in expected if any(fnmatchcase(name, glob) for name in places)}
    for glob in unused:
        if glob not in matched:
            from initaudit.suggest import did_you_mean

            raise UsageError("expect_init", f"no tensor is named {glob!r}", advice=did_you_mean(glob, places))


def _judge(evidence: Evidence, place: _Place, allowed: tuple[str | float, ...]) -> Deviation | None:
    try:
        values = evidence.checkpoint.arrays[place.tensor].read()
    except InitauditError as error:
        return Deviation(place.tensor, " or ".join(map(str, allowed)), str(error))
    seen = observe(values)
    verdicts = [judge(claim, seen, place.site) for claim in allowed]
    if any(verdict.holds for verdict in verdicts):
        return None
    m = seen.moments
    text = f"{m.nan + m.inf:,} values that are not finite" if m.nan or m.inf else f"mean {m.mean:.3g}, std {m.std:.4g}"
    fits = recognise(seen, place.site).schemes if place.site is not None else ()
    text += f", as {fits[0].name} gives" if fits else ""
    return Deviation(place.tensor, " or ".join(verdict.expected for verdict in verdicts), text)
