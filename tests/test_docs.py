"""What the documents show is executed: commands with their outputs, Python, configuration, workflows, links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli_golden import without_times

from initaudit import config
from initaudit.cli import cli
from initaudit.config import load_config
from initaudit.report import formats

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
# Paths that a document gives as an example of what somebody will write.
NOT_YET = {"initaudit/rules/ia109_odd_one_out.py"}
WRITTEN = [page for page in PAGES if "Made by docs/generate.py" not in page.read_text("utf-8")]


def blocks(language: str) -> list[tuple[Path, str]]:
    return [
        (page, block)
        for page in WRITTEN
        for block in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    ]


def identity(pairs):
    return [f"{page.stem}-{index}" for index, (page, _) in enumerate(pairs)]


def shell(command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user's shell runs it, with this interpreter's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    kept |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=kept, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(("page", "block"), blocks("console"), ids=identity(blocks("console")))
def test_commands_print_what_is_shown(page, block, overwrite):
    shown = ""
    for command in re.findall(r"^\$ (.*)$", block, re.M):
        done = shell(command)
        shown += f"$ {command}\n{done.stdout}{done.stderr}"
    if overwrite:
        page.write_text(page.read_text("utf-8").replace(block, shown), "utf-8")
        return
    assert without_times(shown) == without_times(block), "if the new output is right: pytest tests/test_docs.py --overwrite"


@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=identity(blocks("python")))
def test_python_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize(("page", "block"), blocks("toml"), ids=identity(blocks("toml")))
def test_configuration_is_accepted(page, block, tmp_path):
    (tmp_path / "pyproject.toml").write_text(block, "utf-8")
    assert load_config(tmp_path).origin


def test_every_key_of_the_configuration_is_documented():
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert [key for key in config._KEYS if not re.search(rf"\b{key}\b", text)] == []


def options_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", command))


def test_commands_in_the_documents_use_options_that_exist():
    known = {
        option
        for command in (*cli.commands.values(), *cli.commands["baseline"].commands.values())
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "--version"}
    wrong = []
    for page in (*WRITTEN, ROOT / "action.yml"):
        text = page.read_text("utf-8")
        for command in re.findall(r"(?:^|[`/ ])initaudit ([^`#\n]*)", text):
            wrong += [f"{page.name}: {option}" for option in options_of(command) - known]
            named = re.findall(r"--format ([a-z]+)", command)
            wrong += [f"{page.name}: --format {name}" for name in named if name not in formats()]
    assert wrong == []


def test_every_install_line_is_constrained():
    files = [*PAGES, ROOT / "action.yml", ROOT / ".ci" / "run"]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines() if re.search(r"pip install\b", line)]
    assert len(lines) >= 5
    assert [
        line for line in lines if "-c constraints.txt" not in line and '-c "$ACTION_PATH/constraints.txt"' not in line
    ] == []


def test_links_and_paths_lead_somewhere():
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
        links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
        paths = set(re.findall(r"`((?:initaudit|docs|tests|fixtures|\.ci)/[\w./-]+)`", text)) - NOT_YET
        broken += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
        broken += [f"{page.name}: {path}" for path in paths if not (ROOT / path).exists()]
    assert broken == []


def test_anchors_exist():
    for page in PAGES:
        for file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text("utf-8")):
            target = page if not file else page.parent / file
            heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], f"{page}: {anchor}"


def test_generated_pages_are_up_to_date():
    done = shell(f"{sys.executable} docs/generate.py --check")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_workflows_are_yaml_and_the_action_names_what_exists():
    yaml = pytest.importorskip("yaml")
    for _page, block in blocks("yaml"):
        assert yaml.safe_load(block)
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert [hook["id"] for hook in hooks] == ["initaudit"]
    assert re.search(hooks[0]["files"], "models/net.onnx")
    assert not re.search(hooks[0]["files"], "net.onnx.md")
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    used = {name for step in action["runs"]["steps"] for name in re.findall(r"inputs\.(\w+)", str(step))}
    assert used == set(action["inputs"])
    assert not [step for step in action["runs"]["steps"] if "${{" in step["run"]], "an input in a script is an injection"


@pytest.mark.parametrize(("model", "status"), [("fixtures/good/he_mlp.onnx", 0), ("fixtures/broken/zero.onnx", 1)])
def test_the_steps_of_the_action_work(tmp_path, model, status):
    yaml = pytest.importorskip("yaml")
    step = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["runs"]["steps"][1]
    summary = tmp_path / "summary.md"
    (tmp_path / "step.sh").write_text(step["run"], "utf-8")
    # GitHub runs `shell: bash` steps with these flags.
    command = f"bash --noprofile --norc -eo pipefail {tmp_path / 'step.sh'}"
    done = shell(command, MODELS=model, ARGUMENTS="--strict", RUNNER_TEMP=str(tmp_path), GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == status, done.stderr
    assert ("::error file=" in done.stdout) is bool(status)
    assert "### initaudit" in summary.read_text("utf-8")


def test_the_install_step_of_the_action_keeps_cuda_out(tmp_path):
    yaml = pytest.importorskip("yaml")
    step = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["runs"]["steps"][0]
    # A stand-in for Python writes down what it is asked to do: nothing is installed.
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{tmp_path}/asked'\n", "utf-8")
    stand_in.chmod(0o755)
    (tmp_path / "step.sh").write_text(step["run"], "utf-8")
    command = f'PATH="{tmp_path}:$PATH" bash --noprofile --norc -eo pipefail {tmp_path / "step.sh"}'
    done = shell(command, ACTION_PATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text("utf-8").splitlines()
    assert asked == ["-m", "pip", "install", "-q", "-c", f"{ROOT}/constraints.txt", str(ROOT)]
    assert (ROOT / "constraints.txt").is_file()
    assert step["env"] == {"ACTION_PATH": "${{ github.action_path }}"}


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        layers = [m for _ in range(DEPTH) for m in (nn.Linear(32, 32), nn.ReLU())]
        super().__init__(*layers, nn.Linear(32, 4))
"""
# What the recipes install is what is tested here: pip is asked, and finds nothing to do.
SHIMS = {
    "pip": "exit 0",
    "initaudit": f'exec "{sys.executable}" -m initaudit "$@"',
    "python3": 'mkdir -p .venv/bin && cp "$(dirname "$0")/pip" "$(dirname "$0")/initaudit" .venv/bin/',
}


