"""Inputs that are made up must be accepted by the real forward, leave module and random state alone, and mean something."""

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from initaudit.errors import UnreadableModel, UsageError
from initaudit.graph.from_onnx import from_onnx
from initaudit.graph.graph import Input
from initaudit.load import load_proto
from initaudit.probe.graph_inputs import tables
from initaudit.probe.inputs import InputSpec, draw, for_graph, for_module, load_data, match_data, parse_spec


class Series(nn.Module):
    """A vector of four numbers would fit as one example of four features."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, timeseries):
        return self.b(torch.tanh(self.a(timeseries)))


class Digits(nn.Module):
    """Its flattened features fix the side: 28."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16 * 12 * 12, 10)

    def forward(self, x):
        return self.head(torch.flatten(F.max_pool2d(F.relu(self.b(F.relu(self.a(x)))), 2), 1))


class Flattens(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(784, 10)

    def forward(self, x):
        return self.head(x.view(x.shape[0], -1))


class Positions(nn.Module):
    """Token ids below 70 and at most 12 positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(70, 16), nn.Embedding(12, 16), nn.Linear(16, 70)

    def forward(self, idx):
        return self.head(self.tokens(idx) + self.places(torch.arange(idx.shape[1])))


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.conv = nn.Linear(1, 16), nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x) + self.time(t[:, None].float())[:, :, None, None]


class Code(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.mean, self.scale, self.decoder = (nn.Linear(*s) for s in ((64, 32), (32, 8), (32, 8), (8, 64)))

    def forward(self, x, noise):
        h = F.relu(self.encoder(x))
        return self.decoder(self.mean(h) + noise * torch.exp(self.scale(h)))


class Masked(nn.Module):
    """Ids that come as floats, and a mask that must be given."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x, mask):
        return (self.head(self.table(x.long())) * mask.unsqueeze(-1)).sum(1)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, *, x, scale: float):
        return self.layer(x) * scale


class TwoWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, src, tgt):
        return self.transformer(src, tgt)


def generator():
    return nn.Sequential(nn.ConvTranspose2d(100, 16, 4), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))


def residual_network():
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, stride=2, padding=1), nn.ReLU()) for i in range(5)),
        nn.Conv2d(8, 8, 3, padding=1),
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=90,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
        )
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=60))


# module, shapes of the inputs, and the exclusive bound of the ids (None: floats)
CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)), [(4, 64)], None),
    "as many features as examples": (lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), [(4, 4)], None),
    "features called time": (Series, [(4, 4)], None),
    "digits": (Digits, [(4, 1, 28, 28)], None),
    "flattens": (Flattens, [(4, 784)], None),
    "positions": (Positions, [(4, 12)], 70),
    "diffusion": (Diffusion, [(4, 3, 32, 32), (4,)], None),
    "code": (Code, [(4, 64), (4, 8)], None),
    "masked": (Masked, [(4, 16), (4, 16)], 9),
    "keywords": (Keywords, [(4, 5)], None),
    "encoder and decoder": (TwoWords, [(4, 16, 32), (4, 16, 32)], None),
    "generator": (generator, [(4, 100, 1, 1)], None),
    "lstm": (lambda: nn.LSTM(6, 8, batch_first=True), [(4, 16, 6)], None),
    "attention behind a linear layer": (
        lambda: nn.Sequential(nn.Linear(12, 32), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)),
        [(4, 16, 12)],
        None,
    ),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU()), [(4, 1, 16, 16, 16)], None),
    "waveform": (lambda: nn.Sequential(nn.Conv1d(1, 8, 80, 16), nn.ReLU(), nn.Conv1d(8, 8, 3)), [(4, 1, 256)], None),
    "bilinear": (lambda: nn.Bilinear(6, 7, 3), [(4, 6), (4, 7)], None),
    "deep strides": (residual_network, [(4, 3, 64, 64)], None),
    "bert": (bert, [(4, 12)], 90),
    "t5": (t5, [(4, 16), (4, 16)], 60),
}


@pytest.mark.parametrize("name", CASES)
def test_module(name):
    build, shapes, bound = CASES[name]
    torch.manual_seed(0)
    module = build()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    before, training = torch.get_rng_state(), module.training
    positional, keywords = for_module(module, batch=4)
    assert torch.equal(before, torch.get_rng_state())
    assert module.training is training
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
    tensors = [v for v in (*positional, *keywords.values()) if isinstance(v, torch.Tensor)]
    assert [tuple(t.shape) for t in tensors] == shapes
    if bound is not None:
        assert 0 <= int(tensors[0].min()) <= int(tensors[0].max()) < bound
        assert int(tensors[0].max()) >= bound // 2, "ids use the table"
    with torch.no_grad():
        module(*positional, **keywords)


def test_the_same_seed_gives_the_same_inputs():
    module = Code()
    (a, _), _ = for_module(module, batch=3, seed=5)
    (b, _), _ = for_module(module, batch=3, seed=5)
    (c, _), _ = for_module(module, batch=3, seed=6)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_floats_are_standard_normal():
    x = draw((200, 500), torch.float32, None, torch.Generator().manual_seed(0))
    assert abs(float(x.mean())) < 4 / 10**2.5
    assert float(x.var()) == pytest.approx(1, abs=4 * 2**0.5 / 10**2.5)


