"""An operator that is not executed: a call that stands in the graph for what nobody here can compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from initaudit.errors import UnsupportedOperator


@dataclass(frozen=True)
class Unknown:
    """The target of a call to an operator that is not known. What lies downstream of it is unknown, never guessed."""

    domain: str
    op_type: str

    @property
    def __name__(self) -> str:
        """As torch.fx asks for it."""
        return f"unknown_{self.op_type}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Never computes anything."""
        raise UnsupportedOperator(f"{self.domain or 'ai.onnx'}::{self.op_type}", "an operator that is not executed here")
