"""Modules in wrappers are audited as what they hold: the same layers, the same numbers, and the wrapper still works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import initaudit
from initaudit.load.unwrap import unwrap

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about its own older wrappers
ROOT = Path(__file__).parent.parent


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.Tanh()), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def inner(wrap):
    model = net()
    model[2] = wrap(model[2])
    return model


def in_place(module):
    module.compile(backend="eager")
    return module


def forward_only(module):
    module.forward = compiled(module.forward)
    return module


def fsdp(module, **options):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


class Sized(nn.Sequential):
    """A module whose constructor needs arguments, as most do."""

    def __init__(self, parts):
        super().__init__(*parts)


def both_shards(module):
    fully_shard(module[2])
    return fully_shard(module)


WRAPPED = {
    "DataParallel": lambda: nn.DataParallel(net()),
    "DistributedDataParallel": lambda: nn.parallel.DistributedDataParallel(net()),
    "torch.compile": lambda: compiled(net()),
    "torch.compile of DistributedDataParallel": lambda: compiled(nn.parallel.DistributedDataParallel(net())),
    "torch.compile inside": lambda: inner(compiled),
    "compile in place": lambda: in_place(net()),
    "compile in place inside": lambda: inner(in_place),
    "a compiled forward": lambda: forward_only(net()),
    "FullyShardedDataParallel": lambda: fsdp(inner(fsdp)),
    "FullyShardedDataParallel, original parameters": lambda: fsdp(net(), use_orig_params=True),
    "fully_shard": lambda: both_shards(net()),
    "fully_shard of a constructor with arguments": lambda: both_shards(Sized(net())),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_module_is_audited_as_what_it_holds(one_process, name):
    x = torch.randn(8, 32)
    wrapped = WRAPPED[name]()
    before = {key: value.clone() for key, value in wrapped.state_dict().items()} if "Full" not in name else {}
    plain, found = initaudit.audit(net(), x), initaudit.audit(wrapped, x)
    assert [layer.tensor for layer in found.layers] == ["0.weight", "2.0.weight", "3.weight"]
    assert [layer.observed for layer in found.layers] == [layer.observed for layer in plain.layers]
    assert found.risk == plain.risk
    assert [f.code for f in found.findings] == [f.code for f in plain.findings]
    assert any(note.startswith("taken out of") for note in found.report.notes)
    wrapped(x).sum().backward()
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(wrapped.state_dict()[key] == value).all(), torch.tensor(True)), key


def test_a_plain_module_is_its_own_inside():
    model = net()
    assert unwrap(model) == (model, ())


def test_ties_stay_ties():
    model = nn.Sequential(nn.Linear(8, 8), compiled(nn.Linear(8, 8)))
    model[1]._orig_mod.weight = model[0].weight
    plain, _ = unwrap(model)
    assert plain[0].weight is plain[1].weight is model[0].weight


TWO_RANKS = """
import sys, torch, torch.distributed as dist, warnings
warnings.simplefilter("ignore")
rank, store, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sys.path.insert(0, sys.argv[4])
from test_wrapped_modules import both_shards, fsdp, net
import initaudit
x = torch.ones(8, 32)
wrapped = {"fully_shard": both_shards, "FSDP": fsdp}[kind](net())
plain, found = initaudit.audit(net(), x), initaudit.audit(wrapped, x)
assert found.risk == plain.risk and [l.observed for l in found.layers] == [l.observed for l in plain.layers]
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["FSDP", "fully_shard"])
def test_shards_of_two_processes_are_put_together(tmp_path, kind):
    arguments = [str(tmp_path / "store"), kind, str(Path(__file__).parent)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), *arguments],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
