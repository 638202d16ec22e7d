"""What a run is going to do and what it will cost, before any of it is done."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comit_bench.errors import MissingError
from comit_bench.jobs import Job, Settings, left_out
from comit_bench.recipes import KINDS, DatasetSpec, ProbeSpec, Recipe
from comit_bench.registry import MAJORITY

if TYPE_CHECKING:
    from comit_bench.evaluation import Bench
    from comit_bench.tokenizers.base import Tokenizer

PROBE_EFFICIENCY = 0.35  # share of the matrix-product rate of one core that small probes reach
ENCODE_EFFICIENCY = 0.5
PNG_SECONDS = 0.0004  # reading one small image; large JPEGs take about 10 ms
JPEG_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Cost of one job. ``images`` counts those that must be read; seconds are a rough estimate."""

    job: Job
    images: int
    messages_bytes: int
    seconds: float


@dataclass(slots=True)
class Plan:
    """All jobs with their costs, the state of the data, what is missing and what cannot be done."""

    jobs: list[JobPlan] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    missing: list[MissingError] = field(default_factory=list)
    refused: list[tuple[Job, str]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Estimated time of everything."""
        return sum(part.seconds for part in self.jobs)

    @property
    def cache_bytes(self) -> int:
        """Size of the token stores."""
        return sum(part.messages_bytes for part in self.jobs)


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


def data_state(recipe: Recipe[DatasetSpec], bench: Bench) -> tuple[str, dict[str, int]]:
    """Whether a data set is there, and images per split, without reading or making any.

    Raises:
        MissingError: It is neither here nor made here.
    """
    spec = recipe.spec
    if spec.generator is not None:
        folder = bench.settings.cache_dir / "datasets" / spec.folder
        there = (folder / "scenes.json").is_file()
        counts = {"train": spec.generator.train, "val": spec.generator.val}
        return ("made before" if there else "will be made now, seeded"), counts
    data = bench.data(recipe)  # the folders are scanned once, here; the run uses what is found
    return f"found in {data.folder}", {name: len(split) for name, split in data.splits.items()}


def make_plan(jobs: Sequence[Job], bench: Bench) -> Plan:
    """Look at data and weights of every job, now rather than hours later.

    Args:
        jobs: From :func:`comit_bench.jobs.make_jobs`.
        bench: Will do the jobs; it keeps what is opened here.

    Raises:
        UsageError: A device that is not there, or a type that it does not compute in.
    """
    from comit_bench.tasks.executor import find_executor, find_looking_executor
    from comit_bench.tokenizers.loading import resolve_dtype

    resolve_dtype(bench.settings.dtype, bench.device)
    plan, rate, settings = Plan(), matmul_rate(), bench.settings
    counts: dict[str, dict[str, int]] = {}
    for job in jobs:
        name = job.dataset.spec.name
        if name not in counts:
            try:
                plan.data[name], counts[name] = data_state(job.dataset, bench)
            except MissingError as error:
                plan.data[name], counts[name] = "missing", {}
                plan.missing.append(error)
        try:
            find_executor(job.task.spec).prepare(
                job.task.spec, cache=settings.cache_dir, offline=settings.offline
            )
            tokenizer = None if job.label == MAJORITY else bench.peek(job)
        except MissingError as error:
            if str(error) not in {str(known) for known in plan.missing}:
                plan.missing.append(error)
            continue
        if job.label == MAJORITY:
            plan.jobs.append(JobPlan(job, 0, 0, 0.0))
            continue
        if tokenizer is not None and not KINDS[job.task.spec.kind].probed:
            reason = find_looking_executor(job.task.spec).refuses(job.task.spec, tokenizer)
            if reason is not None:
                plan.refused.append((job, reason))
                continue
        plan.jobs.append(_cost(job, settings, counts[name], tokenizer, rate))
    return plan


def pass_flops(probe: ProbeSpec, tokens: int, code_dim: int) -> float:
    """FLOPs of one training pass of a probe, forwards and backwards, over so many tokens."""
    block = (4 + 2 * probe.mlp_ratio) * probe.width**2
    return 6.0 * tokens * (block * probe.depth + code_dim * probe.width)


def _cost(
    job: Job, settings: Settings, counts: dict[str, int], tokenizer: Tokenizer | None, rate: float
) -> JobPlan:
    """Images and seconds of one job; a tokenizer that is still to be fitted counts as small."""
    from comit_bench.tasks.executor import find_looking_executor, find_probe_executor

    split, probe, probed = job.task.spec.split, job.task.spec.probe, KINDS[job.task.spec.kind].probed
    names = (split.train, split.report, split.early_stop.source) if probed else (split.report,)
    used = {name: counts.get(name, 0) for name in names}
    images = sum(min(n, settings.limit or n) for n in used.values())
    length, code_dim, per_token, flops = 16, 192, 2, 0.0
    if tokenizer is not None:
        info = tokenizer.info
        length, code_dim = info.message_length, info.code_dim
        per_token = 2 if info.vocab_size else 4 * code_dim
        estimate = getattr(tokenizer, "encode_flops", None)
        flops = estimate(job.policy) if estimate else 2.0 * info.parameters * length
    read = PNG_SECONDS if job.dataset.spec.generator else JPEG_SECONDS
    seconds = images * (read + flops / (rate * ENCODE_EFFICIENCY))
    if not probed:
        decoding: Any = getattr(tokenizer, "decode_flops", lambda: 20 * flops)
        count = getattr(getattr(job.task.spec, job.task.spec.kind), "count", None)  # of some kinds' sections
        images = min(images, count or images)
        times = find_looking_executor(job.task.spec).decodings(job.task.spec) * job.task.spec.seeds
        seconds += times * images * decoding() / (rate * ENCODE_EFFICIENCY)
        return JobPlan(job, images, images * length * per_token, seconds)
    train = min(used[split.train], settings.limit or used[split.train])
    passes, appended = find_probe_executor(job.task.spec).passes(job.task.spec, train)
    per_pass = pass_flops(probe, length + 1 + appended, code_dim)
    cores = os.cpu_count() or 1
    rounds = math.ceil((settings.seeds or job.task.spec.seeds) / cores)  # seeds are fitted side by side
    seconds += passes * probe.max_epochs * rounds * per_pass / (rate / cores * PROBE_EFFICIENCY)
    return JobPlan(job, images, images * length * per_token, seconds)


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
        task = part.job.task.spec
        probed = KINDS[task.kind].probed
        seeds = (settings.seeds or task.seeds) if probed else task.seeds
        if part.job.label == MAJORITY:
            lines.append(f"  {task.name}: {part.job.label} (labels only)")
            continue
        if plan.data[part.job.dataset.spec.name] == "missing":
            lines.append(f"  {task.name}: {part.job.label}: waits for its data")
            continue
        what = "probe seeds" if probed else "seed" if seeds == 1 else "seeds"
        cost = f"{part.images:,} images, {seeds} {what}, about {human_seconds(part.seconds)}"
        policy = f" ({part.job.policy})" if part.job.policy else ""
        lines.append(f"  {task.name}: {part.job.label}{policy}: {cost}")
    for job, reason in plan.refused:
        lines.append(f"  {job.task.spec.name}: {job.label} is left out: {reason}")
    lines.append(
        f"  in all about {human_seconds(plan.seconds)} at most; token cache {human_bytes(plan.cache_bytes)} "
        f"in {_short(settings.cache_dir)}; results in {_short(settings.output)}"
    )
    without = left_out([part.job.tokenizer for part in plan.jobs], settings.options)
    for key, names in without.items():
        option = f"{key}={settings.options[key]}"
        lines.append(f"  --option {option}: not known to {', '.join(names)}, which run without it")
    if settings.limit is not None:
        lines.append(f"  --limit {settings.limit}: records will be marked incomplete")
    return lines


def _short(path: Path) -> str:
    try:
        return "~/" + str(path.resolve().relative_to(Path.home()))
    except ValueError:
        return str(path)
