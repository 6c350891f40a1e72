"""`initaudit fix`: the very line of a finding is run, in every form of file, and nothing else of the file changes."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from initaudit import cli
from initaudit.load import load
from initaudit.repair.lines import NotALine, drawn_by, run_line
from initaudit.repair.targets import CopiedFile

ROOT = Path(__file__).parent.parent


def net(std=0.2):
    """A stack that N(0, `std`) kills or leaves alone: He's std of 32 units is 0.25."""
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, std)
            nn.init.zeros_(module.bias)
    return model


FACTORY = """
import torch
from torch import nn

def broken():
    layers = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, STD)
            nn.init.zeros_(module.bias)
    return model
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a module for each case: an imported module is not read twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def factory(folder, std):
    name = f"nets_{hashlib.blake2b(str(folder).encode(), digest_size=6).hexdigest()}"
    (folder / f"{name}.py").write_text(FACTORY.replace("STD", str(std)))
    return f"{name}:broken"


def run(capsys, *arguments):
    status = cli.run([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def sources(folder):
    """One broken model in every form that can be mended; how it is audited once it is mended."""
    spec = factory(folder, 0.02)
    model = net(0.02)
    save_file(model.state_dict(), folder / "net.safetensors", metadata={"format": "pt"})
    torch.save({"epoch": 3, "model": model.state_dict(), "best": 0.5}, folder / "net.pt")
    (folder / "net.onnx").write_bytes((ROOT / "fixtures" / "broken" / "zero.onnx").read_bytes())
    return spec


@pytest.mark.parametrize("form", ["net.onnx", "net.safetensors", "net.pt", "module.pt", "module.safetensors"])
def test_a_wrong_initialization_is_mended_and_the_model_left_alone(capsys, here, form):
    spec = sources(here)
    module = form.startswith("module")
    source = spec if module else form
    arch = () if module or form.endswith(".onnx") else ("--arch", spec)
    before = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    out = f"out{Path(form).suffix}"
    status, text, err = run(capsys, "fix", source, "-o", out, *arch)
    assert status == 0, text + err
    assert "torch.nn.init.kaiming_normal_(model" in text
    assert "pass: " in text
    assert max(map(len, text.splitlines())) <= 100
    assert {path: path.read_bytes() for path in before} == before
    assert {p.name for p in here.iterdir()} - {p.name for p in before} - {"__pycache__"} == {out}
    # Judged again by a run of its own, not by what `fix` says.
    judged = (out,) if form.endswith(".onnx") else (out, "--arch", spec)
    assert run(capsys, *judged)[0] == 0
    assert run(capsys, source, *arch)[0] == 1


def test_whatever_else_a_checkpoint_holds_stays(capsys, here):
    spec = sources(here)
    assert run(capsys, "fix", "net.pt", "-o", "out.pt", "--arch", spec)[0] == 0
    old, new = torch.load("net.pt", weights_only=True), torch.load("out.pt", weights_only=True)
    assert (new["epoch"], new["best"], list(new["model"])) == (3, 0.5, list(old["model"]))
    assert float(new["model"]["2.weight"].std()) == pytest.approx(0.25, rel=0.1)
    assert torch.equal(new["model"]["0.bias"], old["model"]["0.bias"])
    # Its checksums are those of the new bytes.
    with zipfile.ZipFile("out.pt") as archive:
        assert archive.testzip() is None


def test_names_and_metadata_of_safetensors_and_onnx_stay(capsys, here):
    spec = sources(here)
    assert run(capsys, "fix", "net.safetensors", "-o", "out.safetensors", "--arch", spec)[0] == 0
    assert load("out.safetensors").metadata == {"format": "pt"}
    assert list(load_file("out.safetensors")) == list(load_file("net.safetensors"))
    assert run(capsys, "fix", "net.onnx", "-o", "out.onnx")[0] == 0
    old, new = onnx.load("net.onnx"), onnx.load("out.onnx")
    onnx.checker.check_model(new, full_check=True)
    assert [t.name for t in new.graph.initializer] == [t.name for t in old.graph.initializer]
    assert list(new.graph.node) == list(old.graph.node)


def test_weights_beside_an_onnx_file_move_into_it(capsys, here):
    model = onnx.load(ROOT / "fixtures" / "broken" / "zero.onnx")
    onnx.save(model, "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    assert run(capsys, "fix", "net.onnx", "-o", "out.onnx")[0] == 0
    Path("net.data").unlink()
    assert run(capsys, "out.onnx")[0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_written_in_the_dtype_and_layout_of_the_file(here, dtype):
    weight = torch.randn(6, 4, dtype=dtype)
    torch.save({"a": weight, "turned": weight.T, "part": torch.randn(9, 9, dtype=dtype)[2:5, 1:8:2]}, "net.pt")
    target = CopiedFile(Path("net.pt"), Path("out.pt"))
    checkpoint = target.open()
    new = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4)
    assert all(target.writable(name, array) for name, array in checkpoint.arrays.items())
    target.put(checkpoint, {"part": new.numpy()})
    target.finish()
    found = torch.load("out.pt", weights_only=True)
    assert torch.equal(found["part"], new.to(dtype))
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["turned"], weight.T)


def test_the_same_seed_gives_the_same_file(capsys, here):
    sources(here)
    for out, seed in (("a.onnx", 1), ("b.onnx", 1), ("c.onnx", 2)):
        assert run(capsys, "fix", "net.onnx", "-o", out, "--seed", seed)[0] == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes() != Path("c.onnx").read_bytes()


def test_a_healthy_model_is_said_to_need_nothing(capsys, here):
    for source in (ROOT / "fixtures" / "good" / "he_mlp.onnx", factory(here, 0.25)):
        out = "out.onnx" if str(source).endswith(".onnx") else "out.pt"
        status, text, _ = run(capsys, "fix", source, "-o", out)
        assert (status, "nothing to fix" in text) == (0, True), text
        assert not Path(out).exists()


def test_what_no_line_takes_away_is_left_with_its_help(capsys, here):
    name = factory(here, 0.25).partition(":")[0]
    text = (here / f"{name}.py").read_text()
    lost = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    lost += (
        "        self.body, self.lost = broken(), nn.Linear(128, 128)\n    def forward(self, x):\n        return self.body(x)\n"
    )
    (here / f"{name}.py").write_text(text + lost)
    status, said, _ = run(capsys, "fix", f"{name}:Net", "-o", "out.pt", "--input", "x=8x32:float32")
    assert status == 1
    assert "nothing that a line can fix" in said
    assert "IA311" in said
    assert "not fixed: no line" in said
    assert not Path("out.pt").exists()


def test_trained_weights_are_not_drawn_again(capsys, here):
    from initaudit.rules.examples import trained

    model, _ = trained(lambda m: m[2].weight.fill_(float("nan")))
    torch.save(model.state_dict(), "net.pt")
    Path("arch_of_trained.py").write_text(
        "from initaudit.rules.examples import mlp\n\ndef net():\n    return mlp(24, 64, 64, 64, 64, 5)[0]\n"
    )
    status, text, _ = run(capsys, "fix", "net.pt", "-o", "out.pt", "--arch", "arch_of_trained:net")
    assert status == 1
    assert "IA401" in text
    assert "not fixed" in text
    assert not Path("out.pt").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("old.onnx", "exists already"),
        ("net.onnx", "is the model itself"),
        ("none/out.onnx", "no folder none"),
        (".", "a folder"),
        ("out.pt", "another kind of file"),
    ],
)
def test_nothing_is_overwritten_unasked(capsys, here, out, message):
    sources(here)
    Path("old.onnx").write_bytes(b"precious")
    before = {p: p.read_bytes() for p in here.iterdir() if p.is_file()}
    status, _, err = run(capsys, "fix", "net.onnx", "-o", out)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert {p: p.read_bytes() for p in here.iterdir() if p.is_file()} == before


def test_force_replaces_and_never_the_model(capsys, here):
    sources(here)
    Path("old.onnx").write_bytes(b"old")
    assert run(capsys, "fix", "net.onnx", "-o", "old.onnx", "--force")[0] == 0
    assert run(capsys, "old.onnx")[0] == 0
    assert run(capsys, "fix", "net.onnx", "-o", "net.onnx", "--force")[0] == 2


@pytest.mark.parametrize("source", ["https://example.com/net.onnx", ".", "gone.onnx", "no_such_module:Net"])
def test_what_cannot_be_mended_is_one_line(capsys, here, source):
    status, _, err = run(capsys, "fix", source, "-o", "out.pt" if ":Net" in source else "out.onnx")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert not list(here.iterdir())


def test_an_interrupt_leaves_nothing(capsys, here, monkeypatch):
    sources(here)
    before = sorted(here.iterdir())

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("initaudit.repair.rounds.run_one", stop)
    assert run(capsys, "fix", "net.onnx", "-o", "out.onnx")[0] == 130
    assert sorted(here.iterdir()) == before


SHAPES = {"model[0].weight": (8, 4), "model.a.weight": (8, 4), 'tensors["w;import os"]': (4, 4)}


@pytest.mark.parametrize(
    "line",
    [
        "scale the loss with torch.amp.GradScaler, or train in bfloat16",
        "model.head.weight = model.embed.weight",
        "__import__('os').system('true')",
        "torch.nn.init.normal_(model[1].weight)",
        "torch.nn.init.normal_(model[0].weight.__class__)",
        "torch.nn.init.normal_(model[0].weight, generator=open('x'))",
        "torch.load('x')",
        "model[0].weight.tofile('x')",
        "[exec(x) for x in ('1',)]",
        "torch.nn.init.kaiming_normal_(model[0].weight[0])",
        "torch.nn.init.normal_(model[0].weight, std='a')",
        "for i in (2).__class__: torch.nn.init.normal_(model[i].weight)",
        "lambda: 1",
    ],
)
def test_only_draws_are_understood(line):
    with pytest.raises(NotALine):
        drawn_by(line, SHAPES)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('torch.nn.init.kaiming_normal_(model[0].weight, nonlinearity="relu")  # a reason', ["model[0].weight"]),
        ("for i in range(1): torch.nn.init.zeros_(model[i].weight)", ["model[0].weight"]),
        ("for w, std in (*((model[i].weight, 0.1) for i in range(1)), (model.a.weight, 2),): "
         "torch.nn.init.normal_(w, std=std)", ["model[0].weight", "model.a.weight"]),
        ('for part in tensors["w;import os"].chunk(2): torch.nn.init.ones_(part)', ['tensors["w;import os"]']),
        ("torch.nn.init.normal_(model.a.weight.T, std=2 * model.a.weight[0].numel() ** -0.5)", ["model.a.weight"]),
    ],
)  # fmt: skip
def test_a_line_draws_what_it_names(line, names):
    assert sorted(drawn_by(line, SHAPES)) == sorted(names)
    tensors = {name: torch.full(SHAPES[name], 9.0) for name in names}
    run_line(line, tensors)
    assert all(bool((tensor != 9).all()) for tensor in tensors.values())
