"""The parts of `speed.py` that run whole commands: start-up, memory, folders against `cat`, several files, other tools."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from speed_peers import commands
from speed_tools import Runs, medians, write


def command(*arguments: str) -> Callable[[], subprocess.CompletedProcess[bytes]]:
    """A run of this interpreter, after one by which the code is compiled, as it is for whoever has installed it."""
    compiling = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = partial(subprocess.run, [sys.executable, *arguments], capture_output=True, check=False, timeout=600, env=compiling)
    run()
    return run


def startup(folder: Path, quick: bool) -> None:
    """Short commands against an interpreter that does nothing, and against importing torch."""
    import onnx
    from onnx import helper, numpy_helper

    small = folder / "small.safetensors"
    write(small, (512, 512), 1, "F32")
    weights = [np.random.default_rng(i).normal(0, 0.2, (32, 32)).astype(np.float32) for i in range(2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [8, 32]) for n in "xy"]
    given = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "small", ends[:1], ends[1:], given)), folder / "small.onnx")
    bare: Runs = {
        "bare Python": command("-c", "pass"),
        "--version": command("-m", "initaudit", "--version"),
        "--help": command("-m", "initaudit", "--help"),
        "audit of 1 MB of safetensors": command("-m", "initaudit", "--no-cache", str(small)),
    }
    torch: Runs = {
        "import torch": command("-c", "import torch"),
        "audit of small.onnx, probed": command("-m", "initaudit", "--no-cache", str(folder / "small.onnx")),
    }
    for runs, rounds in ((bare, 3 if quick else 15), (torch, 1 if quick else 7)):
        found = medians(runs, rounds)
        for name, seconds in found.items():
            print(f"startup   {name:33}{seconds / found[next(iter(runs))]:8.2f} of {next(iter(runs))}")


def memory(folder: Path, quick: bool) -> None:
    """The most that a static audit of one large tensor holds, and its bytes a second beside those of several matrices."""
    matrices, path = folder / "matrices.safetensors", folder / "large.safetensors"
    several = write(matrices, (4096, 4096), 4 if quick else 37, "BF16")
    size = write(path, (40_960 if quick else 786_432, 4096), 1, "BF16")
    code = (
        "import re, sys, time, initaudit.auditing.run\n"
        "initaudit.audit(sys.argv[1])\n"  # what is imported once says nothing of a rate
        "start = time.perf_counter(); initaudit.audit(sys.argv[2]); print(time.perf_counter() - start)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    small = folder / "small.safetensors"
    write(small, (512, 512), 1, "BF16")
    rates, peaks = [], []
    for source, total in ((matrices, several), (path, size)):
        run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=600)
        seconds, peak = run([sys.executable, "-c", code, str(small), str(source)]).stdout.split()
        rates.append(total / float(seconds))
        peaks.append(int(peak) / 1000)
    print(
        f"memory    one tensor of {size / 1e9:.1f} GB: peak of {peaks[1]:.0f} MB resident, {rates[1] / rates[0]:.2f} of the "
        "bytes a second of matrices of 4096x4096"
    )
    path.unlink()


# What is measured is a process of its own: the most that it has held since the module was built, less what it held before.
_PROBED = """
import re, sys, torch, initaudit
from torch import nn
torch.set_num_threads(1)

