"""The parts of `speed.py` that call the package: the pass, its variants and threads, growth, and the stages of whole audits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from speed_tools import Runs, medians, replaced, write

if TYPE_CHECKING:
    import torch

    from initaudit.load.stretches import Stretch


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
    from initaudit.load import load
    from initaudit.load.stretches import stretches
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
    sizes = {name: a.nbytes for name, a in arrays.items()}
    for dtype, width in (("BF16", 2), ("F32", 4)):
        path = folder / f"tiny{dtype}.safetensors"
        write(path, (16, 16), 10_000, dtype)
        near = [(stretch, np.array(stretch.read())) for stretch in stretches(load(path).arrays)]
        for records, name in ((False, f"10,000 of 16x16, {dtype}"), (True, f"{dtype}, and records of each")):
            # As many bytes as the matrix has: a pass over a sixth of them would be a measurement of what the one before left.
            times = 1 if records else max(1, arrays["bfloat16"].nbytes // (10_000 * 256 * width))
            runs[name], sizes[name] = partial(measured_together, near, records, times), times * 10_000 * 256 * width
    found = medians(runs, 3 if quick else 7)
    main = sizes["bfloat16"] / found["bfloat16"]
    for name, seconds in found.items():
        print(f"variants  {name:28}{sizes[name] / seconds / main:8.2f} of the bytes a second of bfloat16")


def measured_together(near: list[tuple[Stretch, np.ndarray]], records: bool, times: int) -> None:
    """Many small tensors as an audit measures them: in columns, or with the records that it then makes of each."""
    from initaudit.load.checkpoint import numpy_dtype
    from initaudit.measure.together import measure_together

    for stretch, data in near * times:
        found = measure_together(data, numpy_dtype(stretch.dtype), stretch.places)
        if records:
            [(found.moments(i), found.unit_sums(i)) for i in range(len(stretch.names))]


def threads(folder: Path, quick: bool) -> None:
    """The pass over the tensors, and a whole static audit, by two threads against one."""
    from initaudit import audit
    from initaudit.auditing.tensors import side_by_side
    from initaudit.load import load
    from initaudit.measure.units import measure_units

    path = folder / "threads.safetensors"
    # As many as checkpoints have: of eight, one that is held up leaves the other thread without work for a tenth of the time.
    write(path, (1024, 4096), 16 if quick else 64, "BF16")
    arrays = list(load(path).arrays.values())

    def passes(jobs: int) -> None:
        for _ in side_by_side(lambda array: measure_units(array.read()), arrays, jobs):
            pass

    held = np.random.default_rng(0).normal(0, 0.02, (1024, 4096)).astype(ml_dtypes.bfloat16)

    def loops(jobs: int) -> None:
        """What the two cores can do: the same over one piece that stays in memory, again and again."""
        for _ in side_by_side(lambda _: measure_units(held), range(len(arrays)), jobs):
            pass

    shared = (
        ("one piece, again", loops),
        ("the pass", passes),
        ("audit, --jobs", lambda jobs: audit(path, config={"jobs": jobs})),
    )
    for name, run in shared:
        found = medians({"1": partial(run, 1), "2": partial(run, 2)}, 3 if quick else 25)
        print(f"threads   {name:16} 2 on {os.cpu_count()} cores{'':13}{found['1'] / found['2']:8.2f} x")


def tensors(folder: Path, quick: bool) -> None:
    """How the time of a static audit grows with the number of small tensors."""
    from initaudit import audit

    counts = [10, 100, 300, 1000] if quick else [10, 100, 1000, 10_000, 100_000]
    seconds = []
    for n in counts:
        path = folder / f"n{n}.safetensors"
        write(path, (16, 16), n, "F32")
        seconds.append(processor(partial(audit, path)))
    print_growth("tensors of 16x16", counts, seconds, counts)


def width(folder: Path, quick: bool) -> None:
    """The same with the width of eight matrices; the work is their bytes."""
    from initaudit import audit

    sides = [64, 256, 1024] if quick else [64, 256, 1024, 2048, 4096, 8192]
    seconds = []
    for n in sides:
        path = folder / f"wide{n}.safetensors"
        write(path, (n, n), 8, "BF16")
        seconds.append(processor(partial(audit, path)))
        path.unlink()
    print_growth("width (bytes)", sides, seconds, [n * n for n in sides])


def layers(folder: Path, quick: bool) -> None:
    """The same with the depth of a transformer that is traced and probed."""
    import torch

    import initaudit

    torch.set_num_threads(1)
    depths = [1, 2, 4] if quick else [2, 6, 12, 24, 48, 96]
    seconds = []
    for depth in depths:
        layer = torch.nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, norm_first=True)
        model = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        seconds.append(processor(partial(initaudit.audit, model, torch.randn(4, 8, 32))))
    print_growth("layers, 32 wide", depths, seconds, depths)


def processor(run: Callable[[], object]) -> float:
    """Seconds of this process's processor time: the lesser of two runs, or the first where that takes many."""
    found: list[float] = []
    while len(found) < 2 and sum(found) < 20:
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def print_growth(name: str, sizes: list[int], seconds: list[float], work: list[int]) -> None:
    """Prints the seconds as ratios to the first, and the exponent over the larger half."""
    half = len(sizes) // 2
    slope = np.polyfit(np.log(work[half:]), np.log(seconds[half:]), 1)[0]
    ratios = "  ".join(f"{n}: {s / seconds[0]:.1f}" for n, s in zip(sizes, seconds, strict=True))
    print(f"growth    {name:18}exponent {slope:5.2f}   {ratios}")


