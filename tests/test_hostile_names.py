"""Names out of a stranger's file, from the file through the command to every output: none drives a terminal or a CI runner."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from initaudit import cli
from initaudit.progress import Progress
from initaudit.report import formats

HOSTILE = (
    "a\x1b[2J\x1b]0;owned\x07.weight",
    "a\x9b31m.weight",
    "b\r\nc\x0bd\x0ce\x85f\u2028g\u2029h.weight",
    "\n::error file=x,line=1::injected",
    "::add-mask::x.weight",
    "\n##[error]injected",
    "##vso[task.complete result=Succeeded]done.weight",
    "<script>alert(1)</script><img src=x onerror=alert(1)>.weight",
    "`x` | [y](http://evil.example) **b** @someone #1 ![i](http://evil.example/p.png).weight",
    "left\u202eright\u2066\u2069\u200b\u200f\ufeff.weight",
    "]]><failure message='x'/></testcase>.weight",
    "%0A::warning::x%25.weight",
    'quote"\'\\"""; import os.weight',
    "{0.__class__}{}%s%(x)s.weight",
    "tab\tnull\x01del\x7f.weight",
    "../../etc/passwd.weight",
    "x" * 3000 + ".weight",
)
FILE = "evil\x1b[31m\n::error::x\u202e##[error]<b>`|*"


def matrices(scale: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    """A weight under every hostile name: each constant, so that a finding about each repeats the name."""
    return {name: np.full((16, 16), (i + 1) * scale, np.float32) for i, name in enumerate(HOSTILE)}


def as_safetensors(path: Path, scale: float = 1.0) -> None:
    save_file(matrices(scale), path)


def as_zip(path: Path, scale: float = 1.0) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in matrices(scale).items()}
    torch.save({"state_dict": tensors, "\x1b[31mnote\n::error::y": "\x1b[0m\n::error::z"}, path)


def as_numpy(path: Path, scale: float = 1.0) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in matrices(scale).items():
            content = io.BytesIO()
            np.lib.format.write_array(content, value)
            archive.writestr(f"{name.replace(chr(0), '')}.npy", content.getvalue())


