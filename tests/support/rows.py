"""Records with outcomes, made of numbers: rows that a table or a comparison can be made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.results.outcomes import Outcomes, outcomes_path, write_outcomes
from comit_bench.results.records import load_record, protocol_digest, record_path, save_record
from comit_bench.results.schema import Metric, Record

BASE = load_record(Path(__file__).parents[1] / "fixtures" / "records" / "measured-v1.json")
TASK = {"name": "recognition-scenes", "version": 3, "kind": "classification", "suite": "scenes"}


def put(
    root: Path,
    name: str,
    values: Mapping[str, NDArray[np.float64]] | None,
    *,
    task: str = "recognition-scenes",
    kind: str = "classification",
    version: int = 3,
    ids: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    whole: Mapping[str, Metric] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    side: Mapping[str, Any] | None = None,
    protocol: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Record:
    """Write a record and its outcomes below ``root``.

    Args:
        root: Folder of records.
        name: Of the tokenizer.
        values: Metric -> [U, n] (shares in 0..1); None is a record without outcomes.
        task: Its name.
        kind: Of the task.
        version: Of the task.
        ids: [n]; default numbers.
        clusters: [n] or None.
        units: Metric -> unit; default %.
        whole: Metrics without outcomes.
        tokenizer: Further fields of its row.
        side: The tokenizer's side of the protocol.
        protocol: Further keys of the task's side.
        record: Further fields of the record.
    """
    found, metrics = None, dict(whole or {})
    seeds = 1
    if values:
        seeds, n = next(iter(values.values())).shape
        found = Outcomes(
            ids=ids or [str(i) for i in range(n)], seeds=range(seeds), values=values, clusters=clusters
        )
        metrics = {
            key: found.metric(key, unit=(units or {}).get(key, "%"), higher_is_better=key != "loss")
            for key in values
        } | metrics
    told = {"seeds": list(range(seeds)), "limit": None, "control": None, **(protocol or {})}
    told["tokenizer"] = dict(side or {})
    row = {**BASE.tokenizer.model_dump(), "name": name, "family": name, "weights": f"fitted:{name}"}
    made = Record.model_validate(
        {
            **dict(BASE), "schema_version": 3, "tokenizer": {**row, **(tokenizer or {})},
            "task": {**BASE.task.model_dump(), **TASK, "name": task, "kind": kind, "version": version},
            "metrics": metrics, "protocol": told, "protocol_digest": protocol_digest(told),
            "seeds": tuple(range(seeds)), "created": datetime(2026, 1, 1, tzinfo=UTC), "notes": (),
            "timings": {}, **(record or {}),
        }
    )  # fmt: skip
    if found is not None:
        path = outcomes_path(record_path(root, made))
        made = made.model_copy(update={"outcomes": write_outcomes(path, found)})
    save_record(root, made, overwrite=True)
    return made


def shares(
    rng: np.random.Generator,
    level: float,
    difficulty: NDArray[np.float64],
    *,
    seeds: int = 3,
    spread: float = 0.01,
) -> NDArray[np.float64]:
    """0 or 1 [seeds, n]: an image is right where a row's skill exceeds its difficulty, with some luck."""
    skill = level + spread * rng.normal(size=(seeds, 1))
    return (skill + 0.15 * rng.normal(size=(seeds, len(difficulty))) > difficulty).astype(np.float64)
