"""What a run is going to do, what it waits for, and how long it took before: before any of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from comit_bench.errors import MissingError
from comit_bench.pipeline.jobs import Job, Reference, Settings, left_out, make_jobs
from comit_bench.pipeline.messages import policy_of
from comit_bench.pipeline.record import expected_seconds, images_of
from comit_bench.pipeline.session import Session, why_not
from comit_bench.pipeline.suite import choose_tasks, with_references
from comit_bench.recipes.specs import DatasetSpec, Recipe
from comit_bench.tasks.base import find_task
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.load import resolve_dtype


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job before it is done.

    Attributes:
        job: Which.
        images: Images that must be read.
        messages_bytes: Size of their tokens in the store.
        seconds: How long it took on this machine before, scaled by the images; None is unknown.
        waits: What is not here and must come first (``data``, ``weights``); nothing when it can be done.
    """

    job: Job
    images: int
    messages_bytes: int
    seconds: float | None
    waits: tuple[str, ...] = ()


@dataclass(slots=True)
class RunPlan:
    """Every job, the state of the data, what is missing and what cannot be done.

    Attributes:
        asked: All jobs that were asked for.
        jobs: Those that can be done, and what is known about each.
        data: Data set -> its state, in words.
        missing: What must come first.
        refused: Jobs whose tokenizer cannot do what the task asks, and why.
    """

    asked: list[Job] = field(default_factory=list)
    jobs: list[JobPlan] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    missing: list[MissingError] = field(default_factory=list)
    refused: list[tuple[Job, str]] = field(default_factory=list)

    @property
    def cache_bytes(self) -> int:
        """Size of the token stores."""
        return sum(part.messages_bytes for part in self.jobs)

    def lacks(self, error: MissingError) -> None:
        """Note something that is missing, once."""
        if str(error) not in {str(known) for known in self.missing}:
            self.missing.append(error)


def data_state(
    recipe: Recipe[DatasetSpec], session: Session, *, dry: bool = False
) -> tuple[str, dict[str, int]]:
    """Whether a data set is there, and images per split, without making any.

    Contents of files are read once for the fingerprint and the proof that splits share no image, so that what
    is wrong with the data is said now. ``dry``: files are only listed.

    Raises:
        MissingError: It is neither here nor made here.
    """
    spec = recipe.spec
    if spec.generator is not None:
        folder = spec.made_in(session.settings.cache_dir)
        there = (folder / "scenes.json").is_file()
        counts = {"train": spec.generator.train, "val": spec.generator.val}
        return ("made before" if there else "will be made now, seeded"), counts
    data = session.data(recipe, contents=not dry)  # the run uses what is opened here
    short = data.shortcomings(dict.fromkeys(data.splits, 0))
    told = f"; records will be marked incomplete ({'; '.join(short)})" if short else ""
    return f"found in {data.folder}{told}", {name: len(split) for name, split in data.splits.items()}


def plan_run(
    tokenizers: Sequence[str | Tokenizer],
    tasks: Sequence[str] | None,
    settings: Settings,
    *,
    suite: str,
    references: bool = True,
    dry: bool = False,
) -> tuple[RunPlan, Session]:
    """From what was asked for to a plan, and the session that will do it.

    Args:
        tokenizers: Names, hub ids, directories or objects.
        tasks: Task names; None is the default ones of the suite.
        settings: How.
        suite: ``scenes`` or ``paper``.
        references: Also the rows that bracket every score.
        dry: See :func:`make_plan`.

    Raises:
        UsageError, MissingError: Unknown names, wrong settings.
        BenchError: Results or cache cannot be written.
    """
    rows = with_references(tokenizers, suite) if references else tokenizers
    jobs = make_jobs(rows, choose_tasks(tasks, suite, settings), settings)
    session = Session(settings)
    if not dry:
        session.require_places()
    return make_plan(session.settle_policies(jobs), session, dry=dry), session


