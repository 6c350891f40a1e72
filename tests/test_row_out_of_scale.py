"""A row far out of a drawn table is named for what comes of it, and tables as they are drawn and trained are left alone."""

import numpy as np
import pytest
import torch
from torch import nn

import initaudit

WORDS = torch.randint(1, 50, (64, 32), generator=torch.Generator().manual_seed(0))
WORDS[:, 8:] = 0


class Mean(nn.Module):
    def __init__(self, change, rows=50, std=1.0):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        with torch.no_grad():
            self.table.weight.mul_(std)
            change(self.table.weight)

    def forward(self, words):
        return self.head(self.table(words).mean(1))


class Last(Mean):
    def __init__(self, change):
        super().__init__(change)
        self.gru = nn.GRU(32, 32, batch_first=True)

    def forward(self, words):
        return self.head(self.gru(self.table(words))[0][:, -1])


def alarms(model, inputs=WORDS):
    return [(f.code, f.tensor) for f in initaudit.audit(model, inputs).findings if f.severity != "info"]


FAR = {
    "filled": lambda: Mean(lambda w: w[0].fill_(60.0)),
    "drawn": lambda: Mean(lambda w: w[0].mul_(60)),
    "the last": lambda: Mean(lambda w: w[-1].mul_(60)),
    "of a large table": lambda: Mean(lambda w: w[0].mul_(100), rows=3000, std=0.02),
    "before a recurrence": lambda: Last(lambda w: w[0].mul_(60)),
}


@pytest.mark.parametrize("build", FAR.values(), ids=FAR)
def test_the_row_is_named_and_nothing_behind_it(build):
    torch.manual_seed(0)
    assert alarms(build()) == [("IA112", "table.weight")]


def by_frequency(w):
    """Trained rows are as large as they were often met (Zipf's law)."""
    w.mul_(torch.from_numpy(40 / (1 + np.arange(50)) ** 0.5).float()[:, None])


NEAR = {
    "as drawn": lambda w: None,
    "padding of zeros": lambda w: w[0].zero_(),
    "three times": lambda w: w[0].mul_(3),
    "trained": by_frequency,
    "not finite": lambda w: w[0].fill_(float("nan")),
}


@pytest.mark.parametrize("change", NEAR.values(), ids=NEAR)
def test_other_tables_are_left_alone(change):
    torch.manual_seed(0)
    assert "IA112" not in {code for code, _ in alarms(Mean(change))}


def test_a_row_of_little_power_is_a_remark():
    torch.manual_seed(0)
    (found,) = [f for f in initaudit.audit(Mean(lambda w: w[0].mul_(20), rows=3000), WORDS + 1).findings if f.code == "IA112"]
    assert found.severity == "info"
