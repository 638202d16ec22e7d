"""Tables: views over records, and over nothing else.

A row is a tokenizer, a column is one metric of one task under one protocol. The rules:

- two protocols never share a column: a difference in the task's side of the protocol (control and
  ``--limit`` included), in the task's version or in the data opens new columns, and the header
  says what differs; a difference on the tokenizer's side opens a new row;
- what was not measured is a dash; nothing is averaged over tasks, hence never over missing cells;
- a recipe that takes the place of a built-in one (``--include-path``) says so in the header;
- bold is every row that is not significantly worse than the best of its column, underlined every row not
  significantly worse than the best of the rest, where others are, by what is kept of every image
  (``results/paired.py``); with
  ``marks="rank"`` instead the best and the second-best, at the printed precision (what looks equal shares
  its rank). Both are taken among complete measured rows that are no reference, and never in the columns of a
  control or of a metric that is not ranked;
- the result does not depend on the order in which records come.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from comit_bench.errors import BenchError, UsageError, did_you_mean
from comit_bench.recipes.specs import recipe_root
from comit_bench.results.notation import (
    INCOMPLETE,
    MARKS,
    PUBLISHED,
    UNCONVERGED,
    UNTRAINED,
    decimals_for,
    format_number,
    one_line,
)
from comit_bench.results.paired import Rank, Side, ranks, side_of
from comit_bench.results.records import Metric, Record, TokenizerRow
from comit_bench.results.rows import (
    COLUMN_KEY,
    column_digest,
    newest_records,
    record_order,
    row_key,
    row_labels,
    task_side,
    tell_apart,
)
from comit_bench.results.trainings import ReadOutcomes, is_joined, join_trainings

RANKED = "Best bold, second-best underlined, among complete measured rows that are no reference."
TESTED = (
    "Bold: not significantly worse than the best of the column; underlined: not significantly worse than the "
    "best of the rest, where others are (paired t test over images and probe seeds or trainings, two-sided "
    "level .05, Holm's correction over all pairs of the column; complete measured rows that are no "
    "reference)."
)
SECTIONS = ("reference", "baseline", "learned")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring columns that share a task and the task's side of the protocol.

    Attributes:
        digest: Identifies task, version, data and protocol.
        column: What the protocol wants in the header in any case (its key ``column``), e.g. the resolution.
        variant: What tells this group from others of the same task; empty when it is alone.
        recipe: Where the recipe (or that of the data) is from, when it replaces a built-in one; else empty.
    """

    task: str
    version: int
    suite: str
    title: str
    control: str | None
    digest: str
    column: str = ""
    variant: str = ""
    recipe: str = ""

    @property
    def subtitle(self) -> str:
        """Second line of the header: version, foreign recipe, control, column, variant."""
        control = f"control {self.control}" if self.control else ""
        recipe = f"recipe of {self.recipe}" if self.recipe else ""
        parts = (f"v{self.version}", recipe, control, self.column, self.variant)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of one group; ``decimals`` is the printed precision."""

    group: Group
    metric: str
    unit: str
    higher_is_better: bool
    chance: float | None
    decimals: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One number, the record it is from, and how it is set: ``best`` is bold, ``second`` underlined."""

    metric: Metric
    record: Record
    marks: str = ""
    rank: Rank | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenizer; marks that hold for all of its cells stand at its label.

    ``details`` has one text per name in the table's ``details``; empty is the tokenizer's size.
    """

    label: str
    tokenizer: TokenizerRow
    origin: str
    marks: str
    cells: tuple[Cell | None, ...]
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in order of ``SECTIONS``; ``footnotes`` explain the marks that occur.

    ``details`` head the columns between a row's label and its scores; ``title`` may be empty. ``legend`` says
    what bold and underlined mean, and where they are not used.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    details: tuple[str, ...] = ("params", "K", "vocab")
    title: str = ""
    legend: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups in order of their columns."""
        return tuple(dict.fromkeys(column.group for column in self.columns))


