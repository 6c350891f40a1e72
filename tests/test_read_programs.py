"""Programs in files: the graphs of torch.export and TorchScript are read as data, and nothing of a file is run unasked."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initaudit import audit
from initaudit.errors import UnreadableModel, UnsupportedOperator
from initaudit.graph.allowed import exported_target, overload, packet
from initaudit.graph.sound import check

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.conv(self.norm(x)))


class Net(nn.Module):
    """A residual network with a region without gradients, of which every exporter makes something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, 2), nn.Sequential(Block(16), Block(16))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.gelu(self.stem(x)))
        with torch.no_grad():
            scale = torch.ones(x.shape[0], 16) * 0.5
        return self.head(self.drop(x.mean((2, 3)) * scale))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.head = nn.Embedding(50, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.words(ids))[0])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


BATCH = torch.export.Dim("batch", min=1, max=64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "residual": (Net, torch.zeros(2, 3, 32, 32)),
    "sequences": (Sequences, torch.zeros(2, 12, dtype=torch.int64)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.zeros(2, 10, 16)),
}


def told(path: Any, **config: Any) -> dict[str, tuple[Any, ...]]:
    """What the report says of every weight, but for the numbers of a probe with other inputs."""
    layers = audit(path, config=config).report.layers
    return {
        layer.tensor: (layer.operator, layer.fan_in, layer.fan_out, tuple(a.name for a in layer.activations))
        for layer in layers
    }


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_program_is_paired_as_its_module(name: str, dynamic: bool, tmp_path: Path) -> None:
    make, example = NETWORKS[name]
    module = seeded(make)
    path = tmp_path / "x.pt2"
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=({0: BATCH},) if dynamic else None), path)
    found = audit(path)
    assert found.report.probe["batch"] == (8 if dynamic else 2)
    assert told(path) == told(module)
    assert [f.code for f in found.findings if f.code in ("IA001", "IA003", "IA004", "IA505")] == []
    assert any("own graph" in note for note in found.report.notes)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The archive with another description of its graph."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("models/model.json"):
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            new.writestr(info.filename, data)
    return target


