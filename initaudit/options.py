"""The options of the command line that set the configuration, in one table, and the configuration they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from initaudit.config import DTYPES, FAIL_ON, PHASES, Config, load_config
from initaudit.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def _codes(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(code.strip().upper() for value in values for code in value.split(",") if code.strip())


def _inputs(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, spec = value.partition("=")
        if not (name and equals and spec):
            raise click.BadParameter(f"{value!r}; expected NAME=SHAPE:TYPE such as x=2x3x224x224:float32", ctx, parameter)
        pairs[name] = spec
    return pairs


# What a run is told beyond the models; each is a field of Config under the option's own name unless a name is given.
CONFIG_OPTIONS = (
    click.option("--select", multiple=True, callback=_codes, metavar="CODES", help="Only these rules: codes or prefixes."),
    click.option("--ignore", multiple=True, callback=_codes, metavar="CODES", help="Not these rules."),
    click.option("--extend-select", multiple=True, callback=_codes, metavar="CODES", help="These rules as well."),
    click.option("--strict", is_flag=True, help="Warnings fail as errors do."),
    click.option("--fail-on", type=click.Choice(FAIL_ON), help="The lowest severity that gives status 1."),
    click.option("--phase", type=click.Choice(PHASES), help="Judge as fresh or as trained weights."),
    click.option("--probe/--no-probe", default=True, help="Run a forward and a backward pass."),
    click.option("--input", "inputs", multiple=True, callback=_inputs, metavar="NAME=SPEC", help="x=2x3x224x224:float32"),
    click.option("--data", type=click.Path(), metavar="FILE", help="A real batch: .npz, .npy or .pt by input name."),
    click.option("--loss", is_flag=True, help="The model's output is its loss: differentiate that."),
    click.option("--jvp", is_flag=True, help="Push a random direction forward too: gains in the JSON report."),
    click.option("--base", metavar="CKPT", help="The checkpoint that this one was tuned from."),
    click.option("--arch", metavar="MODEL", help="The program for a file that holds weights only."),
    click.option("--device", metavar="NAME", help="Where to probe: auto (where the module is), cpu, cuda:1 ..."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Judge the number range of this type."),
    click.option("--seed", type=int, metavar="N", help="Of the synthetic batch, and of a module that is built."),
    click.option("--probe-batch", type=click.IntRange(min=1), metavar="N", help="Examples in the synthetic batch."),
    click.option("--probe-seeds", type=click.IntRange(min=1), metavar="N", help="Probe so often: error bars of the risk."),
    click.option("--baseline", type=click.Path(), metavar="FILE", help="Leave out the findings accepted in this file."),
    click.option("--rehearse", type=click.IntRange(min=0), metavar="N", help="Train a copy for N steps as well."),
    click.option("--trust", is_flag=True, help="PyTorch may load and run an exported program or TorchScript."),
    click.option("--cache/--no-cache", default=True, help="Take the report on an unchanged file from the cache."),
    click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Models side by side, and tensors of one model."),
)
_FIELDS = frozenset(field.name for field in dataclasses.fields(Config)) - {"models", "origin"}


def config_options(command: F) -> F:
    """Adds every option of `CONFIG_OPTIONS`, and `--config`, to a command."""
    command = click.option("--config", "config_file", type=click.Path(), metavar="FILE", help="Instead of the nearest file.")(
        command
    )
    for option in reversed(CONFIG_OPTIONS):
        command = option(command)
    return command


def config_from(ctx: click.Context) -> Config:
    """The configuration of the file with what was really typed over it; raises `UsageError`."""
    overrides: dict[str, tuple[Any, str]] = {}
    names = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name, value in ctx.params.items():
        if name in _FIELDS and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            overrides[name] = (value, names[name])
    path = Path(ctx.params["config_file"]) if ctx.params.get("config_file") else None
    config = load_config(overrides=overrides, file=path)
    if "inputs" in overrides:
        # One input typed does not take away the others that the file describes.
        common: Mapping[str, str] = load_config(file=path).inputs
        overrides["inputs"] = ({**common, **overrides["inputs"][0]}, "--input")
        config = load_config(overrides=overrides, file=path)
    return config


def outputs(formats: tuple[str, ...], output: str | None, sources: tuple[str, ...]) -> list[tuple[str, Path | None]]:
    """(format, file or None for the terminal) for every output; raises `UsageError` where that cannot be done."""
    from initaudit.report import format_named
    from initaudit.report.write import check_target

    found: list[tuple[str, Path | None]] = []
    for text in formats if formats else ("text",):
        name, colon, path = text.partition(":")
        format_named(name)
        if colon and not path:
            raise UsageError(f"--format {text}", "no file after the colon", "--format sarif:out.sarif")
        found.append((name, Path(path) if path else None))
    if output is not None:
        free = [index for index, (_, file) in enumerate(found) if file is None]
        if not free:
            raise UsageError("--output", "every --format has its file already", advice="leave one of the two out")
        found[free[0]] = (found[free[0]][0], Path(output))
    if sum(file is None for _, file in found) > 1:
        raise UsageError("--format", "two formats for one terminal", "--format NAME:FILE for all but one")
    targets = [str(file.resolve()) for _, file in found if file is not None]
    if len(set(targets)) < len(targets):
        raise UsageError("--format", "two formats for one file", "a file for each")
    for _, file in found:
        if file is not None:
            check_target(file, sources)
    return found
