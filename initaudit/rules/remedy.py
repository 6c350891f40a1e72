"""The line of PyTorch that puts a weight right: its real attribute path, and the draw that its activation needs."""

from __future__ import annotations

import itertools
import keyword
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence

# So many separate names in one line; beyond, a reader looks at the finding's `related`.
_MOST = 6
_WORDS = re.compile(r"[^\W\d]\w*(\.\w+)+")
# `/layers/layers.0/fc/MatMul`: torch's exporter names a node after the modules that it was called in.
_SCOPES = re.compile(r"(?:/[^\W\d][\w.]*)+/[A-Z]\w*")


def attribute_path(tensor: str, program: Any = None, node: str = "") -> str:
    """The Python expression for a parameter: `model.layer3[0].conv1.weight`.

    `program` decides, where it is a module, which steps are indices and which are attributes; else names and numbers between
    dots are taken for what torch calls them, and the name of an exporter's `node` for the module that it was called in. A
    tensor of another name (of an ONNX graph made by hand, of another framework) is `tensors["name"]`.
    """
    if hasattr(program, "named_modules"):
        found = _walk(program, tensor.split("."))
        if found is not None:
            return found
    if _WORDS.fullmatch(tensor) or re.fullmatch(r"\d+(\.\w+)+", tensor):
        return "model" + "".join(_step(part) for part in tensor.split("."))
    if hasattr(program, "named_modules"):
        return f'tensors["{_quoted(tensor)}"]'  # what lies outside of the module has no way in Python
    scopes = [part for part in node.split("/")[1:-1] if part] if _SCOPES.fullmatch(node) else []
    if scopes:
        # A child of a container repeats the container's name: layers, then layers.0.
        own = [s for i, s in enumerate(scopes) if not (i + 1 < len(scopes) and scopes[i + 1].startswith(f"{s}."))]
        return "model" + "".join(_step(part) for s in own for part in s.split(".")) + ".weight"
    return f'tensors["{_quoted(tensor)}"]'


def _step(part: str) -> str:
    if part.isdigit():
        return f"[{part}]"
    return f".{part}" if part.isidentifier() and not keyword.iskeyword(part) else f'["{part}"]'


def _walk(module: Any, parts: list[str]) -> str | None:
    """The expression by the containers that are really there; None where a step does not exist."""
    here, text = module, "model"
    for part in parts:
        if isinstance(here, (list, tuple, dict)) and not hasattr(here, "named_modules"):
            # A plain container: what it holds is no parameter of the module, and has a name all the same (`outside.py`)
            keys = here if isinstance(here, dict) else range(len(here))
            key = next((k for k in keys if str(k).replace(".", "_") == part), None)
            if key is None:
                return None
            here, text = here[key], f'{text}["{_quoted(key)}"]' if isinstance(key, str) else f"{text}[{key!r}]"
            continue
        try:
            following = getattr(here, part)
        except AttributeError:
            return None
        indexed = part.isdigit() and hasattr(here, "__getitem__") and hasattr(here, "__len__")
        if indexed and int(part) < _length(here) and _same(here, int(part), following):
            text += f"[{part}]"
        elif part.isidentifier() and not keyword.iskeyword(part):
            text += f".{part}"
        elif hasattr(here, "__getitem__") and _same(here, part, following):
            text += f'["{part}"]'
        else:
            return f'model.get_parameter("{_quoted(".".join(parts))}")'
        here = following
    return text


def _length(container: Any) -> int:
    try:
        return len(container)
    except (TypeError, NotImplementedError):  # a compiled module has the method and not the length
        return 0