def _expression(document: dict[str, Any], text: str) -> None:
    graph = document["graph_module"]["graph"]
    for meta in graph["tensor_values"].values():
        meta["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}
    document["range_constraints"] = {text: {"min_val": 1, "max_val": 9}}
    document["guards_code"] = [text]


def _target(document: dict[str, Any], target: str) -> None:
    document["graph_module"]["graph"]["nodes"][1]["target"] = target


def _operand(document: dict[str, Any], argument: dict[str, Any]) -> None:
    document["graph_module"]["graph"]["nodes"][1]["inputs"][0]["arg"] = argument


HOSTILE: dict[str, Callable[[dict[str, Any], str], None]] = {
    "a size": lambda d, mark: _expression(d, f"__import__('os').system('touch {mark}')"),
    "an operator of os": lambda d, mark: _target(d, "os.system"),
    "an attribute of torch.ops": lambda d, mark: _target(d, "torch.ops.load_library"),
    "an attribute of an operator": lambda d, mark: _target(d, "torch.ops.aten.relu.__class__"),
    "a file": lambda d, mark: _target(d, "torch.ops.aten.from_file.default"),
    "another library": lambda d, mark: _target(d, "torch.ops.inductor.accumulate_grad_.default"),
    "a memory swap": lambda d, mark: _target(d, "torch.ops.aten.set_.source_Tensor"),
    "an expression as operand": lambda d, mark: _operand(d, {"as_expr": f"__import__('os').system('touch {mark}')"}),
    "a name that nothing makes": lambda d, mark: _operand(d, {"as_tensor": {"name": "__class__"}}),
    "an object": lambda d, mark: _operand(d, {"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}),
    "no graph": lambda d, mark: d.update(graph_module=[]),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "x.pt2"
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.export.save(torch.export.export(seeded(lambda: module), (torch.zeros(2, 4),)), path)
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_of_an_exported_program_is_run(kind: str, exported: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    path = rewritten(exported, tmp_path / "x.pt2", lambda document: HOSTILE[kind](document, str(mark)))
    found = audit(path)
    assert not mark.exists()
    assert {layer.tensor for layer in found.layers} == {"0.weight", "2.weight"}
    if kind != "a size":  # which is not looked at
        assert any(note.startswith("the file's graph gives no program: ") for note in found.report.notes), found.report.notes
        assert {f.code for f in found.findings} == {"IA003", "IA004"}


def test_a_size_runs_where_pytorch_loads_it(exported: Path, tmp_path: Path) -> None:
    """The danger that the reader avoids is real: --trust runs it, and says so."""
    mark = tmp_path / "run"
    text = f"__import__('os').system('touch {mark}')"
    path = rewritten(exported, tmp_path / "x.pt2", lambda document: _expression(document, text))
    audit(path, config={"trust": True})
    assert mark.exists()


def test_trust_runs_what_the_reader_refuses(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))
            return self.head(torch.relu(x))

    path = tmp_path / "x.pt2"
    torch.export.save(torch.export.export(seeded(Branching), (torch.ones(3, 4),)), path)
    assert any("higher_order.cond" in note and "--trust" in note for note in audit(path).report.notes)
    found = audit(path, config={"trust": True})
    assert any("torch.export.load (--trust)" in note for note in found.report.notes)
    assert found.report.probe
    assert found.layers


@pytest.mark.parametrize(
    "name",
    [
        *(
            "set_",
            "resize_",
            "from_file",
            "_local_scalar_dense",
            "relu.default",
            "__class__",
            "",
            "record_stream",
            "save",
            "wait",
        ),
        *("manual_seed", "set_data", "_reshape_alias", "as_strided", "native_batch_norm", "ctc_loss", "_pad_packed_sequence"),
        *("max_pool2d_with_indices_backward", "embedding_dense_backward", "gelu_backward", "_convert_indices_from_coo_to_csr"),
        *("fractional_max_pool2d", "segment_reduce", "to_sparse", "_upsample_bilinear2d_aa", "_nested_view_from_buffer_copy"),
    ],
)
def test_operators_that_a_file_may_not_call(name: str) -> None:
    with pytest.raises(UnsupportedOperator):
        packet(name)


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 3, "num_layers": 2}, {"bias": False}, {"batch_first": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_weights_are_measured_before_a_kernel_trusts_them(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    if "proj_size" in options and kind is not nn.LSTM:
        return
    layer = kind(4, 8, **options)
    name = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[kind.__name__]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = torch.zeros(count, 5, layer.proj_size or 8), torch.zeros(count, 5, 8)
    x = torch.zeros(5, 3, 4) if layer.batch_first else torch.zeros(3, 5, 4)
    weights = list(layer._flat_weights)

    def arguments(x: torch.Tensor, h: torch.Tensor, weights: list[torch.Tensor]) -> tuple[Any, ...]:
        state = [h, c] if name == "lstm" else h
        return x, state, weights, layer.bias, layer.num_layers, 0.0, False, layer.bidirectional, layer.batch_first

    check(name, arguments(x, h, weights), {})
    getattr(torch.ops.aten, name)(*arguments(x, h, weights))
    for place, weight in enumerate(weights):
        with pytest.raises(UnreadableModel):
            check(name, arguments(x, h, [*weights[:place], weight[:1], *weights[place + 1 :]]), {})
    for wrong in (arguments(x, h[:, :1], weights), arguments(x[..., :2], h, weights), arguments(x, h, weights[:-1])):
        with pytest.raises(UnreadableModel):
            check(name, wrong, {})


def test_attention_needs_a_value_for_every_key() -> None:
    q = torch.zeros(1, 2, 4, 8)
    check("scaled_dot_product_attention", (q, q, q), {})
    with pytest.raises(UnreadableModel):
        check("scaled_dot_product_attention", (q, q, q[:, :, :1]), {})
    with pytest.raises(UnreadableModel):
        check("_weight_norm", (torch.zeros(5, 4), torch.zeros(1, 1), 0), {})


def test_a_decomposed_program_is_paired_as_its_module(tmp_path: Path) -> None:
    """What decompositions write are kernels that check nothing: others are called in their place."""
    module = seeded(
        lambda: nn.Sequential(Block(3), nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True))
    )
    program = torch.export.export(module.eval(), (torch.randn(2, 3, 4, 4),)).run_decompositions()
    torch.export.save(program, tmp_path / "x.pt2")
    assert any("legit_no_training" in str(node.target) for node in program.graph.nodes)
    found = audit(tmp_path / "x.pt2")
    assert any(note.startswith("paired through") for note in found.report.notes), found.report.notes
    assert {layer.operator for layer in found.layers} >= {"conv", "linear"}


def test_operators_that_write_to_what_they_are_given_as_output() -> None:
    with pytest.raises(UnsupportedOperator):
        overload("add", "out")
    assert exported_target("torch.ops.aten.add.Tensor") is torch.ops.aten.add.Tensor
    assert exported_target("_operator.mul")(3, 4) == 12
    with pytest.raises(UnsupportedOperator):
        exported_target("_operator.pow")


@pytest.mark.parametrize("way", ["traced", "scripted"])
@pytest.mark.parametrize("name", NETWORKS)
def test_torchscript_is_paired_as_its_module(name: str, way: str, tmp_path: Path) -> None:
    make, example = NETWORKS[name]
    module = seeded(make)
    made = torch.jit.trace(module, example, check_trace=False) if way == "traced" else torch.jit.script(module)
    torch.jit.save(made, tmp_path / "x.pt")
    found = audit(tmp_path / "x.pt")
    assert found.report.probe["batch"] == (2 if way == "traced" else 8), "a traced module has the inputs it was traced with"
    assert told(tmp_path / "x.pt") == told(module)
    assert [f.code for f in found.findings if f.code in ("IA001", "IA003", "IA004", "IA505")] == []


def scripted(code: str, target: Path) -> Path:
    """A TorchScript archive whose forward has the body `code`."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, self.weight)

    torch.jit.save(torch.jit.script(seeded(Plain)), target.with_suffix(".old"))
    with zipfile.ZipFile(target.with_suffix(".old")) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith(".py"):
                head, _, _ = data.decode().partition(") -> Tensor:\n")
                data = (head + ") -> Tensor:\n" + "".join(f"    {line}\n" for line in code.splitlines())).encode()
            new.writestr(info.filename, data)
    return target


HOSTILE_CODE = {
    "an import": "import os\nreturn x",
    "a builtin": "__import__('os').system('touch MARK')\nreturn x",
    "an eval": "eval(\"open('MARK', 'w')\")\nreturn x",
    "an open": "open('MARK', 'w')\nreturn x",
    "an attribute of a module": "torch.os.system('touch MARK')\nreturn x",
    "a class behind a number": "y = (1).__class__.__base__.__subclasses__()\nreturn x",
    "a class behind a function": "y = x.add.__globals__\nreturn x",
    "a class behind the object": "y = self.__class__.__init__.__globals__\nreturn x",
    "a class behind a word": "y = int.__subclasses__()\nreturn x",
    "attributes of a format": "y = torch.format('{0.__class__}', x)\nreturn torch.load('MARK')",
    "a file read": "return torch.from_file('MARK', True, 16)",
    "a file written": "torch.save(x, 'MARK')\nreturn x",
    "another library": "return ops.quantized.linear(x, x, 1.0, 0)",
    "a lambda": "return (lambda y: y)(x)",
    "a comprehension": "return [y for y in x][0]",
    "an endless loop": "while True:\n  y = 1\nreturn x",
    "an endless recursion": "return (self).forward(x, )",
    "a tensor that is too large": "return torch.mm(x, torch.ones([4, 10000000000]))",
    "a list that is too long": "y = torch.mul([1], 10000000000)\nreturn x",
    "a power that is too large": "y = torch.pow(9, torch.pow(9, 9))\nreturn x",
    "numbers that double": "y = 3\nfor i in range(100000000):\n  y = torch.mul(y, y)\nreturn x",
    "lists within lists": "y = [1]\nfor i in range(60):\n  y = [y, y]\nz = torch.str(y)\nreturn x",
    "lists within lists, compared": "y = [1]\nz = [1]\nfor i in range(60):\n  y = [y, y]\n"
    "  z = [z, z]\nif y == z:\n  w = 1\nreturn x",
    "lists within lists, returned": "y = [x]\nfor i in range(60):\n  y = [y, y]\nreturn y",
    "a list within itself": "y = [x]\nz = torch.append(y, y)\nreturn y",
    "tensors that double": "y = [x]\nfor i in range(60):\n  z = torch.extend(y, y)\nreturn x",
    "a range that is too long": "y = list(range(1000000000000))\nreturn x",
    "memory beyond the end": "return torch._reshape_alias(x, [100000000], [1])",
    "weights that are too few": "h = torch.zeros([1, 1, 8])\nreturn (torch.lstm(torch.zeros([3, 50, 4]), [h, h], "
    "[torch.zeros([32, 4]), torch.zeros([1, 8])], False, 1, 0., False, False, False))[0]",
    "brackets": "return " + "(" * 5000 + "x" + ")" * 5000,
    "no code": "return return",
    "signs": "return " + "-" * 200_000 + "1",
}


@pytest.mark.parametrize("kind", HOSTILE_CODE)
def test_nothing_of_torchscript_is_run(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    path = scripted(HOSTILE_CODE[kind].replace("MARK", str(mark)), tmp_path / "x.pt")
    found = audit(path)
    assert not mark.exists()
    assert [layer.tensor for layer in found.layers] == ["weight"]
    assert not any(note.startswith("paired through") for note in found.report.notes)
    assert any(note.startswith("the file's graph gives no program: ") for note in found.report.notes), found.report.notes
    assert {f.code for f in found.findings} >= {"IA003", "IA004"}


def test_trust_lets_pytorch_run_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    module = seeded(Net)
    torch.jit.save(torch.jit.script(module), path)
    found = audit(path, config={"trust": True})
    assert any("torch.jit.load (--trust)" in note for note in found.report.notes)
    assert told(path, trust=True) == told(module)