def whole(folder: Path, quick: bool) -> None:
    """Seconds by stage of whole audits, as shares of one forward and backward pass over the probe's batch."""
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    ids, images = torch.randint(0, 1000, (8, 64)), torch.randn(8, 3, 224, 224)
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    bert = hf.BertConfig(**small) if quick else hf.BertConfig()
    models: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {"BERT-base": lambda: (hf.BertModel(bert), ids)}
    if not quick:
        models |= {
            "GPT-2 small": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False)), ids),
            "ResNet-50": lambda: (hf.ResNetForImageClassification(hf.ResNetConfig()), images),
            "ViT-B": lambda: (hf.ViTForImageClassification(hf.ViTConfig()), images),
        }
    for name, build in models.items():
        model, given = build()
        model.train()

        def plain(model: torch.nn.Module = model, given: torch.Tensor = given) -> None:
            output = next(v for v in model(given).values() if isinstance(v, torch.Tensor))
            output.float().square().mean().backward()

        stages(name, plain, model, given, 1 if quick else 3)
        if not quick:
            path = folder / f"{name}.onnx"
            torch.onnx.export(model.eval(), (given,), path, dynamo=True, optimize=False, verbose=False, external_data=True)
            model.train()
            stages(f"{name}, ONNX", plain, path, given, 3)


def stages(name: str, plain: Callable[[], object], model: object, given: torch.Tensor, rounds: int) -> None:
    """Prints what an audit of `model` takes in passes of `plain`, and each of its stages, in seconds of the processor."""
    from initaudit.auditing import program, run
    from initaudit.rules import roots

    seconds: dict[str, float] = {}
    parts: list[tuple[object, str]] = [(run, "measure_all"), (program, "open_program"), (program, "pair")]
    parts += [(program, "probed"), (program, "layer_evidence"), (program, "with_recognition"), (program, "in_company")]
    parts += [(roots, "findings_of"), (run, "model_report")]

    def audit() -> None:
        with replaced(parts, lambda function, part: timed(function, part, seconds)):
            run.audit(model, given)

    audit()  # what is imported and compiled once is no stage
    seconds.clear()
    found = medians({"pass": plain, "audit": audit}, rounds, time.process_time)
    shares = "  ".join(f"{part} {s / rounds / found['pass']:.2f}" for part, s in seconds.items())
    print(f"whole     {name:18}{found['audit'] / found['pass']:6.2f} passes: {shares}", flush=True)


def timed(function: Callable[..., object], name: str, seconds: dict[str, float]) -> Callable[..., object]:
    """`function`, adding what it takes of the processor to `seconds`."""

    def inner(*args: object, **kwargs: object) -> object:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    return inner
