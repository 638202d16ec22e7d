"""Measure tokenizers on tasks: what the command line calls, and what there is from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comit_bench.pipeline.bench import Bench, Reporter, do_jobs
from comit_bench.pipeline.jobs import Settings, make_jobs
from comit_bench.pipeline.plan import Plan, make_plan
from comit_bench.pipeline.suite import DEFAULT_TOKENIZERS, choose_suite, choose_tasks, with_references

if TYPE_CHECKING:
    from comit_bench.results.schema import Record
    from comit_bench.tokenizers.base import Tokenizer


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
        **settings: See :class:`comit_bench.pipeline.jobs.Settings`.

    Returns:
        One record per tokenizer and task, in order; each is on disk already.

    Raises:
        UsageError, MissingError: Unknown names, wrong settings, absent data or weights: before any work.
        BenchError: A job failed. All others were done first, and their records are kept.
    """
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


def plan_of_suite(suite: str, settings: Settings) -> Plan:
    """What ``comit-bench run --suite SUITE`` plans when nothing else is asked for; ``doctor`` shows it."""
    from comit_bench.pipeline.plan import make_plan

    rows = with_references(DEFAULT_TOKENIZERS, suite)
    jobs = make_jobs(rows, choose_tasks(None, suite, settings), settings)
    return make_plan(jobs, Bench(settings), dry=True)
