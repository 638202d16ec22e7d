"""The command line: ``comit-bench run | sweep | paper | compare | figure | train | ls | doctor | ...``.

Only argument parsing happens here, and only typer is imported at the top: ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comit_bench import __version__
from comit_bench.commands import cache as cache_command
from comit_bench.commands import data as data_command
from comit_bench.commands import figure as figure_command
from comit_bench.commands import tokens as token_command
from comit_bench.commands.compare import compare
from comit_bench.commands.console import guarded, say, set_up_logging
from comit_bench.commands.options import (
    DataRoot,
    Include,
    as_path,
    comma_separated,
    command_group,
    run_alone,
)
from comit_bench.commands.paper import paper
from comit_bench.commands.report import report
from comit_bench.commands.run import run
from comit_bench.commands.sweep import sweep
from comit_bench.commands.train import train
from comit_bench.commands.weights import app as weights_app
from comit_bench.results.checkout import git_state

app = command_group("What do the tokens of 1D discrete image tokenizers mean? From images to a table.")
app.command(name="run")(run)
app.command(name="sweep")(sweep)
app.command(name="train")(train)
app.command(name="paper")(paper)
app.command(name="compare")(compare)
app.command(name="report")(report)
app.command(name="tokenize")(token_command.tokenize)
app.command(name="detokenize")(token_command.detokenize)
app.add_typer(cache_command.app, name="cache")
app.add_typer(data_command.app, name="data")
app.add_typer(figure_command.app, name="figure")
app.add_typer(weights_app, name="weights")


@app.command(name="ls")
def ls(
    what: Annotated[str, typer.Argument(help="tokenizers, tasks or datasets.")] = "tokenizers",
    names: Annotated[bool, typer.Option("--names", help="Only the names, one per line.")] = False,
    include_path: Include = None,
) -> None:
    """List what can be named on the command line."""
    from comit_bench.commands.listing import list_things

    list_things(what, names_only=names, include=tuple(include_path or ()))


@app.command(name="doctor")
def doctor(data_root: DataRoot = None) -> None:
    """Say what is installed, found and missing, and how to get what is missing."""
    from comit_bench.commands.listing import examine

    raise typer.Exit(examine(data_root))


@app.command(name="validate")
def validate(
    files: Annotated[
        list[Path], typer.Argument(callback=as_path, help="Recipes (.yaml) or records (.json).")
    ],
) -> None:
    """Check recipe and record files; exit code 2 when one is wrong."""
    from comit_bench.commands.listing import validate_files

    raise typer.Exit(validate_files(files))


@app.command(name="table")
def table(
    records: Annotated[
        list[Path] | None,
        typer.Argument(callback=as_path, help="Directories of records. [default: results/records]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(callback=as_path, help="Also write table.csv, table.md, table.tex here.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Only tasks of this suite.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Only these tasks, comma-separated, in this order.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics, comma-separated.")] = None,
    published: Annotated[
        bool, typer.Option(help="Also print published numbers of the same tasks, marked as such.")
    ] = True,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Print tables of the paper instead: table-1, table-2, table-3, table-4, objectness, "
            "comma-separated, or all. With --suite paper all of them follow the plain table."
        ),
    ] = None,
    marks: Annotated[
        str,
        typer.Option(
            help="significance: bold is what is not significantly worse than the best. Or rank: the best."
        ),
    ] = "significance",
    trainings: Annotated[
        str,
        typer.Option(help="each: a row per training. mean: those of one recipe (group) are one row."),
    ] = "each",
) -> None:
    """Rebuild the table from records alone."""
    from comit_bench.commands.listing import rebuild_table

    rebuild_table(
        records or [Path("results/records")],
        output=output,
        suite=suite,
        tasks=comma_separated(tasks),
        metrics=comma_separated(metrics),
        published=published,
        layouts=comma_separated(layout),
        marks=marks,
        trainings=trainings,
    )


@app.command(name="cost")
def cost(
    names: Annotated[list[str] | None, typer.Argument(help="Presets. [default: all with a network]")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that one image may take.")] = 120.0,
    memory: Annotated[float, typer.Option(help="GB that the weights may take.")] = 24.0,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Also measure processor time.")] = True,
) -> None:
    """Print what one image costs, as Markdown: FLOPs, and processor seconds of one thread."""
    from comit_bench.commands.cost import write

    write(names or [], limit=limit, memory=memory, timed=timed)


@app.command(name="push")
def push(
    folder: Annotated[
        Path,
        typer.Argument(callback=as_path, help="Exported folder: config.json, model.safetensors, README.md."),
    ],
    repo: Annotated[str, typer.Option(help="USER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder, list the files, stop.")
    ] = False,
) -> None:
    """Upload a trained tokenizer with its model card and pictures to the Hugging Face hub."""
    from comit_bench.tokenizers import push as hub

    set_up_logging()
    upload = hub.prepare(folder, repo)
    if dry_run:
        typer.echo(f"{upload}\ndry run: nothing was uploaded")
        return
    say(str(upload))
    typer.echo(hub.push(upload, private=private).url)


def _say_version() -> None:
    state = git_state()
    typer.echo(f"{__version__} ({state})" if state else __version__)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and in a checkout its commit.")
    ] = False,
) -> None:
    if version:
        _say_version()
        raise typer.Exit()


def main() -> None:
    """Entry point of the console script."""
    # To build all commands takes longer than the version.
    guarded(_say_version if sys.argv[1:] == ["--version"] else app)


def main_run() -> None:
    """Entry point of ``python -m comit_bench.run``."""
    run_alone(run, "python -m comit_bench.run")


if __name__ == "__main__":
    main()
