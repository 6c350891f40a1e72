"""What a TorchScript archive describes, as plain records: objects with their attributes, the text of its classes and functions.

The text is Python's syntax and no Python: `initaudit.graph.from_script` follows the few statements that the format has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.pickle_arrays import Leaf
from initaudit.load.pickle_values import Call, Global, NdArray, Tensor
from initaudit.load.spans import show
from initaudit.load.torch_zip import Entries

MAX_SOURCE = 32 << 20  # bytes of all sources together
MAX_NESTING = 80  # brackets within brackets; Python's own parser ends at 200


@dataclass(frozen=True)
class Named:
    """A tensor of the archive by the name that its array has."""

    name: str


@dataclass(frozen=True)
class Instance:
    """An object of the archive: the qualified name of its class and its attributes."""

    type: str
    attributes: dict[str, Any] = field(repr=False)

    def __deepcopy__(self, memo: Any) -> Instance:
        """Itself: a copy of the module that follows the code has tensors of its own and the same description."""
        return self


@dataclass(frozen=True)
class ScriptProgram:
    """`sources` maps a module such as `__torch__.torch.nn.functional` to its text.

    `examples` are shape and dtype of the inputs that a traced module was recorded with.
    """

    root: Instance
    constants: tuple[Any, ...]
    sources: Mapping[str, str] = field(repr=False)
    examples: tuple[tuple[tuple[int, ...], str], ...] = ()


def script_program(
    root: Any, constants: Any, entries: Entries, names: Mapping[int, str], traced: list[Leaf], where: str
) -> ScriptProgram:
    """The program of an archive whose pickles were read; `names` are those of the arrays by the tensor's identity.

    Raises `UnreadableModel` for a file that holds something else, or is larger or deeper than code is.
    """
    made = _value(root, names, {}, 0)
    if not isinstance(made, Instance):
        raise UnreadableModel(where, "a TorchScript archive without a module")
    held = _value(constants, names, {}, 0)
    examples = tuple((leaf.shape, leaf.dtype) for _, leaf, _ in traced if isinstance(leaf, Tensor))
    return ScriptProgram(made, tuple(held) if isinstance(held, (list, tuple)) else (), _sources(entries, where), examples)


def _sources(entries: Entries, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    total = 0
    for name, members in entries.items():
        _, code, path = name.partition("/code/")
        if not code or not path.endswith(".py"):
            continue
        total += members[0].size
        if len(members) > 1 or total > MAX_SOURCE:
            raise UnreadableModel(where, f"{show(name)} stands twice, or its sources have more than {MAX_SOURCE} bytes")
        try:
            text = members[0].data().read().decode()
        except UnicodeDecodeError as error:
            raise UnreadableModel(where, f"{show(name)} is no text") from error
        found[path.removesuffix(".py").replace("/", ".")] = _shallow(text, f"{where}: {show(name)}")
    return found


def _shallow(text: str, where: str) -> str:
    """`text` where it is not nested more deeply than code is; a parser goes as deep as its input."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    indent = max((len(line) - len(line.lstrip(" ")) for line in text.splitlines()), default=0)
    if deepest > MAX_NESTING or indent > 4 * MAX_NESTING:
        raise UnreadableModel(where, "code that is nested too deeply")
    return text


def _value(value: Any, names: Mapping[int, str], made: dict[int, Any], depth: int) -> Any:
    """A value of a pickle as the interpreter takes it: every object once, tensors by name."""
    if depth > 64:
        raise UnreadableModel("TorchScript", "attributes that are nested too deeply")
    if isinstance(value, Tensor):
        return Named(names.get(id(value), ""))
    if isinstance(value, Call):
        if id(value) not in made:
            attributes: dict[str, Any] = {}
            kind = f"{value.function.module}.{value.function.name}" if isinstance(value.function, Global) else ""
            made[id(value)] = Instance(kind, attributes)
            state = value.state if isinstance(value.state, dict) else {}
            attributes.update((str(key), _value(item, names, made, depth + 1)) for key, item in state.items())
        return made[id(value)]
    if not isinstance(value, (list, tuple, dict)):
        return None if isinstance(value, (Global, NdArray)) else value
    if id(value) not in made:  # a list that holds one list twice, which holds one twice, has 2**n of them
        if isinstance(value, dict):
            plain = ((key, item) for key, item in value.items() if isinstance(key, (str, int, float)))
            made[id(value)] = {key: _value(item, names, made, depth + 1) for key, item in plain}
        else:
            made[id(value)] = type(value)(_value(item, names, made, depth + 1) for item in value)
    return made[id(value)]
