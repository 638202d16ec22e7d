"""Tables of the report as plain values: a section per task and protocol, an overview, records for the drawer.

Nothing is computed here that is not in records and outcomes. What the page shows of a number stands in one
place: :func:`numbers` makes it, the cells of tables point at it by record and metric.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comit_bench.errors import BenchError
from comit_bench.metrics.statistics import difference
from comit_bench.recipes.specs import Recipe, TaskSpec, find_tasks
from comit_bench.results.compare import main_metric
from comit_bench.results.notation import MARKS, format_number, one_line
from comit_bench.results.paired import side_of
from comit_bench.results.render.layout import (
    PAPER,
    detail_texts,
    heading,
    is_reference,
    spread_text,
    value_text,
)
from comit_bench.results.rows import column_digest, flat, task_side
from comit_bench.results.schema import Metric, Record
from comit_bench.results.table import Cell, Column, Group, Row, Table
from comit_bench.results.trainings import ReadOutcomes

Interval = tuple[float, float]
FAR = 2.5  # a reference this much further away than all others is not drawn
Tasks = Mapping[str, Recipe[TaskSpec]]


@dataclass(frozen=True, slots=True)
class Numbers:
    """The records that cells point at, and the intervals of their metrics.

    Attributes:
        records: By position.
        intervals: (position, metric) -> 95 % interval of the mean, over images and probe seeds.
    """

    records: tuple[Record, ...]
    intervals: dict[tuple[int, str], Interval]

    def place(self, record: Record) -> int:
        """Position of a record."""
        return next(i for i, one in enumerate(self.records) if one is record)


def numbers(table: Table, read: ReadOutcomes) -> Numbers:
    """What stands behind the cells of a table."""
    records: dict[int, Record] = {}
    for row in table.rows:
        records |= {id(cell.record): cell.record for cell in row.cells if cell is not None}
    kept = tuple(records.values())
    intervals = {
        (place, name): interval
        for place, record in enumerate(kept)
        for name, metric in record.metrics.items()
        if (interval := interval_of(record, name, metric, read)) is not None
    }
    return Numbers(kept, intervals)


def interval_of(record: Record, name: str, metric: Metric, read: ReadOutcomes) -> Interval | None:
    """The 95 % interval of a mean over images and probe seeds; None where nothing is known image by image.

    It is that of the difference from 0, see :func:`comit_bench.metrics.statistics.difference`.
    """
    try:
        outcomes = read(record)
        side = None if outcomes is None else side_of(outcomes, name, metric.unit)
    except BenchError:
        return None
    if side is None:
        return None
    there = np.flatnonzero(np.isfinite(side.values).all(axis=0))
    clusters = None if side.clusters is None else side.clusters[there]
    try:
        found = difference(side.values[:, there], np.zeros((1, len(there))), clusters)
    except ValueError:
        return None
    low, high = found.low, found.high
    return (max(low, 0.0), min(high, 100.0)) if metric.unit == "%" else (low, high)


@dataclass(frozen=True, slots=True)
class Scale:
    """The horizontal axis of interval plots, in a metric's unit."""

    low: float
    high: float
    decimals: int

    def at(self, value: float) -> str:
        """Where a value lies, as an SVG length."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    @property
    def ends(self) -> tuple[str, str]:
        """Both ends as they are printed."""
        return format_number(self.low, self.decimals), format_number(self.high, self.decimals)


def scale_of(column: Column, values: Sequence[float]) -> Scale:
    """An axis that holds some values and a little more."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - room, high + room
    if column.unit == "%":
        low, high = max(low, 0.0), min(high, 100.0)
    return Scale(low, high, column.decimals)


@dataclass(frozen=True, slots=True)
class Mark:
    """Places of one row in an interval plot; ``low`` and ``high`` are empty without an interval."""

    at: str
    low: str = ""
    high: str = ""


@dataclass(frozen=True, slots=True)
class Number:
    """A cell as it is printed; ``text`` is empty where nothing was measured."""

    text: str = ""
    spread: str = ""
    marks: str = ""
    rank: str = ""
    raw: float | None = None
    record: int = -1
    metric: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table of the report."""

    label: str
    marks: str
    kind: str
    details: tuple[str, ...]
    cells: tuple[Number, ...]
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """Head of a column; ``up`` tells where better is, ``chance`` is printed or empty."""

    text: str
    up: bool
    chance: str
    task: str = ""
    anchor: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A task under one protocol.

    Attributes:
        anchor: Of links.
        title: Of the task, for readers.
        name: Of the task, with version and what tells the protocol from others.
        published: Whether its numbers are published ones.
        facts: Words about data and images.
        heads: Of the columns of numbers.
        lines: The rows that have a number here.
        main: Position of the main metric.
        scale: Axis of the interval plot; None without one.
        chance: Where chance lies on it; empty when there is none.
        protocol: The task's side of the protocol.
        without: Measured rows of the table that have no number here.
    """

    anchor: str
    title: str
    name: str
    task: str
    control: str
    published: bool
    facts: str
    source: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    main: int
    scale: Scale | None
    chance: str
    protocol: tuple[tuple[str, str], ...]
    without: tuple[str, ...]
    columns: tuple[Column, ...] = field(repr=False)

    @property
    def ordered(self) -> tuple[Line, ...]:
        """The rows that have the main metric, best first."""
        there = [line for line in self.lines if line.cells[self.main].raw is not None]
        up = self.heads[self.main].up
        return tuple(sorted(there, key=lambda line: (line.cells[self.main].raw or 0.0) * (-1 if up else 1)))


