"""What may stand for a model on the command line: folders of several, addresses, standard input, code that draws."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from initaudit import cli
from initaudit.load import remote
from initaudit.load.collection import models_in

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def audited(capsys, *arguments):
    """(exit status, the models of the JSON report, stderr)"""
    status = cli.run([*arguments, "--format", "json"])
    out, err = capsys.readouterr()
    return status, json.loads(out)["models"] if out else [], err


def weights(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    save_file({name: rng.normal(0, 0.1, (8, 8)).astype(np.float32) for name in names}, path)


def test_every_model_of_a_folder_is_audited(capsys):
    Path("models").mkdir()
    for name in ("good/he_mlp.onnx", "broken/zero.onnx"):
        shutil.copy(FIXTURES / name, "models")
    weights(Path("models/net.safetensors"), "fc.weight")
    torch.save({"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}, "models/optimizer.pt")
    Path("models/README.md").write_text("read me")
    status, models, err = audited(capsys, "models")
    assert (status, err) == (1, "")
    assert [Path(m["source"]).name for m in models] == ["he_mlp.onnx", "net.safetensors", "zero.onnx"]


def test_what_belongs_together_is_one_model():
    weights(Path("shards/model-00001-of-00002.safetensors"), "a.weight")
    weights(Path("shards/model-00002-of-00002.safetensors"), "b.weight")
    weights(Path("hub/model.safetensors"), "a.weight")
    weights(Path("hub/adapter.safetensors"), "b.weight")
    Path("hub/config.json").write_text("{}")
    weights(Path("one/model.safetensors"), "a.weight")
    for folder in ("shards", "hub", "one", "missing", __file__):
        assert models_in(folder) == (folder,)


def test_folders_below_are_searched_where_there_is_nothing_above():
    weights(Path("runs/a/model.safetensors"), "a.weight")
    weights(Path("runs/b/epoch1.safetensors"), "a.weight")
    weights(Path("runs/b/epoch2.safetensors"), "a.weight")
    weights(Path("runs/.hidden/model.safetensors"), "a.weight")
    weights(Path("runs/env/model.safetensors"), "a.weight")
    Path("runs/env/pyvenv.cfg").write_text("")
    Path("runs/loop").symlink_to("..")
    assert models_in("runs") == ("runs/a", "runs/b/epoch1.safetensors", "runs/b/epoch2.safetensors")


def test_a_folder_without_models_says_so(capsys):
    Path("empty/below").mkdir(parents=True)
    status, _, err = audited(capsys, "empty")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "empty: a folder without a model" in err


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def copyfile(self, source, outputfile):
            # A connection that breaks off in the middle.
            data = source.read()
            outputfile.write(data[: len(data) // 2] if "broken" in self.path else data)

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def test_an_address_is_fetched_and_named_in_the_report(capsys, server):
    folder, address = server
    shutil.copy(FIXTURES / "broken/zero.onnx", folder / "zero net.onnx")
    status, models, err = audited(capsys, f"{address}/zero%20net.onnx")
    assert (status, err) == (1, "")
    assert models[0]["source"] == f"{address}/zero%20net.onnx"
    assert not list(Path(remote.tempfile.gettempdir()).glob("initaudit-*/zero net.onnx")), "nothing stays behind"


def test_external_data_and_shards_come_along(capsys, server):
    folder, address = server
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        torch.onnx.export(model, (torch.randn(2, 64),), folder / "net.onnx", dynamo=True, external_data=True, verbose=False)
    assert (folder / "net.onnx.data").exists()
    assert audited(capsys, f"{address}/net.onnx")[0] == 0
    weights(folder / "model-00001-of-00002.safetensors", "a.weight")
    weights(folder / "model-00002-of-00002.safetensors", "b.weight")
    index = {"weight_map": {f"{name}.weight": f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", start=1)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    status, models, _ = audited(capsys, f"{address}/model.safetensors.index.json")
    assert (status, [layer["tensor"] for layer in models[0]["layers"]]) == (0, ["a.weight", "b.weight"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    assert "its shards lie outside its folder" in audited(capsys, f"{address}/model.safetensors.index.json")[2]


def test_what_cannot_be_fetched_is_one_line(capsys, server, monkeypatch):
    folder, address = server
    shutil.copy(FIXTURES / "good/he_mlp.onnx", folder / "broken.onnx")
    monkeypatch.setattr(remote, "TIMEOUT", 2.0)
    for source, message in [
        (f"{address}/none.onnx", "the server answers 404"),
        (f"{address}/broken.onnx", "the connection ended after"),
        ("http://127.0.0.1:9/net.onnx", "cannot be fetched"),
        ("http://", "cannot be fetched"),
        ("hf://alone", "expected hf://owner/name"),
        ("memory://none/net.onnx", "cannot be fetched"),
        ("nothing://net.onnx", "cannot be fetched"),
    ]:
        if source.split(":")[0] in ("memory", "nothing"):
            pytest.importorskip("fsspec")
        status, models, err = audited(capsys, source, str(FIXTURES / "good/he_mlp.onnx"))
        assert status == 2
        assert message in err, err
        assert len(err.splitlines()) == 1
        assert models[1]["verdict"] == "pass", "the others are audited"


def test_other_file_systems_are_read_through_fsspec(capsys):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://bucket/zero.onnx", "wb") as file:
        file.write((FIXTURES / "broken/zero.onnx").read_bytes())
    assert audited(capsys, "memory://bucket/zero.onnx")[0] == 1


def test_the_hub_is_asked_for_models_only(capsys, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(repository, *, revision, allow_patterns, local_dir):
        asked.append((repository, revision, "*.safetensors" in allow_patterns))
        weights(Path(local_dir) / "model.safetensors", "a.weight")
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert audited(capsys, "hf://owner/net@main")[0] == 0
    assert asked == [("owner/net", "main", True)]


def test_more_than_the_disk_holds_is_refused(capsys, server, monkeypatch):
    folder, address = server
    shutil.copy(FIXTURES / "good/he_mlp.onnx", folder)
    monkeypatch.setattr(remote, "SPARE", 1 << 60)
    assert "than the" in audited(capsys, f"{address}/he_mlp.onnx")[2]


def test_standard_input_is_a_model(capsys, monkeypatch):
    for data, status in (((FIXTURES / "broken/zero.onnx").read_bytes(), 1), (b"", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        got, models, err = audited(capsys, "-")
        assert got == status
        assert models[0]["source"] == "-"
        assert (status == 2) == ("-: the file is empty" in err)


CODE = """
import random
import numpy as np
import torch

def net():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.mul_(1 + random.random() / 10 + np.random.rand() / 10)
    return model
"""


def test_a_module_that_draws_is_audited_alike_in_every_run(capsys, monkeypatch):
    Path("drawing_net.py").write_text(CODE)
    monkeypatch.syspath_prepend(".")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second, other = (audited(capsys, "drawing_net:net", "--seed", str(seed))[1] for seed in (3, 3, 4))
    assert first == second != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_device_that_is_not_there_is_one_line(capsys):
    for name in ("cuda:77", "nonsense"):
        status, _, err = audited(capsys, str(FIXTURES / "good/he_mlp.onnx"), "--device", name)
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"--device {name}" in err
