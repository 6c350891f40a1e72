"""A callback for transformers' Trainer that audits the model before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from initaudit.errors import UsageError
from initaudit.integrations.gate import Action, Gate
from initaudit.randomness import random_state_kept

if TYPE_CHECKING:
    from initaudit.config import Config

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise UsageError("initaudit.integrations.transformers", "transformers is not installed") from error

_LABELS = ("labels", "label", "label_ids")  # what the Trainer takes for targets where `label_names` does not say


class InitauditCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Trainer(callbacks=[InitauditCallback()], ...): stops before step 0 where a model cannot learn, or warns (action="warn").

    The audit runs on the first examples of the training set, put together by the Trainer's own collator; targets are left
    out. An iterable data set is not touched, because what is read from it may be lost: inputs are then made up, unless
    `inputs` is a function from None to what `forward` is given. A run that is resumed is not audited.
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audits once, before the first step of a run that starts from scratch."""
        if state.global_step > 0:
            return
        model = kwargs["model"]
        with random_state_kept():
            batch = _examples(kwargs.get("train_dataloader"), args) if self._gate.inputs is None else None
        self._gate.act(self._gate.complaint(model, batch, model.forward))


def _examples(loader: Any, args: Any) -> Any:
    """The collated first examples of a data set that can be indexed, without targets; None for any other."""
    data = getattr(loader, "dataset", None)
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__") or len(data) == 0:
        return None
    batch = loader.collate_fn([data[i] for i in range(min(len(data), args.per_device_train_batch_size))])
    targets = args.label_names if args.label_names is not None else _LABELS
    return {k: v for k, v in batch.items() if k not in targets} if isinstance(batch, Mapping) else batch
