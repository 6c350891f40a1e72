"""What every training framework is given: an audit before the first step, which stops the run or warns."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from initaudit.config import Config
from initaudit.errors import InitauditError, UnreadableModel, UsageError
from initaudit.randomness import random_state_kept

if TYPE_CHECKING:
    import torch

Action = Literal["fail", "warn"]


class NotTrainable(InitauditError):
    """The audit before the first step found what keeps the network from learning; its text is the report."""

    def __str__(self) -> str:
        return self.found


class UntrainableWarning(UserWarning):
    """The same, where the run was to go on."""


class Gate:
    """Audits a module once and acts on what was found.

    `action` is "fail" (raise `NotTrainable`) or "warn"; a model that cannot be traced or probed only ever gives a warning.
    `config` is a `Config` or its fields over those of the project's configuration. `inputs`
    takes a batch and returns what `forward` is to be given (a tensor, a tuple or a mapping); where it is None, this is worked
    out from the signature of `forward`.
    """

    def __init__(self, action: Action, config: Config | Mapping[str, Any] | None, inputs: Callable[[Any], Any] | None) -> None:
        if action not in ("fail", "warn"):
            raise UsageError("action", repr(action), "'fail' or 'warn'")
        self.action, self.config, self.inputs = action, config, inputs

    def complaint(self, module: torch.nn.Module, batch: Any, forward: Callable[..., Any]) -> str:
        """What is wrong with the module, or "". Nothing about it, nor any random state, is changed."""
        from initaudit.auditing import audit
        from initaudit.auditing.run import known_fields
        from initaudit.config import load_config
        from initaudit.testing import complaint, not_probed

        settings = self.config
        if not isinstance(settings, Config):
            given = known_fields(settings) if settings is not None else {}
            settings = load_config(overrides={name: (value, f"{name}=") for name, value in given.items()})
        inputs = self.inputs(batch) if self.inputs is not None else inputs_of(batch, forward)
        try:
            with random_state_kept():
                found = audit(module, inputs, config=settings)
        except UnreadableModel as error:
            self._not_seen(str(error))
            return ""
        if why := not_probed(found):
            self._not_seen(why)
        return complaint(found, settings)

    def _not_seen(self, why: str) -> None:
        warnings.warn(f"initaudit could not probe the model before training: {why}", UntrainableWarning, stacklevel=4)

    def act(self, text: str) -> None:
        """Raises or warns where there is something to say."""
        if text and self.action == "fail":
            raise NotTrainable("before training", text)
        if text:
            warnings.warn(text, UntrainableWarning, stacklevel=3)


def inputs_of(batch: Any, forward: Callable[..., Any]) -> Any:
    """The part of a batch that `forward` takes: by name from a mapping, as many as it needs from a sequence; else None."""
    try:
        parameters = [p for p in inspect.signature(forward).parameters.values() if p.name != "self"]
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(batch, Mapping):
        taken = {p.name: batch[p.name] for p in parameters if p.name in batch}
        return taken if taken else None
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        # What follows the inputs in a batch are targets, for which forward has no place or a default.
        needed = [p for p in positional if p.default is p.empty]
        count = min(len(batch), max(1, len(needed)))
        return tuple(batch[:count])
    return batch
