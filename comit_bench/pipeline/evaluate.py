"""Measure tokenizers on tasks: what the command line calls, and what there is from Python.

:func:`run_job` is the whole way of one job, from images to a record. Everything finished is on disk before
the next thing starts: token shards as they fill, a record as soon as its task ends. The same call continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from comit_bench.errors import BenchError, UnsupportedOperation, UsageError
from comit_bench.files import locked, remove_folder, user_path
from comit_bench.pipeline.failures import unexpected
from comit_bench.pipeline.inputs import inputs_of, protocol_of
from comit_bench.pipeline.jobs import Job, Reference, Settings
from comit_bench.pipeline.messages import threads_for, were_mended, with_messages
from comit_bench.pipeline.plan import RunPlan, plan_run
from comit_bench.pipeline.record import (
    Identity,
    identify,
    images_of,
    keep_record,
    make_record,
    note_seconds,
    work_folder,
)
from comit_bench.pipeline.session import Reporter, Session, Start, refuse
from comit_bench.pipeline.suite import DEFAULT_TOKENIZERS, choose_suite
from comit_bench.probing.fit import FitProgress, ProgressCallback
from comit_bench.results.schema import Record
from comit_bench.tasks.base import Inputs, find_task
from comit_bench.tasks.result import Result
from comit_bench.tokenizers.base import Tokenizer

MEMORY_ADVICE = (
    "Lower --batch-size, close other programs that use this device, take --dtype bfloat16 or more memory, or "
    "--device cpu. What was finished is kept: the same command continues."
)
_log = logging.getLogger(__name__)


def evaluate(
    tokenizer: str | Tokenizer | Sequence[str | Tokenizer],
    tasks: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    references: bool = True,
    reporter: Reporter | None = None,
    **settings: Any,
) -> list[Record]:
    """Measure tokenizers on tasks.

    Args:
        tokenizer: Name, hub id, directory or object satisfying the tokenizer contract; or several.
        tasks: Task names; None is the default ones of the suite, ``all`` every one of it.
        suite: ``scenes`` or ``paper``; None is ``paper`` when ``data_root`` is given, else ``scenes``.
        references: Also measure the reference rows.
        reporter: Progress hooks.
        **settings: See :class:`comit_bench.pipeline.jobs.Settings`; paths may be text.

    Returns:
        One record per tokenizer and task, in order; each is on disk already.

    Raises:
        UsageError, MissingError: Unknown names, wrong settings, absent data or weights: before any work.
        BenchError: A job failed. All others were done first, and their records are kept.
    """
    paths = {
        name: user_path(value, name)
        for name, value in settings.items()
        if name in ("output", "data_root", "cache") and isinstance(value, str)
    }
    chosen = Settings(**{"progress": False, **settings, **paths})
    several = (
        [tokenizer] if isinstance(tokenizer, str) or not isinstance(tokenizer, Sequence) else [*tokenizer]
    )
    name, _ = choose_suite(suite, chosen.data_root)
    plan, session = plan_run(several, tasks, chosen, suite=name, references=references)
    for error in plan.missing:
        raise error
    session.reporter = reporter or session.reporter
    finished = run_jobs(plan.asked, session)
    if finished.failures:
        raise finished.failures[0][1]
    return finished.records


def plan_of_suite(suite: str, settings: Settings) -> RunPlan:
    """What ``comit-bench run --suite SUITE`` plans when nothing else is asked for; ``doctor`` shows it."""
    return plan_run(DEFAULT_TOKENIZERS, None, settings, suite=suite, dry=True)[0]


# ------------------------------------------------------------------------------------------ one job


class Elsewhere(Exception):
    """Another run is doing this job."""


def run_job(job: Job, session: Session, *, wait: bool = True) -> Record | None:
    """Do one job, or return the record that it left earlier; None in all processes but the first.

    A job that another run is just measuring is left to it, and its record is returned.

    Raises:
        Elsewhere: Another run is measuring it, and ``wait`` is False. Its tokens are made by then.
        BenchError: The job cannot be done; other jobs are not affected.
    """
    started, ranks, settings = time.perf_counter(), session.ranks, session.settings

    # open the data, load the tokenizer, look for a record
    inputs = ranks.together(lambda: inputs_of(job, session.data(job.dataset), session))
    tokenizer = ranks.together(lambda: session.tokenizer(job))
    identity = ranks.together(lambda: _identity(job, tokenizer, inputs, session))
    found = ranks.together(lambda: _earlier(job, identity, settings))
    mended = found is not None and were_mended(job, tokenizer, inputs, found, session)
    if ranks.share(found is not None and not mended):
        return found

    # get the messages
    _check(job, tokenizer, inputs, session)
    inputs, encoded = with_messages(job, tokenizer, inputs, session)
    work = work_folder(job, identity, inputs, settings)
    with _alone(job, work, session, wait):
        again = ranks.together(lambda: _meanwhile(identity, session))
        if ranks.share(again is not None and again != found):
            return again

        # measure, write
        tokenized = time.perf_counter()
        result = _measure(job, inputs, work, session)
        if result is None:
            return None
        spent = {"tokenize": tokenized - started, "probe": time.perf_counter() - tokenized}
        record = make_record(result, identity, inputs, settings, spent)
        record = keep_record(record, result.outcomes, settings, replace=mended)
        remove_folder(work)
        seconds = time.perf_counter() - started
        images = images_of(job, {name: len(split) for name, split in inputs.data.splits.items()}, settings)
        note_seconds(job, settings, seconds=seconds, images=images, encoded=encoded)
        return record


def _identity(job: Job, tokenizer: Tokenizer | None, inputs: Inputs, session: Session) -> Identity:
    with session.ranks.in_turn():
        protocol = protocol_of(job, tokenizer, inputs, session.settings)
    return identify(job, tokenizer, inputs.data, protocol)


def _earlier(job: Job, identity: Identity, settings: Settings) -> Record | None:
    """The record that an earlier run has left and that is to be kept.

    Raises:
        UsageError: There is one, and ``overwrite`` is ``never``.
    """
    found = None if settings.overwrite == "always" else identity.find(settings.records)
    if found is not None and settings.overwrite == "never":
        raise UsageError(
            f"{job.label} on {job.task.spec.name} has a record already, and --overwrite never stops "
            "there. Use only-missing to keep it and go on, or always to replace it."
        )
    if found is not None:
        _log.info("%s on %s: the record exists and is kept", job.label, job.task.spec.name)
    return found


def _meanwhile(identity: Identity, session: Session) -> Record | None:
    """A record that another run has left meanwhile; the first process looks."""
    if not session.ranks.first or session.settings.overwrite == "always":
        return None
    return identity.find(session.settings.records)


def _check(job: Job, tokenizer: Tokenizer | None, inputs: Inputs, session: Session) -> None:
    """Refuse what cannot be measured before anything is tokenized; workers get ready meanwhile.

    Raises:
        UnsupportedOperation: As the task says.
        BenchError: The data cannot be measured.
    """
    if tokenizer is None:
        return
    refuse(job, tokenizer)
    task, examined, first = (
        find_task(job.task.spec),
        replace(inputs, tokenizer=tokenizer),
        session.ranks.first,
    )
    session.ranks.together(lambda: task.examine(examined) if first else None)
    if inputs.pool is not None and first:
        inputs.pool.start(len(inputs.seeds))


@contextmanager
def _alone(job: Job, work: Path, session: Session, wait: bool) -> Iterator[None]:
    """No other run measures this job during the block, with the same cache."""
    what, ranks = f"measuring {job.label} on {job.task.spec.name}", session.ranks
    lock = work.with_name(f".{work.name}.lock")
    with ExitStack() as stack:

        def enter() -> bool:
            return not ranks.first or stack.enter_context(locked(lock, what, wait=wait))

        if not ranks.share(ranks.together(enter)):
            raise Elsewhere(what)
        yield


def _measure(job: Job, inputs: Inputs, work: Path, session: Session) -> Result | None:
    """Run the task; None in processes that have no part in it."""
    spec, first, reporter = job.task.spec, session.ranks.first, session.reporter
    task, probed = find_task(spec), spec.task_kind.probed
    if probed and not first:
        return None
    if session.settings.overwrite == "always" and first:
        remove_folder(work)

    def start(what: str, total: int, unit: str) -> Callable[[int], None]:
        reporter.stop()
        return reporter.start(f"{job.label}: {what} {spec.name}", total, unit)

    try:
        if probed:
            watched = inputs if job.instant else replace(inputs, progress=_epochs(inputs, start))
            if isinstance(job.tokenizer, Reference):
                return job.tokenizer.measure(task, watched)
            return task.run(watched)
        assert inputs.tokenizer is not None
        with threads_for(inputs.tokenizer, session.device):
            return task.run(replace(inputs, start=start, work=work))
    finally:
        reporter.stop()


def _epochs(inputs: Inputs, start: Start) -> ProgressCallback:
    """Epochs of all fits in one progress bar; one that stops early counts as if it had not."""
    most, seen = inputs.spec.probe.max_epochs, dict[int, int]()
    fits = len(inputs.seeds) * inputs.spec.split.folds * max(1, len(inputs.learning_rates))
    advance = start("probing", fits * most, "epochs")

    def progress(state: FitProgress) -> None:
        before = seen.get(state.seed, 0) if state.log.epoch > 1 else 0
        epochs = most if state.finished else state.log.epoch
        advance(epochs - before)
        seen[state.seed] = epochs

    return progress


# --------------------------------------------------------------------------------------- many jobs


@dataclass(slots=True)
class Finished:
    """Records that were made or found, what failed, and what a tokenizer cannot do."""

    records: list[Record] = field(default_factory=list)
    failures: list[tuple[Job, BenchError]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def run_jobs(jobs: Sequence[Job], session: Session) -> Finished:
    """Do all jobs and end the probe workers; a job that fails does not stop the others.

    What another run is measuring is left for last: it is either done by then, or waited for.
    """
    finished = Finished()
    records: dict[int, Record] = {}
    later: list[int] = []

    def fail(job: Job, error: BenchError) -> None:
        finished.failures.append((job, error))
        _log.warning("%s on %s failed; the other jobs go on", job.label, job.task.spec.name)

    def do(number: int, *, wait: bool) -> None:
        job = jobs[number]
        session.reporter.check()
        try:
            record = run_job(job, session, wait=wait)
            if record is not None:
                records[number] = record
        except Elsewhere:
            later.append(number)
        except UnsupportedOperation as error:
            finished.refused.append(str(error))
        except BenchError as error:
            fail(job, error)
        except Exception as error:  # a plugin's, a library's, the device's: the others are not affected
            doing = f"{job.label} on {job.task.spec.name}"
            fail(job, unexpected(error, doing, session.settings.output, if_memory=MEMORY_ADVICE))
            torch.cuda.empty_cache()

    with session.pool:
        for number in range(len(jobs)):
            do(number, wait=False)
        for number in later:
            do(number, wait=True)
    finished.records = [records[number] for number in sorted(records)]
    return finished
