"""What audits cost, as ratios to what one would do instead, within one run: medians of runs that take turns.

    python benchmarks/speed.py --quick                  # under a minute on two idle cores
    python benchmarks/speed.py                          # everything; the disk part writes 10 GB and deletes them
    python benchmarks/speed.py pass startup             # some parts

Parts: pass, variants, threads, startup, memory, disk, growth, whole, peers. One thread an operation throughout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from speed_peers import commands

# Read when numpy and torch are imported, so that they have to be there before.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Runs = Mapping[str, Callable[[], object]]


def medians(runs: Runs, rounds: int) -> dict[str, float]:
    """Seconds of each, the median of `rounds` in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def write(path: Path, shape: tuple[int, ...], count: int, dtype: str, seed: int = 0) -> int:
    """A safetensors file of `count` matrices of normal values, each drawn anew; returns its bytes.

    Files of other seeds hold tensors of other names.
    """
    generator = np.random.default_rng(seed)
    size = math.prod(shape) * (2 if dtype == "BF16" else 4)
    header: dict[str, object] = {}
    for i in range(count):
        offsets = [i * size, (i + 1) * size]
        layer = seed * count // 4 + i // 4
        header[f"layers.{layer}.m{i % 4}.weight"] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            values = np.float32(0.02) * generator.standard_normal(shape, np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values)
    return path.stat().st_size


def one_pass(folder: Path, quick: bool) -> None:
    """All statistics of a pass against safe_open and torch.std_mean, the file in the page cache."""
    import torch
    from safetensors import safe_open

    from initaudit.load import load
    from initaudit.measure.moments import measure
    from initaudit.measure.units import measure_units

    torch.set_num_threads(1)
    for dtype in ("BF16", "F32"):
        path = folder / f"{dtype}.safetensors"
        size = write(path, (2048 if quick else 4096, 4096), 4, dtype)
        arrays = load(path).arrays

        def by_hand(path: Path = path) -> None:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    torch.std_mean(file.get_tensor(name).float())

        runs: Runs = {
            "safe_open and std_mean": by_hand,
            "moments, units, keys": lambda arrays=arrays: [measure_units(a.read()) for a in arrays.values()],
            "moments alone": lambda arrays=arrays: [measure(a.read()) for a in arrays.values()],
        }
        found = medians(runs, 3 if quick else 9)
        for name, seconds in found.items():
            print(f"pass      {dtype:5}{name:28}{size / seconds / 1e9:7.2f} GB/s{found[next(iter(runs))] / seconds:8.2f} x")


def variants(folder: Path, quick: bool) -> None:
    """Bytes a second of other types, shapes and values, as shares of those of a bfloat16 matrix."""
    import torch

    from initaudit.measure.moments import measure
    from initaudit.measure.units import as_matrix, measure_units

    rng, side = np.random.default_rng(0), 1024 if quick else 4096
    plain = rng.normal(0, 0.02, (side, 4096)).astype(np.float32)
    nan = plain.astype(ml_dtypes.bfloat16)
    nan[:] = np.nan
    arrays = {
        "bfloat16": plain.astype(ml_dtypes.bfloat16),
        "float32": plain,
        "float16": plain.astype(np.float16),
        "float8_e4m3fn": (plain * 20).astype(ml_dtypes.float8_e4m3fn),
        "int8": (plain * 1000).astype(np.int8),
        "one axis": plain.astype(ml_dtypes.bfloat16).reshape(-1),
        "norm-like, one axis": (1 + plain).reshape(-1),
        "kernels 3x3": plain.reshape(-1)[: side * 4032].reshape(-1, 448, 3, 3),
        "zeros": np.zeros((side, 4096), ml_dtypes.bfloat16),
        "NaN": nan,
    }
    runs: dict[str, Callable[[], object]] = {
        name: (lambda a=a: measure(a)) if a.ndim == 1 else (lambda a=a: measure_units(as_matrix(a)))
        for name, a in arrays.items()
    }
    tiny = [plain[:16, i % 4000 : i % 4000 + 16].copy() for i in range(10_000)]
    runs["ten thousand of 16x16"] = lambda: [measure_units(a) for a in tiny]
    found = medians(runs, 3 if quick else 7)
    sizes = {**{name: a.nbytes for name, a in arrays.items()}, "ten thousand of 16x16": 10_000 * 1024}
    main = sizes["bfloat16"] / found["bfloat16"]
    for name, seconds in found.items():
        print(f"variants  {name:28}{sizes[name] / seconds / main:8.2f} of the bytes a second of bfloat16")
    tensors = [torch.from_numpy(a) for a in tiny]
    each = medians({"": lambda: [torch.std_mean(t) for t in tensors]}, 3)[""]
    print(f"variants  {'ten thousand of 16x16':28}{each / found['ten thousand of 16x16']:8.2f} x torch.std_mean of each")


