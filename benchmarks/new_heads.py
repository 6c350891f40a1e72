"""A fresh head on a trained body: is one that is out of scale told (IA601), and are the others left alone?

    python benchmarks/new_heads.py --seeds 5

trains seven small networks on the digits of scikit-learn for 300 steps of SGD and of Adam, draws the head anew in several ways,
and audits each with a batch of digits and with inputs that the audit makes up. The judge is the cross-entropy on
all digits: above two and a half times that of guessing the head is out of scale, below one and a half times it is not; what
lies between is not counted.
"""

from __future__ import annotations

import argparse
import collections
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from trained_networks import OPTIMIZERS, Recurrent, Transformer, cnn, mlp, train

import initaudit

BAD, WELL = 2.5, 1.5


def pooled(width: int = 64, *, norm: bool = True, channels: tuple[int, ...] = (16, 32)) -> nn.Module:
    """Convolutions and a head on averages over the image."""
    layers: list[nn.Module] = []
    i = 1
    for o in (*channels, width):
        layers += [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU()]
        i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": cnn,
    "pooled": pooled,
    "pooled, no norm": lambda: pooled(norm=False),
    "pooled, 16 units": lambda: pooled(16, channels=(8,)),
    "mlp": mlp,
    "transformer": Transformer,
    "lstm": Recurrent,
}
HEADS: dict[str, Callable[[torch.Tensor], object]] = {
    "N(0, 1)": lambda w: nn.init.normal_(w),
    "N(0, 3)": lambda w: nn.init.normal_(w, 0, 3),
    "N(0, 20/fan_in)": lambda w: nn.init.normal_(w, 0, math.sqrt(20 / w.shape[1])),
    "U(-1, 1)": lambda w: nn.init.uniform_(w, -1, 1),
    "default": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "N(0, 0.01)": lambda w: nn.init.normal_(w, 0, 0.01),
    "N(0, 0.02)": lambda w: nn.init.normal_(w, 0, 0.02),
    "Xavier": lambda w: nn.init.xavier_uniform_(w),
    "He": lambda w: nn.init.kaiming_normal_(w),
    "zeros": lambda w: nn.init.zeros_(w),
}


def outcomes(seed: int) -> Iterator[tuple[str, str, str, str, float, bool, list[str]]]:
    """(network, optimizer, head, inputs, loss over that of guessing, told by IA601, other alarms)."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    for name, make in NETWORKS.items():
        for kind in ("sgd", "adam"):
            torch.manual_seed(seed)
            net: Any = make()
            train(net, OPTIMIZERS[kind](list(net.parameters())), 300)
            net.eval()
            head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
            for how in ("as trained", *HEADS):
                if how != "as trained":
                    with torch.no_grad():
                        HEADS[how](head.weight)
                        head.bias.zero_()
                with torch.no_grad():
                    loss = float(nn.functional.cross_entropy(net(x), y)) / math.log(10)
                for given, inputs in (("given", (x[:32],)), ("made-up", None)):
                    found = [f for f in initaudit.audit(net, inputs).findings if f.severity != "info"]
                    codes = [f.code for f in found]
                    yield name, kind, how, given, loss, "IA601" in codes, [c for c in codes if c != "IA601"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for seed in range(options.first, options.first + options.seeds):
        for name, kind, how, inputs, loss, told, others in outcomes(seed):
            group = "as trained" if how == "as trained" else "bad" if loss > BAD else "well" if loss < WELL else "between"
            group = f"{group}, {inputs} inputs"
            counts[group]["told" if told else "silent"] += 1
            counts[group]["other alarms"] += bool(others)
            if (told and not group.startswith(("bad", "between"))) or (not told and group.startswith("bad")) or others:
                print(
                    f"{seed} {name} {kind} {how}, {inputs} inputs: loss {loss:.2f} of guessing, told {told}, others {others}",
                    flush=True,
                )
    for group, c in counts.items():
        print(f"{group}: told {c['told']} of {c['told'] + c['silent']}, other alarms {c['other alarms']}")


if __name__ == "__main__":
    main()
