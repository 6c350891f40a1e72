"""A folder of large shards: how long an audit of it takes, how much memory, and what it finds.

The folder is a decoder's: bf16 shards of safetensors with an index, weights N(0, 0.02) but for one that is constant, one that
holds a NaN, and a last tensor that the index does not name. It is made in a temporary place, audited by the command in a
process of its own, and removed.

    python benchmarks/large_folder.py [--gigabytes 10] [--folder PLACE] [--keep]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
LAYERS_OF_A_SHARD = 4


def layer(index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One decoder block of 404 MB."""

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()

    prefix = f"model.layers.{index}"
    shapes = {f"self_attn.{letter}_proj": (WIDTH, WIDTH) for letter in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    tensors = {f"{prefix}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    return tensors


def make(folder: Path, gigabytes: float) -> int:
    """Writes the folder and returns its bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    layers = max(2, round(gigabytes * 1e9 / 404.8e6))
    shards = -(-layers // LAYERS_OF_A_SHARD)
    where: dict[str, str] = {}
    for shard in range(shards):
        tensors: dict[str, torch.Tensor] = {}
        for index in range(shard * LAYERS_OF_A_SHARD, min(layers, (shard + 1) * LAYERS_OF_A_SHARD)):
            tensors |= layer(index, generator)
        if shard == 0:
            tensors["model.layers.0.self_attn.q_proj.weight"].fill_(0.02)
            tensors["model.layers.1.mlp.up_proj.weight"][7, 11] = float("nan")
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        where |= dict.fromkeys(tensors, name)
        if shard == shards - 1:
            del where[next(reversed(tensors))]
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(folder: Path) -> tuple[float, float, list[str]]:
    """(seconds, peak resident MB, findings) of `initaudit FOLDER`."""
    command = [sys.executable, "-m", "initaudit", str(folder), "--no-cache", "--format", "json"]
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    text = child.stdout.read()
    _, _, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    model = json.loads(text)["models"][0]
    found = [f"{finding['code']} {finding['tensor']}" for finding in model["findings"] if finding["severity"] != "info"]
    return seconds, usage.ru_maxrss / 1024, found


@click.command()
@click.option("--gigabytes", default=10.0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where it is made, or lies already; else a temporary place.")
@click.option("--keep", is_flag=True, help="Leave it there.")
def main(gigabytes: float, folder: Path | None, keep: bool) -> None:
    """Makes, measures, removes."""
    place = folder if folder is not None else Path(tempfile.mkdtemp()) / "model"
    try:
        size = sum(file.stat().st_size for file in place.iterdir()) if place.is_dir() else make(place, gigabytes)
        seconds, megabytes, found = measure(place)
        print(f"{size / 1e9:.1f} GB: {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s, peak {megabytes:.0f} MB resident")
        print("\n".join(found))
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