def as_onnx(path: Path, scale: float = 1.0) -> None:
    nodes, at = [], "x\x1b[31m\n::error::input"
    for index, name in enumerate(HOSTILE):
        nodes.append(helper.make_node("MatMul", [at, name], [f"{name}.out"], name=f"node {name}"))
        at = f"{name}.out"
        if index % 3 == 0:
            nodes.append(helper.make_node("Relu", [at], [f"{name}.relu"], name=f"relu {name}"))
            at = f"{name}.relu"
    nodes.append(helper.make_node("Odd\x1b[31m\n::error::op", [at], ["y"], domain="evil\x1b[31m\n::error::domain"))
    given = [helper.make_tensor_value_info("x\x1b[31m\n::error::input", TensorProto.FLOAT, [4, 16])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in matrices(scale).items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("evil\x1b[31m\n::error::domain", 1)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g\n::error::g", given, made, held), opset_imports=opsets), path)


WRITERS: dict[str, Callable[..., None]] = {
    "safetensors": as_safetensors,
    "torch_zip": as_zip,
    "numpy": as_numpy,
    "onnx": as_onnx,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of every writer, under a hostile file name."""
    folder = tmp_path_factory.mktemp("hostile")
    made = {}
    for name, write in WRITERS.items():
        made[name] = folder / f"{name} {FILE}".replace("/", "")
        write(made[name])
    return made


def judged(text: str, *, commands: bool = False) -> None:
    """`commands`: the format's own lines are commands to a CI runner, and must be nothing but these."""
    bad = sorted({f"U+{ord(c):04X}" for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")})
    assert not bad
    assert "##[" not in text
    assert "##vso" not in text
    for line in text.splitlines():
        if line.lstrip().startswith("::"):
            assert commands
            assert line.startswith(("::error ", "::warning ", "::notice ", "::group::", "::endgroup::"))
            assert "injected" not in line[:9]


def ran(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.run([*arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("form", sorted(formats()))
@pytest.mark.parametrize("kind", ["torch_zip", "onnx"])
def test_every_format(kind: str, form: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ran([str(files[kind]), "--no-cache", "--format", form], capsys)
    assert status == 1, err
    assert len(out) > 200
    judged(out, commands=form == "github")
    judged(err)
    if form in ("json", "sarif", "gitlab"):
        json.loads(out)


@pytest.mark.parametrize("options", [["--statistics"], ["--quiet"], ["--verbose"], ["--show-healthy"], ["--no-probe"]], ids=str)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_way_of_the_text(
    kind: str, options: list[str], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if options != ["--statistics"] and kind not in ("torch_zip", "onnx"):
        options = [*options, "--statistics"]
    _, out, err = ran([str(files[kind]), "--no-cache", *options], capsys)
    judged(out)
    judged(err)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("kind", ["safetensors", "torch_zip"])
def test_comparisons(kind: str, form: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / f"other {FILE}"
    WRITERS[kind](other, 3.0)
    _, out, err = ran(["compare", str(files[kind]), str(other), "--format", form], capsys)
    judged(out)
    judged(err)
    save_file({"x\x1b[31m\n::error::y": np.ones((4, 4), np.float32)}, other)
    for first, second in ((files[kind], other), (other, files[kind])):
        _, out, err = ran(["compare", str(first), str(second), "--format", form], capsys)
        judged(out)
        judged(err)
        _, out, err = ran([str(second), "--base", str(first), "--no-cache"], capsys)
        judged(out)
        judged(err)


BROKEN = {
    "no such file": None,
    "an empty file": b"",
    "text": b"\x1b[31m\n::error::x",
    "a header": (64).to_bytes(8, "little") + b'{"a\x1b[31m": 3}'.ljust(64),
    "a tensor past the end": (120).to_bytes(8, "little")
    + b'{"\\u001b[31m\\n::error::t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(120),
    "a type": (120).to_bytes(8, "little")
    + b'{"\\u001b[31mt":{"dtype":"\\u001b[31m\\n::error::F","shape":[4],"data_offsets":[0,16]}}'.ljust(120)
    + bytes(16),
    "a pickle that runs": b"cos\nsystem\n(S'\x1b[31m::error::x'\ntR.",
    "a pickle of odd names": b"\x80\x04\x8c\x09\x1b[31m\n::ev\x8c\x09\x1b[31m\n::ev\x93)R.",
    "a cut zip": b"PK\x03\x04" + bytes(40),
    "a cut ONNX file": b"\x08\x08\x12\x07pytorch:\xff\xff\x03",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_lines_about_what_cannot_be_read(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{kind} {FILE}"
    content = BROKEN[kind]
    if content is not None:
        path.write_bytes(content)
    for form in ("text", "junit", "github"):
        status, out, err = ran([str(path), "--no-cache", "--format", form], capsys)
        assert status in (1, 2)
        judged(out, commands=form == "github")
        judged(err)


def test_folders(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"folder {FILE}"
    folder.mkdir()
    shard = f"model-00001-of-00002 {FILE}.safetensors"
    save_file(matrices(), folder / shard)
    weights = {**dict.fromkeys(HOSTILE, shard), "lost\x1b[31m\n::error::x": f"model-00002-of-00002 {FILE}.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / f"modeling {FILE}.py").write_text("import os")
    config = {
        "model_type": "\x1b[31m\n::error::x",
        "auto_map": {"AutoModel": "\x1b[31m\n::error::x.Y"},
        "quantization_config": {},
    }
    config["quantization_config"] = {"quant_method": "\x1b[31m\n::error::q"}
    (folder / "config.json").write_text(json.dumps(config))
    for form in ("text", "github", "markdown"):
        _, out, err = ran([str(folder), "--no-cache", "--format", form], capsys)
        judged(out, commands=form == "github")
        judged(err)


def test_baselines(files: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["baseline", "write"], ["baseline", "check"], ["baseline", "prune"]):
        _, out, err = ran([*command, str(files["torch_zip"])], capsys)
        judged(out)
        judged(err)


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import initaudit.progress

    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(initaudit.progress, "PATIENCE", 0.0)
    monkeypatch.setattr(initaudit.progress, "REFRESH", 0.001)
    with Progress(shown=True) as progress:
        import time

        for name in HOSTILE:
            progress(f"{FILE}: measuring {name}")
            time.sleep(0.01)
    lines = written.getvalue().replace("\r\x1b[K", "\n").replace("\x1b[K", "\n").replace("\r", "")
    assert "measuring" in lines
    judged(lines)
