"""What every loader of bare weights does last: strip wrapper prefixes, notice empty tensors and packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

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
    arrays = name_packings(arrays)
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