def build_table(
    records: Iterable[Record],
    *,
    metrics: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    suite: str | None = None,
    tasks: Sequence[str] | None = None,
    row_of: Callable[[Record], tuple[str, ...]] | None = None,
    decimals: int | None = None,
    outcomes: ReadOutcomes | None = None,
    marks: Literal["significance", "rank"] = "significance",
    trainings: Literal["each", "mean"] = "each",
) -> Table:
    """Arrange records as a table.

    Args:
        records: In any order; of two for the same cell the one created last is shown.
        metrics: Names to show, in this order, of all tasks or by task; default all, in the order of the
            records.
        suite: Only tasks of this suite.
        tasks: Only these tasks, in this order; default all, by suite and name.
        row_of: What makes a row; default :func:`row_key`.
        decimals: Printed precision of all columns; default by unit and size.
        outcomes: How outcomes are had of a record, e.g. :class:`~comit_bench.results.outcomes.OutcomeFiles`
            of the folder with the records; without them nothing can be tested.
        marks: What is set bold and underlined, see above.
        trainings: ``mean`` joins the rows of one recipe trained with several seeds, see
            :mod:`comit_bench.results.trainings`.
    """
    row_of, read = row_of or row_key, outcomes or _no_outcomes
    if trainings == "mean":
        records, read = join_trainings(records, read)
    chosen, older = newest_records(_filter(sorted(records, key=record_order), suite, tasks), row_of)
    by_group: dict[str, list[Record]] = defaultdict(list)
    for record in chosen:
        by_group[column_digest(record)].append(record)
    members = sorted(by_group.values(), key=lambda group: _group_order(group, tasks))
    groups = _named_groups(members)
    columns = [
        column
        for group, group_records in zip(groups, members, strict=True)
        for column in _columns(group, group_records, metrics, decimals)
    ]
    shown = {column.metric for column in columns}
    if isinstance(metrics, Sequence) and (unknown := [m for m in metrics if m not in shown]) and chosen:
        names = {name for record in chosen for name in record.metrics}
        raise UsageError(f"no record has a metric {unknown[0]!r}.{did_you_mean(unknown[0], names)}")
    rows = _rows(chosen, columns, row_of)
    rows, legend = _ranked(rows, columns) if marks == "rank" else _tested(rows, columns, read)
    notes = _notes(rows, groups, members, older)
    return _tidy(Table(tuple(columns), tuple(rows), _footnotes(rows), notes, legend=legend))


def _no_outcomes(record: Record) -> None:
    """Of which nothing is known image by image."""


def _tidy(table: Table) -> Table:
    """The same table; whatever a record says stands on one line."""
    groups = {
        group: replace(
            group,
            task=one_line(group.task),
            control=None if group.control is None else one_line(group.control),
            column=one_line(group.column),
            variant=one_line(group.variant),
            recipe=one_line(group.recipe),
        )
        for group in table.groups
    }
    columns = [
        replace(c, group=groups[c.group], metric=one_line(c.metric), unit=one_line(c.unit))
        for c in table.columns
    ]
    rows = [replace(row, label=one_line(row.label)) for row in table.rows]
    return replace(table, columns=tuple(columns), rows=tuple(rows), notes=tuple(map(one_line, table.notes)))


def _filter(records: list[Record], suite: str | None, tasks: Sequence[str] | None) -> list[Record]:
    if not records:
        return records
    if suite is not None:
        suites = {record.task.suite for record in records}
        if suite not in suites:
            raise UsageError(f"no record belongs to suite {suite!r}.{did_you_mean(suite, suites)}")
        records = [record for record in records if record.task.suite == suite]
    if tasks is not None:
        names = {record.task.name for record in records}
        for task in tasks:
            if task not in names:
                raise UsageError(f"no record belongs to task {task!r}.{did_you_mean(task, names)}")
        records = [record for record in records if record.task.name in tasks]
    return records


def _group_order(records: list[Record], tasks: Sequence[str] | None) -> tuple[Any, ...]:
    """Real before control, complete before limited, measured before published."""
    newest = records[-1]
    task = newest.task
    position = list(tasks).index(task.name) if tasks is not None else 0
    complete = any(record.complete for record in records)
    where = (position, task.suite, task.name, -task.version)
    return (*where, newest.control or "", not complete, _published(records), column_digest(newest))


def _named_groups(members: list[list[Record]]) -> list[Group]:
    groups = []
    for records in members:
        task = records[-1].task
        digest, column = column_digest(records[-1]), records[-1].protocol.get(COLUMN_KEY, "")
        control, recipe = records[-1].control, _foreign_recipe(records)
        groups.append(
            Group(
                *(task.name, task.version, task.suite, task.title, control, digest, str(column)),
                recipe=recipe,
            )
        )
    rivals: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        rivals[group.task, group.version, group.control, _published(members[index])].append(index)
    for (*_, published), indices in rivals.items():
        labels, _ = tell_apart({i: task_side(members[i][-1]) for i in indices}, ["limit", "seeds"])
        sources = {i: str(members[i][-1].protocol.get("source", "")).partition(" (")[0] for i in indices}
        for index in indices:
            variant, source = labels[index], sources[index]
            if published:  # by its source, and what that says when several are of one source
                alone = source and list(sources.values()).count(source) == 1
                told = (source if len(indices) > 1 else "", "" if alone else variant)
                variant = " ".join(part for part in ("published", *told) if part)
            groups[index] = replace(groups[index], variant=variant)
    return groups


