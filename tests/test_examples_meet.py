"""Where the output of an example depends on others. Judge: autograd's gradient of one example's output at another's input."""

import pytest
import torch
from torch import nn

import initaudit

ROWS = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three layers, put together by `call`."""

    def __init__(self, call, inner=None, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.call, self.inner = call, inner() if inner is not None else None
        self.first, self.second, self.head = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.call(self, x)


def attention(axis):
    def call(net, x):
        scores = (net.first(x) @ net.second(x).transpose(1, 2)).softmax(axis)
        return net.head((scores @ net.first(x)).mean(1))

    return lambda: Net(call)


def recurrent(batch_first):
    return lambda: Net(lambda net, x: net.head(net.inner(x)[0][:, -1]), lambda: nn.LSTM(16, 32, batch_first=batch_first))


def reshaped(right):
    def call(net, x):
        h = torch.relu(net.first(x))
        return net.head((h if right else h.transpose(0, 1).reshape(x.shape[0], 6, 32)).mean(1))

    return lambda: Net(call)


def normalized(axis):
    return lambda: Net(lambda net, x: net.head(net.first(x)).log_softmax(axis), width=32)


def centred(net, x):
    h = net.first(x)
    return net.head(torch.relu((h - h.mean(0)) / (h.var(0) + 1e-5).sqrt()))


def split_into_heads(net, x):
    q, k = (f(x).view(len(x), 6, 4, 8).transpose(1, 2).reshape(len(x) * 4, 6, 8) for f in (net.first, net.second))
    h = (q @ k.transpose(1, 2)).softmax(-1) @ q
    return net.head(h.view(len(x), 4, 6, 8).transpose(1, 2).reshape(len(x), 6, 32))


def similarities(net, x):
    return nn.functional.normalize(net.first(x)) @ nn.functional.normalize(net.second(x)).T


# A network, its inputs, the operator at which examples meet
MEET = {
    "softmax over the batch": (attention(0), TOKENS, "softmax"),
    "a forgotten batch_first": (recurrent(False), TOKENS, "lstm"),
    "a reshape after a transpose": (reshaped(False), TOKENS, "reshape"),
    "log_softmax of the wrong axis": (normalized(0), ROWS, "log_softmax"),
    "statistics of the batch by hand": (lambda: Net(centred, width=32), ROWS, "mean"),
    "the same behind BatchNorm": (lambda: nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Softmax(0)), ROWS, "softmax"),
}


def remarks(model, given):
    return [f for f in initaudit.audit(model, given).findings if f.code == "IA315"]


@pytest.mark.parametrize(("build", "given", "where"), MEET.values(), ids=MEET)
def test_the_operator_at_which_examples_meet_is_named(build, given, where):
    (found,) = remarks(build(), given)
    assert found.severity == "info"
    assert f"they first meet in {where} at " in found.message


def test_the_line_is_named():
    (found,) = remarks(Net(similar_rows), TOKENS)
    assert "test_examples_meet.py:" in found.message
    assert found.location.file == __file__


def similar_rows(net, x):
    return net.head(net.first(x).mean(1).softmax(0))


ALONE = {
    "attention within an example": (attention(-1), TOKENS),
    "batch_first": (recurrent(True), TOKENS),
    "no reshape": (reshaped(True), TOKENS),
    "log_softmax of the classes": (normalized(1), ROWS),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)), ROWS),
    "BatchNorm in training": (
        lambda: nn.Sequential(nn.Conv1d(6, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14, 5)).train(),
        TOKENS,
    ),
    "heads folded into the batch": (lambda: Net(split_into_heads), TOKENS),
    "similarities of all with all": (lambda: Net(similarities, width=32), ROWS),
    "a loss": (lambda: Net(lambda net, x: net.head(net.first(x)).square().mean(), width=32), ROWS),
    "dropout": (lambda: nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 5)).train(), ROWS),
    "in place": (lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 5)), ROWS),
    "one example": (attention(0), TOKENS[:1]),
}


@pytest.mark.parametrize(("build", "given"), ALONE.values(), ids=ALONE)
def test_examples_that_do_not_meet_are_left_alone(build, given):
    assert remarks(build(), given) == []


def test_nodes_and_edges_are_no_examples():
    edges = torch.randint(0, 8, (2, 20), generator=torch.Generator().manual_seed(0))

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(32, 16), nn.Linear(16, 5)

        def forward(self, x, edges):
            h = torch.relu(self.first(x))
            return self.head(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))

    assert remarks(Sums(), (ROWS, edges)) == []


@pytest.mark.parametrize("name", ["softmax over the batch", "statistics of the batch by hand", "log_softmax of the wrong axis"])
def test_the_judge_agrees(name):
    build, given, _ = MEET[name]
    x = given.clone().requires_grad_()
    (slope,) = torch.autograd.grad(build()(x)[1].square().sum(), x)
    assert slope[0].abs().max() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("axis", "count"), [(0, 1), (-1, 0)])
def test_in_a_file_too(axis, count, tmp_path):
    path = tmp_path / "model.onnx"
    torch.onnx.export(attention(axis)().eval(), (TOKENS,), path, dynamo=False)
    assert len(remarks(path, [TOKENS])) == count
