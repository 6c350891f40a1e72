"""A graph follows the device that it is asked to run on, whatever the trace wrote into it; judged on the meta device."""

import pytest
import torch
from test_doors import through_torch
from zoo import MODELS

from initaudit import cli
from initaudit.graph.execute import Executor


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_module_is_bound_to_the_device_of_its_trace(name):
    """Initial states, positions, masks and buffers of integers are made or moved there: the meta device mixes with no other."""
    graph, inputs = through_torch(name)
    with torch.no_grad():
        result, *_ = Executor(graph, device="meta").run(*[x.to("meta") for x in inputs])
    assert result.device.type == "meta"


def test_a_device_that_is_not_there_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "without.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Linear(3, 2)\n")
    missing = "xpu" if not torch.xpu.is_available() else "hpu"
    assert cli.run(["without:net", "--device", missing]) == 2
    text = capsys.readouterr().err.strip()
    assert f"--device {missing}" in text
    assert "\n" not in text