def test_a_described_input_is_taken_as_described():
    positional, _ = for_module(Diffusion(), shapes={"x": parse_spec("x", "2x3x8x8:float32")}, batch=2)
    assert [tuple(p.shape) for p in positional] == [(2, 3, 8, 8), (2,)]
    with pytest.raises(UsageError, match="no such argument"):
        for_module(Diffusion(), shapes={"y": InputSpec((2,))}, batch=2)


def test_what_fits_nothing_is_said_with_what_was_tried():
    class Never(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            raise RuntimeError("only on Sundays")

    with pytest.raises(UnreadableModel, match=r"only on Sundays.*--input x=2x3x224x224:float32"):
        for_module(Never(), batch=2)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(3, 8)

    def forward(self, batch):
        return self.left(batch["left"]) + self.right(batch["right"])


class InPairs(ByName):
    def forward(self, batch):
        left, (right, other) = batch
        return self.left(left) + self.right(right) + self.right(other)


@pytest.mark.parametrize("kind", [ByName, InPairs])
def test_a_mapping_or_a_nested_tuple_is_asked_for(kind):
    with pytest.raises(UnreadableModel, match="a mapping or a tuple of tensors") as caught:
        for_module(kind())
    assert "\n" not in str(caught.value)


def test_a_cache_inside_the_module_is_left_alone():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 3), {}

        def forward(self, x):
            self.seen[x.shape] = self.layer(x)
            self.last = x
            return self.seen[x.shape]

    module = Caches()
    for_module(module, batch=2)
    assert module.seen == {}
    assert not hasattr(module, "last")


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("2x3x224x224:float32", (2, 3, 224, 224), torch.float32),
        ("7", (7,), torch.float32),
        ("4x16:int64", (4, 16), torch.int64),
        ("scalar:bool", (), torch.bool),
    ],
)
def test_spec(text, shape, dtype):
    assert parse_spec("x", text) == InputSpec(shape, dtype)


@pytest.mark.parametrize("text", ["", "2x", "x", "0x3", "2x-3", "2x3:float31", "2 3", "99999x99999x9"])
def test_spec_that_means_nothing(text):
    with pytest.raises(UsageError, match=r"^--input x=[^\n]*$"):
        parse_spec("x", text)


def test_data(tmp_path):
    from safetensors.torch import save_file

    x, ids = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([[1, 2]], dtype=np.int32)
    np.savez(tmp_path / "b.npz", x=x, ids=ids)
    np.save(tmp_path / "b.npy", x)
    save_file({"x": torch.from_numpy(x).bfloat16()}, tmp_path / "b.safetensors")
    data = load_data(tmp_path / "b.npz")
    assert set(data) == {"x", "ids"}
    matched = match_data(data, {"ids": torch.int64, "x": torch.float32})
    assert matched["ids"].dtype == torch.int64
    assert torch.equal(match_data(load_data(tmp_path / "b.npy"), {"image": None})["image"], torch.from_numpy(x))
    assert torch.equal(load_data(tmp_path / "b.safetensors")["x"], torch.from_numpy(x).bfloat16())
    with pytest.raises(UsageError, match="the values are float32; expected int64"):
        match_data(data, {"x": torch.int64, "ids": None})
    with pytest.raises(UsageError, match="no input 'ids'"):
        match_data(data, {"x": None})


def test_data_that_would_run_code_or_is_damaged(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 9)
    (tmp_path / "text.csv").write_text("1,2")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    for name in ("objects.npy", "short.npz", "short.safetensors", "text.csv", "absent.npy", "text.npy"):
        with pytest.raises(UsageError, match=r"^--data [^\n]*$"):
            load_data(tmp_path / name)


def exported(module, inputs, axes):
    import onnx

    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), inputs, held, dynamo=False, input_names=list(axes), dynamic_axes={k: v for k, v in axes.items() if v}
        )
    proto = onnx.load_from_string(held.getvalue())
    checkpoint = load_proto(proto)
    return from_onnx(checkpoint.program, checkpoint.arrays)


def test_graph_with_symbolic_sizes():
    graph = exported(Digits(), (torch.randn(2, 1, 28, 28),), {"x": {0: "n", 2: "h", 3: "w"}})
    (x,) = for_graph(graph, batch=4)
    assert tuple(x.shape) == (4, 1, 28, 28)


def test_graph_with_ids_and_positions():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(70, 8), nn.Embedding(12, 8)

        def forward(self, ids, pos, mask):
            return (self.tokens(ids) + self.places(pos)) * mask.unsqueeze(-1)

    one = torch.ones(2, 5, dtype=torch.int64)
    free = {0: "n", 1: "t"}
    graph = exported(Ids(), (one, one, one), {"ids": free, "pos": free, "mask": free})
    assert tables(graph) == {"ids": 70, "pos": 12}
    ids, pos, mask = for_graph(graph, batch=3)
    assert tuple(ids.shape) == (3, 16)
    assert int(ids.max()) < 70
    assert pos[0].tolist() == [*range(12), 0, 1, 2, 3]
    assert bool((mask == 1).all())


def test_fixed_sizes_are_kept():
    graph = exported(Flattens(), (torch.randn(2, 1, 28, 28),), {"x": {}})
    assert graph.inputs == (Input("x", (2, 1, 28, 28), torch.float32),)
    assert [tuple(v.shape) for v in for_graph(graph, batch=8)] == [(2, 1, 28, 28)]