def _foreign_recipe(records: list[Record]) -> str:
    """Where a recipe is from that took the place of a built-in one, as it is called; else empty."""
    origins = set()
    for record in records:
        task, data = record.task, record.task.dataset
        probe = task.origin if (recipe_root("probes") / task.name).is_dir() else "builtin"
        images = data.origin if (recipe_root("datasets") / data.name).is_dir() else "builtin"
        origins.add(next((origin for origin in (probe, images) if origin != "builtin"), "builtin"))
    return (
        "" if "builtin" in origins else ", ".join(sorted(Path(origin).name or origin for origin in origins))
    )


def _published(records: list[Record]) -> bool:
    return all(record.origin == "paper" for record in records)


def _columns(
    group: Group,
    records: list[Record],
    metrics: Sequence[str] | Mapping[str, Sequence[str]] | None,
    precision: int | None,
) -> list[Column]:
    wanted = metrics.get(group.task, ()) if isinstance(metrics, Mapping) else metrics
    found: dict[str, list[tuple[Record, Metric]]] = defaultdict(list)
    for record in records:
        for name, metric in record.metrics.items():
            found[name].append((record, metric))
    columns = []
    for name in found if wanted is None else [m for m in dict.fromkeys(wanted) if m in found]:
        record, first = found[name][0]
        for other, metric in found[name]:
            if (metric.unit, metric.higher_is_better) != (first.unit, first.higher_is_better):
                raise UsageError(
                    f"{record.tokenizer.name} and {other.tokenizer.name} disagree on the unit or direction "
                    f"of {name!r} in task {group.task!r}: measure one of them again"
                )
        chances = {metric.chance for _, metric in found[name]}
        decimals = precision
        if decimals is None:
            decimals = decimals_for(first.unit, [metric.value for _, metric in found[name]])
        chance = chances.pop() if len(chances) == 1 else None
        columns.append(Column(group, name, first.unit, first.higher_is_better, chance, decimals))
    return columns


def _row_order(key: tuple[str, ...], newest: Record) -> tuple[Any, ...]:
    tokenizer = newest.tokenizer
    section = SECTIONS.index(tokenizer.kind)
    settings = tuple(newest.decoder_setting(name) or 0.0 for name in ("guidance", "steps"))
    return (section, tokenizer.family.lower(), tokenizer.parameters or 0, key[0], settings, key)


def _rows(
    records: list[Record], columns: list[Column], row_of: Callable[[Record], tuple[str, ...]]
) -> list[Row]:
    """Rows in their order, without ranks; a row that has measured numbers is described by one of them."""
    cells: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    newest: dict[tuple[str, ...], Record] = {}
    for record in records:
        key = row_of(record)
        cells[key][column_digest(record)] = record
        if key not in newest or record.origin != "paper" or newest[key].origin == "paper":
            newest[key] = record
    labels = row_labels(newest)
    rows = []
    for key in sorted(cells, key=lambda key: _row_order(key, newest[key])):
        row_cells = tuple(_cell(cells[key].get(column.group.digest), column.metric) for column in columns)
        if any(row_cells):
            rows.append(_row(labels[key], newest[key], row_cells))
    return rows


def _cell(record: Record | None, metric: str) -> Cell | None:
    if record is None or metric not in record.metrics:
        return None
    marks = (INCOMPLETE if not record.complete else "") + (PUBLISHED if record.origin == "paper" else "")
    marks += UNCONVERGED if record.unconverged else ""
    return Cell(record.metrics[metric], record, marks)


def _row(label: str, newest: Record, cells: tuple[Cell | None, ...]) -> Row:
    present = [cell for cell in cells if cell is not None]
    shared = [
        mark for mark in (INCOMPLETE, PUBLISHED, UNCONVERGED) if all(mark in cell.marks for cell in present)
    ]
    for mark in shared:
        cells = tuple(c and replace(c, marks=c.marks.replace(mark, "")) for c in cells)
    marks = ("" if newest.tokenizer.trained else UNTRAINED) + "".join(shared)
    return Row(label, newest.tokenizer, newest.origin, marks, cells)


def _candidates(rows: list[Row], index: int, column: Column) -> dict[int, Cell]:
    """Cells of a column that can be marked, by the position of their row; none where there is but one."""
    found = {}
    for position, row in enumerate(rows):
        cell = row.cells[index]
        if cell is not None and _rankable(cell.record):
            found[position] = cell
    return found if len(found) > 1 and column.group.control is None else {}


def _unranked(column: Column, candidates: Mapping[int, Cell]) -> bool:
    return any(cell.metric.unranked for cell in candidates.values())


def _with_ranks(rows: list[Row], found: Mapping[int, Mapping[int, Rank]]) -> list[Row]:
    """Rows with the ranks of columns: position of the column -> position of the row -> rank."""
    grid = [list(row.cells) for row in rows]
    for index, column in found.items():
        for position, rank in column.items():
            cell = grid[position][index]
            grid[position][index] = cell and replace(cell, rank=rank)
    return [replace(row, cells=tuple(cells)) for row, cells in zip(rows, grid, strict=True)]


