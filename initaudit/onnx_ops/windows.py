"""How a window moves over space: padding, output sizes and the windows themselves, for convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sweep:
    """A window's sizes, steps and paddings along every spatial axis, and the output's sizes.

    `begin` and `end` are the padding that counts as part of the image; `extra` is what the last window of a rounded-up
    output reaches beyond it (negative where the end of the image is not reached).
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    sizes: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """The extent of a window with its gaps."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def extra(self) -> tuple[int, ...]:
        """How far the last window reaches beyond the padded image."""
        axes = zip(self.output, self.strides, self.reach, self.sizes, self.begin, self.end, strict=True)
        return tuple((o - 1) * s + r - (n + b + e) for o, s, r, n, b, e in axes)


def sweep(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    pads: Sequence[int] | None,
    dilations: Sequence[int] | None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Sweep:
    """The sweep of a window over an image of these sizes; `pads` holds all beginnings, then all ends."""
    rank = len(sizes)
    steps = tuple(strides) if strides else (1,) * rank
    gaps = tuple(dilations) if dilations else (1,) * rank
    begin, end, output = [], [], []
    for axis, (n, k, s, d) in enumerate(zip(sizes, kernel, steps, gaps, strict=True)):
        reach = (k - 1) * d + 1
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            count = -(-n // s)
            total = max((count - 1) * s + reach - n, 0)
            first = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            last = total - first
        else:
            first, last = (pads[axis], pads[axis + rank]) if pads and auto_pad != "VALID" else (0, 0)
            room = n + first + last - reach
            count = (-(-room // s) if ceil_mode else room // s) + 1
            # A window that would start in the padding at the end is left out.
            if ceil_mode and (count - 1) * s >= n + first:
                count -= 1
        begin.append(first)
        end.append(last)
        output.append(count)
    return Sweep(tuple(kernel), steps, gaps, tuple(begin), tuple(end), tuple(sizes), tuple(output))


def torch_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Paddings in the order of torch.nn.functional.pad: the last axis first."""
    return [amount for pair in reversed(list(zip(begin, end, strict=True))) for amount in pair]


def padded(x: Tensor, by: Sweep, value: float) -> Tensor:
    """`n c …` grown (or cropped) to exactly what the windows cover."""
    amounts = torch_pads(by.begin, [e + x_ for e, x_ in zip(by.end, by.extra, strict=True)])
    return F.pad(x, amounts, value=value) if any(amounts) else x


def windows(x: Tensor, by: Sweep, value: float) -> Tensor:
    """Every window of an image `n c s…`, as a view `n c o… k…` of its padded form."""
    view = padded(x, by, value)
    for axis, (reach, stride, gap) in enumerate(zip(by.reach, by.strides, by.dilations, strict=True)):
        view = view.unfold(2 + axis, reach, stride)[..., ::gap]
    return view
