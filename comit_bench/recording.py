"""From a task's result to a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comit_bench.jobs import Job, Settings
from comit_bench.registry import MAJORITY

if TYPE_CHECKING:
    import torch

    from comit_bench.data.datasets import OpenData
    from comit_bench.results.schema import Counts, Record, TaskRow, TokenizerRow
    from comit_bench.tasks.result import TaskResult
    from comit_bench.tokenizers.base import Tokenizer

NOTES = ("best_epoch", "epochs_run")  # of a result's details; the rest of these goes nowhere
DETAILS = ("by_predicate",)


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
        dataset=DatasetRow(name=data.name, version=data.version, fingerprint=data.fingerprint),
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
            binomial=m.share,
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
        details={key: result.extra[key] for key in DETAILS if key in result.extra},
    )


def device_name(device: torch.device) -> str:
    """A device in words, for records."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    import platform

    return f"cpu ({platform.machine()})"
