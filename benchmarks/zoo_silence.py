"""Healthy models: what is said of each, as a module and as an ONNX file."""

from __future__ import annotations

import functools
import time
from typing import Any

from zoo_models import Model, built, quiet, zoo

from initaudit import audit


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