def held(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

class Gated(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layer, self.gate = nn.Linear(n, n), nn.Parameter(torch.zeros(()))
    def forward(self, x):
        return x + self.gate * torch.relu(self.layer(x))

class Tied(nn.Module):
    def __init__(self, n, count):
        super().__init__()
        self.table, self.body = nn.Embedding(n, n), plain(n, count - 1)
    def forward(self, x):
        return self.body(self.table(x)) @ self.table.weight.T

def plain(n, count):
    return nn.Sequential(*(m for _ in range(count) for m in (nn.Linear(n, n), nn.ReLU())))

def made(kind, n, count):
    torch.set_default_dtype(torch.bfloat16 if "16" in kind else torch.float32)  # no float32 module comes first
    if kind == "tied":
        return Tied(n, count), torch.randint(n, (8, 4))  # of float32
    module = nn.Sequential(*(Gated(n) for _ in range(count))) if "gated" in kind else plain(n, count)
    x = torch.randn(8, n)
    torch.set_default_dtype(torch.float32)
    return module, x

action, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
run = {"audit": initaudit.audit, "pass": lambda m, x: m(x).sum().backward()}[action]
run(*made(kind, 64, 2))  # what is imported is none of the module
before = held("VmRSS")
module, x = made(kind, 4096, count)
found = run(module, x)
assert action == "pass" or found.risk, "no probe was run"
print((held("VmHWM") - before) / sum(p.nbytes for p in module.parameters()))
"""


def probe(folder: Path, quick: bool) -> None:
    """The most that an audit with probe of a module of a gigabyte holds, in units of the module, beside what one pass holds."""
    count = 4 if quick else 16
    kinds = (
        ("plain", "of float32", count),
        ("tied", "with a tied table", count),
        ("gated", "with gates of zero", count),
        ("plain16", "of bfloat16", count * 7 // 4),
        ("gated16", "of bfloat16, with gates of zero", count * 7 // 4),
    )
    for kind, what, layers in kinds[:1] if quick else kinds:
        held = {}
        for action in ("pass", "audit"):
            command = [sys.executable, "-c", _PROBED, action, kind, str(layers)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            held[action] = float(done.stdout)
        size = layers * 4096**2 * (2 if "16" in kind else 4) / 1e9
        print(
            f"probe     {size:.1f} GB {what + ', audited and probed: peak of':52}{held['audit']:5.2f} of the module, itself "
            f"included (one forward and backward pass: {held['pass']:.2f})"
        )


def jobs(folder: Path, quick: bool) -> None:
    """Several files by two processes against one, and whether the reports are the same."""
    files = [folder / f"file{i}.safetensors" for i in range(2 if quick else 6)]
    for i, path in enumerate(files):
        write(path, (4096, 4096), 4 if quick else 24, "BF16", seed=i)
    runs = {n: command("-m", "initaudit", "--no-cache", *map(str, files), "--jobs", n) for n in "12"}
    same = runs["1"]().stdout == runs["2"]().stdout
    found = medians(runs, 1 if quick else 5)
    print(f"jobs      {len(files)} files, --jobs 2{'':14}{found['1'] / found['2']:8.2f} x, the same report: {same}")


def disk(folder: Path, quick: bool) -> None:
    """A folder of shards against `cat` of its files: from the page cache, and where that may be emptied from the disk."""
    shards = folder / "shards"
    shards.mkdir()
    count = 2 if quick else 37
    for i in range(count):
        write(shards / f"model-{i + 1:05}-of-{count:05}.safetensors", (4096, 4096), 8, "BF16", seed=i)
    against_cat(shards, quick)


def against_cat(shards: Path, quick: bool) -> None:
    """Prints how long an audit of a folder takes, as a share of what `cat` of its files takes."""
    files = [str(p) for p in sorted(shards.iterdir())]
    size = sum(os.path.getsize(path) for path in files)

    def cat() -> None:
        with open(os.devnull, "wb") as nowhere:
            subprocess.run(["cat", *files], stdout=nowhere, check=True)

    def empty() -> bool:
        try:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            return False
        return True

    ours = {n: command("-m", "initaudit", "--no-cache", str(shards), "--jobs", n) for n in "21"}
    cat()
    if (status := ours["2"]().returncode) > 1:
        raise SystemExit(f"the folder cannot be audited: {status}")
    found = medians({"cat": cat, **ours}, 1 if quick else 3)
    for n in ours:
        print(f"disk      {size / 1e9:.1f} GB, warm, --jobs {n}{'':11}{found[n] / found['cat']:8.2f} of cat")
    if quick or not empty():
        return
    times = {}
    for name, run in (("cat", cat), ("audit", ours["2"])):
        empty()
        times[name] = medians({name: run}, 1)[name]
    print(f"disk      {size / 1e9:.1f} GB, cold, --jobs 2{'':11}{times['audit'] / times['cat']:8.2f} of cat")


def peers(folder: Path, quick: bool) -> None:
    """Whole commands of other tools on the same checkpoint, where INITAUDIT_PEERS names an interpreter that has them."""
    path = folder / "peers.safetensors"
    size = write(path, (1024, 1024) if quick else (2048, 2048), 8, "F32")
    here = str(path)
    runs = {"initaudit": command("-m", "initaudit", "--no-cache", here)}
    for name, arguments in commands(here).items():
        run = partial(subprocess.run, arguments, capture_output=True, check=False, timeout=600, text=True)
        try:
            first = run()
        except FileNotFoundError:
            print(f"peers     {name:40}is not there: INITAUDIT_PEERS names no interpreter that has it")
            continue
        if first.returncode:
            print(f"peers     {name:40}cannot be run: {(first.stderr.strip().splitlines() or ['?'])[-1][:100]}")
        else:
            runs[name] = run
    found = medians(runs, 1 if quick else 3)
    for name, seconds in found.items():
        print(f"peers     {name:40}{seconds / found['initaudit']:8.1f} times initaudit's time for {size / 1e6:.0f} MB")
