"""Quantised ONNX graphs put back in floating point: the network that was quantised, with its weights as they were rounded.

A quantised value stands for scale · (q - zero point). Here it is represented by that number: weights are dequantised when
they are read, activations are not rounded at all (the straight-through estimate of Bengio et al. 2013, section 2.3, whose
derivative of rounding is 1), integer products become products. One nonlinearity is kept: where the smallest integer stands for
zero, negative values are cut off, which is how quantisers write a ReLU; that at the other end of the range is not.

The operators are those that onnxruntime's quantisers write, and its optimiser behind them. One whose scales the graph does not
tell stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.load.checkpoint import Array
from initaudit.load.dequantize import LOWEST, Values, dequantized, unpacked, unpacked_blocks
from initaudit.load.integer_weights import IntegerWeights, Unscaled
from initaudit.load.onnx_rewrite import MICROSOFT, attribute_of, constant_node, in_place_of, input_name, with_nodes

if TYPE_CHECKING:
    import onnx

# What moves elements and keeps their meaning, so that a scale behind it is the scale of what it moves.
_MOVES = ("Identity", "Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")
# onnxruntime's operators of one or two quantised inputs: the operator that they are, and how many inputs.
_WRAPPED = {
    "QLinearAdd": ("Add", 2),
    "QLinearMul": ("Mul", 2),
    "QLinearLeakyRelu": ("LeakyRelu", 1),
    "QLinearSigmoid": ("Sigmoid", 1),
    "QLinearSoftmax": ("Softmax", 1),
    "QLinearAveragePool": ("AveragePool", 1),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", 1),
}
_WRAPPED_ATTRIBUTES = ("alpha", "axis", "auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_INTEGER = ("MatMulInteger", "ConvInteger")
QUANTIZED = frozenset((
    *_WRAPPED, *_INTEGER, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "QGemm", "QLinearConcat", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "QAttention",
    "MatMulNBits", "GatherBlockQuantized",
))  # fmt: skip


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether the main graph has an operator that a quantiser writes."""
    return any(node.op_type in QUANTIZED for node in model.graph.node)


