"""What a run is going to do, what it waits for, and how long it took before: before any of it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from comit_bench.errors import MissingError
from comit_bench.pipeline.jobs import Job, Settings, left_out
from comit_bench.pipeline.record import expected_seconds, images_of
from comit_bench.recipes.specs import KINDS, DatasetSpec, ProbeSpec, Recipe
from comit_bench.tokenizers.registry import MAJORITY

if TYPE_CHECKING:
    from comit_bench.pipeline.bench import Bench
    from comit_bench.tokenizers.base import Tokenizer

ENCODE_EFFICIENCY = 0.5  # share of the matrix-product rate that encoders reach


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
class Plan:
    """Every job, the state of the data, what is missing and what cannot be done."""

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


def matmul_rate() -> float:
    """float32 FLOP per second of this machine: the best of a few short products, in under 0.1 s."""
    import torch

    side = 768
    a, best = torch.randn(side, side), float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def pass_flops(probe: ProbeSpec, tokens: int, code_dim: int) -> float:
    """FLOPs of one training pass of a probe, forwards and backwards, over so many tokens."""
    block = (4 + 2 * probe.mlp_ratio) * probe.width**2
    return 6.0 * tokens * (block * probe.depth + code_dim * probe.width)


def data_state(recipe: Recipe[DatasetSpec], bench: Bench, *, dry: bool = False) -> tuple[str, dict[str, int]]:
    """Whether a data set is there, and images per split, without making any.

    Contents of files are read once for the fingerprint and the proof that splits share no image, so that what
    is wrong with the data is said now. ``dry``: files are only listed.

    Raises:
        MissingError: It is neither here nor made here.
    """
    spec = recipe.spec
    if spec.generator is not None:
        folder = bench.settings.cache_dir / "datasets" / spec.folder
        there = (folder / "scenes.json").is_file()
        counts = {"train": spec.generator.train, "val": spec.generator.val}
        return ("made before" if there else "will be made now, seeded"), counts
    data = bench.look(recipe) if dry else bench.data(recipe)  # the run uses what is opened here
    short = data.shortcomings(dict.fromkeys(data.splits, 0))
    told = f"; records will be marked incomplete ({'; '.join(short)})" if short else ""
    return f"found in {data.folder}{told}", {name: len(split) for name, split in data.splits.items()}


def make_plan(jobs: Sequence[Job], bench: Bench, *, dry: bool = False) -> Plan:
    """Look at data and weights of every job, now rather than hours later.

    Args:
        jobs: From :func:`comit_bench.pipeline.jobs.make_jobs`.
        bench: Will do the jobs; it keeps what is opened here.
        dry: Nothing will be done: no file is read or written.

    Raises:
        UsageError: A device that is not there, a type that it does not compute in, or a cropping policy
            that a tokenizer does not know.
    """
    from comit_bench.tasks.base import find_executor
    from comit_bench.tokenizers.load import resolve_dtype

    resolve_dtype(bench.settings.dtype, bench.device)
    plan, settings = Plan(), bench.settings
    counts: dict[str, dict[str, int]] = {}
    for job in jobs:
        name = job.dataset.spec.name
        waits = []
        if name not in counts:
            try:
                plan.data[name], counts[name] = data_state(job.dataset, bench, dry=dry)
            except MissingError as error:
                plan.data[name], counts[name] = "missing", {}
                plan.lacks(error)
        if plan.data[name] == "missing":
            waits.append("data")
        try:
            find_executor(job.task.spec).prepare(
                job.task.spec, cache=settings.cache_dir, offline=settings.offline
            )
        except MissingError as error:
            waits.append("what the task needs")
            plan.lacks(error)
        tokenizer = None
        try:
            tokenizer = None if job.label == MAJORITY else bench.peek(job)
        except MissingError as error:
            waits.append("weights")
            plan.lacks(error)
        if tokenizer is not None:
            bench.policy(job, tokenizer)
        reason = bench.why_not(job, tokenizer)
        if reason is not None:
            plan.refused.append((job, reason))
        else:
            plan.jobs.append(_job_plan(job, settings, counts[name], tokenizer, tuple(waits)))
    return plan


def _job_plan(
    job: Job, settings: Settings, counts: dict[str, int], tokenizer: Tokenizer | None, waits: tuple[str, ...]
) -> JobPlan:
    """Images, bytes and seconds of one job; a tokenizer that is not here, or is fitted, counts as small."""
    if job.label == MAJORITY:
        return JobPlan(job, 0, 0, 0.0, waits)
    images = images_of(job, counts, settings)
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


def describe(plan: Plan, settings: Settings, *, suite: str, why: str) -> list[str]:
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
    if part.job.label == MAJORITY:
        return " (labels only)"
    probed = KINDS[task.kind].probed
    seeds = (settings.seeds or task.seeds) if probed else task.seeds
    what = "probe seeds" if probed else "seed" if seeds == 1 else "seeds"
    known = "time unknown" if part.seconds is None else f"about {human_seconds(part.seconds)}"
    return f"{policy}: {part.images:,} images, {seeds} {what}, {known}"


def _total(plan: Plan) -> str:
    timed = [part.seconds for part in plan.jobs if part.seconds is not None and part.job.label != MAJORITY]
    others = sum(part.seconds is None for part in plan.jobs)
    if not timed:
        return "time unknown: nothing like it was done on this machine before"
    known = f"about {human_seconds(sum(timed))}, as on this machine before"
    return f"{known}, and {others} jobs of unknown time" if others else f"in all {known}"


def _short(path: Path) -> str:
    try:
        return "~/" + str(path.resolve().relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere, or a user without a home
        return str(path)
