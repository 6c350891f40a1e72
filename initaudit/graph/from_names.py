"""Weights without a program: what shapes, and the tensors beside them, tell about axes and roles. Free of torch.

Everything here is inferred: a bias as long as one axis says which axis counts the units, the weight before says how many groups
a convolution has; where shapes say nothing, words in the name are a hint. What is inferred is marked so, and no activation is
ever claimed: `part` says what kind of place a weight has, and what such places usually feed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from initaudit.load.checkpoint import Array
from initaudit.roles import WeightUse

Confidence = Literal["shape", "name"]

_TABLE = re.compile(r"embed|(^|[._])(wte|wpe|tok|pos|vocab|lookup)([._]|$)|(bias|shared)\.weight$", re.IGNORECASE)
# What is added or multiplied element by element although it has several axes: tokens, positions, biases, scales, states.
_NO_WEIGHT = re.compile(
    r"(^|[._])[a-z_]*(tokens?|pos|position|positions|embed|embedding|embeddings|bias|biases|table|scale|scales|scale_inv|gamma|beta|alpha|"
    r"gain|temperature|log|mask|probe|const|constant|mean|std|var|state|absmax|quant_map|rel_pos_[hw])[0-9_]*$",
    re.IGNORECASE,
)
_WEIGHT = re.compile(r"(^|[._])(weight|kernel)s?$|weight_v$|weight\.original1$")
_RECURRENT = re.compile(r"weight_(ih|hh)_l\d+|(^|[._])(kernel_)?recurrent")
MANY = 4  # groups that a convolution must have to be told from one that stands beside the trunk
_GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n"), 1: ("h",)}
# The places that a weight may have, by the words that most families use for them, and what follows such a place as a rule.
PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(rf"(^|[.])({words})([.]|$)", re.IGNORECASE))
    for part, words in (
        ("LoRA A, before a matrix that starts at zero", "lora_a|lora_down"),
        ("LoRA B, zero at the start", "lora_b|lora_up"),
        ("router of experts, before a softmax", "router|gate"),
        ("attention query or key, before a softmax", "q|k|q_proj|k_proj|query|key|wq|wk|to_q|to_k|q_lin|k_lin"),
        ("attention query, key and value in one", "qkv|in_proj|in_proj_weight|c_attn|query_key_value|qkv_proj|wqkv"),
        ("attention value or output, linear as a rule", "v|v_proj|value|wv|to_v|v_lin|o_proj|out_proj|wo|to_out|out_lin"),
        ("gate of a feed-forward block, before SiLU or GELU as a rule", "gate_proj|w1|wi_0|gate_up_proj|w12|fc1_g"),
        ("way up in a feed-forward block, before an activation as a rule", "up_proj|fc1|lin1|c_fc|wi|wi_1|w3|dense_h_to_4h"),
        ("way down in a feed-forward block, linear as a rule", "down_proj|fc2|lin2|w2|dense_4h_to_h"),
        ("head", "head|lm_head|classifier|score|logits|fc"),
    )
)


@dataclass(frozen=True)
class NamedWeight:
    """A tensor taken for a weight: `use` holds its axes and operator, `confidence` what the inference rests on.

    `part` says in words what place it has in a block and what follows there as a rule; empty where nothing tells.
    """

    name: str
    use: WeightUse
    shape: tuple[int, ...]
    confidence: Confidence
    bias: str | None = None
    part: str = ""

    @property
    def role(self) -> str:
        """The role in the terms of pairing."""
        return "embedding" if "v" in self.use.axes else "recurrent" if self.use.gates else "contraction"


def infer(arrays: Mapping[str, Array]) -> tuple[NamedWeight, ...]:
    """The weights among `arrays`, in their order: floating-point tensors of two axes and more that look like a layer's."""
    found: list[NamedWeight] = []
    before: tuple[str, int] | None = None  # the parent and the units of the weight that stands before
    for name, array in arrays.items():
        if not array.dtype.startswith(("float", "bfloat")) or not 2 <= len(array.shape) <= 5 or array.size == 0:
            continue
        if not _is_weight(name, array.shape):
            continue
        weight = _weight(name, array, arrays, before)
        found.append(weight)
        if weight.role == "contraction":
            before = name, _units(weight)
        elif weight.role == "embedding":
            before = name, weight.shape[1]
    return tuple(found)


