"""The program for a file that holds weights only: the architecture that the user names, or that a config.json names.

The module is built without values; the file's weights become its parameters by name, as views of the file, so that pairing,
probe and rules see the network as its own code computes it, and what is missing, unexpected or of another shape is known.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from initaudit.errors import UnreadableModel, UsageError
from initaudit.load import from_module
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.module import build_spec
from initaudit.load.names import matched
from initaudit.load.spans import reason, show
from initaudit.load.unwrap import unwrap

_BITS = {
    "bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2), "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2fnuz": (np.uint8, torch.float8_e5m2fnuz), "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}  # fmt: skip
_PLAIN = frozenset((
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
))  # fmt: skip


class EmptyOnMeta(TorchFunctionMode):
    """Parameters are allocated by torch.empty and then drawn: on the meta device neither costs anything.

    What a module computes while it is built (frequencies of a rotation, masks) is made as ever, unlike under
    `torch.device("meta")`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def in_architecture(checkpoint: Checkpoint, spec: str | None) -> Checkpoint:
    """`checkpoint` with the program that `spec` names, or that its config.json describes; as it is where there is neither.

    Raises UnreadableModel where what `spec` names cannot be built. A configuration that cannot be used is a note.
    """
    if checkpoint.program is not None:
        if spec is None:
            return checkpoint
        text = f"--arch {spec} was not used: the model has a program"
        return dataclasses.replace(checkpoint, notes=(*checkpoint.notes, text))
    if spec is not None:
        return attach(checkpoint, _built(spec, checkpoint.arrays), spec)
    if isinstance(checkpoint.metadata.get("config"), Mapping) and checkpoint.arrays:
        from initaudit.auditing.transformers_folder import from_config

        return from_config(checkpoint)
    return checkpoint


def _built(spec: str, arrays: Mapping[str, Array]) -> nn.Module:
    """The module that `timm:NAME` or `package.module:callable` stands for, its parameters on the meta device if it allows."""
    library, _, name = spec.partition(":")
    if library == "timm":
        return _timm(name, arrays)
    if ":" not in spec:
        raise UsageError(f"--arch {spec}", "no architecture", "timm:NAME or package.module:callable")
    try:
        with EmptyOnMeta():
            module = build_spec(spec)
    except UnreadableModel:
        return build_spec(spec)  # code that computes with its parameters while it builds them
    return build_spec(spec) if _unfinished(module) else module


def _unfinished(module: nn.Module) -> bool:
    """Whether a buffer has no values that no file would bring: the module has to be built in full."""
    kept = set(module.state_dict(keep_vars=True))
    return any(buffer.is_meta and name not in kept for name, buffer in module.named_buffers())


def _timm(name: str, arrays: Mapping[str, Array]) -> nn.Module:
    """timm's model of that name, with as many classes and input channels as the file's weights have."""
    where = f"--arch timm:{name}"
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise UsageError(where, f"timm cannot be imported ({reason(error)})", advice="pip install timm") from error
    if not timm.is_model(name):
        from initaudit.suggest import did_you_mean

        raise UsageError(where, "timm has no such model", advice=did_you_mean(name, timm.list_models()))

    def build(**options: int) -> nn.Module:
        with EmptyOnMeta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = timm.create_model(name, pretrained=False, **options)
        return made

    try:
        module = build()
        options = _sizes(module, arrays)
        module = build(**options) if options else module
        if _unfinished(module):
            module = timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        raise UnreadableModel(where, f"building it raised {type(error).__name__}: {reason(error)}") from error
    return module


def _sizes(module: nn.Module, arrays: Mapping[str, Array]) -> dict[str, int]:
    """Classes and channels of the file where they are not those that the model was built with."""
    config = getattr(module, "pretrained_cfg", None) or {}
    state = module.state_dict(keep_vars=True)
    names, _ = matched(state, arrays)
    found: dict[str, int] = {}
    for key, option, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = config.get(key)
        for prefix in layer if isinstance(layer, (list, tuple)) else [layer]:
            own = f"{prefix}.weight"
            theirs = names.get(own)
            if theirs is not None and arrays[theirs].shape != tuple(state[own].shape):
                if len(arrays[theirs].shape) > axis:
                    found[option] = arrays[theirs].shape[axis]
            elif key == "classifier" and own in state and theirs is None:
                found[option] = 0
    return found


