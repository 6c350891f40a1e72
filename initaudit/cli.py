"""The command line: the one place that prints and decides the exit status. What it needs it imports when it needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from initaudit import __version__
from initaudit.errors import InitauditError, UsageError
from initaudit.options import config_from, config_options, outputs
from initaudit.terminal import complain, deliver, emit, terminal_style

if TYPE_CHECKING:
    from initaudit.baseline import Baseline
    from initaudit.config import Config
    from initaudit.progress import Progress
    from initaudit.report.report import Report

HELP = """\
Usage: initaudit [OPTIONS] MODEL [MODEL ...]
       initaudit COMMAND [ARGS]

Can this network, as it is initialised, learn? Is this checkpoint sound?
MODEL is a file (.onnx, .safetensors, .pt ...), a folder, a URL or
package.module:callable.

Examples:
  initaudit model.onnx                      audit a file
  initaudit mypackage.models:Net            audit a module as it is initialised
  initaudit mypackage.models:Net --input x=8x3x32x32:float32
  initaudit checkpoints/ --phase trained    audit every model of a folder
  initaudit model.onnx --format text --format sarif:out.sarif
  initaudit explain IA301                   what a rule means and what to do

Commands:
  rules        list the rules               baseline  accept findings
  explain      the page of a rule           compare   two models
  config       the configuration in force   fix       draw flagged weights again
  completion   a shell's completion script

Options used most (all of them: initaudit audit --help):
  --select CODES, --ignore CODES    rules by code or prefix: IA2, IA301
  --strict, --fail-on LEVEL         fails from: error, warning, info, never
  --phase auto|init|trained         judge as fresh or as trained weights
  --input NAME=SPEC, --data FILE    what the probe feeds the model
  --no-probe                        look at the weights only
  --format NAME[:FILE]              text concise grouped json jsonl sarif github
                                    gitlab junit markdown html
  --output FILE                     write the report there
  --verbose, --quiet, --statistics  more, less, counts
  --version, --help

