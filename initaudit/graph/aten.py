"""Roles of ATen operators: what torch.export writes. Operators that are not named here are classified by their own schema."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from initaudit.roles import Kind, Operand, Role, WeightUse


def _linear(_: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    return (WeightUse("weight", ("o", "i"), "linear", bias="bias"),)


def _bilinear(_: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    return (WeightUse("weight", ("o", "i", "i"), "bilinear", bias="bias"),)


def _convolution(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    rank = len(call["weight"].shape) - 2
    groups = int(call.get("groups", 1))
    if call.get("transposed", False):
        return _transposed(call)
    return (WeightUse("weight", ("o", "i", *"k" * rank), "conv", bias="bias", groups=groups, unit_axis=1),)


def _transposed(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    rank = len(call["weight"].shape) - 2
    stride = call.get("stride", 1)
    strides = [int(s) for s in stride] if isinstance(stride, Sequence) else [int(stride)]
    strides = strides * rank if len(strides) == 1 else strides
    return (
        WeightUse(
            "weight",
            ("i", "o", *"k" * rank),
            "conv_transpose",
            bias="bias",
            groups=int(call.get("groups", 1)),
            overlap=1 / math.prod(strides),
            unit_axis=1,
        ),
    )


def product_weights(left: str, right: str, bias: str | None = None) -> Any:
    """The weight of a matrix product is whichever factor is constant: `i o` on the right, `o i` on the left.

    Leading axes of a factor are independent copies (`n`). A vector on either side is a contraction with one unit.
    """

    def weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
        a, b = call[left], call[right]
        if not (isinstance(a, Operand) and isinstance(b, Operand)):
            return ()
        if b.constant and b.shape is not None and len(b.shape) > 0:
            rank = len(b.shape)
            axes = ("i",) if rank == 1 else (*"n" * (rank - 2), "i", "o")
            return (WeightUse(right, axes, "linear", bias=bias, unit_axis=-1 if rank > 1 else None),)
        if a.constant and a.shape is not None and len(a.shape) > 0:
            rank = len(a.shape)
            axes = ("i",) if rank == 1 else (*"n" * (rank - 2), "o", "i")
            return (WeightUse(left, axes, "linear", bias=bias, unit_axis=-2 if rank > 1 else None),)
        return ()

    return weights


def einsum_uses(equation: str, operands: Sequence[Operand], argument: str) -> tuple[WeightUse, ...]:
    """The constant factors of an einsum: letters that the output drops are `i`, letters shared with data and kept are `n`."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    found = []
    for index, (term, operand) in enumerate(zip(terms, operands, strict=False)):
        if not operand.constant or operand.shape is None or "." in term:
            continue
        others = "".join(t for i, t in enumerate(terms) if i != index)
        axes = tuple("i" if c not in right else "n" if c in others else "o" for c in term)
        if "i" not in axes or not others:
            continue
        units = [c for c, a in zip(term, axes, strict=True) if a == "o"]
        plain = "." not in right
        axis = right.index(units[-1]) if units and plain else -1 if units and right.endswith(units[-1]) else None
        found.append(WeightUse(argument, axes, "einsum", index=index, unit_axis=axis))
    return tuple(found)