def threads(folder: Path, quick: bool) -> None:
    """The pass over the tensors, and a whole static audit, by two threads against one."""
    from initaudit import audit
    from initaudit.auditing.tensors import side_by_side
    from initaudit.load import load
    from initaudit.measure.units import measure_units

    path = folder / "threads.safetensors"
    write(path, (4096, 4096), 8, "BF16")
    arrays = list(load(path).arrays.values())

    def passes(jobs: int) -> None:
        for _ in side_by_side(lambda array: measure_units(array.read()), arrays, jobs):
            pass

    for name, run in (("the pass", passes), ("audit, --jobs", lambda jobs: audit(path, config={"jobs": jobs}))):
        found = medians({"1": partial(run, 1), "2": partial(run, 2)}, 3 if quick else 7)
        print(f"threads   {name:16} 2 on {os.cpu_count()} cores{'':13}{found['1'] / found['2']:8.2f} x")


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
    for runs, rounds in ((bare, 5 if quick else 15), (torch, 3 if quick else 7)):
        found = medians(runs, rounds)
        for name, seconds in found.items():
            print(f"startup   {name:33}{seconds / found[next(iter(runs))]:8.2f} of {next(iter(runs))}")


def memory(folder: Path, quick: bool) -> None:
    """The most that a static audit of one large tensor holds."""
    path = folder / "large.safetensors"
    rows = 40_960 if quick else 393_216
    size = write(path, (4096, 4096), 1, "BF16")
    with path.open("rb") as file:
        header = 8 + struct.unpack("<Q", file.read(8))[0]
        file.seek(header)
        part = file.read()
    entry = {"dtype": "BF16", "shape": [rows * 2, 4096], "data_offsets": [0, rows * 8192 * 2]}
    text = json.dumps({"lm_head.weight": entry}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(rows * 2 // 4096):
            file.write(part)
    size = path.stat().st_size
    code = "import re, sys, initaudit; initaudit.audit(sys.argv[1]); print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=600)
    peak = re.search(r"VmHWM:\s+(\d+)", done.stdout)
    print(f"memory    one tensor of {size / 1e9:.1f} GB: peak of {int(peak[1]) / 1000 if peak else math.nan:.0f} MB resident")
    path.unlink()


def disk(folder: Path, quick: bool) -> None:
    """A folder of shards against `cat` of its files: from the page cache, and where that may be emptied from the disk."""
    shards = folder / "shards"
    shards.mkdir()
    size = sum(
        write(shards / f"model-{i + 1:05}-of-{n:05}.safetensors", (4096, 4096), 8, "BF16", seed=i)
        for n in ([2] if quick else [37])
        for i in range(n)
    )
    files = [str(p) for p in sorted(shards.iterdir())]

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

    ours = command("-m", "initaudit", "--no-cache", str(shards), "--jobs", "2")
    cat()
    if (status := ours().returncode) > 1:
        raise SystemExit(f"the folder cannot be audited: {status}")
    found = medians({"cat": cat, "audit": ours}, 3 if quick else 2)
    print(f"disk      {size / 1e9:.1f} GB, warm, --jobs 2{'':11}{found['audit'] / found['cat']:8.2f} of cat")
    if quick or not empty():
        return
    times = {}
    for name, run in (("cat", cat), ("audit", ours)):
        empty()
        times[name] = medians({name: run}, 1)[name]
    print(f"disk      {size / 1e9:.1f} GB, cold, --jobs 2{'':11}{times['audit'] / times['cat']:8.2f} of cat")


def growth(folder: Path, quick: bool) -> None:
    """How seconds grow with tensors, layers and width: the exponent of a fit over the larger half of the sizes."""
    import torch

    import initaudit

    torch.set_num_threads(1)

    def tensors(n: int) -> Callable[[], object]:
        path = folder / f"n{n}.safetensors"
        write(path, (16, 16), n, "F32")
        return lambda: initaudit.audit(path)

    def layers(depth: int, width: int) -> Callable[[], object]:
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        model = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        return lambda: initaudit.audit(model, torch.randn(4, 8, width))

    def wide(n: int) -> Callable[[], object]:
        path = folder / f"wide{n}.safetensors"
        write(path, (n, n), 8, "BF16")
        return lambda: initaudit.audit(path)

    counts = [10, 100, 300, 1000] if quick else [10, 100, 1000, 10_000, 100_000]
    depths = [2, 4, 8] if quick else [2, 6, 12, 24, 48, 96]
    widths = [64, 256, 1024] if quick else [64, 256, 1024, 2048, 4096, 8192]
    print_growth("tensors", counts, [best(tensors(n)) for n in counts], counts)
    print_growth("layers, 32 wide", depths, [best(layers(d, 32)) for d in depths], depths)
    print_growth("width (bytes)", widths, [best(wide(n)) for n in widths], [n * n for n in widths])


def best(run: Callable[[], object]) -> float:
    """The shorter of two runs."""
    return min(medians({"": run}, 1)[""] for _ in range(2))


def print_growth(name: str, sizes: list[int], seconds: list[float], work: list[int]) -> None:
    """Prints the seconds as ratios to the first, and the exponent over the larger half."""
    half = len(sizes) // 2
    slope = np.polyfit(np.log(work[half:]), np.log(seconds[half:]), 1)[0]
    ratios = "  ".join(f"{n}: {s / seconds[0]:.1f}" for n, s in zip(sizes, seconds, strict=True))
    print(f"growth    {name:18}exponent {slope:5.2f}   {ratios}")


def peers(folder: Path, quick: bool) -> None:
    """Whole commands of other tools on the same checkpoint, where INITAUDIT_PEERS names an interpreter that has them."""
    path = folder / "peers.safetensors"
    size = write(path, (1024, 1024) if quick else (2048, 2048), 8, "F32")
    here = str(path)
    runs = {"initaudit": command("-m", "initaudit", "--no-cache", here)}
    for name, arguments in commands(here).items():
        run = partial(subprocess.run, arguments, capture_output=True, check=False, timeout=600, text=True)
        first = run()
        if first.returncode:
            print(f"peers     {name:40}cannot be run: {(first.stderr.strip().splitlines() or ['?'])[-1][:100]}")
        else:
            runs[name] = run
    found = medians(runs, 3)
    for name, seconds in found.items():
        print(f"peers     {name:40}{seconds / found['initaudit']:8.1f} times initaudit's time for {size / 1e6:.0f} MB")


def whole(folder: Path, quick: bool) -> None:
    """Seconds by stage of whole audits, as shares of one forward and backward pass over the probe's batch."""
    import torch
    import transformers as hf

    from initaudit.auditing import program, run
    from initaudit.rules import roots

    torch.set_num_threads(1)
    ids = torch.randint(0, 1000, (8, 64))
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    bert = hf.BertConfig(**small) if quick else hf.BertConfig()
    models: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {"BERT-base": lambda: (hf.BertModel(bert), ids)}
    if not quick:
        models |= {
            "GPT-2 small": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config()), ids),
            "ResNet-50": lambda: (hf.ResNetForImageClassification(hf.ResNetConfig()), torch.randn(8, 3, 224, 224)),
            "ViT-B": lambda: (hf.ViTForImageClassification(hf.ViTConfig()), torch.randn(8, 3, 224, 224)),
        }
    parts = [(run, "measure_all"), (program, "open_program"), (program, "pair"), (program, "probed")]
    parts += [(program, "layer_evidence"), (program, "with_recognition"), (program, "in_company")]
    parts += [(roots, "findings_of"), (run, "model_report")]
    for name, build in models.items():
        model, given = build()
        model.train()
        seconds: dict[str, float] = {}

        def plain(model: torch.nn.Module = model, given: torch.Tensor = given) -> None:
            output = next(v for v in model(given).values() if isinstance(v, torch.Tensor))
            output.float().square().mean().backward()

        def stages(model: torch.nn.Module = model, given: torch.Tensor = given, seconds: dict[str, float] = seconds) -> None:
            undo = [(module, part, getattr(module, part)) for module, part in parts]
            for module, part, function in undo:
                setattr(module, part, timed(function, part, seconds))
            try:
                run.audit(model, given)
            finally:
                for module, part, function in undo:
                    setattr(module, part, function)

        stages()  # what is imported and compiled once is no stage
        seconds.clear()
        found = medians({"pass": plain, "audit": stages}, 1 if quick else 3)
        rounds = 1 if quick else 3
        shares = "  ".join(f"{part} {s / rounds / found['pass']:.2f}" for part, s in seconds.items())
        print(f"whole     {name:12}{found['audit'] / found['pass']:6.2f} passes: {shares}")


def timed(function: Callable[..., object], name: str, seconds: dict[str, float]) -> Callable[..., object]:
    """`function`, adding what it takes to `seconds`."""

    def inner(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    return inner


PARTS: dict[str, Callable[[Path, bool], None]] = {
    "pass": one_pass,
    "variants": variants,
    "threads": threads,
    "startup": startup,
    "memory": memory,
    "disk": disk,
    "growth": growth,
    "whole": whole,
    "peers": peers,
}


def main() -> None:
    """Runs the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where files are written; default: a temporary folder")
    chosen = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in THREADS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **THREADS})
    for part in chosen.parts or PARTS:
        folder = Path(tempfile.mkdtemp(dir=chosen.folder))
        try:
            PARTS[part](folder, chosen.quick)
        finally:
            shutil.rmtree(folder)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
