"""Outcomes: what every single image contributed to the metrics of a record, kept beside it as Parquet.

One line per probe seed and image: ``id``, ``seed``, ``cluster`` (images that stand or fall together; only
where there are such), a column per metric that is a mean over images, and whatever else is known of the
answer (``answer``, ``truth``, ...). Shares are 0 to 1 here and percent in the record. Where a metric means
nothing for an image its value is missing.

Every probe worker imports this module, so what reads and writes Parquet is imported when it is needed.

Shape legend: ``U`` seeds, ``n`` images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.errors import CorruptFileError, MissingError
from comit_bench.files import atomic_path, sha256_file
from comit_bench.metrics.statistics import estimate
from comit_bench.results.records import record_path
from comit_bench.results.schema import Metric, Record

Floats = NDArray[np.float64]
PERCENT = 100.0
AGAIN = "Measure it again with --overwrite always."


def scale(unit: str) -> float:
    """What outcomes are multiplied by to be in a metric's unit."""
    return PERCENT if unit == "%" else 1.0


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Outcomes:
    """Values of all images, for every seed.

    Attributes:
        ids: [n].
        seeds: [U].
        values: Metric -> float64 [U, n]; NaN where the metric means nothing for the image, whatever the seed.
        clusters: [n], names; images of one name are not independent of each other.
        columns: Further columns, [n] or [U, n] each.
    """

    ids: Sequence[str]
    seeds: Sequence[int]
    values: Mapping[str, Floats]
    clusters: Sequence[str] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.seeds), len(self.ids))
        for name, value in self.values.items():
            if value.shape != shape:
                raise ValueError(f"outcomes {name!r} are {list(value.shape)}, expected {list(shape)}")

    @classmethod
    def same_for_all(
        cls, ids: Sequence[str], seeds: Sequence[int], values: Mapping[str, Any], **rest: Any
    ) -> Outcomes:
        """Of a row about which nothing is random: values [n] by metric, the same for every seed."""
        rows = {
            name: np.tile(np.asarray(value, dtype=np.float64), (len(seeds), 1))
            for name, value in values.items()
        }
        return cls(ids=ids, seeds=seeds, values=rows, **rest)

    def of(self, metric: str) -> tuple[Floats, NDArray[np.int64], list[str] | None]:
        """Values [U, m], positions [m] and clusters [m] of the images that have a value."""
        values = self.values[metric]
        there = np.flatnonzero(np.isfinite(values).all(axis=0))
        clusters = None if self.clusters is None else [self.clusters[i] for i in there.tolist()]
        return values[:, there], there, clusters

    def metric(
        self, name: str, *, unit: str = "%", chance: float | None = None, higher_is_better: bool = True
    ) -> Metric:
        """The metric as a record stores it: mean, spread over seeds and standard error.

        Args:
            name: Of one of ``values``.
            unit: ``%`` for shares, ``dB`` or empty.
            chance: In ``unit``.
            higher_is_better: Direction.
        """
        values, images, clusters = self.of(name)
        values = scale(unit) * values
        found = estimate(values, clusters)
        return Metric.from_seeds(
            values.mean(axis=1).tolist(),
            n=len(images),
            unit=unit,
            chance=chance,
            higher_is_better=higher_is_better,
            stderr=found.stderr,
        )


def outcomes_path(record: Path) -> Path:
    """Where the outcomes of the record in a file lie."""
    return record.with_suffix(".parquet")


def write_outcomes(path: Path, outcomes: Outcomes) -> str:
    """Write a file, whole or not at all, and return its digest, ``sha256:<hex>``."""
    import pyarrow as pa
    from pyarrow import parquet

    seeds, n = len(outcomes.seeds), len(outcomes.ids)
    columns: dict[str, Any] = {
        "id": pa.array(list(outcomes.ids) * seeds).dictionary_encode(),
        "seed": np.repeat(np.asarray(outcomes.seeds, dtype=np.int64), n),
    }
    if outcomes.clusters is not None:
        columns["cluster"] = pa.array(list(outcomes.clusters) * seeds).dictionary_encode()
    for name, values in outcomes.values.items():
        columns[name] = pa.array(values.ravel(), from_pandas=True)  # NaN is a missing value
    for name, values in outcomes.columns.items():
        given = np.asarray(values)
        columns[name] = (given if given.shape[:2] == (seeds, n) else np.tile(given, seeds)).ravel()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        parquet.write_table(pa.table(columns), partial, compression="zstd")
    return sha256_file(path)


