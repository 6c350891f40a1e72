"""From the values of a pickle to named arrays: tensors as views of their storages, nested containers as dotted names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Problem, numpy_dtype
from initaudit.load.pickle_values import Affine, Call, Event, NdArray, Recorder, Tensor, describe
from initaudit.load.spans import Stored, byte_count, show
from initaudit.load.sparse import Parts, check_dense, dense

MAX_VISITED = 500_000  # values; a list that holds itself twice at every level has 2**levels
MAX_DEPTH = 64
TOO_LARGE = "its values are nested too deeply or too often; what lies below is not read"
MAX_EXPANDED = 1 << 27  # elements of a view that repeats its storage (stride 0)
Leaf = tuple[tuple[str, ...], Tensor | NdArray, bool]


def leaves(root: Any, broken: list[str] | None = None) -> Iterator[Leaf]:
    """(path, tensor, trainable) of everything below `root`, in its order; what is too deep or too much is said in `broken`.

    Paths follow dictionary keys, list positions and attributes. A pickled nn.Module gives the names of its state_dict, because
    its `_parameters`, `_buffers` and `_modules` stand for no attribute of their own.
    """
    visited = 0
    stack: list[tuple[tuple[str, ...], Any, bool, tuple[int, ...]]] = [((), root, True, ())]
    while stack:
        path, value, trainable, above = stack.pop()
        visited += 1
        if visited > MAX_VISITED or len(above) > MAX_DEPTH:
            if broken is not None and TOO_LARGE not in broken:
                broken.append(TOO_LARGE)
            if visited > MAX_VISITED:
                return
            continue
        if isinstance(value, Tensor) or (isinstance(value, NdArray) and value.objects is None):
            yield path, value, trainable
            continue
        if id(value) in above:
            continue
        children = list(_children(path, value))
        stack.extend((where, item, trainable and kept, (*above, id(value))) for where, item, kept in reversed(children))


def _children(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """(path, value, trainable) of what a container holds."""
    if isinstance(value, dict):
        for key, item in value.items():
            if _holds(item):
                yield (*path, show(key, 500) if isinstance(key, (str, int)) else describe(key)), item, True
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if _holds(item):
                yield (*path, str(index)), item, True
    elif isinstance(value, NdArray):
        yield from _children(path, value.objects)
    elif isinstance(value, Call):
        yield from _of_object(path, value)


def _of_object(path: tuple[str, ...], value: Call) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    state = value.state
    if isinstance(state, tuple) and len(state) == 2 and all(part is None or isinstance(part, dict) for part in state):
        state = {**(state[0] or {}), **(state[1] or {})}  # (__dict__, __slots__)
    if isinstance(state, dict) and isinstance(state.get("_modules"), dict):
        for group, trainable in (("_parameters", True), ("_buffers", False), ("_modules", True)):
            members = state.get(group)
            for key, item in members.items() if isinstance(members, dict) else ():
                if _holds(item):
                    yield (*path, show(key, 500)), item, trainable
        return
    for part in (dict(value.entries) if value.entries else None, value.items, state):
        yield from _children(path, part)
    if value.args:
        yield from _children(path, value.args)


def _holds(value: Any) -> bool:
    return isinstance(value, (Tensor, NdArray, dict, list, tuple, Call)) and bool(value)


def as_array(value: Tensor | NdArray, name: str, where: str, trainable: bool) -> Array:
    """The lazy array of a tensor; raises `UnreadableModel` where its bytes are missing or its view leaves the storage."""
    label = f"{where}: {show(name)}"
    if isinstance(value, NdArray):
        return _numpy_array(value, name, label)
    if value.sparse is not None:
        return _sparse_array(value, *value.sparse, name, label, where, trainable)
    storage = value.storage
    try:
        byte_count(value.dtype, value.shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if storage.span is None:
        raise UnreadableModel(label, storage.problem)
    item = numpy_dtype(value.dtype).itemsize
    declared = storage.elements * numpy_dtype(storage.dtype).itemsize
    if declared > storage.span.length:
        raise UnreadableModel(label, f"{storage.span.length} bytes of storage {show(storage.key)}", f"{declared}")
    check_view(value, declared // item, label)
    trainable = trainable and (value.requires_grad or not value.parameter)
    steps = "*" * value.conjugate + "-" * value.negative
    key = f"{storage.identity or storage.key}+{value.offset}{steps}" if math.prod(value.shape) else ""
    if value.quantizer is not None:
        quantizer = value.quantizer
        check_quantizer(quantizer, value, label)
        return Array(
            name, value.shape, "float32", lambda: _dequantized(value, quantizer), key, f"affine {value.dtype}", trainable
        )
    return Array(name, value.shape, value.dtype, _opener(value), key, trainable=trainable)


def _opener(value: Tensor) -> Callable[[], np.ndarray[Any, Any]]:
    """Reads the values, if it can be from where they lie one after another in the file."""
    storage, elements = value.storage, math.prod(value.shape)
    plain = _contiguous(value) and elements > 0 and not (value.conjugate or value.negative or storage.big_endian)
    if storage.span is None or not plain:
        return lambda: _view(value)
    item = numpy_dtype(value.dtype).itemsize
    return Stored(storage.span.part(value.offset * item, elements * item), value.dtype, value.shape)


def _sparse_array(
    value: Tensor, layout: str, parts: tuple[Tensor, ...], name: str, label: str, where: str, trainable: bool
) -> Array:
    """The lazy array of a sparse tensor; raises `UnreadableModel` as `as_array` does."""
    check_dense(value.dtype, value.shape, label)
    readers = Parts(layout, tuple(as_array(part, f"{name} ({layout})", where, False).open for part in parts))
    trainable = trainable and (value.requires_grad or not value.parameter)
    return Array(name, value.shape, value.dtype, lambda: dense(readers, value.shape, label), trainable=trainable)


def check_view(value: Tensor, available: int, label: str) -> None:
    """Raises `UnreadableModel` unless every element of the view lies among the `available` elements of the storage."""
    if len(value.shape) != len(value.stride) or any(step < 0 for step in value.stride) or value.offset < 0:
        raise UnreadableModel(
            label, f"shape {list(value.shape)} with stride {list(value.stride)} from {value.offset}", "a view"
        )
    elements = math.prod(value.shape)
    if not elements:
        return
    last = value.offset + sum((size - 1) * step for size, step in zip(value.shape, value.stride, strict=True))
    if last >= available:
        raise UnreadableModel(
            label, f"its last element is number {last} of a storage of {available}", advice="the file is damaged"
        )
    if elements > available and elements > MAX_EXPANDED:
        raise UnreadableModel(label, f"{elements} elements over a storage of {available}", "a view of sensible size")


def check_quantizer(quantizer: Affine, value: Tensor, label: str) -> None:
    """Raises `UnreadableModel` unless the scales of a quantised tensor fit its shape."""
    if quantizer.axis < 0:
        return
    parts = (quantizer.scale, quantizer.zero_point)
    if quantizer.axis >= len(value.shape) or not all(isinstance(part, Tensor) for part in parts):
        raise UnreadableModel(label, "scales that do not fit the tensor")
    for part in parts:
        if part.shape != (value.shape[quantizer.axis],) or part.storage.span is None:
            raise UnreadableModel(label, "scales that do not fit the tensor")
        check_view(part, part.storage.span.length // numpy_dtype(part.dtype).itemsize, label)


def _view(value: Tensor) -> np.ndarray[Any, Any]:
    found = _stored(value)
    if value.conjugate:
        found = np.conj(found)
    return np.asarray(-found) if value.negative else found


def _stored(value: Tensor) -> np.ndarray[Any, Any]:
    storage = value.storage
    item = numpy_dtype(value.dtype).itemsize
    if storage.span is None:
        raise UnreadableModel(show(storage.key), storage.problem)
    if not math.prod(value.shape):
        return np.zeros(value.shape, numpy_dtype(value.dtype))
    if _contiguous(value):
        span = storage.span.part(value.offset * item, math.prod(value.shape) * item)
        return span.array(value.dtype, value.shape, big_endian=storage.big_endian)
    available = storage.elements * numpy_dtype(storage.dtype).itemsize // item
    flat = storage.span.part(0, available * item).array(value.dtype, (available,), big_endian=storage.big_endian)
    strides = tuple(step * item for step in value.stride)
    return np.lib.stride_tricks.as_strided(flat[value.offset :], value.shape, strides, writeable=False)


def _contiguous(value: Tensor) -> bool:
    expected = 1
    for size, step in zip(reversed(value.shape), reversed(value.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _dequantized(value: Tensor, quantizer: Affine) -> np.ndarray[Any, Any]:
    codes = _view(value).astype(np.float32)
    if quantizer.axis < 0:
        return (codes - np.float32(quantizer.zero_point)) * np.float32(quantizer.scale)
    along = [1] * codes.ndim
    along[quantizer.axis] = -1
    zero, scale = (_view(part).astype(np.float32).reshape(along) for part in (quantizer.zero_point, quantizer.scale))
    return np.asarray((codes - zero) * scale)


def _numpy_array(value: NdArray, name: str, label: str) -> Array:
    if value.dtype is None or value.raw is None:
        raise UnreadableModel(label, "an array of Python objects, which is not read")
    try:
        plain = value.dtype.numpy
    except TypeError as error:
        raise UnreadableModel(label, f"an array of {show(value.dtype.code)}, which holds no numbers") from error
    shape, raw, big_endian, fortran = value.shape, value.raw, value.dtype.big_endian, value.fortran
    try:
        expected = byte_count(plain.name, shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if expected != raw.length:
        raise UnreadableModel(label, f"{raw.length} bytes for {plain.name} of shape {show(list(shape))}", f"{expected}")
    if fortran:
        return Array(name, shape, plain.name, lambda: raw.array(plain.name, shape[::-1], big_endian=big_endian).T)
    return Array(name, shape, plain.name, lambda: raw.array(plain.name, shape, big_endian=big_endian))


def code_problems(recorder: Recorder) -> list[Problem]:
    """One IA505 for each thing that unpickling would run; what libraries that everybody knows build of plain data shares one.

    A layer of torch.nn or a record of settings is made without calling anything of the file's own choice, so that such a file
    is one to be converted and no attack: a warning.
    """
    known = [event for event in recorder.events.values() if event.verb in ("builds", "imports") and _of_library(event.label)]
    others = [event for event in recorder.events.values() if event not in known]
    problems = [Problem("IA505", "", f"unpickling it {_sentence(event)}; nothing of it was run") for event in others]
    if known:
        labels = [event.label for event in known]
        layers = all(label.startswith("torch.nn.modules.") for label in labels)
        shown = [label.rpartition(".")[2] if layers else label for label in labels]
        names = ", ".join(shown[:6]) + (", ..." if len(labels) > 6 else "")
        made = "a whole module" if any(label.startswith("torch.nn.modules.") for label in labels) else "objects"
        found = f"unpickling it builds {made} out of {names}, which torch.load refuses with weights_only=True"
        problems.append(Problem("IA505", "", f"{found}; its tensors were read without building it", severity="warning"))
    problems += [Problem("IA001", "", text) for text in dict.fromkeys(recorder.broken)]
    return problems


# Packages whose classes ordinary checkpoints are made of, and the classes that pickle restores without running a function of
# the file's choice: layers, optimizers, training arguments, settings, estimators, random states.
_LIBRARIES = (
    "torch.nn.modules.", "torch.nn.parallel.", "torch.optim.", "torch.ao.nn.", "torchvision.models.", "timm.models.",
    "timm.layers.", "transformers.", "lightning.", "pytorch_lightning.", "lightning_fabric.", "omegaconf.", "accelerate.",
    "peft.", "sklearn.", "numpy.random.", "torch.distributed.fsdp.", "torch.torch_version.", "deepspeed.",
)  # fmt: skip
_CLASS = re.compile(r"_*[A-Z]\w*")


def _of_library(label: str) -> bool:
    module, _, name = label.rpartition(".")
    return f"{module}.".startswith(_LIBRARIES) and _CLASS.fullmatch(name) is not None


def _sentence(event: Event) -> str:
    times = f" ({event.count} times)" if event.count > 1 else ""
    return f"{event.verb} {event.label}{event.detail}{times}"