def sections(table: Table, known: Numbers) -> list[Section]:
    """A section per group of the table's columns: what is measured by default first, then in its order."""
    recipes = find_tasks()
    found = [_section(table, group, number, known, recipes) for number, group in enumerate(table.groups)]

    def place(section: Section) -> tuple[bool, bool]:
        recipe = recipes.get(section.task)
        return (
            recipe is None or not recipe.spec.by_default,
            recipe is None or not recipe.spec.task_kind.probed,
        )

    return sorted(found, key=place)


def _section(table: Table, group: Group, number: int, known: Numbers, recipes: Tasks) -> Section:
    places = [i for i, column in enumerate(table.columns) if column.group == group]
    rows = [row for row in table.rows if any(row.cells[i] for i in places)]
    first = next(cell.record for row in rows for i in places if (cell := row.cells[i]))
    main_name = one_line(main_metric(first))
    places.sort(key=lambda i: table.columns[i].metric != main_name)
    columns = tuple(table.columns[i] for i in places)
    scale, chance = _scale(rows, places[0], columns[0], known)
    published = all(row.origin == PAPER for row in rows)
    return Section(
        anchor=f"task-{number}",
        title=one_line(group.title),
        name=", ".join(part for part in (group.task, group.subtitle) if part),
        task=group.task,
        control=group.control or "",
        published=published,
        facts=_facts(rows, places, published, recipes),
        source=one_line(str(first.protocol.get("source", ""))) if published else "",
        heads=tuple(_head(column) for column in columns),
        lines=tuple(_line(row, places, columns, scale, known) for row in rows),
        main=0,
        scale=scale,
        chance=chance,
        protocol=tuple((one_line(k), one_line(v)) for k, v in sorted(task_side(first).items())),
        without=tuple(
            row.label for row in table.rows if row.origin != PAPER and row not in rows and not published
        ),
        columns=columns,
    )


def _head(column: Column, task: str = "", anchor: str = "", note: str = "") -> Head:
    chance = "" if column.chance is None else format_number(column.chance, column.decimals)
    return Head(heading(column), column.higher_is_better, chance, task, anchor, note)


def _scale(rows: Sequence[Row], place: int, column: Column, known: Numbers) -> tuple[Scale | None, str]:
    """The axis of the main metric, and where chance is on it."""
    there = [(row, cell) for row in rows if (cell := row.cells[place]) is not None]
    if len(there) < 2:
        return None, ""

    def ends(cell: Cell) -> Sequence[float]:
        return known.intervals.get((known.place(cell.record), column.metric), (cell.metric.value,))

    values = [] if column.chance is None else [column.chance]
    values += [value for row, cell in there if not is_reference(row) for value in ends(cell)]
    outside = [value for row, cell in there if is_reference(row) for value in ends(cell)]
    whole = values + outside
    if len(values) < 2 or max(whole) - min(whole) < FAR * (max(values) - min(values)):
        values = whole
    scale = scale_of(column, values)
    return scale, "" if column.chance is None else scale.at(column.chance)


def _line(
    row: Row, places: Sequence[int], columns: Sequence[Column], scale: Scale | None, known: Numbers
) -> Line:
    cells = tuple(_number(row.cells[i], column, known) for i, column in zip(places, columns, strict=True))
    first, mark = row.cells[places[0]], None
    if scale is not None and first is not None and scale.low <= first.metric.value <= scale.high:
        interval = known.intervals.get((cells[0].record, cells[0].metric))
        ends = tuple(map(scale.at, interval)) if interval else ("", "")
        mark = Mark(scale.at(first.metric.value), *ends)
    return Line(row.label, row.marks, kind_of(row), detail_texts(row), cells, mark)


def kind_of(row: Row) -> str:
    """``learned``, ``baseline``, ``reference`` or ``published``."""
    return "published" if row.origin == PAPER else "reference" if is_reference(row) else row.tokenizer.kind


