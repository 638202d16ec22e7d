"""Rows of one recipe that was trained with several seeds, as one row: mean and spread over the trainings.

Which rows those are, their tokenizers declare (``TokenizerInfo.group``). How much a probe varies with its
seed and how much a training varies with its own are two things, so the joined row has trainings where others
have probe seeds: its values are one per training, each the mean over that training's probe seeds.

Shape legend: ``T`` trainings, ``n`` images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from comit_bench.errors import UsageError
from comit_bench.files import digest_json
from comit_bench.results.outcomes import Outcomes
from comit_bench.results.rows import column_digest, newest_records, record_order, row_key, row_side
from comit_bench.results.schema import Metric, Record

ReadOutcomes = Callable[[Record], Outcomes | None]  # how outcomes are had, e.g. outcomes.OutcomeFiles
SCHEME = "trainings"  # of the weights of a joined row


def is_joined(record: Record) -> bool:
    """Whether it is the mean over several trainings."""
    return record.tokenizer.weights.startswith(f"{SCHEME}:")


def line_of(record: Record) -> tuple[str, ...] | None:
    """What the trainings of one recipe have in common; None for one that stands alone."""
    group = record.tokenizer.group
    if group is None or record.origin == "paper":
        return None
    return (group, record.origin, str(record.tokenizer.trained), digest_json(row_side(record)))


def join_trainings(records: Iterable[Record], read: ReadOutcomes) -> tuple[list[Record], ReadOutcomes]:
    """Replace the records of groups with at least two trainings by one record per column.

    Args:
        records: In any order; of two of one training and column the last one counts.
        read: Outcomes of these records.

    Returns:
        The records, and how outcomes are had of them.
    """
    kept: list[Record] = []
    lines: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=record_order):
        line = line_of(record)
        (kept if line is None else lines[line]).append(record)
    parts: dict[tuple[object, ...], list[Record]] = {}
    for line in sorted(lines):
        trainings = {row_key(record) for record in lines[line]}
        if len(trainings) < 2:
            kept += lines[line]
            continue
        columns: dict[str, list[Record]] = defaultdict(list)
        for record in newest_records(lines[line], row_key)[0]:
            columns[column_digest(record)].append(record)
        for members in columns.values():
            kept.append(_joined(line[0], len(trainings), members))
            parts[_place(kept[-1])] = members

    def read_joined(record: Record) -> Outcomes | None:
        members = parts.get(_place(record)) if is_joined(record) else None
        return read(record) if members is None else _stacked([read(member) for member in members])

    return kept, read_joined


def _place(record: Record) -> tuple[object, ...]:
    return (row_key(record), column_digest(record))


def _joined(group: str, trainings: int, members: Sequence[Record]) -> Record:
    """One record of several; it is never written."""
    newest = members[-1]
    tokenizer = newest.tokenizer.model_copy(
        update={
            "name": f"{group} ({trainings} trainings)",
            "weights": f"{SCHEME}:{trainings}",
            "revision": None,
        }
    )
    metrics = {}
    for name, metric in newest.metrics.items():
        values = [m.metrics[name].value for m in members if name in m.metrics]
        mean = Metric.from_seeds(
            values,
            n=metric.n or 1,
            unit=metric.unit,
            chance=metric.chance,
            higher_is_better=metric.higher_is_better,
        )
        kept = {"value", "std", "stderr", "per_seed"}
        metrics[name] = metric.model_copy(update={key: getattr(mean, key) for key in kept})
    seeds = " or ".join(map(str, sorted({len(member.seeds) for member in members})))
    return newest.model_copy(
        update={
            "tokenizer": tokenizer,
            "metrics": metrics,
            "seeds": tuple(range(len(members))),
            "complete": all(member.complete for member in members),
            "incomplete": tuple(dict.fromkeys(why for member in members for why in member.incomplete)),
            "unconverged": tuple(sorted({seed for member in members for seed in member.unconverged})),
            "outcomes": None if any(m.outcomes is None for m in members) else newest.outcomes,
            "details": {SCHEME: len(members), "probe_seeds": seeds},
        }
    )


def _stacked(found: Sequence[Outcomes | None]) -> Outcomes | None:
    """Outcomes with trainings for seeds: float64 [T, n] by metric; None if those of a training are missing.

    Raises:
        UsageError: The trainings were measured on different images.
    """
    every = [one for one in found if one is not None]
    first = every[0] if every else None
    if first is None or len(every) < len(found):
        return None
    if any(list(one.ids) != list(first.ids) or one.clusters != first.clusters for one in every):
        raise UsageError("the trainings of this group were measured on different images")
    names = [name for name in first.values if all(name in one.values for one in every)]
    values = {name: np.stack([one.values[name].mean(axis=0) for one in every]) for name in names}
    return Outcomes(ids=first.ids, seeds=range(len(every)), values=values, clusters=first.clusters)
