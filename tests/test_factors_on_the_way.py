"""Growth that no weight makes is put down to what forward multiplies and adds. Judge: the network mended as the help says."""

import pytest
import torch
from torch import nn

import initaudit

ROWS = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
DEPTH = 12


class Block(nn.Module):
    """A residual block, its sum taken `factor` times by `times`, its branch multiplied by `share`."""

    def __init__(self, times, share):
        super().__init__()
        self.layer, self.times, self.share = nn.Linear(32, 32), times, share
        nn.init.kaiming_normal_(self.layer.weight)

    def forward(self, x):
        return self.times(x + self.share * torch.relu(self.layer(x)))


def stack(times, share=1 / DEPTH):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(times, share) for _ in range(DEPTH)], nn.Linear(32, 5))


def exploding(model, given=ROWS):
    return [f for f in initaudit.audit(model, given).findings if f.code == "IA302"]


TIMES = {
    "times": lambda x: 1.5 * x,
    "divided": lambda x: x / (2 / 3),
    "in place": lambda x: x.mul_(1.5),
    "a tensor": lambda x: x * torch.tensor(1.5),
}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_a_factor_of_the_stream_is_named(times):
    (found,) = exploding(stack(times))
    assert "multiplications by 1.5 on the way" in found.message
    assert found.help.startswith("multiply by 1 in place of 1.5 at 0 (test_factors_on_the_way.py:")
    assert "kaiming" not in found.help
    assert "sums" not in found.help  # what is left without the factors is no growth
    assert exploding(stack(lambda x: x)) == []


def test_sums_are_named_where_they_grow_by_themselves():
    (found,) = exploding(stack(lambda x: x, 1.0))
    assert "multiplications" not in found.message
    assert found.help.startswith(f"divide what each of the {DEPTH - 1} sums adds to the signal by {DEPTH - 1}")
    assert exploding(stack(lambda x: x, 1 / (DEPTH - 1))) == []


def test_both_are_named():
    (found,) = exploding(stack(lambda x: 1.5 * x, 1.0))
    assert "in place of 1.5" in found.help
    assert "sums" in found.help


def test_what_a_division_takes_back_is_no_growth():
    (found,) = exploding(stack(lambda x: (x * 8.0) / 8.0, 1.0))
    assert "multiplications" not in found.message


def test_weights_that_are_too_large_are_drawn_anew():
    torch.manual_seed(0)
    layers = [f for _ in range(6) for f in (nn.Linear(32, 32), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=1.5)
    findings = initaudit.audit(nn.Sequential(*layers, nn.Linear(32, 5)), ROWS).findings
    assert "kaiming_normal_" in findings[0].help


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_in_a_file_too(tmp_path):
    path = tmp_path / "model.onnx"
    torch.onnx.export(stack(TIMES["times"]), (ROWS,), path, dynamo=False)
    (found,) = exploding(path, [ROWS])
    assert "multiplications by 1.5 on the way" in found.message
