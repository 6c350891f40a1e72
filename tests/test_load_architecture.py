"""Weights without a program, paired through the architecture that the user or a config.json names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm_models import import_timm
from torch import nn

import initaudit
from initaudit.auditing.architecture import as_tensor, attach, in_architecture
from initaudit.errors import UnreadableModel, UsageError
from initaudit.load import load

transformers = pytest.importorskip("transformers")


def gpt2(folder: Path, **changes: object) -> nn.Module:
    """A small model with a tied head in a folder as `save_pretrained` writes it, its configuration changed."""
    settings = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=24)
    model = transformers.GPT2LMHeadModel(settings)
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return model


def test_a_folder_is_paired_and_probed(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    report = initaudit.audit(tmp_path)
    feeds = {layer.tensor: [a.name for a in layer.activations] for layer in report.layers}
    assert feeds["transformer.h.0.mlp.c_fc.weight"] == ["gelu"]
    assert report.risk
    assert not [f for f in report.findings if f.code in ("IA003", "IA004", "IA502", "IA503")]
    program = in_architecture(load(tmp_path), None).program
    for name, value in model.state_dict().items():
        assert torch.equal(program.state_dict()[name], value)


def test_weights_are_views_that_never_reach_the_file(tmp_path: Path) -> None:
    gpt2(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    program = in_architecture(load(tmp_path), None).program
    with torch.no_grad():
        program.transformer.wpe.weight.fill_(7)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}}, "code of its own"),
        ({"model_type": "nothing-known"}, "knows no model_type"),
        ({"model_type": ["gpt2"]}, "knows no model_type"),
        ({"n_layer": 10**9}, "a size that no model has"),
        ({"n_embd": 10**6}, "the files hold"),
        ({"n_embd": "wide"}, "config.json gives no program"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_gives_nothing_falls_back_to_names(
    changes: dict[str, object], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2(tmp_path, **changes)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    report = initaudit.audit(tmp_path)
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules
    message = next(f.message for f in report.findings if f.code == "IA004")
    assert says in message
    assert "names and shapes" in message
    assert len(report.layers) >= 10


def test_known_classes_are_used_beside_code_that_is_not(tmp_path: Path) -> None:
    gpt2(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Evil"}, attn_implementation="evil/kernels")
    report = initaudit.audit(tmp_path)
    assert any("asks for code of its own" in note for note in report.report.notes)
    assert report.risk


def test_what_a_file_lacks_and_has_besides_is_told(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    state = {name: value.contiguous() for name, value in model.transformer.state_dict().items()}
    del state["h.1.mlp.c_fc.weight"]
    state["strange.weight"] = torch.randn(3, 4)
    state["ln_f.weight"] = torch.ones(7)
    save_file(state, tmp_path / "model.safetensors")
    found = {f.tensor: f for f in initaudit.audit(tmp_path).findings if f.code == "IA502"}
    assert "which the file lacks" in found["transformer.h.1.mlp.c_fc.weight"].message
    assert found["strange.weight"].severity == "warning"
    assert "[7] in the file and [32]" in found["transformer.ln_f.weight"].message


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


class Tied(nn.Module):
    """A table and a head that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.arange(8) / 8 + 1, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.table(x) * self.scale)))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which `Tied` can be imported."""
    monkeypatch.chdir(tmp_path)
    return f"{__name__}:Tied"


def test_a_module_of_the_user_pairs_exactly(spec: str, tmp_path: Path) -> None:
    torch.save({"model": {f"net.{name}": value for name, value in Tied().state_dict().items()}}, tmp_path / "x.pt")
    report = initaudit.audit(tmp_path / "x.pt", torch.randint(0, 20, (4, 5)), config={"arch": spec})
    feeds = {layer.tensor: [a.name for a in layer.activations] for layer in report.layers}
    assert feeds["body.weight"] == ["tanh"]
    assert {"table.weight", "body.weight"} <= feeds.keys()
    assert report.risk
    assert not [f for f in report.findings if f.code in ("IA003", "IA502", "IA503")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_used_as_load_state_dict_does(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    torch.save({name: value.to(dtype) for name, value in net.state_dict().items()}, tmp_path / "x.pt")
    checkpoint = attach(load(tmp_path / "x.pt"), nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), "net")
    expected = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    expected.load_state_dict(torch.load(tmp_path / "x.pt"))
    for name, value in expected.state_dict().items():
        assert torch.equal(checkpoint.program.state_dict()[name], value)
    # The range is judged of what the file holds.
    assert {str(array.dtype) for array in checkpoint.arrays.values()} == {str(dtype).removeprefix("torch.")}
    report = initaudit.audit(tmp_path / "x.pt", torch.randn(8, 16), config={"arch": f"{__name__}:Small"})
    assert report.risk
    assert not [f for f in report.findings if f.code in ("IA003", "IA004", "IA502")]


def test_a_tie_that_the_file_has_lost_is_told(spec: str, tmp_path: Path) -> None:
    state = {**Tied().state_dict(), "head.weight": torch.randn(20, 8)}
    torch.save(state, tmp_path / "x.pt")
    problems = in_architecture(load(tmp_path / "x.pt"), spec).problems
    assert [p.code for p in problems] == ["IA503"]


@pytest.mark.parametrize(
    ("arch", "error", "says"),
    [
        ("resnet", UsageError, "no architecture"),
        ("timm:nothing-of-that-name", UsageError, "timm"),
        ("no_such_package:Net", UnreadableModel, "no module named"),
        ("collections:OrderedDict", UnreadableModel, "torch.nn.Module"),
        ("torch.nn:Identity", UnreadableModel, "no name of the file"),
    ],
)
def test_an_architecture_that_cannot_be(arch: str, error: type[Exception], says: str, tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "x.pt")
    with pytest.raises(error, match=says):
        in_architecture(load(tmp_path / "x.pt"), arch)


def test_timm_with_other_classes_and_channels(tmp_path: Path) -> None:
    timm = import_timm()
    if timm is None:
        pytest.skip("timm is not installed")
    model = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    checkpoint = in_architecture(load(tmp_path / "x.pt"), "timm:resnet10t")
    assert checkpoint.problems == ()
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.program.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_arrays_become_tensors_without_a_change(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randn(5, 6).to(dtype)
    save_file({"pad": torch.zeros(3, dtype=torch.uint8), "x": value}, tmp_path / "x.safetensors")
    array = load(tmp_path / "x.safetensors").arrays["x"]
    assert torch.equal(as_tensor(array).float(), value.float())
    assert not isinstance(array.read(), np.ndarray) or not array.read().flags.writeable
