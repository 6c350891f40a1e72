"""IA314: weights that forward computes with and that no optimizer is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example
from initaudit.rules.remedy import attribute_path
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.support import names


class NotRegistered(Rule):
    """Weights that forward computes with are not among the module's parameters.

    What it does: runs forward once and looks at the tensors to which autograd would hand a gradient. Those that ask for one and
    that `parameters()` does not hold are named by their way in Python. Inputs and what forward derives from them are none; nor
    are constants, masks and frozen tables, which ask for no gradient. A parameter that forward draws anew at each call is
    one. It is an error where nothing else is trainable.

    Why it is bad: an optimizer over `model.parameters()` never changes them, `state_dict()` does not save them, and
    `model.to(device)` leaves them behind. Nothing raises.

    Example: layers kept in a plain list or dict; a tensor with requires_grad=True as an attribute; a layer built in forward.

    Instead: `torch.nn.ModuleList`, `ModuleDict`, `ParameterList` or `torch.nn.Parameter`; `requires_grad_(False)` for what is
    to stay as it is.

    Source: torch.nn.Module, "Submodules assigned in this way will be registered"; torch.nn.ModuleList.
    """

    code = "IA314"
    name = "not-registered"
    severity = "error"
    phase = "any"
    summary = "forward computes with weights that the module's parameters() does not hold"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for what is held in plain containers, one for what each call draws anew."""
        graph = evidence.graph
        own = graph.own if graph is not None else None
        if graph is None or own is None or not own.strays:
            return
        alone = all(n in own.missed for n, a in evidence.checkpoint.arrays.items() if a.trainable)
        held = [s for s in own.strays if not s.drawn]
        if held:
            named = [s.name for s in held if s.name]
            what = names(named) if named else f"a tensor of shape {held[0].shape} that lies outside of the module"
            yield self._finding(
                evidence,
                f"forward computes with {_count(held)} that parameters() does not hold: {what}; an optimizer over "
                "model.parameters() never changes them, state_dict() does not save them",
                f"{_register(evidence, named)}; or requires_grad_(False) for what is to keep its values",
                named,
                alone,
            )
        if drawn := [s for s in own.strays if s.drawn]:
            yield self._finding(
                evidence,
                f"forward makes {_count(drawn)} anew in each call, with other values (shape {drawn[0].shape}): nothing that "
                "is learnt could stay in them",
                "build the layer in __init__ and call it in forward",
                [],
                alone,
            )

    def _finding(self, evidence: Evidence, message: str, help: str, named: list[str], alone: bool) -> Finding:
        return self.finding(
            message + ("; nothing else of the network is trainable" if alone else ""),
            help,
            severity="error" if alone else "warning",
            measured=1.0,
            expected=0.0,
            law=EXACT + "autograd's graph leads to them, and parameters() does not",
            tensor=named[0] if named else "",
            related=tuple(named[1:]),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Registered layers, and a table that is not to be trained."""
        return (
            example("layers in a ModuleList", lambda: _listed(registered=True)),
            example("a frozen table", lambda: _tensor(trainable=False)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Layers in a list, and a bare tensor."""
        return (
            example("layers in a plain list", lambda: _listed(registered=False)),
            example("a tensor that asks for a gradient", lambda: _tensor(trainable=True)),
        )


def _count(strays: list[Any]) -> str:
    return "1 weight" if len(strays) == 1 else f"{len(strays)} weights"


def _register(evidence: Evidence, named: list[str]) -> str:
    """The line that registers what holds the first of them, by what stands there."""
    from torch import Tensor, nn

    advice = "hold them in torch.nn.ModuleList or torch.nn.ModuleDict, or as torch.nn.Parameter"
    if not named:
        return advice
    here: Any = evidence.checkpoint.program
    parts = named[0].split(".")
    depth = 0
    while depth < len(parts) and isinstance(following := getattr(here, parts[depth], None), nn.Module):
        if parts[depth] not in here._modules:
            return advice  # hidden by its author
        here, depth = following, depth + 1
    kinds: dict[tuple[type, type], str] = {
        (list, nn.Module): "ModuleList",
        (tuple, nn.Module): "ModuleList",
        (dict, nn.Module): "ModuleDict",
        (list, Tensor): "ParameterList",
        (tuple, Tensor): "ParameterList",
        (dict, Tensor): "ParameterDict",
    }
    path = attribute_path(".".join(parts[: depth + 1]), evidence.checkpoint.program)
    if isinstance(following, Tensor):
        return f"{path} = torch.nn.Parameter({path})"
    values = following.values() if isinstance(following, dict) else following if isinstance(following, (list, tuple)) else ()
    texts = not isinstance(following, dict) or all(isinstance(k, str) for k in following)
    for (container, inside), name in kinds.items():
        if isinstance(following, container) and values and texts and all(isinstance(v, inside) for v in values):
            return f"{path} = torch.nn.{name}({path})"
    return advice


def _listed(*, registered: bool) -> Any:
    import torch
    from torch import nn

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(16, 32), nn.Linear(32, 32)]
            self.layers = nn.ModuleList(layers) if registered else layers
            self.head = nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            y: torch.Tensor = self.head(x)
            return y

    return Listed(), (torch.randn(64, 16),)


def _tensor(*, trainable: bool) -> Any:
    import torch
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(16).requires_grad_(trainable)
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.scale * x)
            return y

    return Scaled(), (torch.randn(64, 16),)
