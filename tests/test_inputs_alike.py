"""Example inputs without variation are named, and the network is judged on others. Judge: the same network on real rows."""

import pytest
import torch
from torch import nn

import initaudit

ROWS = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def layers(change=lambda m: None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    with torch.no_grad():
        change(model)
    return model


def convs():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 5))


class Tokens(nn.Module):
    """Ids and a mask of floating-point numbers, averaged."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, ids, mask):
        y = torch.relu(self.body(self.table(ids))) * mask.unsqueeze(-1)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))


def found(model, given):
    return {(f.code, f.severity) for f in initaudit.audit(model, given).findings}


ALIKE = {
    "zeros": (layers, torch.zeros(8, 32)),
    "ones": (layers, torch.ones(8, 32)),
    "one row": (layers, ROWS[:1].expand(8, -1)),
    "one example of zeros": (layers, torch.zeros(1, 32)),
    "images of zeros": (convs, torch.zeros(2, 3, 16, 16)),
    "one image": (convs, IMAGES[:1].repeat(4, 1, 1, 1)),
    "ids of zeros": (Tokens, (torch.zeros(8, 6, dtype=torch.long), torch.ones(8, 6))),
    "one text": (Tokens, (torch.tensor([[3, 1, 4, 1, 5, 9]]).expand(8, -1), torch.ones(8, 6))),
}


@pytest.mark.parametrize(("build", "given"), ALIKE.values(), ids=ALIKE)
def test_inputs_without_variation_are_the_inputs_fault(build, given):
    kept = [x.clone() for x in (given if isinstance(given, tuple) else (given,))]
    assert found(build(), given) == {("IA005", "info")}
    assert all(torch.equal(a, b) for a, b in zip(kept, given if isinstance(given, tuple) else (given,), strict=True))


def test_the_input_is_named():
    (finding,) = initaudit.audit(Tokens(), (torch.zeros(8, 6, dtype=torch.long), torch.ones(8, 6))).findings
    assert "(ids)" in finding.message


def silenced(model):
    model[2].weight.zero_()
    model[2].bias.fill_(-1)


@pytest.mark.parametrize("given", [torch.zeros(8, 32), ROWS[:1].expand(8, -1)])
def test_a_network_at_fault_is_still_reported(given):
    real = found(layers(silenced), ROWS)
    assert found(layers(silenced), given) - {("IA005", "info")} == real
    assert "error" in {severity for _, severity in real}


VARIED = {
    "rows": (layers, ROWS),
    "one example": (layers, ROWS[:1]),
    "one row that differs": (layers, torch.cat([torch.zeros(7, 32), ROWS[:1]])),
    "ids and a mask of ones": (
        Tokens,
        (torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0)), torch.ones(8, 6)),
    ),
    "one text alone": (Tokens, (torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.ones(1, 6))),
}


@pytest.mark.parametrize(("build", "given"), VARIED.values(), ids=VARIED)
def test_inputs_with_variation_are_taken_as_they_are(build, given):
    assert "IA005" not in {code for code, _ in found(build(), given)}


def test_made_up_inputs_are_none_of_the_users():
    assert "IA005" not in {code for code, _ in found(layers(), None)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_in_a_file_too(tmp_path):
    path = tmp_path / "model.onnx"
    torch.onnx.export(layers(), (ROWS,), path, dynamo=False)
    assert found(path, [torch.zeros(8, 32)]) == {("IA005", "info")}
