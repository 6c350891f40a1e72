"""Our operators behind ONNX's own backend interface, so that its test-suite runs against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as BaseBackend
from onnx.backend.base import BackendRep
from torch import Tensor

from initaudit.errors import InitauditError
from initaudit.onnx_ops.budget import Budget, metered
from initaudit.onnx_ops.convert import from_numpy, to_numpy
from initaudit.onnx_ops.registry import NEWEST_OPSET
from initaudit.onnx_ops.run import Scope, call_node, run_model


class Prepared(BackendRep):
    """A model that is ready to run."""

    def __init__(self, model: onnx.ModelProto, budget: Budget | None = None) -> None:
        self._model = model
        self._budget = budget
        given = {proto.name for proto in model.graph.initializer}
        self._names = [i.name for i in model.graph.input if i.name not in given]

    def run(self, inputs: Sequence[Any], **_: Any) -> tuple[Any, ...]:
        """The outputs as arrays, for inputs in the order of the graph. Raises InitauditError for too few or too many."""
        if len(inputs) != len(self._names):
            raise InitauditError(self._model.graph.name or "graph", f"{len(inputs)} inputs", f"{len(self._names)}")
        tensors = {name: from_numpy(np.asarray(v)) for name, v in zip(self._names, inputs, strict=True)}
        return tuple(to_numpy(v) for v in run_model(self._model, tensors, self._budget))


class Backend(BaseBackend):
    """`onnx.backend.base.Backend` on torch, on the CPU."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **_: Any) -> Prepared:
        """The model, ready to run."""
        return Prepared(model)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Sequence[Any], device: str = "CPU", **_: Any) -> tuple[Any, ...]:
        """The outputs of the model as arrays."""
        return cls.prepare(model, device).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Sequence[Any], device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """The outputs of one node as arrays; `opset_version` is that of its domain (default: the newest)."""
        given = iter(inputs)
        tensors: list[Tensor | None] = [from_numpy(np.asarray(next(given))) if name else None for name in node.input]
        scope = Scope({"": NEWEST_OPSET, node.domain: kwargs.get("opset_version", NEWEST_OPSET)})
        with metered(Budget()):
            results = call_node(node, tensors, scope, {})
        return tuple(to_numpy(v) for v in results if v is not None)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only the CPU: the suite compares numbers, not devices."""
        return device == "CPU"
