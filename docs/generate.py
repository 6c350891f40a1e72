"""Writes the pages that are made from the code: one for each rule, their index, the command line, the schemes of reports.

python docs/generate.py            write them
python docs/generate.py --check    say which are out of date, and exit 1 if any is
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from reference_pages import api_page, json_page

from initaudit.cli import HELP, cli
from initaudit.report import formats
from initaudit.report.pages import docstring
from initaudit.rules import all_rules
from initaudit.rules.rule import Example, Rule

HERE = Path(__file__).parent
# What the examples of every rule are told; made and judged by tests/test_rules.py, so that these pages need no audit.
SAID = HERE / "examples.json"
NOTE = "<!-- Made by docs/generate.py: change the code, not this page. -->\n"
FAMILIES = {
    "IA0": "What could not be judged",
    "IA1": "Weight variance against what the activation needs",
    "IA2": "Symmetry and degenerate weights",
    "IA3": "Signal and gradient, from the probe",
    "IA4": "Number range",
    "IA5": "Checkpoints",
    "IA6": "Transfer learning",
}
PHASES = {"init": "weights that have not been trained", "trained": "trained checkpoints", "any": "fresh and trained weights"}


def pages() -> Iterator[tuple[str, str]]:
    """(path below this folder, text) of every generated page."""
    for rule in all_rules():
        yield f"rules/{rule.code}.md", rule_page(rule)
    yield "rules/README.md", index_page()
    yield "cli.md", cli_page()
    yield "formats.md", formats_page()
    yield "reference/api.md", api_page(NOTE)
    yield "reference/json.md", json_page(HERE / "report.schema.json", NOTE)


def rule_page(rule: Rule) -> str:
    """The page of a rule: its docstring, and the models by which it is tested."""
    facts = f"Severity: up to **{rule.severity}**. Judges: {PHASES[rule.phase]}."
    reported: dict[str, str] = json.loads(SAID.read_text("utf-8")).get(rule.code, {})
    parts = [f"# {rule.code} {rule.name}", NOTE, facts, f"Fires when {rule.summary.rstrip('.')}.", docstring(rule)]
    for title, kind in (("Reported", type(rule).invalid), ("Left alone", type(rule).valid)):
        if examples := kind():
            parts.append(f"## {title}")
            codes = builders(kind)
            for example in examples:
                parts.append(f"{example.name}:\n\n```python\n{codes[example.name]}\n```")
                if said := reported.get(example.name) if title == "Reported" else None:
                    parts.append(f"```text\n{said}\n```")
    if thresholds := type(rule).thresholds:
        rows = [f"| `{rule.code}.{t.name}` | {t.default:g} | {t.unit} | {t.source} |" for t in thresholds]
        head = "## Thresholds\n\n[`thresholds`](../configuration.md#thresholds) of the configuration changes them."
        parts.append("\n".join([head, "", "| name | default | unit | why |", "|---|---|---|---|", *rows]))
    parts.append(
        f"These models are built, and the rule is tested on them, in `{type(rule).__module__.replace('.', '/')}.py`; "
        "`mlp`, `convs`, `residual` and `trained` stand in `initaudit/rules/examples.py`."
    )
    parts.append(f"Silence it: `--ignore {rule.code}`, or [for some tensors only](../configuration.md#per-tensor-ignores).")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def builders(kind: Callable[[], tuple[Example, ...]]) -> dict[str, str]:
    """What builds each example of a rule, as its source writes it."""
    source = textwrap.dedent(inspect.getsource(kind))
    home = sys.modules[kind.__module__]
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > 1]
    found = {}
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "example" and isinstance(call.args[0], ast.Constant):
            build = call.args[1].body if isinstance(call.args[1], ast.Lambda) else call.args[1]
            text = textwrap.dedent(ast.get_source_segment(source, build, padded=True) or "").strip()
            # What a rule file builds by a function of its own is shown whole.
            own = [vars(home)[node.id] for node in ast.walk(build) if isinstance(node, ast.Name) and node.id.startswith("_")]
            shown = [inspect.getsource(thing).strip() for thing in dict.fromkeys(own) if inspect.isfunction(thing)]
            found[call.args[0].value] = "\n\n\n".join([*shown, *([] if isinstance(build, ast.Name) else [text])])
    return found


def index_page() -> str:
    """The table of all rules, family after family."""
    lines = ["# Rules", "", NOTE]
    for family, title in FAMILIES.items():
        mine = [rule for rule in all_rules() if rule.code.startswith(family)]
        if not mine:
            continue
        lines += [f"## {family}xx: {title}", "", "| code | name | severity | phase | fires when |", "|---|---|---|---|---|"]
        for rule in mine:
            summary = rule.summary.replace("|", "\\|")
            lines.append(f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity} | {rule.phase} | {summary} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def cli_page() -> str:
    """Every command with its options; laid out here, since click's own layout differs from version to version."""
    parts = ["# Command line", NOTE, f"```text\n{HELP}```"]
    for path, command in _commands(cli, "initaudit"):
        names = [_argument(p) for p in command.params if isinstance(p, click.Argument)]
        parts.append(f"## {' '.join([path, *names])}\n\n{inspect.cleandoc(command.help or '')}")
        options = [p for p in command.params if isinstance(p, click.Option)]
        if options:
            parts.append("\n".join(["| option | meaning |", "|---|---|", *map(_option, options)]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _argument(argument: click.Argument) -> str:
    return (argument.name or "").upper() + (" ..." if argument.nargs == -1 else "")


def _option(option: click.Option) -> str:
    values = "|".join(option.type.choices) if isinstance(option.type, click.Choice) else option.metavar or ""
    names = ", ".join((*option.opts, *option.secondary_opts))
    spelled = f"{names} {values}".strip().replace("|", "\\|")
    return f"| `{spelled}` | {option.help or ''} |"


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def formats_page() -> str:
    """The report formats."""
    lines = [
        "# Report formats",
        "",
        NOTE,
        "`--format NAME` prints, `--format NAME:FILE` writes; the option may be repeated.",
        "",
    ]
    lines += ["| name | what it is |", "|---|---|"]
    lines += [f"| `{form.name}` | {form.summary} |" for form in formats().values()]
    lines += [
        "",
        "The JSON document is described by [report.schema.json](report.schema.json) (JSON Schema 2020-12): numbers are",
    ]
    lines += ["finite or null, variances are centred, a `moment2` is not, and a ratio is observed / expected."]
    lines += [
        "Names that come from a file are escaped in every format, so that none of them can drive a terminal or a CI runner."
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Writes or checks; 1 where a page is out of date or belongs to no rule."""
    wanted = dict(pages())
    stale = [path for path, text in wanted.items() if not (HERE / path).exists() or (HERE / path).read_text("utf-8") != text]
    orphans = [
        p.relative_to(HERE).as_posix() for p in (HERE / "rules").glob("*.md") if p.relative_to(HERE).as_posix() not in wanted
    ]
    if "--check" in arguments:
        for path in (*stale, *orphans):
            click.echo(f"docs/{path} is out of date: run python docs/generate.py")
        return 1 if stale or orphans else 0
    for folder in ("rules", "reference"):
        (HERE / folder).mkdir(exist_ok=True)
    for path in stale:
        (HERE / path).write_text(wanted[path], "utf-8")
    for path in orphans:
        (HERE / path).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
