"""Small networks of the usual architectures with example inputs, and the ways in which torch writes them as ONNX."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import onnx
import torch
import torch.nn.functional as F
from torch import nn

Inputs = tuple[torch.Tensor, ...]


class Block(nn.Module):
    """ResNet's basic block, written with the in-place operators that torchvision uses."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.skip = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.skip(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(Block(16, 16), Block(16, 32, 2), Block(32, 32), Block(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1).flatten(1))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it, behind a norm and a ReLU."""

    def __init__(self, layers: int = 4, growth: int = 4) -> None:
        super().__init__()
        widths = [8 + growth * i for i in range(layers + 1)]
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1)) for w in widths[:-1]
        )
        self.norm, self.fc = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.GroupNorm(4, 16), nn.SiLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a = self.down1(x)
        h = F.silu(self.merge(torch.cat([a, self.up(self.down2(a))], 1)))
        return self.out(F.interpolate(h, scale_factor=2, mode="nearest"))


class Einsum(nn.Module):
    """A feed-forward layer with one matrix a head."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 4, 8) * 0.25)
        self.v = nn.Parameter(torch.randn(4, 8, 16) * 0.17)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        h = F.gelu(torch.einsum("bni,ihd->bnhd", x, self.w))
        return self.head(torch.einsum("bnhd,hdo->bno", h, self.v))


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 10, batch_first=True, **options)
        self.head = nn.Linear(20 if options.get("bidirectional") else 10, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class FirstOutput(nn.Module):
    """The first output alone, as exporters want it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)[0]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(8 * 144, 10)
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for p in stack.parameters():  # its layers start as copies of one another
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    return nn.Sequential(nn.Linear(12, 32), stack, nn.Linear(32, 5))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 200, "n_positions": 32}
    return _without_cache(GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return _without_cache(BertForSequenceClassification(BertConfig(**size, vocab_size=200, max_position_embeddings=32)))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**size, intermediate_size=172, vocab_size=200, max_position_embeddings=32)
    return _without_cache(LlamaForCausalLM(config))


def _without_cache(model: nn.Module) -> nn.Module:
    model.config.use_cache = False
    return FirstOutput(model)


def images() -> Inputs:
    return (torch.randn(4, 3, 16, 16),)


def tokens() -> Inputs:
    return (torch.randint(0, 200, (2, 12)),)


def series() -> Inputs:
    return (torch.randn(3, 7, 6),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "cnn": (cnn, images),
    "resnet": (ResNet, images),
    "densenet": (DenseNet, images),
    "unet": (UNet, images),
    "einsum": (Einsum, lambda: (torch.randn(3, 5, 16),)),
    "encoder": (encoder, lambda: (torch.randn(3, 7, 12),)),
    "gpt2": (gpt2, tokens),
    "bert": (bert, tokens),
    "llama": (llama, tokens),
    "bilstm": (lambda: Recurrent("LSTM", bidirectional=True, num_layers=2), series),
    "gru": (lambda: Recurrent("GRU"), series),
    "rnn": (lambda: Recurrent("RNN", nonlinearity="relu"), series),
}


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The network of that name, always with the same weights, and inputs for it."""
    make, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        module = make()
        return module, inputs()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn and log about themselves: none of it is about what is tested."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _dynamo(module: nn.Module, inputs: Inputs, optimize: bool, dynamic: bool) -> onnx.ModelProto:
    shapes = tuple({0: torch.export.Dim("batch", min=2)} for _ in inputs) if dynamic else None
    exported = torch.onnx.export(module.eval(), inputs, dynamo=True, optimize=optimize, verbose=False, dynamic_shapes=shapes)
    return exported.model_proto


def _legacy(module: nn.Module, inputs: Inputs, training: bool, dynamic: bool) -> onnx.ModelProto:
    file, modes = io.BytesIO(), torch.onnx.TrainingMode
    mode = modes.TRAINING if training else modes.EVAL
    names = [f"input_{i}" for i in range(len(inputs))]
    axes = {name: {0: "batch"} for name in names} if dynamic else None
    options = {"do_constant_folding": not training, "training": mode, "opset_version": 17}
    torch.onnx.export(module.train(training), inputs, file, dynamo=False, input_names=names, dynamic_axes=axes, **options)
    return onnx.load_from_string(file.getvalue())


# "keeps": norms stay norms and every weight stays in the file; the others fold norms into weights and tables into constants.
EXPORTERS: dict[str, Callable[[nn.Module, Inputs], onnx.ModelProto]] = {
    "dynamo": lambda m, x: _dynamo(m, x, False, False),
    "dynamo_dynamic": lambda m, x: _dynamo(m, x, False, True),
    "dynamo_optimized": lambda m, x: _dynamo(m, x, True, False),
    "legacy_training": lambda m, x: _legacy(m, x, True, False),
    "legacy_training_dynamic": lambda m, x: _legacy(m, x, True, True),
    "legacy": lambda m, x: _legacy(m, x, False, False),
}
KEEPS = ("dynamo", "dynamo_dynamic", "legacy_training", "legacy_training_dynamic")


def exportable(name: str, exporter: str) -> bool:
    """The older exporter has no operator for aten::diff, which the masks of two models of transformers use."""
    return not (name in ("gpt2", "llama") and exporter.startswith("legacy"))


CASES = [(name, exporter) for name in MODELS for exporter in EXPORTERS if exportable(name, exporter)]


@functools.cache
def exported(name: str, exporter: str) -> bytes:
    """The network of that name as an ONNX file."""
    module, inputs = build(name)
    without_noise(module)
    with torch.random.fork_rng(devices=[]), quiet():
        return EXPORTERS[exporter](module, inputs).SerializeToString()


def without_noise(module: nn.Module) -> nn.Module:
    """Dropout off, for training mode too."""
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    return module
