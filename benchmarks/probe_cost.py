"""What the probe costs, in units of one plain forward and backward pass of the same batch.

    python benchmarks/probe_cost.py [--repeat 3] [--device cpu] [--model resnet-50]

Prints for a ResNet-50-like network on 8 images of 224 x 224 and a 12-layer transformer on 8 sequences of 96: the recording of
every edge (one forward, one backward), and the whole probe with its Gram matrix, units, measures and virtual steps. Medians of
alternated runs, one thread. Peak memory beyond model, graph and batch is compared as well: of the allocator on CUDA, else of
the process, each kind of run in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from initaudit.graph.constness import constant_nodes
from initaudit.graph.from_torch import from_module
from initaudit.probe.backward import backward
from initaudit.probe.observe import SignalObserver
from initaudit.probe.passes import Pass, batch_of, cotangents
from initaudit.probe.run import probe


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = inside == out and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    """ResNet-50's stages (3, 4, 6, 3 bottlenecks of 64 to 512)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inside, 64 << stage, 2 if block == 0 and stage > 0 else 1))
            inside = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


def transformer() -> nn.Module:
    """Twelve pre-norm layers of width 512."""
    layers = [nn.TransformerEncoderLayer(512, 8, 2048, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(12)]
    return nn.Sequential(nn.Linear(64, 512), *layers, nn.LayerNorm(512), nn.Linear(512, 1000))


MODELS = {"resnet-50": (resnet, (8, 3, 224, 224)), "transformer-12": (transformer, (8, 96, 64))}


def runs(name: str, device: str) -> dict[str, Callable[[], object]]:
    """The three kinds of run of one model."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    module, x = build(), torch.randn(shape)
    graph = from_module(module, (x,))
    module, x = module.to(device), x.to(device)
    with torch.no_grad():
        drawn = cotangents([module(x)], batch_of([x]), torch.Generator().manual_seed(0))

    def plain() -> None:
        module.zero_grad()
        (module(x) * drawn[0]).sum().backward()

    def record() -> None:
        constant = constant_nodes(graph.fx)
        observer = SignalObserver(graph.fx, constant)
        run = Pass(graph, constant, device=x.device, observers=(observer,))
        run.run(x)
        backward(run, run.ends(), drawn, keep=False)
        observer.close()

    return {"plain": plain, "record": record, "probe": lambda: probe(graph, (x,), device=x.device), "none": lambda: None}


def peak_resident() -> int:
    """The most memory that this process has held, in KiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage also counts what the parent held when it forked.
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident(name: str, label: str) -> int:
    """The peak resident memory, in KiB, of a process that does one run of that kind."""
    command = [sys.executable, __file__, "--model", name, "--peak", label]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        runs(arguments.model, "cpu")[arguments.peak]()
        print(peak_resident())
        return
    cuda = arguments.device == "cuda"
    # With one thread, the time of the process is not disturbed by what else the machine does.
    clock = time.perf_counter if cuda else time.process_time
    for name in [arguments.model] if arguments.model else MODELS:
        calls = runs(name, arguments.device)
        taken: dict[str, list[float]] = {"plain": [], "record": [], "probe": []}
        peak: dict[str, float] = {}
        for _ in range(arguments.repeat + 1):
            for label, times in taken.items():
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                start = clock()
                calls[label]()
                if cuda:
                    torch.cuda.synchronize()
                    peak[label] = torch.cuda.max_memory_allocated()
                times.append(clock() - start)
        del calls
        median = {label: statistics.median(times[1:]) for label, times in taken.items()}
        ratios = "  ".join(f"{label} {median[label] / median['plain']:.2f}x" for label in ("record", "probe"))
        print(f"{name:16} plain {median['plain']:.2f} s  {ratios}", flush=True)
        if not cuda:
            base = resident(name, "none")
            peak = {label: resident(name, label) - base for label in taken}
        memory = "  ".join(f"{label} {peak[label] / peak['plain']:.2f}x" for label in ("record", "probe"))
        print(f"{name:16} peak memory  {memory}", flush=True)


if __name__ == "__main__":
    main()
