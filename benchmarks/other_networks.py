"""Networks of other families, data, activations, widths and class counts than those that the verdict was fitted to.

    python benchmarks/other_networks.py --out FILE

trains each of them for 200 steps of batch 128 with SGD (momentum 0.9; 0.003, 0.03, 0.3) and Adam (3e-4, 3e-3) and writes a
line of JSON each: the spec and the score of every run, scaled so that 0.1 is chance and 1 is perfect whatever the number of
classes (a regression's score is the share of the variance explained). `build(spec)` returns the untrained module and 64 inputs.
`benchmarks/trainability.py --others FILE` asks the shipped coefficients about them; nothing is fitted to them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from other_layers import Attention, Dense, Gated, Highway, Mean, Norm, Recurrent, Residual, Transposed
from torch import Tensor, nn
from training import score_after

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "elu": nn.ELU, "softplus": nn.Softplus, "mish": nn.Mish,
    "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "hardswish": nn.Hardswish, "relu6": nn.ReLU6, "softsign": nn.Softsign,
}  # fmt: skip
RUNS = (("sgd", 0.003), ("sgd", 0.03), ("sgd", 0.3), ("adam", 3e-4), ("adam", 3e-3))


@dataclasses.dataclass(frozen=True)
class Other:
    """A network: its family, the task it is trained on, size, activation, initialization, fault and seed."""

    family: str
    task: str  # teacher:C | prototypes:C | sequence:C | regression
    depth: int
    width: int
    activation: str
    init: str  # as in weights_: default | he | xavier | orthogonal | normal:S | he*G
    fault: str = "none"
    seed: int = 0

    @property
    def name(self) -> str:
        """All fields in one word."""
        return "-".join(str(v) for v in dataclasses.astuple(self)).replace(":", "")


@functools.cache
def data(task: str) -> tuple[Tensor, Tensor]:
    """2048 examples: N(0, 1) vectors labelled by a random teacher, noisy images or sequences of a class, or a target number."""
    kind, _, number = task.partition(":")
    classes = int(number or 1)
    g = torch.Generator().manual_seed(classes)
    if kind in ("teacher", "regression"):
        x = torch.randn(2048, 20, generator=g)
        hidden = torch.tanh(x @ torch.randn(20, 8, generator=g) / 4)
        out = hidden @ torch.randn(8, classes, generator=g)
        return (x, (out - out.mean()) / out.std()) if kind == "regression" else (x, (out - out.mean(0)).argmax(1))
    y = torch.randint(classes, (2048,), generator=g)
    shape = (3, 10, 10) if kind == "prototypes" else (12, 6)
    centres = torch.randn(classes, *shape, generator=g)
    return centres[y] + 1.5 * torch.randn(2048, *shape, generator=g), y


def architecture(spec: Other) -> nn.Module:
    """The module of `spec` with the framework's default weights."""
    act, w, d = ACTIVATIONS[spec.activation], spec.width, spec.depth
    kind, _, number = spec.task.partition(":")
    out = int(number or 1)
    flat = {"teacher": 20, "regression": 20, "prototypes": 300, "sequence": 72}[kind]
    channels = 3 if kind == "prototypes" else 6
    head = nn.Linear(w, out)

    def repeat(make: Callable[[], list[nn.Module]]) -> list[nn.Module]:
        return [m for _ in range(d) for m in make()]

    if spec.family == "plain":
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, w), act(), *repeat(lambda: [nn.Linear(w, w), act()]), head)
    if spec.family == "mlp_ln":
        body = repeat(lambda: [nn.Linear(w, w), nn.LayerNorm(w), act()])
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, w), act(), *body, head)
    if spec.family == "bottleneck":
        body = repeat(lambda: [nn.Linear(w, 4), act(), nn.Linear(4, w), act()])
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, w), act(), *body, head)
    if spec.family == "resmlp":
        body = repeat(lambda: [Residual(nn.Sequential(nn.Linear(w, w), act(), nn.Linear(w, w)))])
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, w), *body, head)
    if spec.family == "dense":
        body = Dense(flat, w, d, act)
        return nn.Sequential(nn.Flatten(), body, nn.Linear(body.out, out))
    if spec.family == "highway":
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, w), *repeat(lambda: [Highway(w, act)]), head)
    if spec.family == "conv1d":
        body = repeat(lambda: [nn.Conv1d(w, w, 3, padding=1), act()])
        return nn.Sequential(Transposed(nn.Sequential(nn.Conv1d(channels, w, 3, padding=1), act(), *body)), Mean(), head)
    if spec.family == "conv_gn":
        body = repeat(lambda: [nn.Conv2d(w, w, 3, padding=1), nn.GroupNorm(4, w), act()])
        return nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * w, out))
    if spec.family == "separable":
        body = repeat(
            lambda: [nn.Conv2d(w, w, 3, padding=1, groups=w, bias=False), nn.Conv2d(w, w, 1), nn.BatchNorm2d(w), act()]
        )
        return nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * w, out))
    if spec.family == "vgg":
        body = repeat(lambda: [nn.Conv2d(w, w, 3, padding=1), act()])
        return nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), act(), *body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * w, out))
    if spec.family in ("gru", "rnn"):
        cell = (nn.GRU if spec.family == "gru" else nn.RNN)(6, w, num_layers=d, batch_first=True)
        return nn.Sequential(Recurrent(cell), head)
    if spec.family == "mixer":
        blocks = repeat(
            lambda: [
                Residual(Transposed(nn.Sequential(nn.Linear(12, 24), act(), nn.Linear(24, 12))), nn.LayerNorm(w)),
                Residual(nn.Sequential(nn.Linear(w, 2 * w), act(), nn.Linear(2 * w, w)), nn.LayerNorm(w)),
            ]
        )
        return nn.Sequential(nn.Linear(6, w), *blocks, nn.LayerNorm(w), Mean(), head)
    if spec.family == "post_norm":
        blocks = repeat(
            lambda: [
                Residual(Attention(w), behind=nn.LayerNorm(w)),
                Residual(nn.Sequential(nn.Linear(w, 2 * w), act(), nn.Linear(2 * w, w)), behind=nn.LayerNorm(w)),
            ]
        )
        return nn.Sequential(nn.Linear(6, w), *blocks, Mean(), head)
    if spec.family == "llama":
        blocks = repeat(lambda: [Residual(Attention(w), Norm(w)), Residual(Gated(w, act), Norm(w))])
        return nn.Sequential(nn.Linear(6, w), *blocks, Norm(w), Mean(), head)
    raise ValueError(f"unknown family {spec.family!r}")