def in_floats(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> tuple[onnx.ModelProto, dict[str, Array], str]:
    """The model without quantised operators, its arrays with dequantised weights, and a note for the report.

    The model that is given is left as it was. That returned names its initializers only: their values are in the arrays.
    """
    return _Floats(model, arrays).rewritten()


class _Floats(IntegerWeights):
    def __init__(self, model: onnx.ModelProto, arrays: Mapping[str, Array]) -> None:
        super().__init__(arrays, {name: node for node in model.graph.node for name in node.output})
        self.model = model
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)
        self.floats: set[str] = set()  # values that stand in for quantised ones
        self.units: dict[str, str] = {}  # products of two scales, of which the weight's is in the weight by now
        self.products: dict[str, Array] = {}  # of an integer product: its weight's scale
        self.made: list[onnx.NodeProto] = []

    def rewritten(self) -> tuple[onnx.ModelProto, dict[str, Array], str]:
        changed = left = 0
        # Scales may be multiplied before the product that they belong to, so products come first.
        for node in self.model.graph.node:
            if node.op_type in _INTEGER:
                self._find_scale(node)
        for node in self.model.graph.node:
            before = len(self.made)
            self.begin()
            try:
                if node.op_type in QUANTIZED:
                    self._rewrite(node)
                    changed += 1
                elif node.op_type == "Mul" and node.output[0] in self.units:
                    self._emit("Identity", [self.units[node.output[0]]], node)
                else:
                    self._keep(node)
            except Unscaled:
                del self.made[before:]
                self.undo()
                self._keep(node)
                left += 1
        note = f"quantised: {changed} operators are audited in floating point, with dequantised weights and without rounding"
        if left:
            note += f"; the graph does not tell the scales of {left} more"
        return with_nodes(self.model, self.made, self.added), self.arrays, note

    # ------------------------------------------------------------------ nodes

    def _keep(self, node: onnx.NodeProto) -> None:
        self.made.append(node)
        if any(name in self.floats for name in node.input):
            self.floats.update(name for name in node.output if name)

    def _emit(self, op_type: str, inputs: Sequence[str], node: onnx.NodeProto, output: str = "", **options: Any) -> str:
        """A node in place of (a part of) `node`; what it makes is a float, whose name is returned."""
        made = in_place_of(node, op_type, inputs, output or node.output[0], **options)
        self.made.append(made)
        self.floats.add(made.output[0])
        return str(made.output[0])

    def _rewrite(self, node: onnx.NodeProto) -> None:
        if node.op_type in _WRAPPED:
            self._wrapped(node)
        elif node.op_type in _INTEGER:
            self._integer(node)
        else:
            rewriters: dict[str, Callable[[onnx.NodeProto], None]] = {
                "QuantizeLinear": self._quantize,
                "DequantizeLinear": self._dequantize,
                "DynamicQuantizeLinear": self._dynamic,
                "QLinearConv": self._conv,
                "QLinearMatMul": self._matmul,
                "QGemm": self._gemm,
                "QLinearConcat": self._concat,
                "DynamicQuantizeMatMul": self._dynamic_matmul,
                "MatMulIntegerToFloat": self._matmul_to_float,
                "DynamicQuantizeLSTM": self._lstm,
                "QAttention": self._attention,
                "MatMulNBits": self._nbits,
                "GatherBlockQuantized": self._gather_blocks,
            }
            rewriters[node.op_type](node)

    # ------------------------------------------------------------------ operands

    def _operand(self, name: str, scale: str, point: str, axis: int = 0, block_size: int = 0) -> str:
        """A quantised operand as the floats it stands for: a signal that is there already, a weight, or rows of a table."""
        if name in self.floats:
            return name
        held, zero = self.needed(scale), self.needed(point) if point else None
        source = name
        while self.constant(source) is None and source in self.producers and self.producers[source].op_type in _MOVES:
            source = self.producers[source].input[0]
        weight = self.weight(self.needed(source), held, zero, axis, block_size)
        if source == name or self.constant(name) is not None:
            return weight
        # What lies between moves the table under its own name, and keeps no axis for a scale to lie along.
        if held.size != 1 or weight != self.needed(source).name:
            raise Unscaled
        return name

    def _cut(self, point: Array | None) -> bool:
        """Whether the smallest number of the type stands for zero."""
        if point is None:
            return True
        return point.dtype in LOWEST and bool((np.asarray(point.read()).astype(np.int64) == LOWEST[point.dtype]).all())

    def _finish(self, value: str, node: onnx.NodeProto, point: str) -> None:
        """The output of a quantised operator: a ReLU behind it where its zero point says so."""
        cut = self._cut(self.needed(point)) if point else False
        self._emit("Relu" if cut else "Identity", [value], node, copied=())

    # ------------------------------------------------------------------ quantise and dequantise

    def _quantize(self, node: onnx.NodeProto) -> None:
        constant = self.constant(node.input[0]) is not None
        cut = not constant and self._cut(self.optional(node, 2))
        self._emit("Relu" if cut else "Identity", [node.input[0]], node, copied=())

    def _dequantize(self, node: onnx.NodeProto) -> None:
        axis, block_size = attribute_of(node, "axis", 1), attribute_of(node, "block_size", 0)
        value = self._operand(node.input[0], node.input[1], input_name(node, 2), axis, block_size)
        self._emit("Identity", [value], node, copied=())

    def _dynamic(self, node: onnx.NodeProto) -> None:
        self._emit("Identity", [node.input[0]], node)
        for name, value in zip(node.output[1:], (1.0, 0.0), strict=False):
            if name:
                self.made.append(constant_node(name, value))
                self.floats.add(name)

    # ------------------------------------------------------------------ products of integers

    def _find_scale(self, node: onnx.NodeProto) -> None:
        """The scale of an integer product's weight: what its result is multiplied by behind a cast."""
        if self.constant(input_name(node, 1)) is None:
            return
        casts = [c for c in self.users.get(node.output[0], ()) if c.op_type == "Cast"]
        for cast in casts:
            for mul in self.users.get(cast.output[0], ()):
                other = next((n for n in mul.input if n != cast.output[0]), "")
                maker = self.producers.get(other)
                if mul.op_type != "Mul" or maker is None or maker.op_type != "Mul" or len(self.users[other]) != 1:
                    continue
                for scale, rest in (tuple(maker.input), tuple(maker.input)[::-1]):
                    held = self.constant(scale)
                    if held is not None:
                        self.products[node.output[0]], self.units[other] = held, rest
                        return

    def _integer(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.floats:
            raise Unscaled
        if node.op_type == "MatMulInteger" and node.input[1] in self.floats:
            self._emit("MatMul", node.input[:2], node)
            return
        if node.output[0] not in self.products:
            raise Unscaled
        scale = self.products[node.output[0]]
        q, point = self.needed(node.input[1]), self.optional(node, 3)
        conv = node.op_type == "ConvInteger"
        flat = Array(scale.name, (scale.size,), scale.dtype, lambda: scale.read().reshape(-1))
        weight = self.weight(q, flat, point, 0 if conv else len(q.shape) - 1)
        self._emit("Conv" if conv else "MatMul", [node.input[0], weight], node)

    def _product(self, node: onnx.NodeProto, weight: str, bias: str) -> None:
        """The node's first input times a weight, plus a bias where there is one."""
        product = self._emit("MatMul", [node.input[0], weight], node, node.output[0] + " product", copied=())
        self._emit("Add" if bias else "Identity", [product, *([bias] if bias else [])], node, copied=())

    def _dynamic_matmul(self, node: onnx.NodeProto) -> None:
        q = self.needed(node.input[1])
        weight = self.weight(q, self.needed(node.input[2]), self.optional(node, 3), len(q.shape) - 1)
        self._product(node, weight, input_name(node, 4))

    def _matmul_to_float(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.floats:
            raise Unscaled
        q = self.needed(node.input[1])
        weight = self.weight(q, self.needed(node.input[3]), self.optional(node, 5), len(q.shape) - 1)
        self._product(node, weight, input_name(node, 6))

    def _nbits(self, node: onnx.NodeProto) -> None:
        q, scales, points = self.needed(node.input[1]), self.needed(node.input[2]), self.optional(node, 3)
        rows, columns = attribute_of(node, "N", 0), attribute_of(node, "K", 0)
        bits, block = attribute_of(node, "bits", 4), attribute_of(node, "block_size", 32)
        blocks = -(-columns // block) if block > 0 else 0
        fits = bits in (2, 4, 8) and q.size == rows * blocks * (block * bits // 8) and scales.size == rows * blocks
        if input_name(node, 4) or attribute_of(node, "weight_prepacked", 0) or not fits:
            raise Unscaled

        def read() -> Values:
            held = None if points is None else points.read()
            return unpacked_blocks(q.read(), scales.read(), held, columns, rows, bits, block)

        made_of = (q.name, scales.name, "" if points is None else points.name, rows, columns, bits, block)
        weight = self.put(q, made_of, (columns, rows), f"{bits} bits in blocks of {block}", read)
        self._product(node, weight, input_name(node, 5))

    def _gather_blocks(self, node: onnx.NodeProto) -> None:
        """A table in blocks along an axis: integers of 4 bits as such, or packed into bytes along the last axis."""
        q, scales, points = self.needed(node.input[0]), self.needed(node.input[2]), self.optional(node, 3)
        axis, block = attribute_of(node, "quantize_axis", 1), attribute_of(node, "block_size", 128)
        if q.dtype != "uint8":
            table = self.weight(q, scales, points, axis, block)
        else:
            bits = attribute_of(node, "bits", 4)
            shape = (*q.shape[:-1], q.shape[-1] * 8 // bits) if bits in (2, 4, 8) else ()
            if not shape:
                raise Unscaled

            def read() -> Values:
                held = np.array(2 ** (bits - 1), np.uint8) if points is None else unpacked(np.asarray(points.read()), bits)
                if held.ndim:  # their last axis is padded to whole bytes
                    held = held[..., : scales.shape[-1]]
                return dequantized(unpacked(q.read(), bits), scales.read(), held, axis, block)

            made_of = (q.name, scales.name, "" if points is None else points.name, axis, block, bits)
            table = self.put(q, made_of, shape, f"{bits} bits in blocks of {block}", read)
        self._emit("Gather", [table, node.input[1]], node, copied=(), axis=attribute_of(node, "gather_axis", 0))

    # ------------------------------------------------------------------ operators with quantised inputs and outputs

    def _conv(self, node: onnx.NodeProto) -> None:
        x = self._operand(node.input[0], node.input[1], node.input[2])
        weight = self._operand(node.input[3], node.input[4], node.input[5], 0)
        bias = self._bias(node, 8, node.input[1], node.input[4])
        self._finish(self._emit("Conv", [x, weight, bias], node, node.output[0] + " product"), node, node.input[7])

    def _bias(self, node: onnx.NodeProto, place: int, left: str, right: str, factor: float = 1.0) -> str:
        """A bias in units of both scales. The first is one number, so it is read here."""
        q = self.optional(node, place)
        if q is None:
            return ""
        first = np.asarray(self.needed(left).read(), np.float64)
        if first.size != 1:
            raise Unscaled
        return self.weight(q, self.needed(right), None, 0, factor=float(first.reshape(())) * factor)

    def _matmul(self, node: onnx.NodeProto) -> None:
        a = self._operand(node.input[0], node.input[1], node.input[2], -2)
        b = self._operand(node.input[3], node.input[4], node.input[5], -1)
        self._finish(self._emit("MatMul", [a, b], node, node.output[0] + " product"), node, node.input[7])

    def _gemm(self, node: onnx.NodeProto) -> None:
        a = self._operand(node.input[0], node.input[1], node.input[2])
        transposed = bool(attribute_of(node, "transB", 0))
        b = self._operand(node.input[3], node.input[4], node.input[5], 0 if transposed else 1)
        c = self._bias(node, 6, node.input[1], node.input[4], attribute_of(node, "alpha", 1.0))
        value = self._emit("Gemm", [a, b, c], node, node.output[0] + " product", copied=("alpha", "transA", "transB"))
        self._finish(value, node, input_name(node, 8))

    def _wrapped(self, node: onnx.NodeProto) -> None:
        if attribute_of(node, "channels_last", 0):
            raise Unscaled
        op_type, count = _WRAPPED[node.op_type]
        triples = [[input_name(node, 3 * i + j) for j in range(3)] for i in range(count)]
        inputs = [self._operand(x, scale, point) for x, scale, point in triples]
        value = self._emit(op_type, inputs, node, node.output[0] + " result", copied=_WRAPPED_ATTRIBUTES)
        self._finish(value, node, input_name(node, 3 * count + 1))

    def _concat(self, node: onnx.NodeProto) -> None:
        triples = [node.input[i : i + 3] for i in range(2, len(node.input), 3)]
        parts = [self._operand(x, scale, point) for x, scale, point in triples]
        self._finish(self._emit("Concat", parts, node, node.output[0] + " result"), node, node.input[1])

    def _attention(self, node: onnx.NodeProto) -> None:
        q = self.needed(node.input[1])
        x = self._operand(node.input[0], node.input[3], input_name(node, 6))
        weight = self.weight(q, self.needed(node.input[4]), self.optional(node, 7), 1)
        inputs = [x, weight, node.input[2], input_name(node, 5), input_name(node, 8)]
        self._emit("Attention", inputs, node, domain=MICROSOFT)

    def _lstm(self, node: onnx.NodeProto) -> None:
        """Weights `n i (4 o)` with a scale for each direction, or for each row too; LSTM wants `n (4 o) i`."""
        weights = []
        for place, scale in ((1, 8), (2, 10)):
            q, held, point = self.needed(node.input[place]), self.needed(node.input[scale]), self.optional(node, scale + 1)

            def read(q: Array = q, held: Array = held, point: Array | None = point) -> Values:
                def along(a: Array) -> Values:
                    v = a.read().astype(np.float32)
                    return v.reshape(len(v), 1, -1) if v.ndim else v

                value = q.read().astype(np.float32) - (0 if point is None else along(point))
                return np.ascontiguousarray((value * along(held)).transpose(0, 2, 1))

            made_of = (q.name, held.name, "" if point is None else point.name, "lstm")
            weights.append(self.put(q, made_of, (q.shape[0], q.shape[2], q.shape[1]), q.dtype, read))
        inputs = [node.input[0], *weights, *(input_name(node, i) for i in range(3, 8))]
        self._emit("LSTM", inputs, node)
        self.made[-1].output.extend(node.output[1:])
