"""Generative architectures, initialised as their papers or their reference code do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_models import Built, image


def dcgan(module: nn.Module) -> nn.Module:
    """N(0, 0.02) in every convolution, norm scales N(1, 0.02) (Radford et al. 2016)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)
    return module


def generator() -> nn.Module:
    """DCGAN's generator of 32x32 images."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((64, 256), (256, 128), (128, 64))):
        layers += [nn.ConvTranspose2d(a, b, 4, 2 if i else 1, 1 if i else 0, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return dcgan(nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()))


def discriminator(norm: bool = True) -> nn.Module:
    """DCGAN's discriminator; without norms a critic with gradient penalty."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for a, b in ((64, 128), (128, 256)):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=not norm), *([nn.BatchNorm2d(b)] if norm else []), nn.LeakyReLU(0.2)]
    made = nn.Sequential(*layers, nn.Conv2d(256, 1, 4, 1, 0, bias=False), nn.Flatten())
    return dcgan(made) if norm else made


def spectral() -> nn.Module:
    """A discriminator under spectral norm (Miyato et al. 2018)."""
    sn = nn.utils.parametrizations.spectral_norm
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128)):
        layers += [sn(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), sn(nn.Linear(128 * 16, 1)))


class Equal(nn.Module):
    """StyleGAN's equalised layer: N(0, 1) stored, the law's std a factor at run time (Karras et al. 2018)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.zeros(o))
        self.scale = 1 / math.sqrt(i)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def mapping() -> nn.Module:
    """StyleGAN's mapping network: eight equalised layers, their signal scaled back by sqrt(2)."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [Equal(64, 64), Scaled()]
    return nn.Sequential(*layers, Equal(64, 32))


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * F.leaky_relu(x, 0.2)


class Vae(nn.Module):
    """A convolutional variational autoencoder; the noise is an input, so that a run repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4096, 128),
            nn.ReLU(),
        )
        self.mean, self.log_var = nn.Linear(128, 16), nn.Linear(128, 16)
        self.start = nn.Linear(16, 4096)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + noise * torch.exp(0.5 * log_var)
        return torch.sigmoid(self.decoder(F.relu(self.start(z)).view(-1, 64, 8, 8))), mean, log_var


class Drawing(nn.Module):
    """The same with its noise drawn inside, as most code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_var = (
            nn.Sequential(nn.Linear(64, 128), nn.ReLU()),
            nn.Linear(128, 8),
            nn.Linear(128, 8),
        )
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        return self.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)), mean, log_var


class Quantised(nn.Module):
    """VQ-VAE: the nearest row of a table, straight through (van den Oord et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 4, 2, 1))
        self.table = nn.Embedding(64, 16)
        nn.init.uniform_(self.table.weight, -1 / 64, 1 / 64)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1)
        near = (z.unsqueeze(-2) - self.table.weight).square().sum(-1).argmin(-1)
        code = self.table(near)
        straight = z + (code - z).detach()
        return self.decoder(straight.permute(0, 3, 1, 2)), z, code


def time_code(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of a time (Ho et al. 2020)."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class TimeBlock(nn.Module):
    """A residual block that is told the time; its last convolution starts at zero (Dhariwal & Nichol 2021)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, i), nn.Conv2d(i, o, 3, padding=1)
        self.time, self.norm2, self.conv2 = nn.Linear(64, o), nn.GroupNorm(8, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Diffusion(nn.Module):
    """A diffusion U-Net of two scales with attention in the middle; its output starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.stem, self.down1, self.shrink = nn.Conv2d(3, 32, 3, padding=1), TimeBlock(32, 32), nn.Conv2d(32, 32, 3, 2, 1)
        self.down2, self.middle, self.up2 = TimeBlock(32, 64), TimeBlock(64, 64), TimeBlock(128, 64)
        self.norm, self.qkv, self.proj = nn.GroupNorm(8, 64), nn.Conv1d(64, 192, 1), nn.Conv1d(64, 64, 1)
        self.up1, self.last, self.out = TimeBlock(96, 32), nn.GroupNorm(8, 32), nn.Conv2d(32, 3, 3, padding=1)
        for zero in (self.proj, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2)).view(b, 3, 4, c // 4, h * w).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h * w)
        return x + self.proj(y).view(b, c, h, w)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(time_code(t, 32))
        a = self.down1(self.stem(x), t)
        b = self.down2(self.shrink(a), t)
        c = self.attention(self.middle(b, t))
        c = F.interpolate(self.up2(torch.cat([c, b], 1), t), scale_factor=2.0, mode="nearest")
        return self.out(F.silu(self.last(self.up1(torch.cat([c, a], 1), t))))


class DiTBlock(nn.Module):
    """A block whose norms are shifted, scaled and gated by the time, all of it zero at the start (Peebles & Xie 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.modulation = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Linear(width, 6 * width),
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.modulation(F.silu(t))[:, None].chunk(6, -1)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x) * (1 + s1) + b1).view(b, n, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + g2 * self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + s2) + b2), approximate="tanh"))


