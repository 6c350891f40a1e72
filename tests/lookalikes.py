"""Healthy networks that look like faults: each initialized as its paper or its reference implementation does it."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

TOKENS = 64


def draw(layer, std, bias=0.0):
    """N(0, std²), and a constant bias where there is one."""
    nn.init.normal_(layer.weight, 0, std)
    if getattr(layer, "bias", None) is not None:
        nn.init.constant_(layer.bias, bias)
    return layer


class Residual(nn.Module):
    """x + scale * branch(norm(x))."""

    def __init__(self, branch, norm=None, scale=None):
        super().__init__()
        self.norm, self.branch = norm or nn.Identity(), branch
        self.scale = None if scale is None else nn.Parameter(scale)

    def forward(self, x):
        y = self.branch(self.norm(x))
        return x + (y if self.scale is None else self.scale * y)


class Attention(nn.Module):
    """`kv` heads of keys and values for `heads` of queries, in separate matrices or in one; a bias on the scores if given."""

    def __init__(self, width, heads=4, kv=4, *, packed=False, bias=None, make=nn.Linear):
        super().__init__()
        self.heads, self.kv, self.size, self.bias = heads, kv, width // heads, bias
        sizes = [heads * self.size, kv * self.size, kv * self.size]
        self.sizes, self.packed = sizes, packed
        self.into = make(width, sum(sizes)) if packed else nn.ModuleList(make(width, n) for n in sizes)
        self.out = make(heads * self.size, width)

    def forward(self, x):
        q, k, v = self.into(x).split(self.sizes, -1) if self.packed else (m(x) for m in self.into)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.size)
        if self.bias is not None:
            scores = scores + self.bias(x.shape[1])
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def feed_forward(width, act=nn.GELU, make=nn.Linear):
    return nn.Sequential(make(width, 4 * width), act(), make(4 * width, width))


def words(batch=8, length=12):
    return torch.randint(1, TOKENS, (batch, length))


def of_std(std, **more):
    """A maker of linear layers N(0, std²) with zero biases."""
    return lambda i, o: draw(nn.Linear(i, o, **more), std)


# Sampling error and small layers.


def he(layer):
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def small_linear(width=32):
    k = max(4, width // 8)
    return nn.Sequential(he(nn.Linear(6, k)), nn.ReLU(), he(nn.Linear(k, k)), nn.ReLU(), nn.Linear(k, 3)), torch.randn(32, 6)


def small_convolutions(width=32):
    k = max(4, width // 8)
    kernels = [he(nn.Conv2d(i, o, 3, padding=1)) for i, o in ((1, k), (k, 4), (4, k))]
    body = [m for kernel in kernels for m in (kernel, nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(k, 3)), torch.randn(16, 1, 8, 8)


def recurrent(width=32):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(TOKENS, width, padding_idx=0)
            self.cell, self.head = nn.LSTM(width, width, 2, batch_first=True), nn.Linear(width, 4)

        def forward(self, x):
            return self.head(self.cell(self.table(x))[0][:, -1])

    return Tagger(), words()


# Ties.


class Language(nn.Module):
    """A decoder-like stack under a table that is its head as well, where `tied`."""

    def __init__(self, width, block, depth=3, *, tied=True, std=0.02, norm=nn.LayerNorm, scale=1.0, shrink=1.0):
        super().__init__()
        self.table, self.scale, self.shrink = draw(nn.Embedding(TOKENS, width), std), scale, shrink
        self.blocks, self.norm = nn.Sequential(*(block() for _ in range(depth))), norm(width)
        self.head = draw(nn.Linear(width, TOKENS, bias=False), std)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.table(x) * self.scale)) * self.shrink)


def tied_head(width=32):
    """GPT-2 (Radford et al. 2019): 0.02 everywhere, the residual projections less by 1/sqrt(2L)."""
    depth = 3

    def block():
        attention, mlp = Attention(width, packed=True, make=of_std(0.02)), feed_forward(width, make=of_std(0.02))
        for last in (attention.out, mlp[2]):
            draw(last, 0.02 / math.sqrt(2 * depth))
        return nn.Sequential(Residual(attention, nn.LayerNorm(width)), Residual(mlp, nn.LayerNorm(width)))

    return Language(width, block, depth), words()


def shared_layers(width=32):
    """ALBERT (Lan et al. 2020): one block, applied several times."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = draw(nn.Embedding(TOKENS, width, padding_idx=0), 0.02)
            self.attention, self.mlp = Attention(width, make=of_std(0.02)), feed_forward(width, make=of_std(0.02))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
            self.head = draw(nn.Linear(width, 4), 0.02)

        def forward(self, x):
            x = self.norms[0](self.table(x))
            for _ in range(4):
                x = self.norms[1](x + self.attention(x))
                x = self.norms[2](x + self.mlp(x))
            return self.head(x[:, 0])

    return Shared(), words()