def make_plan(jobs: Sequence[Job], session: Session, *, dry: bool = False) -> RunPlan:
    """Look at data and weights of every job, now rather than hours later.

    Args:
        jobs: From :func:`comit_bench.pipeline.jobs.make_jobs`.
        session: Will do the jobs; it keeps what is opened here.
        dry: Nothing will be done: no file is read or written.

    Raises:
        UsageError: A device that is not there, a type that it does not compute in, or a cropping policy
            that a tokenizer does not know.
    """
    settings = session.settings
    resolve_dtype(settings.dtype, session.device)
    plan = RunPlan(list(jobs))
    counts: dict[str, dict[str, int]] = {}
    for job in jobs:
        name = job.dataset.spec.name
        waits = []
        if name not in counts:
            try:
                plan.data[name], counts[name] = data_state(job.dataset, session, dry=dry)
            except MissingError as error:
                plan.data[name], counts[name] = "missing", {}
                plan.lacks(error)
        if plan.data[name] == "missing":
            waits.append("data")
        try:
            find_task(job.task.spec).prepare(
                job.task.spec, cache=settings.cache_dir, offline=settings.offline
            )
        except MissingError as error:
            waits.append("what the task needs")
            plan.lacks(error)
        tokenizer = None
        try:
            tokenizer = session.peek(job)
        except MissingError as error:
            waits.append("weights")
            plan.lacks(error)
        if tokenizer is not None:
            policy_of(job, tokenizer)  # an unknown one is refused
        reason = why_not(job, tokenizer)
        if reason is not None:
            plan.refused.append((job, reason))
        else:
            plan.jobs.append(_job_plan(job, settings, counts[name], tokenizer, tuple(waits)))
    return plan


def _job_plan(
    job: Job, settings: Settings, counts: dict[str, int], tokenizer: Tokenizer | None, waits: tuple[str, ...]
) -> JobPlan:
    """Images, bytes and seconds of one job; a tokenizer that is not here, or is fitted, counts as small."""
    if job.instant:
        return JobPlan(job, 0, 0, 0.0, waits)
    images = images_of(job, counts, settings)
    if isinstance(job.tokenizer, Reference):
        return JobPlan(job, 0, 0, None if waits else expected_seconds(job, settings, images), waits)
    length, per_token = 16, 2
    if tokenizer is not None:
        info = tokenizer.info
        length, per_token = info.message_length, 2 if info.vocab_size else 4 * info.code_dim
    seconds = None if waits else expected_seconds(job, settings, images)
    return JobPlan(job, images, images * length * per_token, seconds, waits)


# --------------------------------------------------------------------------------------- in words


def human_bytes(count: float) -> str:
    """1.5 MB, 12 kB, ..."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """40 s, 12 min, 3.5 h, 1,750 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def describe(plan: RunPlan, settings: Settings, *, suite: str, why: str) -> list[str]:
    """The plan as lines of text."""
    lines = [f"suite {suite} ({why})"]
    lines += [f"  data   {name}: {state}" for name, state in plan.data.items()]
    for part in plan.jobs:
        lines.append(f"  {part.job.task.spec.name}: {part.job.label}{_words(part, settings)}")
    for job, reason in plan.refused:
        lines.append(f"  {job.task.spec.name}: {job.label} is left out: {reason}")
    lines.append(
        f"  {_total(plan)}; token cache {human_bytes(plan.cache_bytes)} in {_short(settings.cache_dir)}; "
        f"results in {_short(settings.output)}"
    )
    without = left_out([part.job.tokenizer for part in plan.jobs], settings.options)
    for key, names in without.items():
        option = f"{key}={settings.options[key]}"
        lines.append(f"  --option {option}: not known to {', '.join(names)}, which run without it")
    if settings.limit is not None:
        lines.append(f"  --limit {settings.limit}: records will be marked incomplete")
    return lines


def _words(part: JobPlan, settings: Settings) -> str:
    """What the plan says about one job, behind its name."""
    task = part.job.task.spec
    policy = f" ({part.job.policy})" if part.job.policy else ""
    if part.waits:
        return f"{policy}: waits for {' and '.join(part.waits)}"
    if part.job.instant:
        return " (labels only)"
    probed = task.task_kind.probed
    seeds = (settings.seeds or task.seeds) if probed else task.seeds
    what = "probe seeds" if probed else "seed" if seeds == 1 else "seeds"
    known = "time unknown" if part.seconds is None else f"about {human_seconds(part.seconds)}"
    images = f"{part.images:,} images" if part.images else "no image"
    return f"{policy}: {images}, {seeds} {what}, {known}"


def _total(plan: RunPlan) -> str:
    read = [part for part in plan.jobs if not part.job.instant]
    timed = [part.seconds for part in read if part.seconds is not None]
    others = len(read) - len(timed)
    if not timed:
        return "time unknown: nothing like it was done on this machine before"
    known = f"about {human_seconds(sum(timed))}, as on this machine before"
    return f"{known}, and {others} jobs of unknown time" if others else f"in all {known}"


def _short(path: Path) -> str:
    try:
        return "~/" + str(path.resolve().relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere, or a user without a home
        return str(path)
