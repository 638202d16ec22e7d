"""``python -m comit_bench.run``: images in on one side, a table out on the other. Read this file first.

parse -> plan -> tokenize -> probe -> record -> table

    dataset    comit_bench/data/         official formats, or embedded scenes that are made on the spot
    tokenizer  comit_bench/tokenizers/   uint8 images -> message (ids, codes)
    tokens     comit_bench/data/store.py computed once, kept on disk
    probe      comit_bench/tasks/        a small transformer that reads the message
    record     comit_bench/results/      one JSON file per tokenizer x task x protocol
    table      comit_bench/results/      a view over records

The work itself is in ``evaluation.py``; what it will cost is in ``plan.py``. Under ``torchrun`` or
``accelerate launch`` all processes make tokens and the first does the rest (``ranks.py``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comit_bench.errors import MissingError, UsageError
from comit_bench.evaluation import Bench, Outcome, Reporter, do_jobs
from comit_bench.files import locked
from comit_bench.jobs import Job, Settings, make_jobs
from comit_bench.reading import user_path
from comit_bench.recipes import KINDS, find_tasks
from comit_bench.registry import MAJORITY

if TYPE_CHECKING:
    from comit_bench.plan import Plan
    from comit_bench.results.schema import Record
    from comit_bench.tokenizers.base import Tokenizer

DATA_VARIABLE = "COMIT_BENCH_DATA"
DEFAULT_TOKENIZERS = ("kmeans-patch", "vq-grid-nano", "titok-nano", "comit-nano")
ALL = "all"
SUITES = ("scenes", "paper")


def choose_suite(suite: str | None, data_root: Path | None) -> tuple[str, str]:
    """The suite and the reason for it.

    Raises:
        UsageError: Unknown suite.
    """
    from comit_bench.errors import did_you_mean

    if suite is not None:
        if suite not in SUITES:
            raise UsageError(f"unknown suite {suite!r}.{did_you_mean(suite, SUITES)}")
        return suite, "as --suite says"
    if data_root is not None:
        return "paper", f"because a data root is given: {data_root}"
    return "scenes", f"embedded data; give --data-root or set {DATA_VARIABLE} for the paper suite"


def suite_tasks(suite: str, settings: Settings, *, every: bool = False) -> list[str]:
    """Tasks of a suite: recognition, pairs, relations, then others by kind and name.

    Args:
        suite: The suite.
        settings: Where to look for recipes.
        every: Also those that are done only when asked for (``by_default: false``).
    """
    recipes = find_tasks(settings.include, allow_override=settings.allow_override)
    chosen = [recipe.spec for recipe in recipes.values() if recipe.spec.suite == suite]
    ordered = sorted(chosen, key=lambda spec: (list(KINDS).index(spec.kind), spec.name))
    return [spec.name for spec in ordered if every or spec.by_default]


def choose_tasks(tasks: Sequence[str] | None, suite: str, settings: Settings) -> list[str]:
    """Task names; ``all`` among them stands for every task of the suite, None for its default ones."""
    if tasks is None or not list(tasks):
        return suite_tasks(suite, settings)
    chosen: list[str] = []
    for task in tasks:
        chosen += suite_tasks(suite, settings, every=True) if task == ALL else [task]
    return list(dict.fromkeys(chosen))


def with_references(tokenizers: Sequence[str | Tokenizer], suite: str) -> list[str | Tokenizer]:
    """Add the rows that bracket every score: the majority class and, on scenes, the pixels themselves."""
    references = [MAJORITY] + (["pixel-oracle"] if suite == "scenes" else [])
    named = {t.lower() for t in tokenizers if isinstance(t, str)}
    return [*(name for name in references if name not in named), *tokenizers]


def plan_of_suite(suite: str, settings: Settings) -> Plan:
    """What ``comit-bench run --suite SUITE`` plans when nothing else is asked for; ``doctor`` shows it."""
    from comit_bench.plan import make_plan

    rows = with_references(DEFAULT_TOKENIZERS, suite)
    jobs = make_jobs(rows, choose_tasks(None, suite, settings), settings)
    return make_plan(jobs, Bench(settings), dry=True)


def evaluate(
    tokenizer: str | Tokenizer | Sequence[str | Tokenizer],
    tasks: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    references: bool = True,
    reporter: Reporter | None = None,
    **settings: Any,
) -> list[Record]:
    """Measure tokenizers on tasks; what the command line calls.

    Args:
        tokenizer: Name, hub id, directory or object satisfying the tokenizer contract; or several.
        tasks: Task names; None is the default ones of the suite, ``all`` every one of it.
        suite: ``scenes`` or ``paper``; None is ``paper`` when ``data_root`` is given, else ``scenes``.
        references: Also measure the reference rows.
        reporter: Progress hooks.
        **settings: See :class:`comit_bench.jobs.Settings`.

    Returns:
        One record per tokenizer and task, in order; each is on disk already.

    Raises:
        UsageError, MissingError: Unknown names, wrong settings, absent data or weights: before any work.
        BenchError: A job failed. All others were done first, and their records are kept.
    """
    from comit_bench.plan import make_plan

    chosen = Settings(**{"progress": False, **settings})
    several = (
        [tokenizer] if isinstance(tokenizer, str) or not isinstance(tokenizer, Sequence) else [*tokenizer]
    )
    name, _ = choose_suite(suite, chosen.data_root)
    rows = with_references(several, name) if references else several
    jobs = make_jobs(rows, choose_tasks(tasks, name, chosen), chosen)
    bench = Bench(chosen, reporter=reporter)
    bench.require_places()
    jobs = bench.settle_policies(jobs)
    for error in make_plan(jobs, bench).missing:
        raise error
    outcome = do_jobs(jobs, bench)
    if outcome.failures:
        raise outcome.failures[0][1]
    return outcome.records


def run_command(
    tokenizers: Sequence[str],
    tasks: Sequence[str] | None,
    *,
    suite: str | None,
    settings: Settings,
    dry_run: bool,
    references: bool = True,
    profile: bool = False,
) -> int:
    """Plan, do, print; returns the exit code (0 done, 1 a task failed, 3 data or weights missing)."""
    from comit_bench.console import Bars, Interrupts, say, say_default
    from comit_bench.plan import describe, make_plan

    name, why = choose_suite(suite, settings.data_root)
    chosen: list[str | Tokenizer] = list(tokenizers or DEFAULT_TOKENIZERS)
    rows = with_references(chosen, name) if references else chosen
    jobs = make_jobs(rows, choose_tasks(tasks, name, settings), settings)
    bench = Bench(settings)
    if not dry_run:
        bench.require_places()
    jobs = bench.settle_policies(jobs)
    plan = make_plan(jobs, bench, dry=dry_run)
    first = bench.ranks.first
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
        bench.reporter = Reporter(bars.start, bars.stop, interrupts.check)
        outcome = do_jobs(jobs, bench)
    if profile:
        say(describe_profile(bench.profile, bench.ranks.rank))
    bench.ranks.leave()
    return finish(outcome, jobs, settings) if first else 0


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


def finish(outcome: Outcome, jobs: Sequence[Job], settings: Settings) -> int:
    """Write and print the tables of this run's tasks; tell what failed."""
    from comit_bench.console import say
    from comit_bench.results.records import load_records, published_records
    from comit_bench.results.tables import build_table, print_table, write_tables

    tasks = list(dict.fromkeys(job.task.spec.name for job in jobs))
    table, files = None, []
    with locked(settings.lock, "writing the tables"):  # else one with fewer records might come last
        records = load_records(settings.records)
        records += published_records(records)
        measured = {record.task.name for record in records}
        if tasks := [task for task in tasks if task in measured]:
            table = build_table(records, tasks=tasks)
            files = write_tables(table, settings.output / "tables", records)
    if table is not None:
        print_table(table)
        say(f"records: {settings.records}\ntables:  {', '.join(str(f) for f in files)}")
    for reason in dict.fromkeys(outcome.refused):
        say(reason)
    for job, error in outcome.failures:
        say(f"failed: {job.label} on {job.task.spec.name}: {error}")
    if not outcome.failures:
        return 0
    missing = all(isinstance(error, MissingError) for _, error in outcome.failures)
    return MissingError.exit_code if missing and not outcome.records else 1


def data_root_from(option: Path | None) -> Path | None:
    """``--data-root``, else the environment.

    Raises:
        UsageError: The environment names the home of a user whom nobody knows.
    """
    value = os.environ.get(DATA_VARIABLE)
    return option or (user_path(value, DATA_VARIABLE) if value else None)


if __name__ == "__main__":
    from comit_bench.cli import main_run

    main_run()