def part_of(name: str) -> str:
    """What place a weight of this name has in a block, where its name says so: the word nearest to its end decides."""
    best = max(((m.start(), part) for part, words in PARTS for m in words.finditer(name)), default=(-1, ""))
    return best[1]


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is multiplied with a signal by an operator, not added or multiplied element by element."""
    last = name.rpartition(".")[2]
    if last in ("weight_g", "original0"):
        return False  # the lengths of a weight norm
    named = _WEIGHT.search(name) is not None or "weight" in last
    wide = sum(size > 1 for size in shape)
    if len(shape) > 2 and shape[0] == 1 and wide < 2:
        return False  # a token, or a scale along the last axis
    if named:
        return len(shape) == 2 or wide > 1 or shape[0] > 1
    if _NO_WEIGHT.search(last):
        return False
    return wide > 1 and not (len(shape) > 2 and (shape[0] == 1 or wide < 3))


def _units(weight: NamedWeight) -> int:
    return weight.shape[1] * weight.use.groups if weight.use.axes[0] == "i" else weight.shape[0]


def _bias_of(name: str, arrays: Mapping[str, Array]) -> Array | None:
    """The one-axis tensor that stands beside a weight under the same parent and shares all but the last word's kind."""
    parent, _, last = name.rpartition(".")
    candidates = (last.replace("weight", "bias"), "bias")
    for candidate in candidates:
        other = arrays.get(f"{parent}.{candidate}" if parent else candidate)
        if candidate != last and other is not None and len(other.shape) == 1:
            return other
    return None


def _weight(name: str, array: Array, arrays: Mapping[str, Array], before: tuple[str, int] | None) -> NamedWeight:
    shape, part = array.shape, part_of(name)
    bias = _bias_of(name, arrays)
    known = bias.name if bias is not None else None
    if _RECURRENT.search(name) and len(shape) == 2:
        gates = next(
            (g for n, g in _GATES.items() if shape[0] % n == 0 and shape[0] // n == _hidden(name, arrays, shape)), ("h",)
        )
        operator = {4: "lstm", 3: "gru"}.get(len(gates), "rnn")
        return NamedWeight(name, WeightUse("", ("o", "i"), operator, gates=gates), shape, "name", known)
    if len(shape) == 2:
        return _matrix(name, shape, bias, part)
    if len(shape) == 3 and _WEIGHT.search(name) is None:
        axes = ("n", "i", "o") if _turned(name, shape, arrays) else ("n", "o", "i")
        return NamedWeight(name, WeightUse("", axes, "matmul"), shape, "name", None, part)
    taps = "k" * (len(shape) - 2)
    turned = bias is not None and bias.shape[0] == shape[1] != shape[0]
    if turned:
        return NamedWeight(name, WeightUse("", ("i", "o", *taps), "conv_transpose", unit_axis=1), shape, "shape", known)
    groups = _groups(shape, before)
    use = WeightUse("", ("o", "i", *taps), "conv", groups=groups, unit_axis=1)
    return NamedWeight(name, use, shape, "shape" if known else "name", known, part)


def _groups(shape: tuple[int, ...], before: tuple[str, int] | None) -> int:
    """Groups of a convolution `o i k k`: as many as the units of the weight before it have more than it takes at a time.

    A single channel in is a depthwise kernel, unless nothing stands before it: then the input itself has one.
    """
    out, into = shape[:2]
    if out == 1:
        return 1
    if into == 1:
        if before is None:
            return 1
        return out
    if before is None or before[1] == into or before[1] % into:
        return 1
    groups = before[1] // into
    # Branches and shortcuts stand beside the trunk in a file too, and halve or double it
    return groups if out == before[1] and groups >= MANY else 1


def _turned(name: str, shape: tuple[int, ...], arrays: Mapping[str, Array]) -> bool:
    """Whether experts packed in one tensor are kept `n i o`: the way up and the way down have to fit each other."""
    parent = name.rpartition(".")[0]
    up, down = (arrays.get(f"{parent}.{other}") for other in ("gate_up_proj", "down_proj"))
    if up is None or down is None or len(up.shape) != 3 or len(down.shape) != 3:
        return False
    (_, first, second), (_, inner, outer) = up.shape, down.shape
    return second in (inner, 2 * inner) and first == outer and first != 2 * outer


def _hidden(name: str, arrays: Mapping[str, Array], shape: tuple[int, ...]) -> int:
    """The hidden size: the inner axis of the recurrent matrix beside an input matrix."""
    other = arrays.get(name.replace("_ih_", "_hh_"))
    return other.shape[1] if other is not None and len(other.shape) == 2 else shape[1]


def _matrix(name: str, shape: tuple[int, ...], bias: Array | None, part: str) -> NamedWeight:
    known = bias.name if bias is not None else None
    if bias is not None and shape[0] != shape[1]:
        axes = ("i", "o") if bias.shape[0] == shape[1] else ("o", "i")
        return NamedWeight(name, WeightUse("", axes, "linear"), shape, "shape", known, part)
    if bias is None and _TABLE.search(name):
        return NamedWeight(name, WeightUse("", ("v", "d"), "embedding"), shape, "name", None, "table of rows")
    return NamedWeight(name, WeightUse("", ("o", "i"), "linear"), shape, "name", known, part)
