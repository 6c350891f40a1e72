"""What an optimizer's state remembers of the gradients: their root mean square, tensor by tensor.

Adam and its kin keep v_t = b v_{t-1} + (1 - b) g_t^2 from v_0 = 0, so that v_t / (1 - b^t) is a weighted mean of the squared
gradients (Kingma & Ba 2015, section 3); RMSprop and Adadelta keep the same mean and do not correct it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from initaudit.errors import InitauditError
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.measure.moments import Moments, measure

# What torch.optim calls its running mean of squared gradients; AMSGrad's maximum is another thing.
SECOND = ("exp_avg_sq", "square_avg")


@dataclass(frozen=True)
class History:
    """The running mean of squared gradients of one parameter.

    `name` is its place in the optimizer's state ("optimizer.state.3"), `tensor` the parameter's own name where the order of the
    parameters tells it, else "". `correction` is 1 - b^t, 1 where the steps or the rate b are not known.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    moments: Moments
    correction: float = 1.0

    @property
    def norm2(self) -> float:
        """The mean squared norm of the gradient."""
        return self.moments.mean * self.moments.count / self.correction

    @property
    def rms(self) -> float:
        """The root mean square of the gradient's components."""
        return math.sqrt(max(self.moments.mean, 0.0) / self.correction)


def histories(checkpoint: Checkpoint) -> tuple[History, ...]:
    """Every running mean that can be read, in the order of the optimizer's parameters."""
    found: list[tuple[list[int | str], str, Array]] = []
    for name, array in checkpoint.optimizer.items():
        owner, _, kind = name.rpartition(".")
        if kind in SECOND and array.size:
            found.append((_order(owner), owner, array))
    found.sort(key=lambda item: [(isinstance(part, str), part) for part in item[0]])
    tensors = _tensors(checkpoint, [(owner, array) for _, owner, array in found])
    made = []
    for _, owner, array in found:
        try:
            moments = measure(array.read())
        except InitauditError:
            continue
        made.append(History(owner, tensors.get(owner, ""), array.shape, moments, _correction(checkpoint, owner)))
    return tuple(made)


def _order(owner: str) -> list[int | str]:
    """torch.optim counts its parameters: 10 comes after 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", owner)]


def _settings(checkpoint: Checkpoint, owner: str) -> tuple[Mapping[str, Any], str]:
    """What the loader kept of the optimizer that `owner` belongs to, and the key of the parameter in its state."""
    for path, settings in checkpoint.metadata.get("optimizers", {}).items():
        prefix = f"{path}.state." if path else "state."
        if owner.startswith(prefix):
            return settings, owner.removeprefix(prefix)
    return {}, ""


def _correction(checkpoint: Checkpoint, owner: str) -> float:
    settings, key = _settings(checkpoint, owner)
    rate = settings.get("rates", {}).get(key)
    steps = settings.get("steps", {}).get(key)
    held = checkpoint.optimizer.get(f"{owner}.step")
    if steps is None and held is not None and held.size == 1:
        try:
            steps = float(held.read().reshape(()))
        except InitauditError:
            return 1.0
    if rate is None or steps is None or not 0.0 < rate < 1.0 or not 1.0 <= steps < math.inf:
        return 1.0
    return float(-math.expm1(steps * math.log(rate)))


def _tensors(checkpoint: Checkpoint, owners: list[tuple[str, Array]]) -> dict[str, str]:
    """The parameter behind every state: by the name that the optimizer keeps, else by order where all the shapes agree."""
    named: dict[str, str] = {}
    for owner, _ in owners:
        settings, key = _settings(checkpoint, owner)
        name = settings.get("names", {}).get(key) or (key if key in checkpoint.arrays else "")
        if name in checkpoint.arrays:
            named[owner] = name
    if named:
        return named
    first = {array.storage or name: name for name, array in reversed(list(checkpoint.arrays.items())) if _learns(array)}
    learned = [name for name in checkpoint.arrays if name in first.values()]
    shapes = [checkpoint.arrays[name].shape for name in learned]
    if shapes == [array.shape for _, array in owners]:
        return {owner: name for (owner, _), name in zip(owners, learned, strict=True)}
    return dict(_groups(checkpoint, owners, learned))


def _groups(checkpoint: Checkpoint, owners: list[tuple[str, Array]], learned: list[str]) -> Iterator[tuple[str, str]]:
    """Where parameters stand in groups (with and without weight decay) only the shapes that one tensor has tell it."""
    shapes = [checkpoint.arrays[name].shape for name in learned]
    states = [array.shape for _, array in owners]
    if sorted(shapes) == sorted(states):
        for owner, array in owners:
            if states.count(array.shape) == 1:
                yield owner, learned[shapes.index(array.shape)]


def _learns(array: Array) -> bool:
    """A state dict does not tell parameters from buffers; statistics of norms are known by their names."""
    return array.trainable and not array.name.endswith(("running_mean", "running_var", "num_batches_tracked"))
