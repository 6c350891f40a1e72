"""What every loader of bare weights does last: strip wrapper prefixes, notice empty tensors and packed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.spans import show

# Put in front of every name by DistributedDataParallel and DataParallel, by torch.compile, and by FSDP in its full state
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
# The names that the packing formats themselves prescribe for the tensors of one packed layer (suffix -> which must be there)
PACKINGS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("gptq", "qweight", frozenset({"qzeros", "scales", "g_idx"})),
    ("awq", "qweight", frozenset({"qzeros", "scales"})),
    ("bitsandbytes 4-bit", "weight", frozenset({"weight.absmax", "weight.quant_map"})),
    ("bitsandbytes 8-bit", "weight", frozenset({"SCB"})),
)


def finish(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with wrapper prefixes stripped (and noted), empty tensors as IA502, and packed weights named as such."""
    arrays, notes = strip_wrappers(checkpoint.arrays)
    arrays = with_scales(name_packings(arrays))
    notes = (*notes, *_packed(arrays))
    arrays = {name: array if _learns(array) else replace(array, trainable=False) for name, array in arrays.items()}
    empty = [name for name, array in arrays.items() if array.size == 0 and "float" in array.dtype]
    problems = list(checkpoint.problems)
    if empty:
        first = f"{show(empty[0])} has no elements"
        rest = f" and {len(empty) - 1} more have none" if len(empty) > 1 else ""
        advice = "a sharded run (ZeRO-3, FSDP) saved a rank's placeholder: gather the full state before saving"
        problem = Problem("IA502", empty[0], f"{first}{rest}; {advice}")
        problems += [] if problem in problems else [problem]
    return replace(checkpoint, arrays=arrays, problems=tuple(problems), notes=checkpoint.notes + notes)


def _packed(arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """A note for each way of packing: the numbers of such weights are codes."""
    found: dict[str, list[str]] = {}
    for name, array in arrays.items():
        if array.quantized and "int" in array.dtype:
            found.setdefault(array.quantized, []).append(name)
    return tuple(
        f"{len(names)} {'weight is' if len(names) == 1 else 'weights are'} quantised ({packing}) and not judged: "
        + show(names[0], 60) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for packing, names in found.items()
    )  # fmt: skip


# What compressed-tensors, FBGEMM and DeepSeek call the factors of an eight-bit float: the weight is their product
_SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")


def with_scales(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`arrays` with eight-bit floats multiplied by the scales that stand beside them, which are no weights themselves."""
    found = dict(arrays)
    for name, array in arrays.items():
        stem, dot, last = name.rpartition(".")
        weight = arrays.get(f"{stem}{dot}weight")
        if last not in _SCALES or weight is None or not weight.dtype.startswith("float8"):
            continue
        found[name] = replace(array, trainable=False)
        if _fits(array.shape, weight.shape):
            found[weight.name] = replace(
                weight, dtype="float32", open=_scaled(weight, array), storage="", quantized=f"{weight.dtype} with scales"
            )
    return found


def _fits(scales: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """One scale, or as many axes as the weight, each of one scale for so many units."""
    return math.prod(scales) == 1 or (len(scales) == len(shape) and all(0 < s <= n for s, n in zip(scales, shape, strict=True)))


def _scaled(weight: Array, scales: Array) -> Callable[[], np.ndarray[Any, Any]]:
    def read() -> np.ndarray[Any, Any]:
        factors = scales.read().astype(np.float32)
        values = weight.read().astype(np.float32)
        if factors.size == 1:
            return np.asarray(values * factors.reshape(()))
        for axis, size in enumerate(weight.shape):
            side = -(-size // factors.shape[axis])  # the last block may be cut
            factors = np.repeat(factors, side, axis=axis).take(range(size), axis=axis)
        return np.asarray(values * factors)

    return read


def _learns(array: Array) -> bool:
    """Integers and booleans (counters, masks, packed codes) take no gradient."""
    return not array.trainable or any(kind in array.dtype for kind in ("float", "complex"))


def strip_wrappers(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """`arrays` under the names of `strip_names`, and a note for each prefix that was taken off."""
    names, stripped = strip_names(arrays)
    notes = tuple(f"prefix '{prefix}' stripped" for prefix in stripped)
    return {names[old]: array if old == names[old] else replace(array, name=names[old]) for old, array in arrays.items()}, notes


def strip_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What each name is without the prefixes of wrappers that stand before all of them, and these prefixes.

    torch.compile and FSDP also put theirs in the middle (`layers._orig_mod.0`), where they belong to no name of the model.
    """
    found = {name: name for name in names}
    stripped: list[str] = []
    changed = True
    while changed and found:
        changed = False
        for prefix in WRAPPERS:
            if all(name.startswith(prefix) and len(name) > len(prefix) for name in found.values()):
                found = {old: name.removeprefix(prefix) for old, name in found.items()}
                stripped.append(prefix)
                changed = True
    for infix in WRAPPERS[1:]:
        renamed = {old: name.replace(f".{infix}", ".").removeprefix(infix) for old, name in found.items()}
        if renamed != found and len(set(renamed.values())) == len(found):
            found = renamed
            stripped.append(infix)
    return found, tuple(dict.fromkeys(stripped))


def name_packings(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`arrays` with `quantized` set on integer weights whose companions (scales, zero points) say how they are packed."""
    found = dict(arrays)
    for name, array in arrays.items():
        if array.quantized or "int" not in array.dtype:
            continue
        stem, dot, last = name.rpartition(".")
        for packing, suffix, companions in PACKINGS:
            if last == suffix and all(f"{stem}{dot}{companion}" in arrays for companion in companions):
                found[name] = replace(array, quantized=packing, trainable=False)
                break
    return found