def _quoted(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"')


def _same(container: Any, key: int | str, child: Any) -> bool:
    try:
        return container[key] is child
    except (KeyError, TypeError, IndexError, NotImplementedError):
        return False


def parameter(evidence: Evidence, tensor: str) -> str:
    """The Python expression for any tensor of the model."""
    layer = evidence.layer(tensor)
    return layer.expression if layer is not None and layer.expression else attribute_path(tensor, evidence.checkpoint.program)


def each(statement: str, expressions: Sequence[str], split: str = "") -> str:
    """One line that does `statement`, in which {} stands for the parameter, to every expression.

    `split` is what takes a parameter apart ("{}.chunk(3)"); the statement then is for each part. Expressions that differ in
    one index only become a loop over it.
    """
    groups = _grouped(list(dict.fromkeys(expressions)))
    if len(groups) == 1:
        text, indices = groups[0]
        if indices is None:
            return f"for part in {split.format(text)}: {statement.format('part')}" if split else statement.format(text)
        if split:
            return f"for part in (p for i in {_range(indices)} for p in {split.format(text)}): {statement.format('part')}"
        return f"for i in {_range(indices)}: {statement.format(text)}"
    shown = [text if indices is None else f"*({text} for i in {_range(indices)})" for text, indices in groups[:_MOST]]
    more = f"  # and {len(groups) - _MOST} more" if len(groups) > _MOST else ""
    if split:
        return f"for part in (p for w in ({', '.join(shown)}) for p in {split.format('w')}): {statement.format('part')}{more}"
    return f"for w in ({', '.join(shown)}): {statement.format('w')}{more}"


def _grouped(expressions: list[str]) -> list[tuple[str, list[int] | None]]:
    """(expression with `i` for the index that varies, its values), or (expression, None) for one on its own."""
    left = dict.fromkeys(expressions)
    found: list[tuple[str, list[int] | None]] = []
    while left:
        first = next(iter(left))
        best: tuple[str, dict[str, int]] = ("", {first: 0})
        for match in re.finditer(r"\[(\d+)\]", first):
            before, after = first[: match.start()], first[match.end() :]
            alike = re.compile(re.escape(before) + r"\[(\d+)\]" + re.escape(after))
            members = {e: int(m.group(1)) for e in left if (m := alike.fullmatch(e))}
            if len(members) > len(best[1]):
                best = f"{before}[i]{after}", members
        text, members = best
        found.append((text, sorted(members.values())) if text else (first, None))
        for member in members:
            del left[member]
    return found


def _range(indices: list[int]) -> str:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if all(b - a == step for a, b in itertools.pairwise(indices)):
        last = indices[-1] + 1
        return f"range({last})" if step == 1 and indices[0] == 0 else f"range({indices[0]}, {last}{f', {step}' * (step > 1)})"
    return f"({', '.join(map(str, indices))})"


def init_line(layer: LayerEvidence, *others: LayerEvidence) -> str:
    """The line that draws this weight, and those `others` that the same statement serves, as their activations need it.

    By the law of the weight's activation: He et al. 2015, eq. 10, with the exact gain; LeCun's for what is linear, Xavier's for
    attention, Saxe et al. 2014 (orthogonal) for a hidden matrix. Fans are those that meet in a unit, whatever the layout.
    """
    draw = _draw(layer)
    if others and draw.by_fan:
        draw = _Draw(draw.by_fan)
    same = [x for x in others if (d := _draw(x)) == draw or d.by_fan == draw.statement]
    line = each(draw.statement, [expression_of(x) for x in (layer, *same)], draw.split)
    left = len({x.tensor for x in others} - {x.tensor for x in same})
    notes = [draw.comment] if draw.comment else []
    if left:
        notes.append(f"and {left} others by their own fans")
    return line + (f"  # {'; '.join(notes)}" if notes else "")


def with_bias(evidence: Evidence, layer: LayerEvidence) -> str:
    """The line that draws this weight, and zeroes its bias where it has one."""
    line, mark, comment = init_line(layer).partition("  # ")
    bias = layer.pair.bias
    return line + (f"; torch.nn.init.zeros_({parameter(evidence, bias)})" if bias else "") + mark + comment


def normal_line(drawn: Sequence[tuple[LayerEvidence, float]]) -> str:
    """The line that draws each weight from N(0, std^2) with its own standard deviation."""
    by_std: dict[str, list[str]] = {}
    for layer, std in drawn:
        by_std.setdefault(f"{std:.4g}", []).append(expression_of(layer))
    if len(by_std) == 1:
        (size, expressions), *_ = by_std.items()
        return each(f"torch.nn.init.normal_({{}}, std={size})", expressions)
    pairs = []
    for size, expressions in by_std.items():
        for text, indices in _grouped(list(dict.fromkeys(expressions))):
            pairs.append(f"({text}, {size})" if indices is None else f"*(({text}, {size}) for i in {_range(indices)})")
    more = f"  # and {len(pairs) - _MOST} more" if len(pairs) > _MOST else ""
    return f"for w, std in ({', '.join(pairs[:_MOST])},): torch.nn.init.normal_(w, std=std){more}"


def expression_of(layer: LayerEvidence) -> str:
    """The Python expression for a weight."""
    return layer.expression or attribute_path(layer.tensor)


def _regular(layer: LayerEvidence) -> bool:
    """Whether the weight lies as torch.nn.init reads it: units first, then what meets in a unit."""
    pair = layer.pair
    return pair.axes[:2] == ("o", "i") and pair.overlap == 1.0 and not pair.gates and pair.stored


@dataclass(frozen=True)
class _Draw:
    """A `statement` with {} for the weight, or for each part of it where `split` takes it apart.

    `by_fan` is the same statement with the fan computed from the weight, "" where torch's layout does not give it.
    """

    statement: str
    split: str = ""
    comment: str = field(default="", compare=False)
    by_fan: str = field(default="", compare=False)


def _draw(layer: LayerEvidence) -> _Draw:
    pair, feed = layer.pair, layer.feed
    name, path = (feed.activation.name, feed.path) if feed is not None else ("unknown", ())
    if pair.role == "recurrent":
        units, inputs = pair.fan_out, pair.fan_in
        how = "orthogonal_" if units == inputs else "xavier_uniform_"
        return _Draw(f"torch.nn.init.{how}({{}})", f"{{}}.view(-1, {units}, {inputs})")
    if pair.role == "embedding" or len(pair.shape) < 2:
        return _Draw("torch.nn.init.normal_({}, std=0.02)")
    if "attention" in path or name == "softmax":
        packed = pair.axes == ("o", "i") and pair.fan_out == 3 * pair.fan_in
        return _Draw("torch.nn.init.xavier_uniform_({})", "{}.chunk(3)" if packed else "")
    classical = _classical(layer, name)
    if classical and _regular(layer):
        return _Draw(f"torch.nn.init.kaiming_normal_({{}}, {classical})")
    if classical and pair.axes == ("i", "o") and pair.stored:
        return _Draw(f"torch.nn.init.kaiming_normal_({{}}.T, {classical})")
    exact = layer.expectation.exact
    variance = exact if exact is not None else layer.expectation.lecun
    if variance is None or layer.gain is None:
        return _Draw("torch.nn.init.xavier_normal_({})")
    gain = layer.gain.gain or 1.0
    by_fan = f"torch.nn.init.normal_({{0}}, std={gain:.4g} * {{0}}[0].numel() ** -0.5)" if _regular(layer) else ""
    std = math.sqrt(variance)
    return _Draw(f"torch.nn.init.normal_({{}}, std={std:.4g})", "", f"gain {gain:.4g}, fan_in {pair.fan_in}", by_fan)


def _classical(layer: LayerEvidence, activation: str) -> str:
    """The arguments of kaiming_normal_ that give the exact gain, "" where none do."""
    if layer.expectation.exact is None or layer.feed is None or layer.feed.activation.scale != 1.0:
        return ""
    slope = layer.feed.activation.parameters.get("negative_slope")
    if activation == "leaky_relu" and slope is not None:
        return f"a={slope:g}"
    return {"relu": 'nonlinearity="relu"', "selu": 'nonlinearity="linear"', "linear": 'nonlinearity="linear"'}.get(
        activation, ""
    )


def reset_line(evidence: Evidence, tensor: str) -> str:
    """The line that initialises any tensor of the model: a weight by its law, a scale to one, a bias to zero."""
    layer = evidence.layer(tensor)
    if layer is not None:
        return init_line(layer)
    from initaudit.rules.gates import factors

    array = evidence.checkpoint.arrays.get(tensor)
    text = parameter(evidence, tensor)
    if array is not None and len(array.shape) > 1:
        return f"torch.nn.init.normal_({text}, std=0.02)"
    scales = factors(evidence.graph) if evidence.graph is not None else []
    return f"torch.nn.init.{'ones_' if tensor in scales else 'zeros_'}({text})"
