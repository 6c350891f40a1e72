"""A norm over one value is named, by both doors; norms over more are left alone."""

import pytest
import torch
from torch import nn

import initaudit

IMAGES = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))
X = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))


def convs(*tail):
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *tail)


def pooled(norm):
    return convs(nn.AdaptiveAvgPool2d(1), norm, nn.Flatten(), nn.Linear(16, 5))


def single(norm):
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1), norm, nn.Linear(1, 5))


class Gate(nn.Module):
    """Squeeze and excitation, beside which the signal goes on."""

    def __init__(self, groups):
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.norm, self.head = nn.GroupNorm(groups, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        gate = torch.relu(self.norm(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head((x * torch.sigmoid(self.excite(gate))).mean((2, 3)))


def alarms(model, inputs):
    return [(f.code, f.severity, f.site) for f in initaudit.audit(model, inputs).findings if f.severity != "info"]


ONE = {
    "GroupNorm": (lambda: pooled(nn.GroupNorm(16, 16)), IMAGES),
    "GroupNorm without a scale": (lambda: pooled(nn.GroupNorm(16, 16, affine=False)), IMAGES),
    "LayerNorm(1)": (lambda: single(nn.LayerNorm(1)), X),
}


@pytest.mark.parametrize(("build", "given"), ONE.values(), ids=ONE)
def test_a_norm_of_one_value_is_named(build, given):
    torch.manual_seed(0)
    assert alarms(build(), given) == [("IA208", "error", "3")]


def test_beside_another_way_it_is_a_warning():
    torch.manual_seed(0)
    assert alarms(Gate(16), IMAGES) == [("IA208", "warning", "norm")]


MORE = {
    "one group": (lambda: pooled(nn.GroupNorm(1, 16)), IMAGES),
    "in front of the pooling": (
        lambda: convs(nn.GroupNorm(16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
        IMAGES,
    ),
    "InstanceNorm of maps": (lambda: convs(nn.InstanceNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES),
    "BatchNorm of one unit": (lambda: single(nn.BatchNorm1d(1)), X),
    "two values": (lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2), nn.LayerNorm(2), nn.Linear(2, 5)), X),
    "a gate over all channels": (lambda: Gate(1), IMAGES),
}


@pytest.mark.parametrize(("build", "given"), MORE.values(), ids=MORE)
def test_norms_of_more_values_are_left_alone(build, given):
    torch.manual_seed(0)
    assert alarms(build(), given) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("build", "given"), ONE.values(), ids=ONE)
def test_in_a_file_too(build, given, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    torch.onnx.export(build().eval(), (given,), path, dynamo=False)
    assert [(code, severity) for code, severity, _ in alarms(path, [given])] == [("IA208", "error")]
