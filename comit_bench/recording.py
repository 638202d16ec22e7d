"""From a task's result to a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comit_bench.files import atomic_path
from comit_bench.jobs import Job, Settings
from comit_bench.registry import MAJORITY

if TYPE_CHECKING:
    import torch

    from comit_bench.data.datasets import OpenData
    from comit_bench.results.schema import Counts, Record, TaskRow, TokenizerRow
    from comit_bench.tasks.result import TaskResult
    from comit_bench.tokenizers.base import Tokenizer

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
) -> Record:
    """Put everything together; nothing is written yet."""
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
        complete=settings.limit is None,
        limit=settings.limit,
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


def save_with_images(settings: Settings, record: Record, per_image: Mapping[str, Any] | None) -> None:
    """Write a record and, before it, its numbers per image as Parquet beside it.

    Args:
        settings: Where to, and what to do about a record that exists.
        record: What was measured.
        per_image: Columns of one entry per image, or None.

    Raises:
        BenchError: The disk is full or not writable.
    """
    from comit_bench.results.records import record_path, save_record

    overwrite = settings.overwrite == "always"
    if per_image is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = record_path(settings.records, record).with_suffix(".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            pq.write_table(pa.table(dict(per_image)), partial, compression="zstd")
    save_record(settings.records, record, overwrite=overwrite)
