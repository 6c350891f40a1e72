"""A mean over what a norm has centred is named, by both doors, and no layer is blamed; other means are left alone."""

import pytest
import torch
from torch import nn

import initaudit

IMAGES = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Mean(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.mean(self.dims)


class Centred(nn.Module):
    """A normalization in its own words."""

    def forward(self, x):
        x = x - x.mean((2, 3), keepdim=True)
        return x / (x.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def net(*middle):
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(*convs, *middle, nn.Linear(16, 5))


def shifted():
    norm = nn.InstanceNorm2d(16, affine=True)
    nn.init.normal_(norm.bias)
    return norm


POOL = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
LOST = {
    "InstanceNorm and a pooling": lambda: net(nn.InstanceNorm2d(16), POOL),
    "with scale and shift": lambda: net(shifted(), Mean(2, 3)),
    "GroupNorm of one channel each": lambda: net(nn.GroupNorm(16, 16), Mean(-2, -1)),
    "a convolution in between": lambda: net(nn.InstanceNorm2d(16), nn.Conv2d(16, 16, 1), Mean(2, 3)),
    "own words": lambda: net(Centred(), Mean(2, 3)),
}


def alarms(found):
    return [(f.code, f.severity) for f in found.findings if f.severity != "info"]


@pytest.mark.parametrize("build", LOST.values(), ids=LOST)
def test_the_norm_is_named(build):
    found = initaudit.audit(build(), IMAGES)
    assert alarms(found) == [("IA209", "error")]


def test_the_message_says_where_and_what_to_do():
    (finding,) = [f for f in initaudit.audit(LOST["InstanceNorm and a pooling"](), IMAGES).findings if f.severity == "error"]
    assert finding.site == "3"
    assert "the pool at 4.0 averages over the values that the instance_norm at 3 has centred" in finding.message
    assert "between instance_norm at 3 and 4.0" in finding.help


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_in_a_file_too(tmp_path):
    path = tmp_path / "model.onnx"
    torch.onnx.export(LOST["with scale and shift"]().eval(), (IMAGES,), path, dynamo=False)
    assert ("IA209", "error") in alarms(initaudit.audit(path))


class Excited(nn.Module):
    """The mean of a centred signal gates it: the gate is the same for every input, and the signal goes on."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.InstanceNorm2d(16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.norm(x)
        return torch.relu(x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None])


def lost_before():
    model = net(nn.BatchNorm2d(16), nn.ReLU(), Mean(2, 3))
    nn.init.zeros_(model[0].weight)
    return model


KEPT = {
    "nothing that differs": lost_before,
    "an activation in between": lambda: net(nn.InstanceNorm2d(16), nn.ReLU(), Mean(2, 3)),
    "groups of several channels": lambda: net(nn.GroupNorm(4, 16), Mean(2, 3)),
    "BatchNorm": lambda: net(nn.BatchNorm2d(16), Mean(2, 3)),
    "a way past it": lambda: net(Excited(), Mean(2, 3)),
    "a norm behind a norm": lambda: net(nn.InstanceNorm2d(16), Centred(), nn.ReLU(), Mean(2, 3)),
}


@pytest.mark.parametrize("build", KEPT.values(), ids=KEPT)
def test_other_means_are_left_alone(build):
    assert "IA209" not in {f.code for f in initaudit.audit(build(), IMAGES).findings}
