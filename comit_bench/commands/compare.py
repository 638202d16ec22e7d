"""``comit-bench compare``: is one row better than another, and what differences can be found at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from comit_bench.commands.console import set_up_logging
from comit_bench.commands.options import as_path, comma_separated
from comit_bench.errors import UsageError


def compare(
    rows: Annotated[
        list[str] | None,
        typer.Argument(help="Rows as the table prints them, e.g. comit-nano 'comit-nano (random:9)'."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Only these tasks, comma-separated. [default: all that rows share]")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Only these metrics, comma-separated. [default: all]")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            callback=as_path, help="Folder of the run; rows not there are taken from the reference records."
        ),
    ] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
    power: Annotated[
        bool,
        typer.Option("--power", help="Print, as Markdown, the smallest difference each task can find."),
    ] = False,
) -> None:
    """Say which of two or more rows is better, by paired tests over images and probe seeds."""
    from comit_bench.results.compare import compare as compared
    from comit_bench.results.power import power_table
    from comit_bench.results.render.comparison import print_comparison

    set_up_logging()
    if power:
        if rows or tasks or metrics or as_json:
            raise UsageError("--power looks at all rows and tasks of --output: leave the others out")
        typer.echo(power_table(output), nl=False)
        return
    chosen = comma_separated(metrics)
    found = compared(*rows or (), output=output, tasks=comma_separated(tasks), metrics=chosen)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print_comparison(found, every=chosen is not None)
