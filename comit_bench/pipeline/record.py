"""From a task's result to a record, and how long it took, for the next plan."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comit_bench.data.split import OpenData
from comit_bench.errors import BenchError
from comit_bench.files import digest_json, locked, write_atomic
from comit_bench.pipeline.jobs import Job, Reference, Settings
from comit_bench.pipeline.messages import broken_images
from comit_bench.recipes.reading import read_json
from comit_bench.results.outcomes import Outcomes, outcomes_path, write_outcomes
from comit_bench.results.records import find_record, record_path, save_record
from comit_bench.results.schema import (
    Counts,
    DatasetRow,
    Environment,
    Record,
    TaskRow,
    TokenizerRow,
    plain_json,
    protocol_digest,
)
from comit_bench.tasks.base import ROLES, Inputs
from comit_bench.tasks.result import Result
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.load import resolve_device

FURTHEST = 4  # times as many images as were measured: beyond that the time of a job is unknown
NOTES = (
    "attainable",
    "best_epoch",
    "epochs_run",
    "left_out",
    "learning_rate",
    "learning_rates",
    "probe_precision",
)  # of a result's remarks, those that a record keeps


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a record from all others: whose, of what, and how."""

    tokenizer: TokenizerRow
    task: TaskRow
    protocol: dict[str, Any]

    def find(self, records: Path) -> Record | None:
        """The record of this identity below a folder."""
        return find_record(records, self.tokenizer, self.task, protocol_digest(self.protocol))


def identify(job: Job, tokenizer: Tokenizer | None, data: OpenData, protocol: dict[str, Any]) -> Identity:
    """The identity of a job's record."""
    spec = job.task.spec
    dataset = DatasetRow(
        name=data.name, version=data.version, fingerprint=data.fingerprint, origin=job.dataset.origin
    )
    task = TaskRow(
        name=spec.name,
        version=spec.version,
        title=spec.title,
        kind=spec.kind,
        suite=spec.suite,
        recipe=job.task.digest,
        origin=job.task.origin,
        dataset=dataset,
    )
    if tokenizer is not None:
        return Identity(TokenizerRow.from_info(tokenizer.info), task, protocol)
    assert isinstance(job.tokenizer, Reference)
    row = TokenizerRow(
        name=job.tokenizer.name,
        family=job.tokenizer.name,
        kind="reference",
        weights="none",
        training_data=job.tokenizer.knows,
        code_licence="Apache-2.0",
    )
    return Identity(row, task, protocol)


def work_folder(job: Job, identity: Identity, inputs: Inputs, settings: Settings) -> Path:
    """A folder for unfinished work: another one for other weights, data, settings, images or devices."""
    rows = {n: hashlib.sha256(role.rows.tobytes()).hexdigest() for n, role in inputs.roles.items()}
    protocol, weights = plain_json(identity.protocol), identity.tokenizer.weights
    key = [job.label, weights, job.task.spec.name, protocol, inputs.device.type, rows]
    return settings.cache_dir / "unfinished" / digest_json(key)[7:31]


def make_record(
    result: Result, identity: Identity, inputs: Inputs, settings: Settings, timings: dict[str, float]
) -> Record:
    """Put everything together; nothing is written yet. ``timings`` are seconds by stage."""
    notes = [f"{key}: {value}" for key, value in result.extra.items() if key in NOTES]
    if not identity.tokenizer.trained:
        notes.append("untrained: random weights, drawn so wide that messages differ at all")
    incomplete = inputs.data.shortcomings(broken_images(inputs))
    return Record(
        tokenizer=identity.tokenizer,
        task=identity.task,
        metrics=result.metrics,
        protocol=identity.protocol,
        protocol_digest=protocol_digest(identity.protocol),
        seeds=tuple(inputs.seeds),
        control=inputs.control,
        complete=settings.limit is None and not incomplete,
        limit=settings.limit,
        incomplete=tuple(incomplete),
        counts=_counts(inputs, settings.limit),
        environment=Environment.collect(device=device_name(inputs.device), dtype=settings.dtype),
        timings=timings,
        notes=tuple(notes),
        details=result.details | _fits(result.extra.get("fits")),
        unconverged=result.unconverged,
    )


def _fits(found: Any) -> dict[str, Any]:
    """Early-stop scores by epoch of every fit, for the details; parts of the data follow each other."""
    parts = [one for one in (found if isinstance(found, list) else [found]) if one]
    if not parts:
        return {}
    curves = [curve for one in parts for curve in one["early_stop"]]
    return {"fits": {"score": parts[0]["score"], "early_stop": curves}}


def _counts(inputs: Inputs, limit: int | None) -> Counts:
    broken = broken_images(inputs)
    expected, seen = inputs.data.counted(broken)
    return Counts(
        **{name: len(inputs.roles[name]) if name in inputs.roles else 0 for name in ROLES},
        broken=sum(broken.values()),
        expected=expected,
        seen={name: number if limit is None else min(number, limit) for name, number in seen.items()},
    )


def device_name(device: torch.device) -> str:
    """A device in words, for records."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu ({platform.machine()})"


def keep_record(
    record: Record, outcomes: Outcomes | None, settings: Settings, *, replace: bool = False
) -> Record:
    """Write a record and, before it, its outcomes beside it.

    If another process has written the same record meanwhile, that one is kept, unless records are always
    replaced.

    Args:
        record: What was measured.
        outcomes: What every image contributed, or None.
        settings: Where to, and what to do about a record that exists.
        replace: Whether a record that exists is replaced whatever the settings say.

    Returns:
        The record that is stored now.

    Raises:
        BenchError: The disk is full or not writable.
    """
    replace = replace or settings.overwrite == "always"
    with locked(settings.lock, "saving a record"):
        if not replace:
            found = find_record(settings.records, record.tokenizer, record.task, record.protocol_digest)
            if found is not None:
                return found
        if outcomes is not None:
            path = outcomes_path(record_path(settings.records, record))
            record = record.model_copy(update={"outcomes": write_outcomes(path, outcomes)})
        save_record(settings.records, record, overwrite=replace)
        return record


def images_of(job: Job, counts: Mapping[str, int], settings: Settings) -> int:
    """Images that a job reads, of splits of these sizes."""
    spec = job.task.spec
    sizes = [counts.get(name, 0) for name in spec.split_names]
    images = sum(min(size, settings.limit or size) for size in sizes)
    count = None if spec.task_kind.probed else getattr(getattr(spec, spec.kind, None), "count", None)
    return min(images, count or images)


def _note(job: Job, settings: Settings) -> Path:
    """Where the time of a job is noted: named by what makes it fast or slow, images apart."""
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
        job: Which; for one that takes no time nothing is noted.
        settings: How it was done.
        seconds: Wall clock, all of it.
        images: Images that it read.
        encoded: How many of them were encoded for it.
    """
    if job.instant:
        return
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
