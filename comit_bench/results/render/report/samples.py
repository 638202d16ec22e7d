"""The sample viewer's data: images, truths, and what every row answered, from outcomes.

Which images of a task are shown: half of them show every pair of rows differ, as far as they do, and half are
drawn by a hash of their id. Both halves take turns, so that fewer are a fair choice, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from comit_bench.errors import BenchError
from comit_bench.results.notation import decimals_for, one_line
from comit_bench.results.outcomes import Floats, Outcomes, scale
from comit_bench.results.render.report.pictures import Pictures, Source, preprocessing_of
from comit_bench.results.render.report.views import Line, Numbers, Section
from comit_bench.results.schema import Record
from comit_bench.results.trainings import ReadOutcomes
from comit_bench.seeding import seed_for

ANSWERS = ("answer", "nearest")  # columns of outcomes that say what was answered
TRUTH = "truth"
TEXTS = (*ANSWERS, TRUTH)
MOST_METRICS = 6
LONGEST = 120  # letters of an answer


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    line: Line
    record: Record
    outcomes: Outcomes


@dataclass(frozen=True, slots=True)
class Shown:
    """The viewer of one task.

    Attributes:
        anchor: Of its section.
        title: Of the task.
        data: For the page's program, without samples.
        samples: One text of JSON each, in the order in which they should be kept.
        total: Images that have outcomes.
    """

    anchor: str
    title: str
    data: dict[str, Any]
    samples: list[str]
    total: int


def viewer(
    section: Section, known: Numbers, read: ReadOutcomes, pictures: Pictures, count: int
) -> Shown | None:
    """What a task's viewer shows; None where nothing is known image by image.

    Args:
        section: Of the task.
        known: The records behind its cells.
        read: Their outcomes, with the columns ``TEXTS``.
        pictures: Of its data set.
        count: Images at most.
    """
    rows = _rows(section, known, read)
    if not rows or not count:
        return None
    ids = list(rows[0].outcomes.ids)
    metrics = _metrics(section, rows)
    if not metrics:
        return None
    means = {name: np.stack([row.outcomes.values[name].mean(axis=0) for row in rows]) for name in metrics}
    up = 1.0 if rows[0].record.metrics[metrics[0]].higher_is_better else -1.0
    chosen = _choice(ids, up * means[metrics[0]], [row.line.kind for row in rows], count)
    source = pictures.source(rows[0].record)
    preprocessing = preprocessing_of([row.record for row in rows])
    others = sorted(
        {str(row.record.tokenizer_protocol.get("preprocessing") or preprocessing) for row in rows}
        - {preprocessing}
    )
    if isinstance(source, Source) and not preprocessing:
        source = "no tokenizer of this task says how it preprocesses images"
    samples = [
        json.dumps(sample, ensure_ascii=False, separators=(",", ":"))
        for sample in _samples(chosen, ids, rows, means, source, preprocessing)
    ]
    data = {
        "rows": [{"label": r.line.label + r.line.marks, "kind": r.line.kind} for r in rows],
        "metrics": [_metric(section, rows, name, means[name]) for name in metrics],
        "seeds": [len(row.outcomes.seeds) for row in rows],
        "total": len(ids),
        "why": source if isinstance(source, str) else "",
        "seen": preprocessing,
        "others": others,
    }
    return Shown(section.anchor, section.title, data, samples, len(ids))


def _rows(section: Section, known: Numbers, read: ReadOutcomes) -> list[_Row]:
    """The rows whose outcomes are of the same images; references last."""
    found: list[_Row] = []
    for line in section.ordered or section.lines:
        place = next((cell.record for cell in line.cells if cell.text), -1)
        try:
            outcomes = read(known.records[place]) if place >= 0 else None
        except BenchError:
            continue
        if outcomes is None:
            continue
        alike = _in_order(outcomes, found[0].outcomes.ids if found else outcomes.ids)
        if alike is not None:
            found.append(_Row(line, known.records[place], alike))
    return sorted(found, key=lambda row: row.line.kind == "reference")


def _metrics(section: Section, rows: Sequence[_Row]) -> list[str]:
    """Metrics of which all rows know every image, the main one first."""
    shared = [n for n in rows[0].outcomes.values if all(n in row.outcomes.values for row in rows)]
    order = [cell.metric for cell in section.lines[0].cells if cell.metric]
    shared.sort(key=lambda name: order.index(name) if name in order else len(order))
    return shared[:MOST_METRICS]


def _in_order(outcomes: Outcomes, ids: Sequence[str]) -> Outcomes | None:
    """The same outcomes in the order of some ids; None when they are of other images."""
    if list(outcomes.ids) == list(ids):
        return outcomes
    place = {name: i for i, name in enumerate(outcomes.ids)}
    if place.keys() != set(ids):
        return None
    order = np.array([place[name] for name in ids], dtype=np.int64)
    return replace(
        outcomes,
        ids=list(ids),
        values={name: values[:, order] for name, values in outcomes.values.items()},
        columns={name: values[:, order] for name, values in outcomes.columns.items()},
    )


def _choice(ids: Sequence[str], values: Floats, kinds: Sequence[str], count: int) -> list[int]:
    """Positions of the images to show, in the order in which they should be kept."""
    drawn = sorted(range(len(ids)), key=lambda i: seed_for(0, f"report/{ids[i]}"))
    differing = _differing(drawn, values, [i for i, kind in enumerate(kinds) if kind != "reference"])
    chosen: dict[int, None] = {}
    for number in range(2 * len(ids)):
        turn = differing if number % 2 == 0 else iter(())
        new = next((i for i in turn if i not in chosen), None)
        new = next((i for i in drawn if i not in chosen), None) if new is None else new
        if new is None or len(chosen) >= count:
            break
        chosen[new] = None
    return list(chosen)


def _differing(drawn: Sequence[int], values: Floats, rows: Sequence[int]) -> Iterator[int]:
    """Images on which one row is better than another, every ordered pair of rows in turn."""
    order = np.asarray(drawn)
    queues = []
    for a, b in permutations(rows, 2):
        gap = values[a, order] - values[b, order]
        there = np.flatnonzero(gap > 1e-9)
        queues.append(iter(order[there[np.argsort(-gap[there], kind="stable")]].tolist()))
    while queues:
        left = []
        for queue in queues:
            image = next(queue, None)
            if image is not None:
                left.append(queue)
                yield image
        queues = left


def _samples(
    chosen: Sequence[int],
    ids: Sequence[str],
    rows: Sequence[_Row],
    means: dict[str, Floats],
    source: Source | str,
    preprocessing: str,
) -> Iterator[dict[str, Any]]:
    for i in chosen:
        sample: dict[str, Any] = {"id": one_line(ids[i])}
        truth = _text(rows[0].outcomes, TRUTH, 0, i)
        place = source.find(ids[i]) if isinstance(source, Source) else None
        if place is not None and isinstance(source, Source):
            sample["image"] = source.thumbnail(place, preprocessing)
            if mask := source.mask(place, preprocessing):
                sample["mask"] = mask
            truth = truth or source.truth(ids[i], place)
        if truth:
            sample["truth"] = one_line(truth)[:LONGEST]
        sample["values"] = [
            [None if np.isnan(value) else round(float(value), 4) for value in means[name][:, i]]
            for name in means
        ]
        answers = [_answers(row.outcomes, i) for row in rows]
        if any(answers):
            sample["answers"] = answers
        yield sample


def _answers(outcomes: Outcomes, image: int) -> list[list[Any]]:
    """What was answered, and under how many seeds, the most frequent first."""
    column = next((name for name in ANSWERS if name in outcomes.columns), None)
    if column is None:
        return []
    said = [_text(outcomes, column, seed, image) for seed in range(len(outcomes.seeds))]
    return [[one_line(text)[:LONGEST], times] for text, times in Counter(said).most_common()]


def _text(outcomes: Outcomes, column: str, seed: int, image: int) -> str:
    found = outcomes.columns.get(column)
    return "" if found is None else str(found[seed][image])


def _metric(section: Section, rows: Sequence[_Row], name: str, values: Floats) -> dict[str, Any]:
    """One metric; over all images, how many are right, and on how many a row beats another one."""
    told = rows[0].record.metrics[name]
    every = np.concatenate([row.outcomes.values[name].ravel() for row in rows])
    binary = bool(np.isin(every[np.isfinite(every)], (0.0, 1.0)).all())
    if binary:  # right: under more than half of the seeds
        right, wrong = (values > 0.5).astype(np.int64), (values <= 0.5).astype(np.int64)
        wins, counts = right @ wrong.T, right.sum(axis=1)
    else:
        signed = values if told.higher_is_better else -values
        wins = np.array([[int((a > b + 1e-9).sum()) for b in signed] for a in signed])
        counts = np.empty(0, dtype=np.int64)
    return {
        "name": one_line(name),
        "unit": one_line(told.unit),
        "binary": binary,
        "up": told.higher_is_better,
        "scale": scale(told.unit),
        "decimals": decimals_for(told.unit, [told.value]),
        "right": counts.tolist(),
        "wins": wins.tolist(),
    }
