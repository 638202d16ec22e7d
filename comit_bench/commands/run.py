"""``comit-bench run``: plan, do, print.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comit_bench.commands.console import Bars, Interrupts, say, say_default, set_up_logging, stoppable
from comit_bench.commands.options import (
    DataRoot,
    Device,
    Dtype,
    Include,
    Offline,
    Output,
    Quiet,
    Weights,
    comma_separated,
)
from comit_bench.commands.report import REPORT_FILE, make_report
from comit_bench.commands.tokens import key_values
from comit_bench.errors import MissingError, UsageError, did_you_mean, shown
from comit_bench.files import check_folder, locked

if TYPE_CHECKING:
    from comit_bench.pipeline.evaluate import Finished
    from comit_bench.pipeline.jobs import Job, Settings

OVERWRITE = ("always", "never", "only-missing")


def run(
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", "-t", help="Name, hub id or checkpoint directory; may be repeated."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="scenes, drawings (embedded) or paper. [default: paper with a data root]"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Comma-separated task names, or all. [default: the probes of the suite]"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Cropping policy: global, raster:9, global+adaptive:3 (the number counts the global crop), "
            "...; may be repeated, a row each. [default: global]"
        ),
    ] = None,
    weights: Weights = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="KEY=VALUE for the tokenizers that know it, e.g. posterior=sample, or FAMILY.KEY=VALUE for "
            "one family; may be repeated.",
        ),
    ] = None,
    data_root: DataRoot = None,
    limit: Annotated[
        int | None, typer.Option(help="Images per split; records are marked incomplete.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Probe seeds. [default: the recipe's]")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: Annotated[
        str, typer.Option(help="Images per encoding call, or auto; no score depends on it.")
    ] = "auto",
    num_workers: Annotated[str, typer.Option(help="Image-reading processes, or auto.")] = "auto",
    output: Output = Path("results"),
    overwrite: Annotated[
        str,
        typer.Option(
            help="Finished records: only-missing keeps them, always replaces them and makes tokens anew, "
            "never stops there."
        ),
    ] = "only-missing",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue; the same as --overwrite only-missing.")
    ] = False,
    control: Annotated[
        str | None,
        typer.Option(
            help="permute-labels: scores must fall to chance; shuffle-tokens, bag-of-tokens: without "
            "positions."
        ),
    ] = None,
    probe_lr: Annotated[
        str | None,
        typer.Option(
            "--probe-lr",
            metavar="A,B,C",
            help="Fit every probe with each of these learning rates; the best on early-stop images counts.",
        ),
    ] = None,
    references: Annotated[bool, typer.Option(help="Also measure the rows that bracket every score.")] = True,
    offline: Offline = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    include_path: Include = None,
    allow_override: Annotated[
        bool, typer.Option("--allow-override", help="Let included recipes replace built-in ones.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time of tokenization went.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html, a page to browse, beside the records.")
    ] = False,
    quiet: Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is kept and skipped.")] = False,
) -> None:
    """Tokenize, probe, print a table. Without arguments: the embedded suite, a few minutes on two cores."""
    from comit_bench.pipeline.jobs import Settings

    set_up_logging(verbose=verbose)
    settings = Settings(
        output=output,
        data_root=data_root,
        policy=policy or None,
        weights=weights,
        options=key_values(option or []),
        limit=limit,
        seeds=seeds,
        device=device,
        dtype=dtype,
        batch_size=_number_or_auto(batch_size, 64, "--batch-size"),
        num_workers=_number_or_auto(num_workers, _auto_workers(), "--num-workers"),
        overwrite=_checked_overwrite(overwrite, resume),
        probe_lr=_learning_rates(probe_lr),
        control=control,
        offline=offline,
        include=tuple(include_path or ()),
        allow_override=allow_override,
        progress=not quiet,
    )
    names = comma_separated(tasks)
    plan: dict[str, Any] = {"suite": suite, "dry_run": dry_run, "references": references, "profile": profile}
    plan["report"] = report
    raise typer.Exit(stoppable(lambda: run_command(tokenizer or [], names, settings=settings, **plan)))


def _learning_rates(text: str | None) -> tuple[float, ...]:
    names = comma_separated(text) or []
    try:
        return tuple(float(name) for name in names)
    except ValueError as error:
        raise UsageError(f"--probe-lr {text}: expected numbers, e.g. 1e-4,3e-4,1e-3") from error


def _checked_overwrite(value: str, resume: bool) -> Any:
    if value not in OVERWRITE:
        raise UsageError(
            f"--overwrite {value!r}: not one of {', '.join(OVERWRITE)}.{did_you_mean(value, OVERWRITE)}"
        )
    if resume and value != "only-missing":
        raise UsageError(f"--resume continues and --overwrite {value} does not: give one of them")
    return value


def _number_or_auto(value: str, automatic: int, option: str) -> int:
    if value == "auto":
        return automatic
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{option} {shown(value)}: expected a whole number or auto") from None


def _auto_workers() -> int:
    """Workers cost a torch import each; they pay where there are cores to spare."""
    cores = os.cpu_count() or 1
    return 0 if cores <= 4 else min(8, cores // 2)


def run_command(
    tokenizers: Sequence[str],
    tasks: Sequence[str] | None,
    *,
    suite: str | None,
    settings: Settings,
    dry_run: bool,
    references: bool = True,
    profile: bool = False,
    report: bool = False,
) -> int:
    """Plan, do, print; returns the exit code (0 done, 1 a task failed, 3 data or weights missing)."""
    from comit_bench.pipeline.evaluate import run_jobs
    from comit_bench.pipeline.plan import describe, plan_run
    from comit_bench.pipeline.session import Reporter
    from comit_bench.pipeline.suite import DEFAULT_TOKENIZERS, choose_suite

    name, why = choose_suite(suite, settings.data_root)
    if dry_run:
        check_folder(settings.output)
        check_folder(settings.cache_dir)
    chosen = tokenizers or DEFAULT_TOKENIZERS
    plan, session = plan_run(chosen, tasks, settings, suite=name, references=references, dry=dry_run)
    first = session.ranks.first
    if first and not tokenizers and name == "paper":
        say_default([label for label in DEFAULT_TOKENIZERS if label.endswith("-nano")])
    if first:
        say("\n".join(describe(plan, settings, suite=name, why=why)))
    if plan.missing:
        if first:
            say("\n".join(f"missing: {error}" for error in plan.missing))
        return MissingError.exit_code
    if dry_run:
        return 0
    bars_on = settings.progress and first
    with Interrupts() as interrupts, Bars(enabled=bars_on, check=interrupts.check) as bars:
        session.reporter = Reporter(bars.start, bars.stop, interrupts.check)
        finished = run_jobs(plan.asked, session)
    if profile:
        say(describe_profile(session.profile, session.ranks.rank))
    session.ranks.leave()
    return finish(finished, plan.asked, settings, report=report) if first else 0


def describe_profile(spent: dict[str, float], rank: int = 0) -> str:
    """Where the time of tokenization went, as text."""
    total = sum(spent.values())
    if not total:
        return "profile: no image was tokenized, all tokens were there"
    names = {
        "images": "waiting for decoded images",
        "encode": "encoding (with the way to and from the device)",
        "write": "writing shards",
    }
    lines = [f"profile of tokenization{f', process {rank}' if rank else ''}: {total:.1f} s"]
    lines += [
        f"  {seconds / total:6.1%}  {seconds:8.1f} s  {names[name]}"
        for name, seconds in sorted(spent.items())
    ]
    return "\n".join(lines)


def finish(finished: Finished, jobs: Sequence[Job], settings: Settings, *, report: bool = False) -> int:
    """Write and print the tables of this run's tasks, and the report when it is wanted; tell what failed."""
    from comit_bench.results.outcomes import OutcomeFiles
    from comit_bench.results.records import load_records, published_records
    from comit_bench.results.render.terminal import print_terminal
    from comit_bench.results.render.write import write_tables
    from comit_bench.results.table import build_table

    tasks = list(dict.fromkeys(job.task.spec.name for job in jobs))
    table, files = None, []
    with locked(settings.lock, "writing the tables"):  # else one with fewer records might come last
        records = load_records(settings.records)
        records += published_records(records)
        measured = {record.task.name for record in records}
        if tasks := [task for task in tasks if task in measured]:
            outcomes = OutcomeFiles(settings.records)
            table = build_table(records, tasks=tasks, outcomes=outcomes)
            files = write_tables(table, settings.output / "tables", records, outcomes=outcomes)
    if table is not None:
        print_terminal(table)
        say(f"records: {settings.records}\ntables:  {', '.join(str(f) for f in files)}")
        if report:
            page = settings.output / REPORT_FILE
            make_report(
                [settings.records],
                page,
                data_root=settings.data_root,
                cache=settings.cache_dir,
                progress=settings.progress,
            )
            say(f"report:  {page}")
    for reason in dict.fromkeys(finished.refused):
        say(reason)
    for job, error in finished.failures:
        say(f"failed: {job.label} on {job.task.spec.name}: {error}")
    if not finished.failures:
        return 0
    missing = all(isinstance(error, MissingError) for _, error in finished.failures)
    return MissingError.exit_code if missing and not finished.records else 1
