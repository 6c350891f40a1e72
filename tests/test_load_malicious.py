"""Nothing of a file may run. The judge is a canary file that each payload touches when a real unpickler reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from malicious import CASES, Case
from malicious_containers import CONTAINERS, TORCH_RUNS, object_array, plain
from pickle_opcodes import WEIGHTS, shell, system

from initaudit.errors import UnreadableModel
from initaudit.load import Checkpoint, load


def read(path: Path, content: bytes) -> Checkpoint:
    path.write_bytes(content)
    return load(path)


def code_messages(checkpoint: Checkpoint) -> str:
    return "\n".join(problem.message for problem in checkpoint.problems if problem.code == "IA505")


def assert_weights(checkpoint: Checkpoint) -> None:
    found = [a.read() for a in checkpoint.arrays.values() if a.shape == WEIGHTS.shape]
    assert found
    assert np.array_equal(found[0], WEIGHTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_payload_is_named_and_not_run(case: Case, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    checkpoint = read(tmp_path / "x.pkl", plain(case.payload(canary)))
    messages = code_messages(checkpoint)
    for name in case.names:
        assert name in messages
    assert not canary.exists()
    assert_weights(checkpoint)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_container_hides_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    checkpoint = read(tmp_path / "model.bin", CONTAINERS[kind](system(canary)))
    assert "calls os.system('touch" in code_messages(checkpoint)
    assert not canary.exists()
    assert_weights(checkpoint)


def test_payloads_bite(tmp_path: Path) -> None:
    """A real unpickler touches the canary of every case that this machine can run: the tests above can fail."""
    running = [case for case in CASES if case.runs]
    for number, case in enumerate(running):
        (tmp_path / f"{number}.pkl").write_bytes(plain(case.payload(tmp_path / f"{number}.canary")))
    program = f"""
import os, pickle, sys, warnings
import cProfile, numpy, profile, pty, pydoc, runpy, subprocess, timeit  # once, before the children do
import numpy.testing
warnings.simplefilter("ignore")
for number in range({len(running)}):
    if os.fork() == 0:
        try:
            pickle.load(open(f"{{number}}.pkl", "rb"))
        finally:
            os._exit(0)
for number in range({len(running)}):
    os.wait()
"""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60, **quiet)
    silent = [case.name for number, case in enumerate(running) if not (tmp_path / f"{number}.canary").exists()]
    assert silent == []


def test_containers_bite(tmp_path: Path) -> None:
    """torch.load, told to trust the file, runs what these containers hold, whatever they look like."""
    for number, kind in enumerate(TORCH_RUNS):
        (tmp_path / f"{number}.pt").write_bytes(CONTAINERS[kind](system(tmp_path / f"{number}.canary")))
    program = f"""
import torch, warnings
warnings.simplefilter("ignore")
for number in range({len(TORCH_RUNS)}):
    try:
        torch.load(f"{{number}}.pt", weights_only=False)
    except Exception:
        pass
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    silent = [kind for number, kind in enumerate(TORCH_RUNS) if not (tmp_path / f"{number}.canary").exists()]
    assert silent == []


def test_table_is_large_and_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 80
    assert sum(case.runs for case in CASES) >= 35


def test_object_array_is_read_as_the_pickle_it_is(tmp_path: Path) -> None:
    checkpoint = read(tmp_path / "x.npy", object_array(system(tmp_path / "canary")))
    assert "calls os.system" in code_messages(checkpoint)
    assert not (tmp_path / "canary").exists()


def test_known_name_of_the_wrong_module_is_reported(tmp_path: Path) -> None:
    from pickle_opcodes import by_line, call

    checkpoint = read(tmp_path / "x.pkl", plain(call(by_line("evil", "_rebuild_tensor_v2"), shell(tmp_path))))
    assert "calls evil._rebuild_tensor_v2" in code_messages(checkpoint)


def test_seven_zip_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(UnreadableModel, match="a 7z archive"):
        load(tmp_path / "x.pt")


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path: Path) -> None:
    from pickle_opcodes import by_stack, call

    checkpoint = read(tmp_path / "x.pkl", plain(call(by_stack("e\x1b[2Jvil", "f\n\x07"))))
    assert code_messages(checkpoint).isprintable()