def _ranked(rows: list[Row], columns: list[Column]) -> tuple[list[Row], tuple[str, ...]]:
    """Mark best and second-best; and the legend."""
    found: dict[int, dict[int, Rank]] = {}
    for index, column in enumerate(columns):
        cells = _candidates(rows, index, column)
        if _unranked(column, cells):
            continue
        values = {p: float(format_number(cell.metric.value, column.decimals)) for p, cell in cells.items()}
        order = sorted(set(values.values()), reverse=column.higher_is_better)
        found[index] = {
            position: "best" if value == order[0] else "second"
            for position, value in values.items()
            if value in order[:2]
        }
    return _with_ranks(rows, found), (RANKED,) if any(found.values()) else ()


def _tested(rows: list[Row], columns: list[Column], read: ReadOutcomes) -> tuple[list[Row], tuple[str, ...]]:
    """Mark what is not significantly worse than the best, and than the best of the rest; and the legend."""
    found: dict[int, dict[int, Rank]] = {}
    untested: dict[str, None] = {}
    unranked: dict[str, None] = {}
    without: dict[str, None] = {}
    for index, column in enumerate(columns):
        cells = _candidates(rows, index, column)
        if _unranked(column, cells):
            unranked[column.metric] = None
            continue
        sides = {p: side for p, cell in cells.items() if (side := _side(cell.record, column, read))}
        try:
            if len(sides) < 2:
                raise UsageError("nothing to compare")
            values = {position: cells[position].metric.value for position in sides}
            found[index] = ranks(sides, values, higher=column.higher_is_better)
            without |= {rows[position].label: None for position in cells if position not in sides}
        except UsageError:
            untested |= {column.metric: None} if cells else {}
    legend = [TESTED] if found else []
    if untested:
        legend.append(f"Untested and unmarked, without outcomes of every image: {_listed(untested)}.")
    if without:
        legend.append(f"Unmarked in tested columns, without outcomes of every image: {_listed(without)}.")
    if unranked:
        legend.append(f"Not to be ranked by, and unmarked: {_listed(unranked)}.")
    return _with_ranks(rows, found), tuple(legend)


def _listed(names: Iterable[str], most: int = 6) -> str:
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest


def _side(record: Record, column: Column, read: ReadOutcomes) -> Side | None:
    """What is known of every image; None where nothing is."""
    try:
        outcomes = read(record)
        return None if outcomes is None else side_of(outcomes, column.metric, column.unit)
    except BenchError as error:
        _warn_once(str(error))
        return None


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    _log.warning("untested: %s", text)


def _rankable(record: Record) -> bool:
    return record.complete and record.origin != "paper" and record.tokenizer.kind != "reference"


def _footnotes(rows: list[Row]) -> tuple[tuple[str, str], ...]:
    used = "".join(row.marks + "".join(cell.marks for cell in row.cells if cell) for row in rows)
    return tuple((mark, text) for mark, text in MARKS.items() if mark in used)


def _notes(rows: list[Row], groups: list[Group], members: list[list[Record]], older: int) -> tuple[str, ...]:
    if not rows:
        return ("No records.",)
    notes = []
    spread = [c for row in rows for c in row.cells if c and c.metric.std is not None]
    seeds = {len(cell.metric.per_seed) for cell in spread if not is_joined(cell.record)} - {0}
    if seeds:
        notes.append(f"± is the sample standard deviation over {_counts(seeds)} seeds.")
    joined = [cell.record for cell in spread if is_joined(cell.record)]
    if joined:
        counts = _counts({len(record.seeds) for record in joined})
        probes = _counts({str(record.details["probe_seeds"]) for record in joined})
        notes.append(
            f"Rows of trainings: mean ± sample standard deviation over {counts} trainings "
            f"({probes} probe seeds each)."
        )
    sides: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for group, records in zip(groups, members, strict=True):
        if not _published(records):
            name = f"{group.task} v{group.version}" + (f", {group.control}" if group.control else "")
            sides[name][group.digest] = task_side(records[-1])
    for task, by_digest in sides.items():
        _, differing = tell_apart(by_digest, ["limit", "seeds"])
        if not differing:
            continue
        rest = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        notes.append(f"The protocols of {task} differ in {', '.join(differing[:6])}{rest}.")
    for group, records in zip(groups, members, strict=True):
        if _published(records) and group.variant != "published":
            notes.append(f"{group.task}, {group.variant}: {records[-1].protocol.get('published', '')}.")
    if older:
        notes.append(f"{older} older record(s) of the same tokenizer, task and protocol left out.")
    return tuple(notes)


def _counts(numbers: Iterable[int | str]) -> str:
    return " or ".join(map(str, sorted(numbers)))