def tied_autoencoder(width=32):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Linear(24, width)
            self.back = nn.Parameter(torch.zeros(24))

        def forward(self, x):
            return F.linear(torch.tanh(self.into(x)), self.into.weight.t(), self.back)

    return Tied(), torch.randn(32, 24)


# Shapes.


def grouped_queries(width=32, kv=2, packed=False):
    """Llama 3 (torchtitan): 0.02 truncated, the last matrices of branches less; two heads of keys for four of queries."""
    depth = 3

    def make(i, o, std=0.02):
        layer = nn.Linear(i, o, bias=False)
        nn.init.trunc_normal_(layer.weight, 0, std)
        return layer

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = make(width, 3 * width), make(width, 3 * width)
            self.down = make(3 * width, width, 0.02 / math.sqrt(2 * depth))

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    def block():
        attention = Attention(width, 4, kv, packed=packed, make=make)
        nn.init.trunc_normal_(attention.out.weight, 0, 0.02 / math.sqrt(2 * depth))
        return nn.Sequential(Residual(attention, nn.RMSNorm(width)), Residual(Gated(), nn.RMSNorm(width)))

    return Language(width, block, depth, tied=False, norm=nn.RMSNorm), words()


def one_key_head(width=32):
    """Multi-query attention (Shazeer 2019), packed."""
    return grouped_queries(width, kv=1, packed=True)


def depthwise(width=32):
    """MobileNetV2 (torchvision): He by fan_out, BatchNorm behind every kernel."""
    blocks = []
    for _ in range(3):
        layers = []
        for i, o, k, groups in (
            (width, 2 * width, 1, 1),
            (2 * width, 2 * width, 3, 2 * width),
            (2 * width, width, 1, 1),
        ):
            conv = nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
            layers += [conv, nn.BatchNorm2d(o), nn.ReLU6()]
        blocks.append(Residual(nn.Sequential(*layers[:-1])))
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    body = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU6(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, draw(nn.Linear(width, 5), 0.01)), torch.randn(16, 3, 10, 10)


def layer_scale(width=32, start=1e-6):
    """ConvNeXt (Liu et al. 2022): a truncated 0.02 everywhere, each branch times 1e-6."""

    class Last(nn.Module):
        def forward(self, x):
            return x.movedim(1, -1)

    class First(nn.Module):
        def forward(self, x):
            return x.movedim(-1, 1)

    def block():
        return nn.Sequential(
            *(nn.Conv2d(width, width, 7, padding=3, groups=width), Last(), nn.LayerNorm(width)),
            *(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), First()),
        )

    blocks = [Residual(block(), None, torch.full((width, 1, 1), start)) for _ in range(3)]
    net = nn.Sequential(
        *(nn.Conv2d(3, width, 2, 2), nn.GroupNorm(1, width), *blocks),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 5)),
    )
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    return net, torch.randn(8, 3, 12, 12)


# Tables.


def padding_row(width=32):
    """A bag of words whose row 0 is padding, as the framework makes it."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(TOKENS, width, padding_idx=0)
            self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

        def forward(self, x):
            return self.body(self.table(x).mean(1))

    x = words()
    x[:, 9:] = 0
    return Bag(), x


def relative_positions(width=32, start=0.02):
    """Swin (Liu et al. 2021): a small table of scores by distance, truncated 0.02, one for each head."""

    class Table(nn.Module):
        def __init__(self, heads=4, most=16):
            super().__init__()
            self.table, self.most = nn.Parameter(torch.zeros(2 * most - 1, heads)), most
            nn.init.trunc_normal_(self.table, std=start) if start else None

        def forward(self, n):
            at = torch.arange(n)
            return self.table[at[:, None] - at + self.most - 1].permute(2, 0, 1)

    def make(i, o):
        layer = nn.Linear(i, o)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    def block():
        attention = Attention(width, packed=True, bias=Table(), make=make)
        return nn.Sequential(
            Residual(attention, nn.LayerNorm(width)), Residual(feed_forward(width, make=make), nn.LayerNorm(width))
        )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.blocks = make(10, width), nn.Sequential(*(block() for _ in range(3)))
            self.norm, self.head = nn.LayerNorm(width), make(width, 5)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.into(x))).mean(1))

    return Net(), torch.randn(8, 12, 10)


def zero_relative_positions(width=32):
    """BEiT (Bao et al. 2022): the table starts at zero."""
    return relative_positions(width, 0.0)


def bucketed_positions(width=32):
    """T5 (Raffel et al. 2020): no scale on the scores but in the queries, a table of buckets drawn with the model's width."""

    class Buckets(nn.Module):
        def __init__(self, heads=4):
            super().__init__()
            self.table = draw(nn.Embedding(16, heads), width**-0.5)

        def forward(self, n):
            at = torch.arange(n)
            return self.table((at[:, None] - at).abs().clamp(max=15)).permute(2, 0, 1)

    shared = Buckets()

    def block():
        attention = Attention(width, bias=shared, make=of_std(width**-0.5, bias=False))
        mlp = nn.Sequential(
            draw(nn.Linear(width, 4 * width, bias=False), width**-0.5),
            nn.ReLU(),
            draw(nn.Linear(4 * width, width, bias=False), (4 * width) ** -0.5),
        )
        return nn.Sequential(Residual(attention, nn.RMSNorm(width)), Residual(mlp, nn.RMSNorm(width)))

    return Language(width, block, std=1.0, norm=nn.RMSNorm, shrink=width**-0.5), words()