def read_outcomes(path: Path, record: Record, also: Collection[str] = ()) -> Outcomes | None:
    """The outcomes of a record.

    Args:
        path: Of the record's file.
        record: As it was read from there.
        also: Further columns to read, where the file has them.

    Returns:
        None for records that never had any (published ones, and those of older versions).

    Raises:
        MissingError: The record has outcomes, but the file is not there.
        CorruptFileError: The file is damaged, or of another measurement.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if record.outcomes is None:
        return None
    path = outcomes_path(path)
    if not path.is_file():
        raise MissingError(
            f"{path}: the outcomes of this record are not there. Copy them, too, or measure it again with "
            "--overwrite always."
        )
    if sha256_file(path) != record.outcomes:
        raise CorruptFileError(f"{path}: does not belong to the record beside it. {AGAIN}")
    try:
        wanted = {"id", "cluster", *record.metrics, *also}
        table = parquet.read_table(path, columns=[c for c in parquet.read_schema(path).names if c in wanted])
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: cannot be read as Parquet ({error}). {AGAIN}") from error
    seeds, n = len(record.seeds), len(table) // max(len(record.seeds), 1)
    values = {
        name: table[name].to_numpy().astype(np.float64).reshape(seeds, n)
        for name in record.metrics
        if name in table.column_names
    }
    for name, value in values.items():
        metric = record.metrics[name]
        mean = scale(metric.unit) * np.nanmean(value)
        if not np.isclose(mean, metric.value, rtol=1e-6, atol=1e-6):
            raise CorruptFileError(
                f"{path}: {name} is {mean:g} here and {metric.value:g} in the record. {AGAIN}"
            )
    clusters = table["cluster"].to_pylist()[:n] if "cluster" in table.column_names else None
    columns = {
        name: np.array(table[name].to_pylist(), dtype=object).reshape(seeds, n)
        for name in also
        if name in table.column_names and name not in values
    }
    ids = table["id"].to_pylist()[:n]
    return Outcomes(ids=ids, seeds=record.seeds, values=values, clusters=clusters, columns=columns)


class OutcomeFiles:
    """The outcomes of records that lie below some folders; every file is read at most once.

    Args:
        *folders: Searched at any depth, when the first outcomes are asked for.
        also: Further columns to read.
    """

    def __init__(self, *folders: Path, also: Collection[str] = ()) -> None:
        self.folders, self.also = folders, also
        self._read: dict[str, Outcomes | None] = {}

    @cached_property
    def _places(self) -> dict[tuple[str, str], list[Path]]:
        """Folder and file name -> the files of that name."""
        found: dict[tuple[str, str], list[Path]] = {}
        for folder in self.folders:
            for path in sorted(folder.rglob("*.parquet")):
                found.setdefault((path.parent.name, path.name), []).append(path)
        return found

    def __call__(self, record: Record) -> Outcomes | None:
        """As :func:`read_outcomes`, of which file is found out."""
        if record.outcomes is None:
            return None
        if record.outcomes not in self._read:
            self._read[record.outcomes] = self._find(record)
        return self._read[record.outcomes]

    def _find(self, record: Record) -> Outcomes | None:
        path = record_path(self.folders[0] if self.folders else Path(), record)
        beside = outcomes_path(path)
        candidates = self._places.get((beside.parent.name, beside.name), [beside])
        for number, candidate in enumerate(candidates, start=1):
            if number == len(candidates) or sha256_file(candidate) == record.outcomes:
                return read_outcomes(candidate.with_suffix(".json"), record, self.also)
        return None
