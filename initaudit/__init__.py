"""initaudit: the linter for the weights of neural networks.

audit = initaudit.audit(module, inputs)
audit.verdict, audit.risk, audit.layers, audit.findings, audit.to_dict()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from initaudit.auditing import Audit
    from initaudit.config import Config

__version__ = "0.1.0"
__all__ = ["__version__", "audit"]


def audit(model: Any, inputs: Any = None, *, config: Config | Mapping[str, Any] | None = None) -> Audit:
    """Audits `model`: a path, a `torch.nn.Module` or an `onnx.ModelProto`; see `initaudit.auditing.audit`.

    `inputs` are example inputs (a tensor, a tuple of tensors, or a mapping by name), made up where None.
    """
    # Imported here so that `initaudit --version` loads neither numpy nor torch.
    from initaudit.auditing import audit as run

    return run(model, inputs, config=config)