# Branches that begin at nothing.


def zero_gammas(width=32):
    """Goyal et al. 2017: the last BatchNorm of every branch starts at zero."""
    blocks = []
    for _ in range(3):
        branch = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )
        for m in branch:
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(branch[-1].weight)
        blocks += [Residual(branch), nn.ReLU()]
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    return nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(), *blocks, *head), torch.randn(16, 3, 10, 10)


def rezero(width=32):
    """Bachlechner et al. 2020: Xavier, each branch times one number that starts at zero, no norm."""
    blocks = []
    for _ in range(6):
        mlp = feed_forward(width, nn.ReLU)
        for m in (mlp[0], mlp[2]):
            nn.init.xavier_normal_(m.weight, math.sqrt(2))
        blocks.append(Residual(mlp, None, torch.zeros(1)))
    return nn.Sequential(nn.Linear(10, width), *blocks, nn.Linear(width, 5)), torch.randn(32, 10)


class Adapted(nn.Module):
    """LoRA (Hu et al. 2022; peft): a frozen layer and B A x beside it, A as a linear layer, B zero."""

    def __init__(self, base, rank=4, alpha=8):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.scale * self.b(self.a(x))


def adapters(width=32):
    """On a base that was not trained before, as of a test."""

    def layer(i, o):
        return Adapted(nn.Linear(i, o))

    return nn.Sequential(nn.Linear(10, width), nn.ReLU(), layer(width, width), nn.ReLU(), layer(width, 5)), torch.randn(32, 10)


# Conventions of their own.


class FromZero(nn.Module):
    """Gemma's RMSNorm, whose scale is 1 + weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def zero_centred_norms(width=32):
    """Gemma (2024): such norms before and behind every branch, a table times sqrt(width), tied."""

    def block():
        parts = Attention(width, 4, 1, make=of_std(0.02, bias=False)), feed_forward(width, make=of_std(0.02, bias=False))
        return nn.Sequential(*(Residual(nn.Sequential(p, FromZero(width)), FromZero(width)) for p in parts))

    return Language(width, block, norm=FromZero, scale=math.sqrt(width)), words()


class Sine(nn.Module):
    def __init__(self, frequency):
        super().__init__()
        self.frequency = frequency

    def forward(self, x):
        return torch.sin(self.frequency * x)


def siren(width=32, frequency=30.0):
    """Sitzmann et al. 2020: U(1/n) in the first layer, U(sqrt(6/n)/w0) in the others."""
    sizes = (2, width, width, width, width)
    layers = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(n, m)
        bound = 1 / n if i == 0 else math.sqrt(6 / n) / frequency
        nn.init.uniform_(layer.weight, -bound, bound)
        layers += [layer, Sine(frequency)]
    last = nn.Linear(width, 1)
    bound = math.sqrt(6 / width) / frequency
    nn.init.uniform_(last.weight, -bound, bound)
    return nn.Sequential(*layers, last), 2 * torch.rand(64, 2) - 1


def trained(net, x, steps=60, rate=3e-3):
    """The net after `steps` of Adam on something that can be learnt: the input itself, or what a fixed function says of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        with torch.no_grad():
            out = net(x)
        table = torch.randn(TOKENS, out.shape[-1]) if not x.is_floating_point() else None
        teacher = torch.randn(x[0].numel(), out.shape[-1])
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], rate)
        for _ in range(steps):
            y = torch.randint(1, TOKENS, x.shape) if table is not None else torch.randn_like(x)
            if table is not None:
                target = y if out.dim() == 3 else table[y].mean(1).argmax(-1)
                loss = F.cross_entropy(net(y).flatten(0, -2), target.flatten())
            elif out.shape == x.shape or out.shape[-1] == 1:
                loss = F.mse_loss(net(y), y if out.shape == x.shape else torch.sin(4 * y[:, :1]))
            else:
                loss = F.cross_entropy(net(y), (y.flatten(1) @ teacher).argmax(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def orthogonal_rows(width=32):
    """Saxe et al. 2014, at changing widths: the spread is that of the longer side."""
    sizes = (24, 6, width // 2, 6 * width, width // 2, width // 2, 6 * width)
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 4)), torch.randn(32, 24)


LOOKALIKES = (
    *(small_linear, small_convolutions, recurrent, tied_head, shared_layers, tied_autoencoder, grouped_queries, one_key_head),
    *(depthwise, layer_scale, padding_row, relative_positions, zero_relative_positions, bucketed_positions, zero_gammas),
    *(rezero, adapters, zero_centred_norms, siren, orthogonal_rows),
)
