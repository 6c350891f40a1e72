"""Initializers that an exporter made of one weight, one for each call, are one weight again; copied layers stay several."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from zoo import EXPORTERS, quiet

from initaudit import audit, cli
from initaudit.load import load
from initaudit.load.onnx_file import load_proto

WIDTH, STEPS = 40, 4  # 1,600 values: the exporter merges equal constants of 1,024 values or fewer by itself


class Reader(nn.Module):
    """A recurrence over a sequence of tokens: torch's own layer, which the exporter takes apart into its steps."""

    def __init__(self, kind=nn.RNN, **options):
        super().__init__()
        self.words = nn.Embedding(20, 24)
        self.cell = kind(24, WIDTH, batch_first=True, **options)
        self.head = nn.Linear(WIDTH * (2 if options.get("bidirectional") else 1), 20)

    def forward(self, tokens):
        return self.head(self.cell(self.words(tokens))[0])


class Loop(nn.Module):
    """The same as a loop over time; states of three axes make the exporter fold each product's weight."""

    def __init__(self, layers=1):
        super().__init__()
        self.words, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.reads = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
        self.turns = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(layers)])

    def forward(self, tokens):
        x, kept = self.words(tokens), []
        states = [x.new_zeros(1, len(x), WIDTH) for _ in self.turns]
        for step in range(x.shape[1]):
            value = x[:, step][None]
            for i, (read, turn) in enumerate(zip(self.reads, self.turns, strict=True)):
                states[i] = value = torch.tanh(read(value) + turn(states[i]))
            kept.append(value[0])
        return self.head(torch.stack(kept, 1))


class Tower(nn.Module):
    """Blocks on sequences: one block several times, or copies of one."""

    def __init__(self, copies):
        super().__init__()
        block = nn.Linear(WIDTH, WIDTH)
        self.first, self.head = nn.Linear(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList([copy.deepcopy(block) if copies else block for _ in range(4)])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def tokens():
    return torch.randint(0, 20, (4, STEPS))


def exported(module, inputs):
    with quiet():
        return EXPORTERS["dynamo_optimized"](module, (inputs,))


def without_notes(model):
    """As what optimizes or converts a model leaves it."""
    bare = copy.deepcopy(model)
    del bare.graph.value_info[:]
    for node in bare.graph.node:
        del node.metadata_props[:]
    return bare


def codes(model):
    return {f.code for f in audit(model).findings if f.severity != "info"}


def weights(model, size):
    """(initializers with that many values, how many weights they are)."""
    found = [a for a in load_proto(model).arrays.values() if a.size == size]
    return len(found), len({a.storage or a.name for a in found})


UNROLLED = {
    "rnn": (Reader, (STEPS - 1, 1)),
    "two layers, both ways": (lambda: Reader(num_layers=2, bidirectional=True), None),
    "a loop over two layers": (lambda: Loop(2), (4 * STEPS, 4)),
}


@pytest.mark.parametrize("name", UNROLLED)
@pytest.mark.parametrize("notes", [True, False], ids=["noted", "bare"])
def test_the_steps_of_a_recurrence_are_one_layer(name, notes):
    make, counts = UNROLLED[name]
    torch.manual_seed(0)
    model = exported(make(), tokens())
    model = model if notes else without_notes(model)
    assert counts is None or weights(model, WIDTH * WIDTH) == counts
    assert codes(model) == set()


@pytest.mark.parametrize("notes", [True, False], ids=["noted", "bare"])
def test_a_recurrence_of_two_copied_layers_is_told(notes):
    torch.manual_seed(0)
    module = Loop(2)
    module.turns[1].weight.data.copy_(module.turns[0].weight)
    model = exported(module, tokens())
    assert "IA203" in codes(model if notes else without_notes(model))


def test_one_block_called_several_times_and_its_copies():
    torch.manual_seed(0)
    shared, copied = (exported(Tower(copies), torch.randn(8, 5, 20)) for copies in (False, True))
    assert weights(shared, WIDTH * WIDTH) == (4, 1)
    assert weights(copied, WIDTH * WIDTH) == (4, 4)
    assert codes(shared) == set()
    assert codes(copied) == codes(without_notes(copied)) == {"IA203"}


def test_copied_blocks_are_no_recurrence_whatever_they_are_given():
    """Each block takes channels of its own out of one condition: a part of a signal, but no step of a sequence."""

    class Conditioned(Tower):
        def forward(self, x):
            x, condition = self.first(x), x.repeat(1, 1, 8).chunk(4, -1)
            for block, part in zip(self.blocks, condition, strict=True):
                x = torch.tanh(block(x) + part)
            return self.head(x)

    torch.manual_seed(0)
    model = exported(Conditioned(copies=True), torch.randn(8, 5, 20))
    assert codes(without_notes(model)) == codes(model) == {"IA203"}


def test_values_decide_and_not_the_notes():
    """A file whose notes call different values one weight: they come from a stranger."""
    torch.manual_seed(0)
    model = exported(Tower(copies=False), torch.randn(8, 5, 20))
    held = [t for t in model.graph.initializer if list(t.dims) == [WIDTH, WIDTH]]
    for tensor in held[1:]:
        drawn = np.random.default_rng(0).normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        tensor.raw_data = drawn.tobytes()
    assert weights(model, WIDTH * WIDTH) == (4, 2)


def test_a_repair_reaches_every_copy(capsys, tmp_path):
    torch.manual_seed(0)
    module = Tower(copies=False)
    module.blocks = nn.ModuleList([module.blocks[0]] * 10)
    nn.init.normal_(module.blocks[0].weight, 0, 0.01)
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(exported(module, torch.randn(8, 5, 20)), source)
    assert cli.run(["fix", str(source), "-o", str(out)]) == 0, capsys.readouterr()
    before, after = load(source).arrays, load(out).arrays
    copies = [name for name, array in before.items() if array.shape == (WIDTH, WIDTH)]
    assert len(copies) == 10
    assert len({after[name].read().tobytes() for name in copies}) == 1
    assert after[copies[0]].read().std() > 5 * before[copies[0]].read().std()