class DiT(nn.Module):
    """A diffusion transformer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(4, width, 2, 2), nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 16)
        for block in self.blocks:
            for m in (block.qkv, block.proj, block.fc1, block.fc2):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(time_code(t, 32))
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, t)
        return self.out(self.norm(x))


class Coupling(nn.Module):
    """RealNVP's coupling of one half by the other, the identity at the start (Dinh et al. 2017; Kingma & Dhariwal 2018)."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip, self.net = flip, nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        if self.flip:
            a, b = b, a
        scale, shift = self.net(a).chunk(2, -1)
        b = b * torch.exp(torch.tanh(scale)) + shift
        return torch.cat([b, a] if self.flip else [a, b], -1)


class PixelCnn(nn.Module):
    """Gated masked convolutions (van den Oord et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1 if i == 0 else 32, 64, 5, padding=2) for i in range(4))
        self.out = nn.Conv2d(32, 16, 1)
        mask = torch.ones(5, 5)
        mask[2, 2:], mask[3:] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            a, b = F.conv2d(x, conv.weight * self.mask, conv.bias, padding=2).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            x = y if i == 0 else x + y
        return self.out(x)


def autoencoder() -> nn.Module:
    """A plain autoencoder."""
    widths = (64, 32, 8, 32, 64)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def _times(batch: int = 8) -> Tensor:
    return torch.randint(0, 1000, (batch,)).float()


GENERATIVE: dict[str, tuple[str, Callable[[], Built]]] = {
    "dcgan-generator": ("GAN", lambda: (generator(), (torch.randn(8, 64, 1, 1),))),
    "dcgan-discriminator": ("GAN", lambda: (discriminator(), (image(32),))),
    "wgan-critic": ("GAN", lambda: (discriminator(norm=False), (image(32),))),
    "sngan-discriminator": ("GAN", lambda: (spectral(), (image(32),))),
    "stylegan-mapping": ("GAN", lambda: (mapping(), (torch.randn(16, 64),))),
    "conv-vae": ("VAE", lambda: (Vae(), (image(32), torch.randn(8, 16)))),
    "mlp-vae-drawing": ("VAE", lambda: (Drawing(), (torch.randn(16, 64),))),
    "vq-vae": ("VAE", lambda: (Quantised(), (image(32),))),
    "autoencoder": ("VAE", lambda: (autoencoder(), (torch.rand(16, 64),))),
    "diffusion-unet": ("diffusion", lambda: (Diffusion(), (image(16), _times()))),
    "dit": ("diffusion", lambda: (DiT(), (image(16, 8, 4), _times()))),
    "realnvp": ("diffusion", lambda: (nn.Sequential(*(Coupling(bool(i % 2)) for i in range(6))), (torch.randn(32, 16),))),
    "pixelcnn": ("diffusion", lambda: (PixelCnn(), (image(16, 8, 1),))),
}
