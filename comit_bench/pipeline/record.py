"""From a task's result to a record, and how long it took, for the next plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comit_bench.errors import BenchError
from comit_bench.files import atomic_path, digest_json, locked, write_atomic
from comit_bench.pipeline.jobs import Job, Settings
from comit_bench.recipes.reading import read_json
from comit_bench.recipes.specs import KINDS
from comit_bench.tokenizers.registry import MAJORITY

if TYPE_CHECKING:
    import torch

    from comit_bench.data.split import OpenData
    from comit_bench.results.schema import Counts, Record, TaskRow, TokenizerRow
    from comit_bench.tasks.result import TaskResult
    from comit_bench.tokenizers.base import Tokenizer

FURTHEST = 4  # times as many images as were measured: beyond that the time of a job is unknown
NOTES = ("best_epoch", "epochs_run", "left_out")  # of a result's details; the rest of these goes nowhere


def tokenizer_row(tokenizer: Tokenizer | None) -> TokenizerRow:
    """Who is measured; None is the majority row."""
    from comit_bench.results.schema import TokenizerRow

    if tokenizer is not None:
        return TokenizerRow.from_info(tokenizer.info)
    return TokenizerRow(
        name=MAJORITY,
        family=MAJORITY,
        kind="reference",
        weights="none",
        training_data="labels of the train split",
        code_licence="Apache-2.0",
    )


def task_row(job: Job, data: OpenData) -> TaskRow:
    """What is measured."""
    from comit_bench.results.schema import DatasetRow, TaskRow

    spec = job.task.spec
    return TaskRow(
        name=spec.name,
        version=spec.version,
        title=spec.title,
        kind=spec.kind,
        suite=spec.suite,
        recipe=job.task.digest,
        origin=job.task.origin,
        dataset=DatasetRow(
            name=data.name, version=data.version, fingerprint=data.fingerprint, origin=job.dataset.origin
        ),
    )


def make_record(
    result: TaskResult,
    *,
    row: TokenizerRow,
    task: TaskRow,
    protocol: dict[str, Any],
    seeds: Sequence[int],
    counts: Counts,
    settings: Settings,
    control: str | None,
    device: torch.device,
    timings: dict[str, float],
    incomplete: Sequence[str] = (),
) -> Record:
    """Put everything together; nothing is written yet.

    Args:
        result: What was measured.
        row: Of which tokenizer.
        task: Of which task.
        protocol: How.
        seeds: Of the probes or decodings.
        counts: Images by role.
        settings: ``limit`` makes a record incomplete.
        control: Name of the control.
        device: Where.
        timings: Seconds by stage.
        incomplete: What of the data is not there, in words (:meth:`OpenData.shortcomings`).
    """
    from comit_bench.results.schema import Environment, Metric, Record, protocol_digest

    metrics = {
        name: Metric.from_seeds(
            m.per_seed,
            n=m.n,
            chance=m.chance,
            higher_is_better=m.higher_is_better,
            unit=m.unit,
            binomial=m.share,
            sampling=m.sampling,
        )
        for name, m in result.metrics.items()
    }
    notes = [f"{key}: {value}" for key, value in result.extra.items() if key in NOTES]
    if not row.trained:
        notes.append("untrained: random weights, drawn so wide that messages differ at all")
    return Record(
        tokenizer=row,
        task=task,
        metrics=metrics,
        protocol=protocol,
        protocol_digest=protocol_digest(protocol),
        seeds=tuple(seeds),
        control=control,
        complete=settings.limit is None and not incomplete,
        limit=settings.limit,
        incomplete=tuple(incomplete),
        counts=counts,
        environment=Environment.collect(device=device_name(device), dtype=settings.dtype),
        timings=timings,
        notes=tuple(notes),
        details=dict(result.details),
    )


def device_name(device: torch.device) -> str:
    """A device in words, for records."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    import platform

    return f"cpu ({platform.machine()})"


def save_with_images(
    settings: Settings, record: Record, per_image: Mapping[str, Any] | None, *, replace: bool = False
) -> Record:
    """Write a record and, before it, its numbers per image as Parquet beside it.

    If another process has written the same record meanwhile, that one is kept, unless records are always
    replaced.

    Args:
        settings: Where to, and what to do about a record that exists.
        record: What was measured.
        per_image: Columns of one entry per image, or None.
        replace: Whether a record that exists is replaced whatever the settings say.

    Returns:
        The record that is stored now.

    Raises:
        BenchError: The disk is full or not writable.
    """
    from comit_bench.results.records import find_record, save_record

    replace = replace or settings.overwrite == "always"
    with locked(settings.lock, "saving a record"):
        if not replace:
            found = find_record(settings.records, record.tokenizer, record.task, record.protocol_digest)
            if found is not None:
                return found
        _save_images(settings, record, per_image)
        save_record(settings.records, record, overwrite=replace)
        return record


def _save_images(settings: Settings, record: Record, per_image: Mapping[str, Any] | None) -> None:
    from comit_bench.results.records import record_path

    if per_image is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = record_path(settings.records, record).with_suffix(".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            pq.write_table(pa.table(dict(per_image)), partial, compression="zstd")


def images_of(job: Job, counts: Mapping[str, int], settings: Settings) -> int:
    """Images that a job reads, of splits of these sizes."""
    spec = job.task.spec
    sizes = [counts.get(name, 0) for name in spec.split_names]
    images = sum(min(size, settings.limit or size) for size in sizes)
    count = None if KINDS[spec.kind].probed else getattr(getattr(spec, spec.kind), "count", None)
    return min(images, count or images)


def _note(job: Job, settings: Settings) -> Path:
    """Where the time of a job is noted: named by what makes it fast or slow, images apart."""
    from comit_bench.tokenizers.load import resolve_device

    key = {
        "tokenizer": job.label,
        "policy": job.policy,
        "task": job.task.digest,
        "seeds": settings.seeds,
        "weights": settings.weights,
        "options": {name: str(value) for name, value in sorted(settings.options.items())},
        "device": device_name(resolve_device(settings.device)),
        "dtype": settings.dtype,
    }
    return settings.cache_dir / "seconds" / f"{digest_json(key)[7:31]}.json"


def _noted(path: Path) -> tuple[float, int, int]:
    """Seconds, images, and images that were encoded; zeros when nothing is noted."""
    try:
        found = read_json(path)
        return float(found["seconds"]), int(found["images"]), int(found["encoded"])
    except (BenchError, LookupError, TypeError, ValueError):
        return 0.0, 0, 0


def note_seconds(job: Job, settings: Settings, *, seconds: float, images: int, encoded: int) -> None:
    """Remember how long a job took. A repetition that found its tokens made does not count.

    Args:
        job: Which.
        settings: How it was done.
        seconds: Wall clock, all of it.
        images: Images that it read.
        encoded: How many of them were encoded for it.
    """
    path = _note(job, settings)
    _, before, encoded_before = _noted(path)
    if (images, encoded) >= (before, encoded_before):
        content = {"seconds": round(seconds, 3), "images": images, "encoded": encoded}
        write_atomic(path, json.dumps(content) + "\n")


def expected_seconds(job: Job, settings: Settings, images: int) -> float | None:
    """How long a job took before, scaled by its images; None when nothing like it was measured here."""
    seconds, before, _ = _noted(_note(job, settings))
    if not before or images > FURTHEST * before:
        return None
    return seconds * images / before
