"""What a module really does with the output of each of its weights: a judge that looks on while forward runs.

Calls of torch are intercepted and tensors followed by identity: from a product with a weight, through norms and changes of
layout, to the activation that is called by its name. It knows nothing of graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

ACTIVATIONS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.gelu: "gelu", F.silu: "silu", F.relu6: "relu6",
    F.mish: "mish", F.hardswish: "hardswish", F.hardsigmoid: "hardsigmoid", F.leaky_relu: "leaky_relu", F.elu: "elu",
    F.softplus: "softplus", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.tanh: "tanh", F.tanh: "tanh",
    torch.Tensor.tanh: "tanh", torch.Tensor.sigmoid: "sigmoid", torch.Tensor.relu: "relu", F.hardtanh: "relu6",
    torch.sin: "sin", F.glu: "sigmoid",
}  # fmt: skip
# Activations that transformers writes out in primitive operators, by the names that its configurations use.
WRITTEN_OUT = {
    "NewGELUActivation": "gelu", "FastGELUActivation": "gelu", "QuickGELUActivation": "quick_gelu", "GELUTanh": "gelu",
    "AccurateGELUActivation": "gelu", "ReLUSquaredActivation": "squared_relu", "MishActivation": "mish",
    "LaplaceActivation": "custom", "ClippedGELUActivation": "custom", "BloomGelu": "gelu",
}  # fmt: skip
# The products and where among their arguments the weight stands.
PRODUCTS = {
    F.linear: 1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1, torch.conv1d: 1, torch.conv2d: 1, torch.addmm: 2, torch.matmul: 1,
    torch.Tensor.matmul: 1, torch.Tensor.__matmul__: 1, torch.bmm: 1, torch.baddbmm: 2,
}  # fmt: skip
PASSED = {
    F.layer_norm, F.batch_norm, F.group_norm, F.instance_norm, F.dropout, F.rms_norm, torch.Tensor.view, torch.Tensor.reshape,
    torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.contiguous, torch.Tensor.chunk, torch.Tensor.split, torch.chunk,
    torch.split, torch.Tensor.__getitem__, torch.Tensor.unsqueeze, torch.Tensor.squeeze, torch.Tensor.flatten, torch.flatten,
    F.dropout2d, torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as, torch.Tensor.unbind, torch.transpose, F.pad,
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Collects (parameter name, activation name) pairs while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in module.named_parameters()}
        self.found: set[tuple[str, str]] = set()
        self._from: dict[int, str] = {}
        self._kept: list[Any] = []  # an identity is told by its address, so nothing watched may be freed
        self._inside = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        source = self._from.get(id(args[0] if args else kwargs.get("input")))
        if func in ACTIVATIONS and source is not None:
            self.found.add((source, ACTIVATIONS[func]))
        # Functionals of torch call themselves again inside: only the outermost call counts.
        self._inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self._inside -= 1
        grouped = "grouped_mm" in getattr(func, "__name__", "")
        if func in PRODUCTS or grouped:
            place = 1 if grouped else PRODUCTS[func]
            weight = args[place] if len(args) > place else kwargs.get("weight")
            source = self.names.get(weight.untyped_storage().data_ptr()) if isinstance(weight, torch.Tensor) else None
        elif func not in PASSED:
            return result
        if source is not None:
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor):
                    self._from[id(value)] = source
                    self._kept.append(value)
        return result

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before an activation of transformers that is written out in primitive operators: what it calls is no news."""
        self._inside += 1
        source = self._from.get(id(args[0])) if args else None
        if source is not None:
            self.found.add((source, WRITTEN_OUT[type(module).__name__]))

    def left(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """After such an activation."""
        self._inside -= 1


@contextlib.contextmanager
def watching(module: nn.Module) -> Iterator[Watch]:
    """Watches the calls of `module` inside the block."""
    watch = Watch(module)
    written = [m for m in module.modules() if type(m).__name__ in WRITTEN_OUT]
    hooks = [m.register_forward_pre_hook(watch.entered) for m in written] + [
        m.register_forward_hook(watch.left) for m in written
    ]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()