def _number(cell: Cell | None, column: Column, known: Numbers) -> Number:
    if cell is None:
        return Number()
    return Number(
        text=value_text(cell, column),
        spread=spread_text(cell, column),
        marks=cell.marks,
        rank=cell.rank or "",
        raw=cell.metric.value,
        record=known.place(cell.record),
        metric=next(name for name in cell.record.metrics if one_line(name) == column.metric),
    )


def _facts(rows: Sequence[Row], places: Sequence[int], published: bool, recipes: Tasks) -> str:
    """How many images, from where, and how often probes were fitted."""
    cells = [cell for row in rows for i in places[:1] if (cell := row.cells[i])] or [
        cell for row in rows for i in places if (cell := row.cells[i])
    ]
    record = cells[0].record
    data = record.task.dataset
    if published:
        return f"{data.name} v{data.version}; {record.protocol.get('published', '')}".strip("; ")
    images = sorted({cell.metric.n for cell in cells if cell.metric.n})
    seeds = sorted({len(cell.record.seeds) for cell in cells})
    recipe = recipes.get(record.task.name)
    fitted = recipe is not None and recipe.spec.task_kind.probed
    parts = [f"data {data.name} v{data.version}"]
    if images:
        parts.append(f"n = {' or '.join(f'{n:,}' for n in images)}")
    if fitted:
        parts.append(f"probes fitted with {' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] != 1)}")
    elif seeds[-1] > 1:
        parts.append(f"{' or '.join(map(str, seeds))} seeds of the decoder's noise")
    return one_line("; ".join(parts))


@dataclass(frozen=True, slots=True)
class Overview:
    """The main metric of every task beside each other."""

    heads: tuple[Head, ...]
    lines: tuple[Line, ...]


def overview(table: Table, found: Sequence[Section], known: Numbers) -> Overview:
    """One column per measured section that is no control, one line per measured row."""
    shown = [section for section in found if not section.published and not section.control]
    columns = [section.columns[section.main] for section in shown]
    heads = tuple(
        _head(column, section.task, section.anchor, section.name.partition(", ")[2])
        for column, section in zip(columns, shown, strict=True)
    )
    places = [table.columns.index(column) for column in columns]
    lines = []
    for row in table.rows:
        cells = tuple(_number(row.cells[i], column, known) for i, column in zip(places, columns, strict=True))
        if row.origin != PAPER and any(cell.text for cell in cells):
            lines.append(Line(row.label, row.marks, kind_of(row), detail_texts(row), cells))
    return Overview(heads, tuple(lines))


# ----------------------------------------------------------------------------------- for the drawer

MOST_DETAILS = 6_000  # characters of a record's further details that are carried along


def record_data(record: Record, place: int, known: Numbers) -> dict[str, Any]:
    """What the drawer shows of a record, as plain JSON values."""
    environment = record.environment
    data: dict[str, Any] = {
        "name": one_line(record.tokenizer.name),
        "title": one_line(record.task.title),
        "task": f"{one_line(record.task.name)} v{record.task.version}",
        "origin": record.origin,
        "created": record.created.strftime("%Y-%m-%d %H:%M UTC"),
        "protocol": _pairs(flat(record.task_protocol)),
        "side": _pairs(flat(record.tokenizer_protocol)),
        "digest": record.protocol_digest,
        "column": column_digest(record)[7:15],
        "weights": one_line(record.tokenizer.weights),
        "seeds": list(record.seeds),
        "notes": [one_line(note) for note in record.notes],
        "incomplete": [one_line(why) for why in record.incomplete],
        "timings": {one_line(k): round(v, 2) for k, v in record.timings.items()},
        "metrics": {name: _metric(name, metric, place, known) for name, metric in record.metrics.items()},
    }
    if record.limit:
        data["incomplete"].insert(0, f"--limit {record.limit}")
    if record.unconverged:
        data["notes"].append(f"{MARKS['¶']} (seeds {', '.join(map(str, record.unconverged))})")
    if record.counts:
        counts = record.counts
        data["counts"] = {k: getattr(counts, k) for k in ("train", "early_stop", "report", "broken")}
    if environment:
        data["environment"] = _pairs({k: str(v) for k, v in environment.model_dump().items() if k != "argv"})
        data["command"] = command_of(record)
    return data


def _metric(name: str, metric: Metric, place: int, known: Numbers) -> dict[str, Any]:
    kept = metric.model_dump(mode="json")
    kept["interval"] = known.intervals.get((place, name))
    return kept


def _pairs(values: dict[str, str]) -> list[list[str]]:
    return [[one_line(key), one_line(value)] for key, value in values.items()]


def command_of(record: Record) -> str:
    """The command line that a record was made with, as it was typed."""
    argv = list(record.environment.argv) if record.environment else []
    if not argv:
        return ""
    program = {"run.py": "python -m comit_bench.run"}.get(argv[0], argv[0])
    return one_line(" ".join([program, *map(shlex.quote, argv[1:])]))


def distinct(values: Iterable[str]) -> list[str]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(values))