def weights_(model: nn.Module, init: str) -> None:
    """Draws every matrix and kernel by the scheme; biases stay as they are."""
    scheme, _, scale = init.replace("*", ":").partition(":")
    for p in (p for p in model.parameters() if p.dim() > 1):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(p)
        if scheme == "he":
            p.normal_(0, math.sqrt(2 / fan_in) * float(scale or 1))
        elif scheme == "xavier":
            p.normal_(0, math.sqrt(2 / (fan_in + fan_out)))
        elif scheme == "lecun":
            p.normal_(0, math.sqrt(1 / fan_in))
        elif scheme == "normal":
            p.normal_(0, float(scale))
        elif scheme == "orthogonal":
            nn.init.orthogonal_(p)
        elif scheme == "positive":
            p.uniform_(0, 2 / fan_in)
        elif scheme != "default":
            raise ValueError(f"unknown initialization {init!r}")


def fault_(model: nn.Module, fault: str) -> None:
    """Breaks what has just been drawn."""
    ws = [p for p in model.parameters() if p.dim() > 1]
    for name in fault.split("+"):
        if name == "equal_rows":
            for p in ws[:-1]:
                p.copy_(p[:1].expand_as(p))
        elif name == "zero_mid":
            ws[len(ws) // 2].zero_()
        elif name == "two_zeros":
            ws[len(ws) // 2].zero_()
            ws[len(ws) // 2 + 1].zero_()
        elif name == "zero_head":
            ws[-1].zero_()
        elif name == "big_head":
            ws[-1].mul_(100)
        elif name == "small_head":
            ws[-1].mul_(1e-3)
        elif name == "big_first":
            ws[0].mul_(100)
        elif name == "tiny_first":
            ws[0].mul_(1e-3)
        elif name == "negative_bias":
            for n, p in model.named_parameters():
                if n.endswith("bias") and p.dim() == 1 and p.numel() > 20:
                    p.fill_(-5.0)
        elif name == "large_bias":
            for n, p in model.named_parameters():
                if n.endswith("bias") and p.dim() == 1:
                    p.normal_(0, 3.0)
        elif name == "sparse":
            for p in ws:
                p.mul_((torch.rand_like(p) < 0.1).float())
        elif name == "rank_one":
            for p in ws[1:-1]:
                flat = p.flatten(1)
                flat.copy_(torch.outer(flat[:, 0], flat[0]) / flat[0].abs().mean())
        elif name != "none":
            raise ValueError(f"unknown fault {fault!r}")


def build(spec: Other) -> tuple[nn.Module, Tensor]:
    """The untrained module of `spec`, in training mode, and 64 inputs for it."""
    torch.manual_seed(spec.seed)
    model = architecture(spec)
    with torch.no_grad():
        weights_(model, spec.init)
        fault_(model, spec.fault)
    return model, data(spec.task)[0][:64]


def train(spec: Other, optimizer: str, lr: float, steps: int) -> float:
    """The score after `steps` steps of batch 128 on the training data: 0.1 for chance and where the loss is not finite."""
    x, y = data(spec.task)
    model, _ = build(spec)
    return score_after(model, x, y, optimizer=optimizer, rate=lr, steps=steps, batch=128, seed=spec.seed)


# Tasks and widths of plain stacks; their activations, depths and initializations.
PLAIN = (("teacher:4", 40), ("regression", 64), ("prototypes:20", 128))
STACKS = (
    *(("silu", 3, "he"), ("silu", 14, "default"), ("elu", 8, "lecun"), ("softplus", 6, "xavier"), ("mish", 20, "he")),
    *(("hardswish", 10, "normal:0.02"), ("relu6", 5, "he*3"), ("softsign", 12, "orthogonal"), ("tanh", 8, "he*3")),
    *(("relu", 8, "positive"), ("relu", 12, "orthogonal"), ("gelu", 30, "xavier"), ("sigmoid", 3, "default")),
    ("sigmoid", 7, "xavier"),
)
FAULTS = (
    *("equal_rows", "zero_mid", "two_zeros", "zero_head", "big_head", "small_head", "big_first", "tiny_first"),
    *("negative_bias", "large_bias", "sparse", "rank_one"),
)
BROKEN = (
    ("plain", "teacher:2", 4, 48, "relu", "he"),
    ("mlp_ln", "prototypes:5", 5, 48, "gelu", "default"),
    ("vgg", "prototypes:10", 4, 24, "relu", "he"),
    ("conv_gn", "prototypes:10", 4, 24, "silu", "he"),
    ("llama", "sequence:8", 3, 32, "silu", "xavier"),
    ("gru", "sequence:4", 1, 40, "tanh", "default"),
)
FAMILIES = (
    ("mlp_ln", "teacher:4", 48, "tanh"),
    ("resmlp", "teacher:4", 48, "relu"),
    ("dense", "regression", 24, "silu"),
    ("highway", "prototypes:5", 48, "tanh"),
    ("conv1d", "sequence:8", 24, "relu"),
    ("conv_gn", "prototypes:20", 24, "relu"),
    ("separable", "prototypes:10", 24, "hardswish"),
    ("vgg", "prototypes:5", 24, "elu"),
    ("mixer", "sequence:8", 32, "gelu"),
    ("post_norm", "sequence:8", 32, "relu"),
    ("llama", "sequence:4", 32, "silu"),
    ("bottleneck", "teacher:2", 48, "elu"),
)


def specs() -> list[Other]:
    """Healthy and sick ones of every family."""
    found = [Other("plain", task, depth, width, act, init) for task, width in PLAIN for act, depth, init in STACKS]
    found += [Other(*base, fault) for base in BROKEN for fault in FAULTS]
    for family, task, width, act in FAMILIES:
        for depth in (2, 9):
            for init in ("default", "he", "normal:0.01", "normal:1", "he*4"):
                found.append(Other(family, task, depth, width, act, init))
    for family in ("gru", "rnn"):
        for depth in (1, 4):
            for init in ("default", "orthogonal", "normal:0.01", "normal:1", "xavier"):
                found.append(Other(family, "sequence:8", depth, 40, "tanh", init))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {json.loads(line)["name"] for line in options.out.read_text().splitlines()} if options.out.exists() else set()
    start = time.time()
    with options.out.open("a") as sink:
        for i, spec in enumerate(specs()):
            if spec.name in done:
                continue
            runs = {f"{o}@{lr:g}": round(train(spec, o, lr, options.steps), 4) for o, lr in RUNS}
            best = {o: max(v for k, v in runs.items() if k.startswith(o)) for o in ("sgd", "adam")}
            sink.write(json.dumps({"name": spec.name, **dataclasses.asdict(spec), "runs": runs, **best}) + "\n")
            sink.flush()
            print(f"\r{i + 1}/{len(specs())} {time.time() - start:.0f}s {spec.name:60}", end="", file=sys.stderr)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