Exit status: 0 nothing at the failing level, 1 findings at it, 2 usage error or
unreadable model.
"""
SHELLS = ("bash", "zsh", "fish")


class Front(click.Group):
    """A group whose first argument may be a model: what is no command is an audit."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "--version"}
        if (not args or (args[0] not in self.commands and args[0] not in own)) and not ctx.resilient_parsing:
            args = ["audit", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(HELP)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return self.commands["audit"].shell_complete(click.Context(self.commands["audit"]), incomplete)
        found: list[Any] = super().shell_complete(ctx, incomplete)
        if not found:
            return [CompletionItem(incomplete, type="file")]
        # bash forgets the other words where one says that files are meant: beside commands they are named one by one.
        import glob

        return [*found, *(CompletionItem(path) for path in sorted(glob.glob(glob.escape(incomplete) + "*")))]


@click.group(cls=Front, context_settings={"help_option_names": ["--help"]})
@click.version_option(__version__, prog_name="initaudit", message="%(prog)s %(version)s")
def cli() -> None:
    """The linter for the weights of neural networks."""


@cli.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option("--format", "formats", multiple=True, metavar="NAME[:FILE]", help="The form of the report; repeatable.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE", help="Write the report there, not to the terminal.")
@click.option("--exit-zero", is_flag=True, help="Status 0 whatever is found.")
@click.option("--quiet", "-q", is_flag=True, help="Findings only.")
@click.option("--verbose", "-v", is_flag=True, help="Every weight, every note, every name.")
@click.option("--show-healthy", is_flag=True, help="Do not fold healthy weights that look alike.")
@click.option("--statistics", is_flag=True, help="How often each rule fired.")
@click.option("--watch", is_flag=True, help="Audit again whenever a file changes.")
@config_options
@click.pass_context
def audit(ctx: click.Context, /, models: tuple[str, ...], formats: tuple[str, ...], output: str | None, **flags: Any) -> None:
    """Audit MODELS: files, folders, package.module:callable, URLs, or names of the configuration."""
    from initaudit.rules.selection import check_config
    from initaudit.session import UNUSABLE, exit_status, models_of

    config = config_from(ctx)
    models = models if models else tuple(config.models)
    if not models:
        raise UsageError("MODEL", "none given, and none in a configuration file", advice="`initaudit --help` shows examples")
    check_config(config)
    targets = outputs(formats, output, tuple(config.for_model(model)[0] for model in models))
    if flags["watch"]:
        ctx.exit(_watch(tuple(config.for_model(model)[0] for model in models)))
    report = _audit(models_of(models, config), config, verbose=flags["verbose"])
    if config.baseline is not None:
        from initaudit.baseline import read_baseline

        report = read_baseline(Path(config.baseline)).without_accepted(report)
    shown = {name: flags[name] for name in ("quiet", "verbose", "show_healthy", "statistics")}
    delivered = deliver(report, targets, config, **shown)
    ctx.exit(exit_status(report, config, exit_zero=flags["exit_zero"]) if delivered else UNUSABLE)


@cli.command()
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text")
def rules(form: str) -> None:
    """List the rules."""
    from initaudit.rules import all_rules

    if form == "json":
        from initaudit.report.as_json import dump

        fields = ("code", "name", "severity", "phase", "summary")
        emit(dump([{name: getattr(rule, name) for name in fields} for rule in all_rules()], indent=2))
        return
    from initaudit.report.pages import rule_table

    emit(rule_table(all_rules(), terminal_style().width))


@cli.command()
@click.argument("code")
def explain(code: str) -> None:
    """Show the page of the rule CODE (a code or a name), or the rules whose codes begin so."""
    from initaudit.report.pages import rule_table, terminal_page
    from initaudit.rules import all_rules, rule

    family = [each for each in all_rules() if each.code.startswith(code.upper())]
    if len(family) > 1:
        emit(rule_table(family, terminal_style().width))
    else:
        emit(terminal_page(rule(code), terminal_style()))


@cli.command()
@config_options
@click.pass_context
def config(ctx: click.Context, /, **_: Any) -> None:
    """Show the configuration in force and where each value comes from."""
    from initaudit.report.pages import config_table
    from initaudit.rules.selection import check_config

    found = config_from(ctx)
    check_config(found)
    emit(config_table(found))


@cli.command()
@click.argument("first")
@click.argument("second")
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", help="json is complete.")
@click.option("--verbose", "-v", is_flag=True, help="Every finding and every name.")
@config_options
@click.pass_context
def compare(ctx: click.Context, /, first: str, second: str, form: str, verbose: bool, **_: Any) -> None:
    """Show what differs between two models. Status 1 where SECOND has findings at the failing level that FIRST has not."""
    import dataclasses

    from initaudit.report.as_json import dump
    from initaudit.report.comparison import compare_models, comparison_dict, comparison_text
    from initaudit.session import FINDINGS, UNUSABLE

    found = config_from(ctx)
    models = (*_audit((first,), found).models, *_audit((second,), dataclasses.replace(found, base=first)).models)
    if any(model.error is not None for model in models):
        ctx.exit(UNUSABLE)
    result = compare_models(*models)
    style = dataclasses.replace(terminal_style(), verbose=verbose)
    emit(dump(comparison_dict(result), indent=2) if form == "json" else style.finish(comparison_text(result, style)))
    ctx.exit(FINDINGS if any(f.severity in found.failing for f in result.appeared) else 0)


@cli.command()
@click.argument("model")
@click.option("--output", "-o", "out", type=click.Path(), required=True, metavar="FILE", help="The file to write.")
@click.option("--force", is_flag=True, help="Replace FILE where there is one.")
@click.option("--verbose", "-v", is_flag=True, help="Every tensor and every name.")
@config_options
@click.pass_context
def fix(ctx: click.Context, /, model: str, out: str, force: bool, verbose: bool, **_: Any) -> None:
    """Draw again what findings name, by the lines that they propose, and audit the result. MODEL stays as it is."""
    import dataclasses

    from initaudit.repair import repair
    from initaudit.repair.text import repair_text
    from initaudit.report.write import check_new
    from initaudit.rules.selection import check_config
    from initaudit.session import FINDINGS

    config = config_from(ctx)
    check_config(config)
    source, its = config.for_model(model)
    check_new(Path(out), source, force=force)
    with _progress(verbose=verbose) as progress:
        result = repair(source, Path(out), its, progress)
    emit(repair_text(source, out, result, dataclasses.replace(terminal_style(), verbose=verbose)))
    left = result.report.findings if result.report is not None else [finding for finding, _ in result.left]
    ctx.exit(FINDINGS if any(finding.severity in its.failing for finding in left) else 0)


@cli.group()
def baseline() -> None:
    """Accept the findings that there are; fail only on new ones."""


@baseline.command("write")
@click.argument("models", nargs=-1, required=True)
@click.option("--reason", default="", help="Why they are accepted.")
@config_options
@click.pass_context
def baseline_write(ctx: click.Context, /, models: tuple[str, ...], reason: str, **_: Any) -> None:
    """Accept every finding of MODELS; reasons and dates of those accepted before are kept."""
    from initaudit.session import exit_status

    file, known, report, found = _baseline_run(ctx, models, must_exist=False)
    updated = known.accept(report, reason)
    updated.write(file)
    new = len(set(updated.entries) - set(known.entries))
    emit(f"{file}: {len(updated.entries)} accepted, {new} of them new")
    ctx.exit(exit_status(report, found, exit_zero=True))


@baseline.command("check")
@click.argument("models", nargs=-1, required=True)
@config_options
@click.pass_context
def baseline_check(ctx: click.Context, /, models: tuple[str, ...], **_: Any) -> None:
    """Report only what is new; name what has gone."""
    from initaudit.session import exit_status

    _file, known, report, found = _baseline_run(ctx, models)
    fresh = known.without_accepted(report)
    deliver(fresh, [("concise", None)], found)
    for entry in known.vanished(report):
        emit(f"gone: {entry.line}")
    ctx.exit(exit_status(fresh, found))


@baseline.command("prune")
@click.argument("models", nargs=-1, required=True)
@config_options
@click.pass_context
def baseline_prune(ctx: click.Context, /, models: tuple[str, ...], **_: Any) -> None:
    """Forget accepted findings that MODELS no longer have."""
    from initaudit.session import exit_status

    file, known, report, found = _baseline_run(ctx, models)
    gone = known.vanished(report)
    known.without(gone).write(file)
    emit(f"{file}: {len(known.entries) - len(gone)} accepted, {len(gone)} forgotten")
    ctx.exit(exit_status(report, found, exit_zero=True))


def _baseline_run(
    ctx: click.Context, /, models: tuple[str, ...], *, must_exist: bool = True
) -> tuple[Path, Baseline, Report, Config]:
    from initaudit.baseline import DEFAULT_FILE, read_baseline
    from initaudit.rules.selection import check_config
    from initaudit.session import models_of

    found = config_from(ctx)
    check_config(found)
    file = Path(found.baseline if found.baseline is not None else DEFAULT_FILE)
    known = read_baseline(file, must_exist=must_exist)
    return file, known, _audit(models_of(models, found), found), found


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: eval "$(initaudit completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click completes bash, zsh and fish"
    emit(kind(cli, {}, "initaudit", "_INITAUDIT_COMPLETE").source())


def _audit(models: tuple[str, ...], config: Config, *, verbose: bool = False) -> Report:
    """The report, with progress on stderr and there one line for each model that could not be read."""
    import time
    from dataclasses import replace

    from initaudit.session import audit_all

    began = time.monotonic()
    with _progress(verbose=verbose) as progress:
        report = audit_all(models, config, progress, tuple(cli.commands))
    for model in report.models:
        if model.error is not None:
            # Notes about a model that was not read are the trace of a fault of ours.
            click.echo("".join(model.notes), err=True, nl=False)
            complain(model.error)
    return replace(report, seconds=time.monotonic() - began)


@contextmanager
def _progress(*, verbose: bool) -> Iterator[Progress]:
    """Progress on stderr, and silence of libraries: what one says to its own callers is no finding about the model."""
    import warnings

    from initaudit.progress import Progress

    with Progress() as progress, warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        yield progress


def _one_line(error: click.ClickException) -> str:
    """What click has to say, as our other mistakes are said."""
    text = " ".join(error.format_message().split()).rstrip(".")
    text = text[:1].lower() + text[1:]
    context = getattr(error, "ctx", None)
    if context is None or "did you mean" in text.lower():
        return text
    return f"{text}; `{context.command_path} --help` shows what there is"


def _watch(sources: tuple[str, ...]) -> int:
    """Runs the same command without --watch, in a process of its own so that changed code is imported anew, for ever."""
    import subprocess
    import time

    from initaudit.session import stamps

    command = [sys.executable, "-m", "initaudit", *(a for a in sys.argv[1:] if a != "--watch")]
    while True:
        seen = stamps(sources)
        subprocess.run(command, check=False)
        click.echo("watching for changes; Ctrl-C ends", err=True)
        while stamps(sources) == seen:
            time.sleep(0.3)


def run(arguments: Sequence[str]) -> int:
    """Runs the command line on these arguments and returns the exit status; everything that goes wrong is a line on stderr."""
    try:
        status = cli.main(list(arguments), prog_name="initaudit", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        complain(_one_line(error))
        return 2
    except InitauditError as error:
        complain(str(error))
        return 2
    except Exception:  # noqa: BLE001 - a fault of ours must not end as status 1, which says "findings"
        import traceback

        traceback.print_exc()
        complain("an internal error, not a finding about the model; please report it with the lines above")
        return 2
