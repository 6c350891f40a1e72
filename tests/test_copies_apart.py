"""Copies that are sent to different places are no rank that is missing. Judge: their gradients."""

import pytest
import torch
from torch import nn

import initaudit

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def icnr(wide, times=4):
    with torch.no_grad():
        units = wide.weight.shape[0] // times
        drawn = torch.empty(units, *wide.weight.shape[1:])
        nn.init.kaiming_normal_(drawn)
        wide.weight.copy_(drawn.repeat_interleave(times, 0))
        nn.init.zeros_(wide.bias)
    return wide


class Up(nn.Module):
    """Twice the size by a convolution of four times the channels, spread by `spread`, read after `after`."""

    def __init__(self, spread, after=None, inner=32):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide = nn.Conv2d(3, 16, 3, padding=1), icnr(nn.Conv2d(16, 64, 3, padding=1))
        self.spread, self.after = spread, after or (lambda net, x, y: torch.relu(y))
        self.skip, self.act, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(inner if after is beside else 16, 3, 3, padding=1)

    def forward(self, x):
        return self.head(self.after(self, x, self.spread(self.wide(torch.relu(self.stem(x))))))


def shuffled(y):
    return nn.functional.pixel_shuffle(y, 2)


def by_hand(y):
    n, c, h, w = y.shape
    return y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def beside(net, x, y):
    return torch.cat([torch.relu(y), net.skip(nn.functional.interpolate(x, scale_factor=2))], 1)


APART = {
    "pixel_shuffle": (shuffled, None),
    "by hand": (by_hand, None),
    "behind PReLU and a norm": (shuffled, lambda net, x, y: net.norm(net.act(y))),
    "beside a skip": (shuffled, beside),
    "blurred": (
        shuffled,
        lambda net, x, y: nn.functional.avg_pool2d(nn.functional.pad(y, (1, 0, 1, 0), mode="replicate"), 2, 1),
    ),
    "a sum with a skip": (shuffled, lambda net, x, y: y + net.skip(nn.functional.interpolate(x, scale_factor=2))),
}


def codes(model, given=IMAGES):
    return {f.code for f in initaudit.audit(model, given).findings} & {"IA202", "IA205"}


@pytest.mark.parametrize(("spread", "after"), APART.values(), ids=APART)
def test_copies_in_different_places_are_meant(spread, after):
    assert codes(Up(spread, after)) == set()


def test_they_part_at_the_first_step():
    net = Up(shuffled)
    net(IMAGES).square().mean().backward()
    first, second = net.wide.weight.grad[0], net.wide.weight.grad[1]
    assert torch.equal(net.wide.weight[0], net.wide.weight[1])
    assert not torch.allclose(first, second, rtol=0.1)


def same_place(net):
    """Copies among the channels of one place, whatever the place."""
    net.wide.weight[:] = net.wide.weight[:4].repeat(16, 1, 1, 1)


def test_a_rank_that_is_missing_at_each_place_is_reported():
    net = Up(shuffled)
    with torch.no_grad():
        same_place(net)
    assert "IA205" in codes(net)


def test_copies_without_a_shuffle_are_reported():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), icnr(nn.Conv2d(16, 64, 3)), nn.ReLU(), nn.Conv2d(64, 3, 3)
    assert codes(nn.Sequential(*layers)) != set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("spread", [shuffled, by_hand])
def test_in_a_file_too(spread, tmp_path):
    path = tmp_path / "model.onnx"
    torch.onnx.export(Up(spread).eval(), (IMAGES,), path, dynamo=False)
    assert codes(path, [IMAGES]) == set()


def test_tokens_that_are_spread_over_a_grid():
    class Expand(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.wide, self.head = nn.Linear(3, 32), nn.Linear(32, 64), nn.Linear(16, 5)
            with torch.no_grad():
                self.wide.weight.copy_(torch.randn(16, 32).mul_(32**-0.5).repeat(4, 1))

        def forward(self, x):
            y = self.wide(torch.relu(self.stem(x.flatten(2).transpose(1, 2))))
            y = y.view(4, 8, 8, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(4, 256, 16)
            return self.head(torch.relu(y))

    assert codes(Expand()) == set()
