"""Weights without a program: what names and shapes tell, held against the layers of real architectures on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TIMM, TRANSFORMERS, build, layers_of
from timm_models import import_timm

import initaudit
from initaudit.graph.from_names import infer, part_of
from initaudit.load.checkpoint import Array

LEAST = 0.98  # of all weights: role and both fans as the module's own layers have them


def unread() -> Any:
    raise AssertionError("names and shapes have to do")


def arrays_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: Array(name, shape, "float32", unread) for name, shape in shapes.items()}


def share_right(names: tuple[str, ...]) -> float:
    right = total = 0
    for name in names:
        module = build(name)
        state = {n: tuple(v.shape) for n, v in module.state_dict().items() if v.is_floating_point()}
        truth = layers_of(module)
        found = {w.name: (w.role, *w.use.fans(w.shape)) for w in infer(arrays_of(state))}
        judged = [n for n, shape in state.items() if len(shape) > 1]
        total += len(judged)
        right += sum(truth.get(n) == found.get(n) for n in judged)
    return right / total


def test_architectures_of_transformers() -> None:
    assert len(TRANSFORMERS) >= 60
    assert share_right(TRANSFORMERS) >= LEAST


def test_architectures_of_timm() -> None:
    if import_timm() is None:
        pytest.skip("timm is not installed")
    assert len(TIMM) >= 60
    assert share_right(TIMM[::4]) >= LEAST  # all of them in benchmarks/names.py


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"conv1.weight": (8, 1, 3, 3)}, {"conv1.weight": ("contraction", 9, 72)}),
        ({"a.weight": (64, 3, 3, 3), "b.weight": (64, 4, 3, 3)}, {"b.weight": ("contraction", 36, 36)}),
        ({"a.weight": (64, 3, 3, 3), "b.weight": (64, 1, 3, 3)}, {"b.weight": ("contraction", 9, 9)}),
        ({"up.weight": (8, 16, 2, 2), "up.bias": (16,)}, {"up.weight": ("contraction", 32, 64)}),
        ({"c.weight": (10, 30), "c.bias": (30,)}, {"c.weight": ("contraction", 10, 30)}),
        ({"wte.weight": (500, 16)}, {"wte.weight": ("embedding", 1, 16)}),
        ({"rnn.weight_ih_l0": (32, 5), "rnn.weight_hh_l0": (32, 8)}, {"rnn.weight_hh_l0": ("recurrent", 8, 8)}),
        ({"cls_token": (1, 1, 16), "pos_embed": (1, 50, 16), "scale": (4, 1, 1), "bias_table": (49, 3)}, {}),
        ({"e.gate_up_proj": (4, 96, 32), "e.down_proj": (4, 32, 48)}, {"e.gate_up_proj": ("contraction", 32, 96)}),
        ({"e.gate_up_proj": (4, 32, 96), "e.down_proj": (4, 48, 32)}, {"e.gate_up_proj": ("contraction", 32, 96)}),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "",
)
def test_what_shapes_tell(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[str, int, int]]) -> None:
    found = {w.name: (w.role, *w.use.fans(w.shape)) for w in infer(arrays_of(shapes))}
    assert {name: found.get(name) for name in expected} == expected
    if not expected:
        assert found == {}


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "query"),
        ("transformer.h.0.attn.c_attn.weight", "query, key and value"),
        ("blocks.3.mlp.fc1.weight", "way up"),
        ("model.layers.0.mlp.gate_proj.weight", "gate of a feed-forward"),
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", "LoRA A"),
        ("lm_head.weight", "head"),
        ("features.0.weight", ""),
    ],
)
def test_places_are_told_by_the_last_word(name: str, word: str) -> None:
    assert word in part_of(name)


def test_no_activation_is_claimed(tmp_path: Path) -> None:
    state = {n: torch.randn(v.shape) for n, v in build("GPT2LMHeadModel").state_dict().items() if v.is_floating_point()}
    torch.save(state, tmp_path / "x.pt")
    report = initaudit.audit(tmp_path / "x.pt")
    assert len(report.layers) >= 10
    assert all(layer.activations == () for layer in report.layers)
    assert all(layer.provenance[0].startswith("inferred from") for layer in report.layers)
    assert any("feed-forward" in text for layer in report.layers for text in layer.provenance)
