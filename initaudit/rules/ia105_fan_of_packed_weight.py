"""IA105: a packed or grouped weight, scaled by the fan of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example
from initaudit.rules.health import health
from initaudit.rules.remedy import each, expression_of, init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import SIGMAS, error_of, fields, fresh_layers, initial, normalised, path_of, plain, sigmas

_QKV = 3


class FanOfPackedWeight(Rule):
    """A weight that packs several matrices, or a grouped kernel, was scaled by the fan of the whole.

    What it does: recognises (a) a matrix of queries, keys and values in one, drawn by Xavier with all 3E outputs counted,
    (b) the kernel of a grouped convolution drawn with the channels of all groups, where a unit sees those of one group, and
    (c) matrices stacked along an axis of their own, as those of experts, which `torch.nn.init` takes for the taps of a kernel.

    Why it is bad: (a) every projection is sqrt(2) too small, which costs a little at the start; (b) a depthwise kernel of 64
    channels has 1/64 of the variance it needs; (c) an expert of 512 by 2048 is drawn with fan-in 1,048,576. Without a
    normalization behind it this compounds from layer to layer.

    Example: `nn.MultiheadAttention` draws `in_proj_weight` so.

    Instead: draw each part by its own fans: `for w in in_proj_weight.chunk(3): nn.init.xavier_uniform_(w)`, and
    `for w in experts: nn.init.kaiming_normal_(w)`.

    Source: https://github.com/pytorch/pytorch/issues/166378; He et al. 2015, section 2.2.
    """

    code = "IA105"
    name = "fan-of-packed-weight"
    severity = "error"
    phase = "init"
    summary = "a packed or grouped weight (Q,K,V in one matrix; depthwise) was scaled by the fan of the whole"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each of the three kinds."""
        if not initial(evidence):
            return
        layers = list(fresh_layers(evidence, "contraction"))
        packed = [x for x in layers if _packed(x)]
        if packed:
            first = packed[0]
            expected = 2 / (first.pair.fan_in + first.pair.fan_out / _QKV)
            yield self.finding(
                f"queries, keys and values are one matrix and were drawn by Xavier with all {first.pair.fan_out} outputs "
                "counted: variance "
                f"{first.moments.variance:.3g}, {first.moments.variance / expected:.2g} of the {expected:.3g} of each "
                "projection on its own, "
                f"{abs(sigmas(first, expected)):.0f} standard errors below; attention starts a little flatter, and learns",
                each("torch.nn.init.xavier_uniform_({})", [expression_of(x) for x in packed], "{}.chunk(3)"),
                severity="info",
                measured=first.moments.variance,
                expected=expected,
                law="Xavier of each projection on its own: 2/(fan_in + fan_out)",
                standard_errors=sigmas(first, expected),
                related=tuple(x.tensor for x in packed[1:]),
                **fields(first),
            )
        grouped = [x for x in layers if _grouped(x) and plain(x) and not normalised(x)]
        if grouped:
            yield self._grouped(evidence, grouped)
        stacked = [(x, law) for x in layers if plain(x) and not normalised(x) and (law := _stacked(x))]
        if stacked:
            yield self._stacked(evidence, stacked)

    def _stacked(self, evidence: Evidence, stacked: list[tuple[LayerEvidence, tuple[str, float]]]) -> Finding:
        first, (law, expected) = stacked[0]
        level, pair = health(evidence).vanishing, first.pair
        ratio = first.moments.variance / expected
        copies = math.prod(n for n, a in zip(pair.shape, pair.axes, strict=True) if a == "n")
        return self.finding(
            f"{copies} matrices are stacked in one tensor of shape {'x'.join(map(str, pair.shape))}, and variance "
            f"{first.moments.variance:.3g} is {law}'s with the fan of the whole: {ratio:.2g} of the {expected:.3g} that one "
            f"matrix of fan_in {pair.fan_in} needs, {abs(sigmas(first, expected)):.0f} standard errors below; what these "
            "layers send on is that much weaker",
            init_line(first, *(x for x, _ in stacked[1:])),
            severity="error" if level == "error" else "warning" if level else "info",
            measured=first.moments.variance,
            expected=expected,
            law=f"{law} with the fan of one matrix",
            standard_errors=sigmas(first, expected),
            related=tuple(x.tensor for x, _ in stacked[1:]),
            **fields(first),
        )

    def _grouped(self, evidence: Evidence, grouped: list[LayerEvidence]) -> Finding:
        first = grouped[0]
        level = health(evidence).vanishing
        expected = 2 / first.pair.fan_in
        return self.finding(
            f"variance {first.moments.variance:.3g} is that of a law with the channels of all {first.pair.groups} groups "
            "counted; a unit sees one "
            f"group, fan_in {first.pair.fan_in}, and needs {expected:.3g} (He): {first.moments.variance / expected:.2g} of it "
            f"is there, {abs(sigmas(first, expected)):.0f} standard errors below, a loss of "
            f"signal that {len(grouped)} such layers multiply",
            each("torch.nn.init.kaiming_normal_({})", [expression_of(x) for x in grouped]),
            severity="error" if level == "error" else "warning" if level else "info",
            measured=first.moments.variance,
            expected=expected,
            law="He et al. 2015, eq. 10: 2/fan_in, of the inputs of one group",
            standard_errors=sigmas(first, expected),
            related=tuple(x.tensor for x in grouped[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Depthwise kernels by their own fan."""
        return (example("depthwise kernels under He", lambda: _depthwise(9)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Depthwise kernels by the fan of the whole, and a packed attention."""
        return (
            example("depthwise kernels by all channels", lambda: _depthwise(9 * 48)),
            example("nn.MultiheadAttention", _attention),
            example("experts as one tensor", _experts),
        )


def _packed(layer: LayerEvidence) -> bool:
    pair, error = layer.pair, error_of(layer)
    if "attention" not in path_of(layer) or pair.fan_out != _QKV * pair.fan_in or not math.isfinite(error):
        return False
    variance = layer.moments.variance
    whole, own = 2 / (pair.fan_in + pair.fan_out), 1 / pair.fan_in
    return abs(variance / whole - 1) < SIGMAS * error < abs(variance / own - 1)


def _grouped(layer: LayerEvidence) -> bool:
    pair, error, variance = layer.pair, error_of(layer), layer.moments.variance
    if pair.groups < 2 or pair.axes[:2] != ("o", "i") or not math.isfinite(error) or not variance > 0:
        return False
    taps = pair.fan_in // max(1, pair.shape[1])
    inside, outside = taps * pair.shape[1], taps * pair.shape[0]  # as torch.nn.init reads the shape
    wrong = [2 / outside, 1 / outside, 2 / (inside * pair.groups), 1 / (inside * pair.groups), 2 / (inside + outside)]
    # With six groups He's law for the whole is PyTorch's default for one.
    own = [c / pair.fan_in for c in (2, 1, 1 / 3)]
    if any(abs(variance / v - 1) < SIGMAS * error for v in own):
        return False
    return any(abs(variance / v - 1) < SIGMAS * error for v in wrong) and variance * pair.fan_in < 2 * (1 - SIGMAS * error)


def _stacked(layer: LayerEvidence) -> tuple[str, float] | None:
    """(the law that fits with the fan of the whole tensor, the variance it asks for by the matrix's own), or None."""
    pair, error, variance = layer.pair, error_of(layer), layer.moments.variance
    if sorted(pair.axes) != ["i", "n", "o"] or pair.axes[0] != "n" or not math.isfinite(error) or not variance > 0:
        return None
    # torch.nn.init takes the axes from the third on for the taps of a kernel.
    inside, outside = pair.shape[1] * pair.shape[2], pair.shape[0] * pair.shape[2]
    laws = (("He", 2.0), ("LeCun", 1.0), ("PyTorch's default", 1 / 3))
    found = [(law, c / fan, c / pair.fan_in) for law, c in laws for fan in (inside, outside)]
    found.append(("Xavier", 2 / (inside + outside), 2 / (pair.fan_in + pair.fan_out)))
    if any(abs(variance / own - 1) < SIGMAS * error for *_, own in found):
        return None
    return next(((law, own) for law, whole, own in found if whole < own and abs(variance / whole - 1) < SIGMAS * error), None)


def _depthwise(fan: int) -> Any:
    import torch
    from torch import nn

    stack: list[nn.Module] = [nn.Conv2d(3, 48, 1)]
    for _ in range(4):
        stack += [nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.ReLU(), nn.Conv2d(48, 48, 1), nn.ReLU()]
    model = nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (fan if m.groups > 1 else m.weight[0].numel())))
    return model, (torch.randn(8, 3, 10, 10),)


def _attention() -> Any:
    import torch
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(x + self.attention(x, x, x, need_weights=False)[0])

    return Reader(), (torch.randn(4, 8, 64),)


def _experts() -> Any:
    import torch
    from torch import nn

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4)
            self.up = nn.Parameter(nn.init.kaiming_normal_(torch.empty(4, 16, 32)))
            self.down = nn.Parameter(nn.init.kaiming_normal_(torch.empty(4, 32, 16)))

        def forward(self, x: torch.Tensor) -> Any:
            hidden = torch.relu(torch.einsum("bi,eio->ebo", x, self.up))
            return ((hidden @ self.down) * self.router(x).softmax(-1).T.unsqueeze(-1)).sum(0)

    return nn.Sequential(Mixture(), nn.Linear(16, 4)), (torch.randn(16, 16),)