def attach(checkpoint: Checkpoint, module: nn.Module, label: str) -> Checkpoint:
    """`checkpoint` with `module` as its program, the file's arrays as the module's parameters under the module's names."""
    module, _ = unwrap(module)
    state = module.state_dict(keep_vars=True)
    names, prefix = matched(state, checkpoint.arrays)
    where = checkpoint.source
    if not names:
        example = f"{show(next(iter(checkpoint.arrays), 'no tensor'))} against {show(next(iter(state), 'no parameter'))}"
        raise UnreadableModel(where, f"no name of the file is one of {label} ({example})", "the architecture of this file")
    reshaped = [own for own, theirs in names.items() if checkpoint.arrays[theirs].shape != tuple(state[own].shape)]
    good = {own: theirs for own, theirs in names.items() if own not in reshaped}
    values = {own: _typed(as_tensor(checkpoint.arrays[theirs]), state[own]) for own, theirs in good.items()}
    problems = [*checkpoint.problems, *_untied(state, good, checkpoint.arrays, values)]
    kept = _assign(module, state, values)
    problems = with_differences(
        problems, label, [n for n in _lacking(state, kept) if n not in reshaped], _left(names, checkpoint.arrays),
        {own: (checkpoint.arrays[names[own]].shape, tuple(state[own].shape)) for own in reshaped},
    )  # fmt: skip
    notes = (f"paired through {label}", *((f"prefix '{show(prefix)}' matched",) if prefix else ()))
    return joined(checkpoint, module, {own: checkpoint.arrays[theirs] for own, theirs in good.items()}, problems, notes)


def joined(
    checkpoint: Checkpoint, module: nn.Module, arrays: Mapping[str, Array], problems: list[Problem], notes: tuple[str, ...]
) -> Checkpoint:
    """The checkpoint of `module`; where `arrays` has a name, its values are read from the file, not from the module."""
    built = from_module(module)
    tied = {name: array.storage for name, array in built.arrays.items()}
    merged: dict[str, Array] = {}
    for name, array in built.arrays.items():
        theirs = arrays.get(name)
        if theirs is not None:
            storage = theirs.storage or tied[name]
            array = dataclasses.replace(theirs, name=name, storage=storage, trainable=array.trainable)
        merged[name] = array
    taken = {array.name for array in arrays.values()}
    merged |= {name: array for name, array in checkpoint.arrays.items() if name not in taken and name not in merged}
    return dataclasses.replace(
        checkpoint,
        arrays=merged,
        program=module,
        problems=tuple(problems),
        notes=(*checkpoint.notes, *built.notes, *notes),
    )


