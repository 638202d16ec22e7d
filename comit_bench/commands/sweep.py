"""``comit-bench sweep``: reconstruction for lists of solver steps, guidance weights, policies, tokenizers.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from comit_bench.commands.console import (
    DEFAULT_TOKENIZER,
    Bars,
    Interrupts,
    say,
    say_default,
    set_up_logging,
    stoppable,
)
from comit_bench.commands.options import DataRoot, Device, Dtype, Include, Offline, Output, Quiet, Weights
from comit_bench.commands.tokens import key_values
from comit_bench.errors import UsageError, shown


def sweep(
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", "-t", help="May be repeated, a curve each. [default: comit-nano]"),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Solver steps, e.g. 1,2,5,10,25.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance weights, e.g. 0,1,2,5,7.5.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Cropping policy; may be repeated, each at every point.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A reconstruction task. [default: that of the suite]")
    ] = None,
    weights: Weights = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="KEY=VALUE that all points share, e.g. guidance=2; may be repeated."),
    ] = None,
    data_root: DataRoot = None,
    limit: Annotated[int | None, typer.Option(help="Images; records are marked incomplete.")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call; no score depends on it.")] = 64,
    output: Output = Path("results"),
    offline: Offline = False,
    include_path: Include = None,
    quiet: Quiet = False,
) -> None:
    """Reconstruct for lists of settings; each point is a record, so the same command continues a sweep."""
    set_up_logging()
    settings: dict[str, Any] = {
        "task": task,
        "steps": _numbers(steps, int, "--steps"),
        "guidance": _numbers(guidance, float, "--guidance"),
        "policy": policy or None,
        "weights": weights,
        "options": key_values(option or []),
        "data_root": data_root,
        "limit": limit,
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        "output": output,
        "offline": offline,
        "include": tuple(include_path or ()),
        "progress": not quiet,
    }
    if not tokenizer and settings["data_root"] is not None:
        say_default([DEFAULT_TOKENIZER])
    names = tokenizer or [DEFAULT_TOKENIZER]
    raise typer.Exit(stoppable(lambda: _run(names, settings)))


def _numbers(text: str | None, kind: type[int] | type[float], option: str) -> list[float]:
    """Comma-separated numbers; None is an empty list."""
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {shown(text)}: expected {what} separated by commas, e.g. 1,2,5") from None


def _run(tokenizers: list[str], settings: dict[str, Any]) -> int:
    from comit_bench.nn.ranks import Ranks
    from comit_bench.pipeline.session import Reporter
    from comit_bench.pipeline.sweep import sweep as measure
    from comit_bench.results.outcomes import OutcomeFiles
    from comit_bench.results.render.terminal import print_terminal
    from comit_bench.results.render.write import write_tables
    from comit_bench.results.table import build_table

    with Interrupts() as interrupts, Bars(enabled=settings["progress"], check=interrupts.check) as bars:
        reporter = Reporter(bars.start, bars.stop, interrupts.check)
        records = measure(tokenizers, reporter=reporter, **settings)
    Ranks.join().leave()
    if not records:  # the first process has them
        return 0
    output = settings["output"]
    outcomes = OutcomeFiles(output / "records")
    table = build_table(records, outcomes=outcomes)
    print_terminal(table)
    files = write_tables(table, output / "tables-sweep", records, outcomes=outcomes)
    say(f"records: {output / 'records'}\ntables:  {', '.join(str(file) for file in files)}")
    say(f"figure:  comit-bench figure sweeps --results {output}")
    return 0
