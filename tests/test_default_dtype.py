"""A default type that the caller has set for their own tensors changes neither what is probed nor what is said."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import initaudit


class Made(nn.Module):
    """Forward makes tensors of the default type itself: masks, positions, first states."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn, self.attention = nn.Embedding(20, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, words):
        x = self.table(words) + torch.linspace(-1, 1, words.shape[1])[:, None]
        x = self.rnn(x, torch.zeros(1, len(x), 16))[0]
        q, k, v = self.attention(self.norm(x)).chunk(3, -1)
        hidden = torch.full((words.shape[1], words.shape[1]), -1e4).triu(1)
        return self.head(x + (q @ k.mT / 4 + hidden).softmax(-1) @ v)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def layers():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


WORDS = torch.randint(20, (32, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("made_up", [False, True])
@pytest.mark.parametrize(("build", "given"), [(layers, None), (Made, WORDS)], ids=["layers", "made in forward"])
def test_it_is_probed(default, build, given, made_up):
    torch.manual_seed(0)
    found = initaudit.audit(build(), None if made_up else torch.randn(64, 16) if given is None else given)
    assert "IA004" not in {f.code for f in found.findings}
    assert found.verdict == "pass"
    assert found.risk["untrainable"]["adam"] < 0.5
    assert torch.get_default_dtype() == default


def test_what_is_sick_is_told(default):
    torch.manual_seed(0)
    model = layers()
    nn.init.zeros_(model[2].weight)
    assert "IA307" in {f.code for f in initaudit.audit(model, torch.randn(64, 16)).findings}


def test_a_rehearsal_and_tangents(default):
    torch.manual_seed(0)
    found = initaudit.audit(layers(), torch.randn(64, 16), config={"rehearse": 5, "jvp": True})
    assert "IA004" not in {f.code for f in found.findings}
