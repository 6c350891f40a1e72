"""Checkpoints as training frameworks and quantisers leave them: what is the model's, what is beside it, what is packed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from initaudit.load import load


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


STATE = network().state_dict()
OPTIMIZER = torch.optim.AdamW(network().parameters()).state_dict()
AVERAGE = {name: value * 0.999 for name, value in STATE.items()}


def prefixed(prefix: str, state: dict[str, Any], dots: str = ".") -> dict[str, Any]:
    return {prefix + name.replace(".", dots): value for name, value in state.items()}


TRAINERS: dict[str, tuple[dict[str, Any], str]] = {
    "Lightning": (
        {
            "state_dict": prefixed("model.", STATE),
            "callbacks": {
                "ModelCheckpoint": {"best_model_score": torch.tensor(0.3), "best_k_models": {"x": torch.tensor(0.3)}}
            },
            "optimizer_states": [OPTIMIZER],
            "lr_schedulers": [{"base_lrs": [0.1], "_last_lr": [torch.tensor(0.1)]}],
            "hyper_parameters": {"lr": 0.1},
            "loops": {"fit_loop": {"state_dict": {}}},
        },
        "model.",
    ),
    "latent diffusion": (
        {
            "state_dict": {
                **prefixed("model.", STATE),
                **prefixed("model_ema.", AVERAGE, ""),
                "model_ema.decay": torch.tensor(0.99),
                "model_ema.num_updates": torch.tensor(3),
            }
        },
        "model.",
    ),
    "an average with dots": ({"state_dict": {**prefixed("net.", STATE), **prefixed("ema_net.", AVERAGE)}}, "net."),
    "an average aside": ({"state_dict": STATE, "ema_state_dict": AVERAGE, "epoch": torch.tensor(3)}, ""),
    "fairseq": ({"args": argparse.Namespace(arch="x"), "model": STATE, "last_optimizer_state": OPTIMIZER}, ""),
    "OpenMMLab": ({"meta": {"version": "1"}, "state_dict": STATE, "optimizer": OPTIMIZER, "message_hub": {}}, ""),
    "DeepSpeed": ({"module": STATE, "optimizer": None, "ds_config": {}, "mp_world_size": 1}, ""),
    "compiled and wrapped": (prefixed("_orig_mod.module.", STATE), ""),
    "random states": ({"model": STATE, "rng": {"cpu": torch.get_rng_state()}, "ema_decay": 0.1}, ""),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_only_the_weights_are_audited(trainer: str, tmp_path: Path) -> None:
    value, prefix = TRAINERS[trainer]
    torch.save(value, tmp_path / "x.pt")
    made = load(tmp_path / "x.pt")
    assert set(made.arrays) == {prefix + name for name in STATE}
    assert made.problems == ()
    for name, tensor in STATE.items():
        assert np.array_equal(made.arrays[prefix + name].read(), tensor.numpy())


def test_an_average_that_is_another_network_is_audited(tmp_path: Path) -> None:
    torch.save({**prefixed("net.", STATE), "ema_head.weight": torch.ones(3, 5)}, tmp_path / "x.pt")
    assert "ema_head.weight" in load(tmp_path / "x.pt").arrays


def test_the_state_of_an_optimizer_alone_says_so(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    made = load(tmp_path / "x.pt")
    assert made.arrays == {}
    assert made.optimizer
    assert made.notes == ("the file holds the state of an optimizer and no weights",)


PACKED: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "gptq": lambda: {
        "qweight": torch.ones(8, 64, dtype=torch.int32), "qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "scales": torch.ones(1, 64).half(), "g_idx": torch.zeros(64, dtype=torch.int32),
    },
    "awq": lambda: {
        "qweight": torch.ones(64, 8, dtype=torch.int32), "qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "scales": torch.ones(1, 64).half(),
    },
    "bitsandbytes 4-bit": lambda: {
        "weight": torch.ones(2048, 1, dtype=torch.uint8), "weight.absmax": torch.ones(64), "weight.quant_map": torch.ones(16),
    },
    "bitsandbytes 8-bit": lambda: {"weight": torch.ones(64, 64, dtype=torch.int8), "SCB": torch.ones(64)},
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKED)
def test_packed_weights_are_named(packing: str, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.{name}": value for i in range(2) for name, value in PACKED[packing]().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    first = "layers.0.qweight" if packing in ("gptq", "awq") else "layers.0.weight"
    assert f"2 weights are quantised ({packing}) and not judged: {first} and 1 more" in load(tmp_path / "x.safetensors").notes


@pytest.mark.parametrize("scales", [(1,), (), (6, 1), (3, 2), (1, 8)], ids=str)
def test_eight_bit_floats_are_multiplied_by_their_scales(scales: tuple[int, ...], tmp_path: Path) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file({"a.weight": weight, "a.weight_scale": scale, "norm.weight": torch.ones(4)}, tmp_path / "x.safetensors")
    array = load(tmp_path / "x.safetensors").arrays["a.weight"]
    expected = weight.float()
    if scale.numel() == 1:
        expected = expected * scale.reshape(())
    else:
        expected = expected * scale.repeat_interleave(6 // scales[0], 0).repeat_interleave(8 // scales[1], 1)
    np.testing.assert_allclose(array.read(), expected.numpy(), rtol=1e-6)
    assert array.quantized == "float8_e4m3fn with scales"
