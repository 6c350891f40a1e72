"""What training drops always cuts a network off; what it drops at random does not."""

import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

import initaudit
from initaudit.graph.noise import drops_everything

X = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(8, 6, 20, generator=torch.Generator().manual_seed(0))


class Depth(nn.Module):
    """Stochastic depth as torchvision and timm write it: nothing is left of it in evaluation."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * (mask.div_(1 - self.p) if self.p < 1 else mask)


class Residual(nn.Module):
    def __init__(self, *rates):
        super().__init__()
        self.stem, self.head = nn.Linear(20, 32), nn.Linear(32, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), Depth(p)) for p in rates
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Functional(nn.Module):
    def __init__(self, p, *, training=True):
        super().__init__()
        self.first, self.head, self.p, self.on = nn.Linear(20, 32), nn.Linear(32, 5), p, training

    def forward(self, x):
        return self.head(functional.dropout(torch.relu(self.first(x)), self.p, self.training and self.on))


class SetUp(nn.Module):
    """ActNorm: the first call in training sets the parameters."""

    def __init__(self):
        super().__init__()
        self.shift, self.done = nn.Parameter(torch.zeros(20)), False

    def forward(self, x):
        if self.training and not self.done:
            self.shift.data.copy_(x.mean(0))
            self.done = True
        return x - self.shift


def plain(noise, before=nn.ReLU):
    return nn.Sequential(nn.Linear(20, 32), before(), noise, nn.Linear(32, 5))


def images(noise):
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), noise, nn.Flatten(), nn.Linear(16 * 36, 5))


PICTURES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CUT = {
    "dropout": (lambda: plain(nn.Dropout(1.0)), X, "(2)"),
    "an integer": (lambda: plain(nn.Dropout(1)), X, "(2)"),
    "dropout2d": (lambda: images(nn.Dropout2d(1.0)), PICTURES, "(2)"),
    "alpha dropout": (lambda: plain(nn.AlphaDropout(1.0), nn.SELU), X, "(2)"),
    "functional": (lambda: Functional(1.0), X, "dropout"),
    "of the inputs": (lambda: nn.Sequential(nn.Dropout(1.0), plain(nn.Identity())), X, "(0)"),
    "of the logits": (lambda: nn.Sequential(plain(nn.Identity()), nn.Dropout(1.0)), X, "(1)"),
    "stochastic depth": (lambda: Residual(1.0, 1.0, 1.0), X, "(blocks.0.4)"),
    "one block": (lambda: Residual(0.0, 0.1, 1.0, 0.0), X, "(blocks.2.4)"),
    "an attention": (lambda: nn.TransformerEncoderLayer(20, 4, 32, 1.0, batch_first=True), SEQUENCE, "(self_attn)"),
    "between the layers of an LSTM": (lambda: nn.LSTM(20, 16, 2, dropout=1.0, batch_first=True), SEQUENCE, "lstm"),
}


@pytest.mark.parametrize(("build", "given", "place"), CUT.values(), ids=CUT)
def test_what_is_dropped_always_is_named(build, given, place):
    torch.manual_seed(0)
    found = [f for f in initaudit.audit(build(), given).findings if f.severity == "error"]
    assert [f.code for f in found] == ["IA311"]
    assert "keeps nothing in training" in found[0].message
    assert place in found[0].message
    assert "below 1" in found[0].help


def wants_targets():
    class Detector(Functional):
        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("targets")
            return super().forward(x)

    return Detector(0.1)


HEALTHY = {
    "nearly all": (lambda: plain(nn.Dropout(0.99)), X),
    "held for evaluation": (lambda: plain(nn.Dropout(1.0)).eval(), X),
    "a part that is": (lambda: nn.Sequential(plain(nn.Dropout(1.0)).eval(), nn.Linear(5, 5)), X),
    "switched off by hand": (lambda: Functional(1.0, training=False), X),
    "stochastic depth": (lambda: Residual(0.1, 0.2, 0.5), X),
    "one layer of an LSTM": (lambda: nn.LSTM(20, 16, 1, dropout=1.0, batch_first=True), SEQUENCE),
    "a batch of one": (lambda: plain(nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.5))), X[:1]),
    "a forward that wants targets": (wants_targets, X),
}


@pytest.mark.parametrize(("build", "given"), HEALTHY.values(), ids=HEALTHY)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_chance_is_no_fault(build, given):
    torch.manual_seed(0)
    assert [f.message for f in initaudit.audit(build(), given).findings if f.severity != "info"] == []


def test_a_mask_that_chooses_nothing_cuts_nothing_off():
    class Sampled(nn.Module):
        """Scheduled sampling begins with a rate of zero."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20))

        def forward(self, x):
            if self.training:
                mask = torch.empty(x.shape[0], 1).bernoulli_(0.0)
                x = mask * self.body(x) + (1 - mask) * x
            return self.body(x)

    torch.manual_seed(0)
    assert initaudit.audit(Sampled(), X).verdict == "pass"


def test_the_module_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(20, 20), SetUp(), nn.BatchNorm1d(20), nn.Dropout(1.0), nn.Linear(20, 4))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    random = torch.get_rng_state()
    assert drops_everything(model, (X,), {})
    assert not model[1].done
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Setting `training`:UserWarning")
@pytest.mark.parametrize(("p", "verdict"), [(1.0, "fail"), (0.5, "pass")])
def test_a_graph_written_down_for_training(p, verdict, tmp_path):
    torch.manual_seed(0)
    file = io.BytesIO()
    mode = torch.onnx.TrainingMode.TRAINING
    torch.onnx.export(plain(nn.Dropout(p)), (X,), file, training=mode, do_constant_folding=False, dynamo=False)
    (tmp_path / "model.onnx").write_bytes(file.getvalue())
    assert initaudit.audit(tmp_path / "model.onnx").verdict == verdict


class Caching(nn.Module):
    """Keeps a table of places for the next call."""

    def __init__(self):
        super().__init__()
        self.tables, self.kept, self.last = {}, [], None

    def forward(self, x):
        if len(x) not in self.tables:
            self.tables[len(x)] = self.last = torch.arange(float(len(x)))[:, None]
            self.kept.append(self.last)
        return x + self.tables[len(x)]


def test_nothing_without_values_is_left_in_the_module():
    shared = nn.Linear(20, 20)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, Caching()), nn.Sequential(shared, nn.Dropout(0.5)))
    before = shared.weight
    assert not drops_everything(model, (X,), {})
    assert shared.weight is before
    assert model[2][1].tables == {}
    assert model[2][1].kept == []
    assert model[2][1].last is None
    assert model(X).sum().backward() is None
    assert type(shared.weight.grad) is torch.Tensor


@functools.cache
def places(count):
    """A table that forward shares between its calls, and with other modules."""
    return torch.arange(float(count))


def test_a_table_that_a_function_keeps_is_traced_as_before():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x):
            return self.layer(x) + places(20)

    torch.manual_seed(0)
    audit = initaudit.audit(Placed(), X)
    assert audit.report.notes == ()
    assert audit.findings == ()