def recipe(title: str, language: str) -> str:
    text = (ROOT / "docs" / "ci.md").read_text("utf-8").partition(f"## {title}\n")[2]
    return re.search(rf"^```{language}\n(.*?)^```$", text, re.M | re.S).group(1)


def run_recipe(folder: Path, script: str, depth: int) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir()
    for name, line in SHIMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").touch()
    (folder / "mypackage" / "models.py").write_text(NET.replace("DEPTH", str(depth)))
    return shell(f'export PATH="{folder / "bin"}:$PATH"; set -e\n{script}', folder)


@pytest.mark.parametrize(("depth", "status"), [(2, 0), (20, 1)])
def test_the_recipe_for_any_shell_runs_as_it_is_written(tmp_path, depth, status):
    done = run_recipe(tmp_path, recipe("Any shell", "sh"), depth)
    assert done.returncode == status, done.stdout + done.stderr


@pytest.mark.parametrize(("depth", "status"), [(2, 0), (20, 1)])
def test_the_recipe_for_gitlab_runs_as_it_is_written(tmp_path, depth, status):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(recipe("GitLab", "yaml"))["initaudit"]
    done = run_recipe(tmp_path, "\n".join(job["script"]), depth)
    assert done.returncode == status, done.stdout + done.stderr
    for file in job["artifacts"]["reports"].values():
        assert (tmp_path / file).stat().st_size, f"{file} is no artifact"


def test_ci_runs_the_tests_as_the_readme_does():
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, re.M)
    assert len(commands) == 2
    assert "initaudit fixtures/" in commands[0]
    assert "pytest" in commands[1]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert shell("bash -n .ci/run").returncode == 0


def test_the_site_leads_to_every_page():
    yaml = pytest.importorskip("yaml")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert site["strict"] is True

    def leaves(entries):
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from leaves(value) if isinstance(value, list) else [value]

    shown = set(leaves(site["nav"]))
    assert [page for page in shown if not (ROOT / "docs" / page).is_file()] == []
    top = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert top <= shown, "a page that nothing leads to"
    for folder in ("rules", "methods"):
        index = (ROOT / "docs" / folder / "README.md").read_text("utf-8")
        assert all(f"]({page.name})" in index for page in (ROOT / "docs" / folder).glob("*.md") if page.name != "README.md")
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text("utf-8")
