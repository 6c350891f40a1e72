"""Draws docs/mean_field.svg: the verdict on tanh networks by weight scale and depth, beside the depth scale of theory.

    python docs/mean_field.py [--width 100] [--out docs/mean_field.svg]

Schoenholz et al. 2017 (figure 5) find that tanh networks train down to about six times xi, the depth over which the
correlation of two inputs forgets where it began. Each square is the risk of one network of Gaussian weights of variance
sigma_w²/width and biases of variance 0.05, untrained, as SGD would meet it; the line is 6 xi. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from initaudit.graph.from_torch import from_module
from initaudit.probe.run import probe
from initaudit.probe.verdict import judge

BIAS = 0.05  # variance, as in figure 5 of the paper
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # sigma_w²
DEPTHS = (4, 8, 16, 24, 32, 48, 64, 96)
CELL, LEFT, TOP = 44, 70, 20

_Z = np.linspace(-8, 8, 2001)
_G = np.exp(-_Z * _Z / 2) / np.exp(-_Z * _Z / 2).sum()


def depth_scale(weight: float, bias: float = BIAS) -> float:
    """xi_c = -1 / ln(chi) at the fixed point of the correlation (Schoenholz et al. 2017, eq. 3 to 9)."""
    q = 1.0
    for _ in range(3000):
        q = weight * float(_G @ np.tanh(math.sqrt(q) * _Z) ** 2) + bias
    z, g = _Z[::10], _G[::10] / _G[::10].sum()

    def of_pair(c: float, phi: object) -> float:
        # Expectation over z1 = sqrt(q) u and z2 = sqrt(q) (c u + sqrt(1 - c²) v).
        u, v = z[:, None], z[None, :]
        values = phi(math.sqrt(q) * u) * phi(math.sqrt(q) * (c * u + math.sqrt(max(1 - c * c, 0.0)) * v))  # type: ignore[operator]
        return float(g @ values @ g)

    c = 0.5
    for _ in range(500):
        c = min((weight * of_pair(c, np.tanh) + bias) / q, 1.0)
    chi = weight * of_pair(c, lambda x: 1 / np.cosh(x) ** 2)
    return -1 / math.log(chi) if chi < 1 else math.inf


class Tanh(nn.Module):
    """`depth` hidden layers of tanh and a linear head of ten."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


def risks(width: int) -> dict[tuple[int, float], float]:
    """The risk under SGD by depth and sigma_w²."""
    found = {}
    for depth in DEPTHS:
        torch.manual_seed(depth)
        module, x = Tanh(width, depth), torch.randn(32, width)
        graph = from_module(module, (x,))  # reads the weights where they lie
        for scale in SCALES:
            with torch.no_grad():
                for layer in module.layers:
                    layer.weight.normal_(std=math.sqrt(scale / width))
                    layer.bias.normal_(std=math.sqrt(BIAS))
                nn.init.normal_(module.head.weight, std=math.sqrt(1 / width))
            found[depth, scale] = round(judge(graph, probe(graph, (x,))).untrainable_sgd, 2)
            print(f"depth {depth:4} sigma_w² {scale:5.2f} risk {found[depth, scale]:.2f}", flush=True)
    return found


def place(depth: float) -> float:
    """The y of a depth: rows are spaced by logarithms."""
    rows = [math.log(d) for d in DEPTHS]
    row = float(np.interp(math.log(depth), rows, range(len(rows))))
    return TOP + (len(DEPTHS) - 1 - row + 0.5) * CELL


def picture(found: dict[tuple[int, float], float]) -> str:
    """The squares, from white (trains) to dark (does not), the axes, and the line of 6 xi."""
    width, height = LEFT + CELL * len(SCALES) + 20, TOP + CELL * len(DEPTHS) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Risk of tanh networks by weight variance and depth">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, depth in enumerate(reversed(DEPTHS)):
        y = TOP + i * CELL
        parts.append(f'<text x="{LEFT - 8}" y="{y + CELL / 2 + 4}" text-anchor="end">{depth}</text>')
        for j, scale in enumerate(SCALES):
            risk = found[depth, scale]
            shade = round(255 - 175 * risk)
            parts.append(
                f'<rect x="{LEFT + j * CELL}" y="{y}" width="{CELL}" height="{CELL}" stroke="#ddd" '
                f'fill="rgb({shade},{shade},{round(255 - 95 * risk)})">'
                f"<title>depth {depth}, sigma_w² {scale}: {risk:.2f}</title></rect>"
            )
            parts.append(f'<text x="{LEFT + (j + 0.5) * CELL}" y="{y + CELL / 2 + 4}" text-anchor="middle">{risk:.2f}</text>')
    points = []
    for j, scale in enumerate(SCALES):
        border = min(max(6 * depth_scale(scale), DEPTHS[0]), DEPTHS[-1])
        points.append(f"{LEFT + (j + 0.5) * CELL},{place(border):.1f}")
        parts.append(
            f'<text x="{LEFT + (j + 0.5) * CELL}" y="{TOP + len(DEPTHS) * CELL + 16}" text-anchor="middle">{scale:g}</text>'
        )
    parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#c00" stroke-width="3"/>')
    parts.append(f'<text x="{LEFT}" y="{height - 10}">sigma_w² across, hidden layers up; red: six depth scales</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    """Runs the grid and writes the picture; says how often the verdict is on the same side as theory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--out", default=str(Path(__file__).with_name("mean_field.svg")))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = risks(arguments.width)
    agree = [(risk >= 0.5) == (depth > 6 * depth_scale(scale)) for (depth, scale), risk in found.items()]
    Path(arguments.out).write_text(picture(found), encoding="utf-8")
    print(f"the verdict and 6 xi agree at {sum(agree)} of {len(agree)} places; wrote {arguments.out}")


if __name__ == "__main__":
    main()
