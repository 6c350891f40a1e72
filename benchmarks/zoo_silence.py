"""Healthy models: what is said of each, as a module and as an ONNX file."""

from __future__ import annotations

import functools
import io
import time
from typing import Any

import onnx
import torch
from torch import nn
from zoo_models import Inputs, Model, built, quiet, zoo

from initaudit import audit

FOLDED = (
    "timm:resnet10t", "timm:resnet18", "timm:repvgg_a0", "timm:mobilenetv2_035", "timm:densenet121", "timm:test_resnet",
    "timm:mobilenetv3_small_050", "timm:efficientnet_lite0", "torchvision:resnet18", "own:pointnet",
)  # fmt: skip


@functools.cache
def models() -> dict[str, Model]:
    """The zoo, read once in a process."""
    return zoo()


def module_row(task: str) -> dict[str, Any]:
    """The audit of a model as a module."""
    model = models()[task.partition("|")[2]]
    module, inputs = built(model)
    began = time.process_time()
    with quiet():
        found = audit(module, inputs)
    return {"family": model.family, "parameters": sum(p.numel() for p in module.parameters()), **summary(found, began)}


def summary(found: Any, began: float) -> dict[str, Any]:
    """An audit as a row."""
    said = [
        {
            "code": f.code,
            "severity": f.severity,
            "tensor": f.tensor,
            "related": len(f.related),
            "message": f.message,
            "help": f.help,
        }
        for f in found.findings
    ]
    return {
        "audit_seconds": round(time.process_time() - began, 3),
        "phase": found.report.phase,
        "verdict": found.verdict,
        "findings": said,
        "layers": len(found.layers),
        "notes": list(found.report.notes),
        "risk": dict(found.risk),
    }


def onnx_tasks() -> list[str]:
    """Every third model of the zoo as an ONNX file with its norms kept, and ten networks with theirs folded away.

    And every fifteenth of the others, in the place of those that torch's exporter refuses.
    """
    names = list(models())
    kept_names = [*names[::3], *names[1::15]]
    return [*(f"onnx|{n}" for n in kept_names), *(f"folded|{n}" for n in FOLDED if n in models())]


def onnx_row(task: str) -> dict[str, Any]:
    """The audit of a model as an ONNX file."""
    kind, _, name = task.partition("|")
    model = models()[name]
    module, inputs = built(model)
    with quiet():
        proto = folded(module, inputs) if kind == "folded" else kept(module, inputs)
        began = time.process_time()
        found = audit(proto)
    return {"family": model.family, **summary(found, began)}


def kept(module: nn.Module, inputs: Inputs) -> onnx.ModelProto:
    """torch's exporter without its optimizer: norms stay norms, every weight stays in the file."""
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    program = torch.onnx.export(module.eval(), arguments, kwargs=keywords, dynamo=True, optimize=False, verbose=False)
    return program.model_proto


def folded(module: nn.Module, inputs: Inputs) -> onnx.ModelProto:
    """The older exporter in evaluation mode, which multiplies the norms into the convolutions."""
    file = io.BytesIO()
    torch.onnx.export(module.eval(), inputs, file, dynamo=False, do_constant_folding=True, opset_version=17)
    return onnx.load_from_string(file.getvalue())