def with_differences(
    known: Iterable[Problem],
    label: str,
    missing: list[str],
    unexpected: list[str],
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> list[Problem]:
    """The `known` problems of a checkpoint, and one IA502 each for what the file lacks, has besides, and has in another shape.

    What is missing with a shard that the loader missed already is a consequence, and is said there.
    """
    problems, unsaid = list(known), list(missing)
    for place, problem in enumerate(problems):
        lost = {problem.tensor, *problem.related} if problem.code == "IA502" else set()
        if lost.intersection(unsaid):
            drawn = sum(name in lost for name in unsaid)
            problems[place] = dataclasses.replace(
                problem, message=f"{problem.message}; {label} leaves {drawn} of them as drawn"
            )
            unsaid = [name for name in unsaid if name not in lost]
    if unsaid:
        text = f"{label} has {_some(unsaid)}, which the file lacks: left as drawn"
        problems.append(Problem("IA502", unsaid[0], text, related=tuple(unsaid[1:])))
    if unexpected:
        text = f"the file holds {_some(unexpected)}, which {label} does not have: it is not used"
        problems.append(Problem("IA502", unexpected[0], text, severity="warning"))
    for name, (theirs, own) in list(reshaped.items())[:20]:
        text = f"{show(name)} is {list(theirs)} in the file and {list(own)} in {label}"
        problems.append(Problem("IA502", name, text))
    return problems


def _some(names: list[str]) -> str:
    shown = ", ".join(show(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _lacking(state: Mapping[str, Any], kept: set[str]) -> list[str]:
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return [name for name, value in tensors.items() if name not in kept and value.is_floating_point()]


def _left(names: Mapping[str, str], arrays: Mapping[str, Array]) -> list[str]:
    used = set(names.values())
    return [name for name, array in arrays.items() if name not in used and array.dtype.startswith(("float", "bfloat"))]


def _assign(module: nn.Module, state: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> set[str]:
    """Puts `values` into the module, tied names together; gives every name that has values now."""
    shared: dict[int, list[str]] = {}
    for name, held in state.items():
        shared.setdefault(id(held), []).append(name)
    kept: set[str] = set()
    for group in shared.values():
        chosen = next((values[name] for name in group if name in values), None)
        old = state[group[0]]
        if chosen is None:
            if isinstance(old, torch.Tensor) and old.is_meta:
                chosen = _drawn(old)
            else:
                continue
        else:
            kept.update(group)
        new = nn.Parameter(chosen, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else chosen
        for name in group:
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            (part._parameters if leaf in part._parameters else part._buffers)[leaf] = new  # type: ignore[assignment]
    return kept


def _typed(value: torch.Tensor, own: Any) -> torch.Tensor:
    """`value` in the type of the parameter that it becomes, as `load_state_dict` converts it: a checkpoint in half precision
    belongs to a module in single precision, whose inputs and constants are in single precision too."""
    if isinstance(own, torch.Tensor) and own.is_floating_point() and value.is_floating_point():
        return value.to(own.dtype)
    return value


def _drawn(old: torch.Tensor) -> torch.Tensor:
    """Something for a parameter that no file brings, so that the others can be probed: LeCun's law, or ones for a vector."""
    if not old.is_floating_point():
        return torch.zeros(old.shape, dtype=old.dtype)
    if old.dim() < 2:
        return torch.ones(old.shape, dtype=old.dtype)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(old.shape, generator=generator).mul_(math.sqrt(1 / max(1, old[0].numel()))).to(old.dtype)


def _untied(
    state: Mapping[str, Any], names: Mapping[str, str], arrays: Mapping[str, Array], values: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    """IA503 for names that the architecture makes one parameter and the file keeps as two that differ."""
    shared: dict[int, list[str]] = {}
    for name in names:
        shared.setdefault(id(state[name]), []).append(name)
    for group in shared.values():
        first = values[group[0]]
        for other in group[1:]:
            same = arrays[names[other]].storage and arrays[names[other]].storage == arrays[names[group[0]]].storage
            if not same and not torch.equal(first, values[other]):
                text = f"{show(other)} and {show(group[0])} are one parameter in the architecture and differ in the file"
                yield Problem("IA503", other, text)


def as_tensor(array: Array) -> torch.Tensor:
    """The array as a tensor that shares the file's memory where it can; writing into it never reaches the file.

    Raises UnreadableModel for values that torch has no type for.
    """
    value = array.read()
    if isinstance(value, np.memmap) and value.filename is not None and value.flags.c_contiguous and not value.flags.writeable:
        value = _copy_on_write(value)
    elif not value.flags.writeable or not value.flags.c_contiguous:
        value = np.array(value, order="C")
    kind = value.dtype.name
    if kind in _BITS:
        carrier, target = _BITS[kind]
        return torch.from_numpy(value.view(carrier)).view(target)
    if kind not in _PLAIN:
        raise UnreadableModel(show(array.name), f"its type {kind} has no counterpart in torch")
    return torch.from_numpy(value)


def _copy_on_write(value: np.memmap[Any, Any]) -> np.ndarray[Any, Any]:
    """A private map of the same bytes: torch takes every tensor for writable, and a write to a read-only page is fatal."""
    base: Any = value
    while isinstance(base.base, np.ndarray):
        base = base.base
    offset = value.offset + (value.__array_interface__["data"][0] - base.__array_interface__["data"][0])
    try:
        name: Any = value.filename
        private: np.ndarray[Any, Any] = np.memmap(name, dtype=value.dtype, mode="c", offset=offset, shape=value.shape)
        return private
    except (OSError, ValueError):
        return np.array(value, order="C")


@contextmanager
def quietly() -> Iterator[None]:
    """What a library says to its own callers is no finding about the model."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