def _einsum(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    return einsum_uses(call["equation"], call["tensors"], "tensors")


def _table(argument: str) -> Any:
    """A constant floating table of rows, picked by indices."""

    def weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
        table = call[argument]
        if not isinstance(table, Operand) or not table.constant or table.shape is None or len(table.shape) != 2:
            return ()
        return (WeightUse(argument, ("v", "d"), "embedding"),)

    return weights


def _index(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    """`table[ids]`: only the first axis is indexed. Rows that constants pick are a signal where they are used as one."""
    indices = call["indices"]
    return _table("self")(call) if len(indices) == 1 and isinstance(indices[0], Operand) and _several(indices[0]) else ()


def _several(indices: Operand) -> bool:
    """More than one row, as far as is known: one single row is a slice."""
    return not indices.constant or math.prod(indices.shape or (1,)) > 1


def _index_select(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    return _table("self")(call) if call["dim"] == 0 and _several(call["index"]) else ()


def _recurrent(operator: str, gates: tuple[str, ...]) -> Any:
    """torch.nn's packed list [w_ih, w_hh, (b_ih, b_hh), (w_hr)] for each layer and direction; gates stacked along axis 0."""

    def weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
        params = call["params"]
        step = 4 if call["has_biases"] else 2
        found = []
        # A projected LSTM carries fewer numbers from step to step than a gate has units.
        projected = operator == "lstm" and params[1].shape[1] * len(gates) != params[1].shape[0]
        for i in range(0, len(params), step + projected):
            found += [WeightUse("params", ("o", "i"), operator, index=i + j, gates=gates, unit_axis=None) for j in (0, 1)]
            if projected:
                found.append(WeightUse("params", ("o", "i"), operator, index=i + step, unit_axis=None))
        return tuple(found)

    return weights


def _cell(operator: str, gates: tuple[str, ...]) -> Any:
    def weights(_: Mapping[str, Any]) -> tuple[WeightUse, ...]:
        return tuple(
            WeightUse(f"w_{part}", ("o", "i"), operator, bias=f"b_{part}", gates=gates, unit_axis=None) for part in ("ih", "hh")
        )

    return weights


def _inner(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    """The last axes of both factors are summed over."""
    other = call["other"]
    if not other.constant or not other.shape:
        return ()
    return (WeightUse("other", (*"o" * (len(other.shape) - 1), "i"), "linear", unit_axis=-1 if len(other.shape) > 1 else None),)


def _tensordot(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    """The axes that are named are summed over, those of the second factor stand last in the result."""
    for name, dims, last in (("other", "dims_other", True), ("self", "dims_self", False)):
        factor = call[name]
        if factor.constant and factor.shape:
            summed = {d % len(factor.shape) for d in call[dims]}
            axes = tuple("i" if a in summed else "o" for a in range(len(factor.shape)))
            return (WeightUse(name, axes, "linear", unit_axis=-1 if last and "o" in axes else None),)
    return ()


def _grouped_product(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    """One matrix an expert, rows of the data sorted by expert."""
    name = "weight" if "weight" in call else "mat2"
    shape = call[name].shape
    return (WeightUse(name, ("n", "i", "o"), "linear", bias="bias"),) if shape is not None and len(shape) == 3 else ()


def _conv_tbc(_: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    return (WeightUse("weight", ("k", "i", "o"), "conv", bias="bias"),)


def _role(kind: Any, name: str = "", data: tuple[str, ...] = (), weights: Any = None) -> Role:
    return Role(kind, name, data, weights)


_CONVOLUTION = _role("contraction", "conv", ("input",), _convolution)
_TRANSPOSED = _role("contraction", "conv_transpose", ("input",), _transposed)
_MERGE = _role("merge", "concat", ("tensors",))

ROLES: Mapping[str, Role] = {
    "linear": _role("contraction", "linear", ("input",), _linear),
    "bilinear": _role("contraction", "bilinear", ("input1", "input2"), _bilinear),
    "matmul": _role("contraction", "matmul", ("self", "other"), product_weights("self", "other")),
    "mm": _role("contraction", "matmul", ("self", "mat2"), product_weights("self", "mat2")),
    "bmm": _role("contraction", "matmul", ("self", "mat2"), product_weights("self", "mat2")),
    "mv": _role("contraction", "matmul", ("self", "vec"), product_weights("self", "vec")),
    "dot": _role("contraction", "matmul", ("self", "tensor"), product_weights("self", "tensor")),
    "addmm": _role("contraction", "matmul", ("mat1", "mat2"), product_weights("mat1", "mat2", "self")),
    "baddbmm": _role("contraction", "matmul", ("batch1", "batch2"), product_weights("batch1", "batch2", "self")),
    "addmv": _role("contraction", "matmul", ("mat", "vec"), product_weights("mat", "vec", "self")),
    "inner": _role("contraction", "matmul", ("self", "other"), _inner),
    "tensordot": _role("contraction", "matmul", ("self", "other"), _tensordot),
    "einsum": _role("contraction", "einsum", ("tensors",), _einsum),
    **dict.fromkeys(
        ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"),
        _role("contraction", "matmul", ("self", "input", "mat2", "weight"), _grouped_product),
    ),
    "conv_tbc": _role("contraction", "conv", ("self",), _conv_tbc),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    "embedding": _role("embedding", "embedding", ("indices",), _table("weight")),
    "embedding_bag": _role("embedding", "embedding", ("indices",), _table("weight")),
    "_embedding_bag": _role("embedding", "embedding", ("indices",), _table("weight")),
    "index": _role("passthrough", "index", ("self",), _index),
    "index_select": _role("passthrough", "index", ("self",), _index_select),
    "lstm": _role("recurrent", "lstm", ("input",), _recurrent("lstm", ("i", "f", "g", "o"))),
    "gru": _role("recurrent", "gru", ("input",), _recurrent("gru", ("r", "z", "n"))),
    "rnn_tanh": _role("recurrent", "rnn_tanh", ("input",), _recurrent("rnn_tanh", ("h",))),
    "rnn_relu": _role("recurrent", "rnn_relu", ("input",), _recurrent("rnn_relu", ("h",))),
    "lstm_cell": _role("recurrent", "lstm", ("input", "hx"), _cell("lstm", ("i", "f", "g", "o"))),
    "gru_cell": _role("recurrent", "gru", ("input", "hx"), _cell("gru", ("r", "z", "n"))),
    "rnn_tanh_cell": _role("recurrent", "rnn_tanh", ("input", "hx"), _cell("rnn_tanh", ("h",))),
    "rnn_relu_cell": _role("recurrent", "rnn_relu", ("input", "hx"), _cell("rnn_relu", ("h",))),
    "batch_norm": _role("normalization", "batch_norm", ("input",)),
    "_native_batch_norm_legit": _role("normalization", "batch_norm", ("input",)),
    "native_batch_norm": _role("normalization", "batch_norm", ("input",)),
    "cudnn_batch_norm": _role("normalization", "batch_norm", ("input",)),
    "instance_norm": _role("normalization", "instance_norm", ("input",)),
    "layer_norm": _role("normalization", "layer_norm", ("input",)),
    "native_layer_norm": _role("normalization", "layer_norm", ("input",)),
    "group_norm": _role("normalization", "group_norm", ("input",)),
    "native_group_norm": _role("normalization", "group_norm", ("input",)),
    "rms_norm": _role("normalization", "rms_norm", ("input",)),
    "_fused_rms_norm": _role("normalization", "rms_norm", ("input",)),
    "softmax": _role("softmax", "softmax", ("self",)),
    "_softmax": _role("softmax", "softmax", ("self",)),
    "_safe_softmax": _role("softmax", "softmax", ("self",)),
    "log_softmax": _role("softmax", "log_softmax", ("self",)),
    "_log_softmax": _role("softmax", "log_softmax", ("self",)),
    "scaled_dot_product_attention": _role("attention", "attention", ("query", "key", "value", "attn_mask")),
    "glu": _role("pointwise", "glu", ("self",)),
    "where": _role("pointwise", "where", ("self", "other")),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _MERGE),
    "scatter": _role("merge", "scatter", ("self", "src")),
    "scatter_add": _role("merge", "scatter", ("self", "src")),
    "index_add": _role("merge", "scatter", ("self", "source")),
    "index_add_": _role("merge", "scatter", ("self", "source")),
    "index_put": _role("merge", "scatter", ("self", "values")),
    "index_put_": _role("merge", "scatter", ("self", "values")),
    "index_copy": _role("merge", "scatter", ("self", "source")),
    "copy_": _role("merge", "copy", ("self", "src")),
    "masked_scatter": _role("merge", "scatter", ("self", "source")),
}

# Operators whose first argument carries the signal and that differ in nothing else that matters here.
_FAMILIES: tuple[tuple[Kind, str], ...] = (
    ("pointwise", "prelu log_sigmoid hardswish relu6 mish special_expit rsub masked_fill"),
    ("pooling", "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"),
    ("pooling", "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    ("pooling", "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d fractional_max_pool2d"),
    (
        "passthrough",
        "_to_copy type_as clone contiguous lift_fresh_copy _unsafe_view repeat flip roll rot90 tile repeat_interleave",
    ),
    ("passthrough", "gather take tril triu pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"),
    ("passthrough", "replication_pad1d replication_pad2d replication_pad3d im2col col2im unfold masked_select slice_scatter"),
    ("passthrough", "channel_shuffle pixel_shuffle pixel_unshuffle grid_sampler grid_sampler_2d grid_sampler_3d"),
    ("passthrough", "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout"),
    ("reduction", "cumsum logsumexp norm linalg_vector_norm"),
    ("opaque", "topk sort argsort argmax argmin nonzero item meshgrid affine_grid_generator detach eq ne lt le gt ge"),
    ("opaque", "logical_and logical_or logical_not logical_xor bitwise_not bitwise_and bitwise_or isnan isinf"),
    (
        "generator",
        "arange zeros ones full empty eye linspace rand randn randint randperm scalar_tensor zeros_like ones_like full_like",
    ),
    (
        "generator",
        "empty_like rand_like randn_like new_zeros new_ones new_full new_empty tril_indices triu_indices bernoulli normal",
    ),
)
_KINDS: Mapping[str, Kind] = {name: kind for kind, words in _FAMILIES for name in words.split()}


def base_name(target: torch._ops.OpOverload) -> str:
    """`aten::relu_` -> `relu`: an in-place operator computes what its namesake computes."""
    name = target._schema.name.partition("::")[2]
    if name in ROLES or name in _KINDS or not name.endswith("_") or name.endswith("__"):
        return name
    return name[:-1]


def _tags(name: str) -> set[torch.Tag]:
    """The tags of the operator of that name: those in place do not bear the tags of their namesakes."""
    packet = getattr(torch.ops.aten, name, None)
    return set() if packet is None else {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}


def aten_role(target: torch._ops.OpOverload) -> Role:
    """The role of an overload: by name where it is a weight's consumer or special, else by its tags and alias schema.

    A library's own operator of a name that ATen or this table has is taken to compute the same.
    """
    name = base_name(target)
    if name in ROLES:
        return ROLES[name]
    arguments = target._schema.arguments
    first = (arguments[0].name,) if arguments else ()
    if name in _KINDS:
        return Role(_KINDS[name], "pool" if _KINDS[name] == "pooling" else name, first if _KINDS[name] != "generator" else ())
    if name.startswith(("upsample", "_upsample")):
        return Role("passthrough", "resize", first)
    if torch.Tag.reduction in target.tags:
        return Role("reduction", name, first)  # before its namesakes: max is a maximum over an axis, or of two tensors
    if torch.Tag.pointwise in target.tags or torch.Tag.pointwise in _tags(name):
        return Role("pointwise", name)
    alias = arguments[0].alias_info if arguments else None
    if (alias is not None and not alias.is_write) or torch.Tag.view_copy in target.tags:
        return Role("passthrough", name, first)
    return Role("opaque", name)
