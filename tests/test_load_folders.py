"""Models of several files: shards with and without an index, distributed checkpoints, folders of several models."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_load_formats import stepped

from initaudit.errors import UnreadableModel
from initaudit.load import load


def test_hugging_face_folder(tmp_path: Path) -> None:
    model, optimizer = stepped()
    tensors = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(4)}
    save_file({"w0": tensors["w0"], "w1": tensors["w1"]}, tmp_path / "model-00001-of-00003.safetensors")
    save_file({"w2": tensors["w2"], "w3": tensors["w3"]}, tmp_path / "model-00002-of-00003.safetensors")
    where = {"w0": 1, "w1": 1, "w2": 2, "lost": 2, "absent": 3}
    index = {"weight_map": {name: f"model-0000{shard}-of-00003.safetensors" for name, shard in where.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "modeling_x.Net"}}))
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('executed')")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model, tmp_path / "training_args.bin")
    checkpoint = load(tmp_path)
    assert checkpoint.metadata["config"]["model_type"] == "x"
    assert sorted(checkpoint.arrays) == ["w0", "w1", "w2", "w3"]
    assert all(np.array_equal(checkpoint.arrays[name].read(), tensors[name]) for name in tensors)
    assert len(checkpoint.optimizer) == 3 * len(list(model.parameters()))
    problems = {(problem.code, problem.tensor) for problem in checkpoint.problems}
    assert problems == {("IA502", "lost"), ("IA502", "absent"), ("IA502", "w3"), ("IA505", "")}
    assert any("modeling_x.Net" in note for note in checkpoint.notes)


def test_index_that_points_outside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    checkpoint = load(folder)
    assert checkpoint.arrays == {}
    assert "lies outside" in checkpoint.problems[0].message


def test_shards_without_an_index(tmp_path: Path) -> None:
    for number in (1, 3):
        save_file({f"w{number}": np.ones(2, np.float32)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    checkpoint = load(tmp_path)
    assert sorted(checkpoint.arrays) == ["w1", "w3"]
    assert "2 of 3 shards" in checkpoint.problems[0].message


def test_several_models_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UnreadableModel, match="several models"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = stepped()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "step": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    checkpoint = load(tmp_path / "dcp")
    assert checkpoint.problems == ()
    for name, tensor in model.state_dict().items():
        assert np.array_equal(checkpoint.arrays[name].read(), tensor.numpy())
    assert len({array.storage for array in checkpoint.arrays.values()}) == len(checkpoint.arrays)
    assert len(checkpoint.optimizer) == 3 * len(list(model.parameters()))
    shard = next((tmp_path / "dcp").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert {problem.code for problem in load(tmp_path / "dcp").problems} == {"IA502"}
    shard.unlink()
    assert load(tmp_path / "dcp").arrays == {}


def test_storages_of_two_shards_are_not_tied(tmp_path: Path) -> None:
    for number in (1, 2):
        out = io.BytesIO()  # every archive that is written to a buffer counts its storages from archive/data/0
        torch.save({f"w{number}": torch.randn(3), f"v{number}": torch.randn(3)}, out)
        (tmp_path / f"pytorch_model-0000{number}-of-00002.bin").write_bytes(out.getvalue())
    storages = [array.storage for array in load(tmp_path).arrays.values()]
    assert len(set(storages)) == len(storages) == 4


def test_zero_shards_are_missing_tensors(tmp_path: Path) -> None:
    module = {"a.weight": torch.zeros(0), "b.bias": torch.zeros(0)}
    shapes = [{"a.weight": torch.Size([3, 4]), "b.bias": torch.Size([3])}]
    torch.save({"module": module, "param_shapes": shapes}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    inner = {"zero_stage": 3, "fp32_flat_groups": [torch.randn(15)]}
    torch.save({"optimizer_state_dict": inner}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    checkpoint = load(tmp_path)
    assert checkpoint.format == "deepspeed"
    assert {problem.code for problem in checkpoint.problems} == {"IA502"}
    assert any("2 of 2 parameters" in problem.message for problem in checkpoint.problems)
    assert len(checkpoint.optimizer) == 1
