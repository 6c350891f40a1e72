"""From a model to its verdict, through both doors: what cannot learn fails with the right codes, its healthy twin passes."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import initaudit
from initaudit.auditing.run import gather
from initaudit.config import Config
from initaudit.errors import UnreadableModel, UsageError
from initaudit.load import from_module

FIXTURES = Path(__file__).parent.parent / "fixtures"
Built = tuple[nn.Module, tuple[torch.Tensor, ...]]


def mlp(depth: int, width: int, act: type[nn.Module], fill: Callable[[torch.Tensor], object]) -> Built:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(32 if i == 0 else width, width), act()]
    layers.append(nn.Linear(width, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers), (torch.randn(16, 32),)


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.skip = nn.Identity() if i == o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        return F.relu(self.skip(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet() -> Built:
    torch.manual_seed(0)
    body = [Block(i, o, 1 if i == o else 2) for i, o in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), (torch.randn(8, 3, 16, 16),)


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=200, n_positions=32, bos_token_id=0, eos_token_id=0)
    config.use_cache = False
    return GPT2LMHeadModel(config), (torch.randint(0, 200, (4, 16)),)


def he(w: torch.Tensor) -> object:
    return nn.init.kaiming_normal_(w, nonlinearity="relu")


BROKEN: dict[str, tuple[Callable[[], Built], set[str]]] = {
    "sigmoid_normal_1": (lambda: mlp(12, 96, nn.Sigmoid, nn.init.normal_), {"IA102", "IA303", "IA306", "IA307"}),
    "zeros": (lambda: mlp(4, 64, nn.ReLU, nn.init.zeros_), {"IA201", "IA311", "IA207"}),
    "constant": (lambda: mlp(4, 64, nn.ReLU, lambda w: nn.init.constant_(w, 0.05)), {"IA201", "IA202"}),
    "xavier_30_relu": (lambda: mlp(30, 96, nn.ReLU, nn.init.xavier_normal_), {"IA101", "IA103", "IA301", "IA303"}),
}
HEALTHY: dict[str, Callable[[], Built]] = {
    "he_relu_12": lambda: mlp(12, 96, nn.ReLU, he),
    "he_relu_30": lambda: mlp(30, 192, nn.ReLU, he),
    "xavier_sigmoid_2": lambda: mlp(2, 96, nn.Sigmoid, nn.init.xavier_normal_),
    "resnet": resnet,
    "gpt2": gpt2,
}


class Logits(nn.Module):
    """The first output alone, as exporters want it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        out = self.inner(*args)
        return out if isinstance(out, torch.Tensor) else out[0]


def exported(module: nn.Module, inputs: tuple[torch.Tensor, ...], exporter: str) -> onnx.ModelProto:
    """An export that keeps the norms: the dynamo exporter without its optimizer, or the older one in training mode."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if exporter == "dynamo":
                return torch.onnx.export(Logits(module).eval(), inputs, dynamo=True, optimize=False, verbose=False).model_proto
            file = io.BytesIO()
            mode = torch.onnx.TrainingMode.TRAINING
            torch.onnx.export(Logits(module), inputs, file, dynamo=False, training=mode, do_constant_folding=False)
            return onnx.load_from_string(file.getvalue())
    finally:
        logging.disable(logging.NOTSET)
        module.train()


def ratios(audit: initaudit.auditing.Audit) -> list[tuple[object, ...]]:
    return sorted(
        (r.operator, r.fan_in, r.fan_out, tuple(sorted({a.name for a in r.activations})), tuple(r.ratio.values()))
        for r in audit.layers
    )


def same(a: list[tuple[object, ...]], b: list[tuple[object, ...]]) -> None:
    assert [r[:4] for r in a] == [r[:4] for r in b]
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left[4], right[4], strict=True):
            assert (x is None) == (y is None)
            assert x is None or math.isclose(x, y, rel_tol=1e-4), (left, right)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("door", ["module", "dynamo", "legacy"])
def test_what_cannot_learn_fails(name, door):
    build, codes = BROKEN[name]
    module, inputs = build()
    audit = initaudit.audit(module if door == "module" else exported(module, inputs, door), inputs)
    found = {f.code for f in audit.findings if f.severity == "error"}
    assert audit.verdict == "fail"
    assert found & codes, [(f.code, f.severity, f.message) for f in audit.findings]


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("door", ["module", "dynamo", "legacy"])
def test_what_is_healthy_passes(name, door):
    if (name, door) == ("gpt2", "legacy"):
        pytest.skip("the older exporter has no aten::diff")
    module, inputs = HEALTHY[name]()
    audit = initaudit.audit(module if door == "module" else exported(module, inputs, door), inputs)
    alarms = [(f.code, f.severity, f.tensor, f.message) for f in audit.findings if f.severity != "info"]
    assert alarms == []
    assert audit.verdict == "pass"


@pytest.mark.parametrize("name", [*BROKEN, *HEALTHY])
@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_both_doors_agree(name, exporter):
    if (name, exporter) == ("gpt2", "legacy"):
        pytest.skip("the older exporter has no aten::diff")
    module, inputs = BROKEN[name][0]() if name in BROKEN else HEALTHY[name]()
    first = initaudit.audit(module, inputs)
    second = initaudit.audit(exported(module, inputs, exporter), inputs)
    same(ratios(first), ratios(second))
    assert first.verdict == second.verdict


def test_the_module_is_left_as_it_was():
    module, inputs = resnet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initaudit.audit(module, inputs)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert module.training


def test_the_same_twice():
    module, inputs = resnet()
    assert initaudit.audit(module, inputs).to_dict() == initaudit.audit(module, inputs).to_dict()


def test_what_is_no_model_is_refused():
    with pytest.raises(UsageError, match=r"expected a path, a torch\.nn\.Module or an onnx\.ModelProto"):
        initaudit.audit(42)
    with pytest.raises(UnreadableModel):
        initaudit.audit("no/such/file.onnx")
    with pytest.raises(UsageError, match="probe_batch"):
        initaudit.audit(resnet()[0], config={"probe_bath": 3})


def test_one_damaged_file_is_one_finding_and_a_useless_one_is_no_model(tmp_path):
    """Half a file names the tensors that are lost; of a file without a readable tensor nothing can be said."""
    whole = (FIXTURES / "good" / "he_mlp.safetensors").read_bytes()
    half, stub = tmp_path / "half.safetensors", tmp_path / "stub.pt"
    half.write_bytes(whole[: len(whole) // 2])
    (found,) = [f for f in initaudit.audit(half).findings if f.severity == "error"]
    assert found.code == "IA001"
    assert {found.tensor, *found.related} >= {"layers.2.weight", "layers.3.weight", "layers.4.weight"}
    stub.write_bytes(b"\x80\x04\x95")
    with pytest.raises(UnreadableModel, match=r"^[^\n]*breaks off[^\n]*$"):
        initaudit.audit(stub)


def test_every_counted_stage_says_where_it_is_and_at_what_rate():
    """What takes long on a large model names the weight or the edge that it is at, and how many a second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    heard = []
    gather(from_module(model), Config(rehearse=2), inputs=(torch.randn(8, 8),), progress=heard.append)
    for stage, unit in (
        ("measuring", "MB"), ("pairing", "weights"), ("recognising", "weights"), ("probing: forward at", "edges"),
        ("probing: backward at", "edges"), ("probing: virtual steps with sgd at", "steps"),
        ("rehearsing with adam at", "steps"),
    ):  # fmt: skip
        said = [line for line in heard if line.startswith(stage) and line.endswith(f" {unit}/s")]
        assert said, (stage, heard)
