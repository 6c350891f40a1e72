"""A Lightning callback that audits the module with the first batch, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from initaudit.errors import UsageError
from initaudit.integrations.gate import Action, Gate

if TYPE_CHECKING:
    from initaudit.config import Config

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        where = "initaudit.integrations.lightning"
        raise UsageError(where, "Lightning is not installed", "lightning or pytorch-lightning") from error


class InitauditCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Trainer(callbacks=[InitauditCallback()]): stops before step 0 where the network cannot learn, or warns (action="warn").

    The audit looks at the module itself with `example_input_array`, where the module has one, else with the part of the first
    batch that `forward` takes; `inputs` (from a batch to what `forward` is given) overrules both. A run that goes on from a
    checkpoint is not audited. With several processes rank zero decides for all.
    """

    def __init__(
        self,
        action: Action = "fail",
        *,
        config: Config | Mapping[str, Any] | None = None,
        inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self._gate = Gate(action, config, inputs)
        self._done = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Audits once, before the first step of a run that starts from scratch."""
        if self._done or trainer.global_step > 0:
            return
        self._done = True
        example = getattr(pl_module, "example_input_array", None)
        if example is not None and self._gate.inputs is None:
            batch = example
        text = self._gate.complaint(pl_module, batch, pl_module.forward)
        self._gate.act(trainer.strategy.broadcast(text))
