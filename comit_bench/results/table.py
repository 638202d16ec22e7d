"""Tables: views over records, and over nothing else.

A row is a tokenizer, a column is one metric of one task under one protocol. The rules:

- two protocols never share a column: a difference in the task's side of the protocol (control and
  ``--limit`` included), in the task's version or in the data opens new columns, and the header
  says what differs; a difference on the tokenizer's side opens a new row;
- what was not measured is a dash; nothing is averaged over tasks, hence never over missing cells;
- a recipe that takes the place of a built-in one (``--include-path``) says so in the header;
- best and second-best are taken among complete measured rows that are no reference, at the printed
  precision (what looks equal shares its rank), and never in the columns of a control;
- the result does not depend on the order in which records come.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.files import digest_json
from comit_bench.recipes.specs import recipe_root
from comit_bench.results.records import Metric, Record, TokenizerRow

if TYPE_CHECKING:
    pass

UNTRAINED, INCOMPLETE, PUBLISHED = "†", "‡", "§"
MARKS = {
    UNTRAINED: "untrained: random weights",
    INCOMPLETE: "incomplete: only part of the data was used (--limit, or images are missing); not ranked",
    PUBLISHED: "published number, not measured here",
}
SECTIONS = ("reference", "baseline", "learned")
COLUMN_KEY = "column"  # of a protocol: words about it that the header always shows; follows from the rest

_log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)


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
    """One number, the record it is from, and how it is set."""

    metric: Metric
    record: Record
    marks: str = ""
    rank: Literal["best", "second"] | None = None


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

    ``details`` head the columns between a row's label and its scores; ``title`` may be empty.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    details: tuple[str, ...] = ("params", "K", "vocab")
    title: str = ""

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
    """
    row_of = row_of or row_key
    chosen, older = _newest(_filter(sorted(records, key=_record_order), suite, tasks), row_of)
    by_group: dict[str, list[Record]] = defaultdict(list)
    for record in chosen:
        by_group[_group_digest(record)].append(record)
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
    rows = _ranked(_rows(chosen, columns, row_of), columns)
    notes = _notes(rows, groups, members, older)
    return _tidy(Table(tuple(columns), tuple(rows), _footnotes(rows), notes))


def one_line(text: str) -> str:
    """Text without line breaks, control characters and invisible signs, which tear tables and terminals."""
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cf": "", "Cs": "?"}
    return " ".join("".join(kinds.get(unicodedata.category(c), c) for c in text).split())


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


def format_number(value: float, decimals: int) -> str:
    """Fixed decimals; huge values in scientific notation; never ``-0.0``."""
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


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


def _record_order(record: Record) -> tuple[Any, ...]:
    """Total order: newest last, contents decide between equals."""
    return (record.created, record.to_json())


def _data_side(record: Record) -> dict[str, Any]:
    """Name, version and fingerprint of the data; where its recipe lies changes no number."""
    data = record.task.dataset
    return {"name": data.name, "version": data.version, "fingerprint": data.fingerprint}


def _group_digest(record: Record) -> str:
    return digest_json([record.task.name, record.task.version, _data_side(record), record.task_protocol])


def _group_order(records: list[Record], tasks: Sequence[str] | None) -> tuple[Any, ...]:
    """Real before control, complete before limited, measured before published."""
    newest = records[-1]
    task = newest.task
    position = list(tasks).index(task.name) if tasks is not None else 0
    complete = any(record.complete for record in records)
    where = (position, task.suite, task.name, -task.version)
    return (*where, newest.control or "", not complete, _published(records), _group_digest(newest))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": "1"}``, digests shortened."""
    if isinstance(value, dict) and value:
        parts = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    scheme, colon, rest = text.partition(":")
    return {prefix: rest[:8] if colon and scheme in ("sha256", "fitted") else text}


def _tell_apart(
    sides: dict[K, dict[str, str]], first: Sequence[str], *, last: Sequence[str] = (), width: int = 28
) -> tuple[dict[K, str], list[str]]:
    """Find a short label for each of several mappings.

    Args:
        sides: The mappings, by key.
        first: Names to prefer when they differ.
        last: Names that are used only where no other tells enough.
        width: Longest label; longer ones become the key's digest.

    Returns:
        Labels, pairwise distinct unless there is only one; and all names that differ.
    """
    names = sorted({name for side in sides.values() for name in side})
    differing = [n for n in names if len({side.get(n) for side in sides.values()}) > 1]
    differing.sort(key=lambda n: (first.index(n) if n in first else len(first), n in last, n))
    used: list[str] = []
    told: set[tuple[str | None, ...]] = {()}
    for name in differing:
        now = {tuple(side.get(n) for n in (*used, name)) for side in sides.values()}
        if len(now) > len(told):
            used, told = [*used, name], now
    labels = {
        key: ", ".join(f"{n}={side[n]}" for n in used if side.get(n, "null") != "null")
        for key, side in sides.items()
    }
    for key, label in list(labels.items()):
        if len(label) > width or list(labels.values()).count(label) > 1:
            labels[key] = digest_json(sides[key])[7:15]
    return labels, differing


def _named_groups(members: list[list[Record]]) -> list[Group]:
    groups = []
    for records in members:
        task = records[-1].task
        digest, column = _group_digest(records[-1]), records[-1].protocol.get(COLUMN_KEY, "")
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
        labels, _ = _tell_apart({i: _task_side(members[i][-1]) for i in indices}, ["limit", "seeds"])
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


def _task_side(record: Record) -> dict[str, str]:
    side = {key: value for key, value in record.task_protocol.items() if key != COLUMN_KEY}
    return _flat({**side, "data": _data_side(record)})


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
            decimals = _decimals(first.unit, [metric.value for _, metric in found[name]])
        chance = chances.pop() if len(chances) == 1 else None
        columns.append(Column(group, name, first.unit, first.higher_is_better, chance, decimals))
    return columns


def _decimals(unit: str, values: list[float]) -> int:
    known = {"%": 1, "dB": 2}
    if unit in known:
        return known[unit]
    largest = max(abs(value) for value in values)
    return 3 if largest < 10 else 2 if largest < 100 else 1


def row_key(record: Record) -> tuple[str, ...]:
    """What makes a row: tokenizer, origin, weights, revision, the tokenizer's side of the protocol."""
    tokenizer = record.tokenizer
    side = digest_json(_row_side(record))
    # one that is fitted on each data set has weights of its own in every column, and still is one row
    weights = "fitted" if tokenizer.weights.startswith("fitted:") else tokenizer.weights
    return (tokenizer.name, record.origin, weights, tokenizer.revision or "", side)


def _row_side(record: Record) -> dict[str, Any]:
    """The tokenizer's side of the protocol, without settings that only some tasks use, at their defaults.

    So that probes, which decode nothing, and reconstruction by the default decoder share a row.
    """
    side = dict(record.tokenizer_protocol)
    decode = side.get("decode")
    if isinstance(decode, dict) and decode.get("default") is True:
        del side["decode"]
    return side


def _told_side(record: Record) -> dict[str, Any]:
    """The same for labels: all settings of the decoder, under their bare names."""
    side = {key: value for key, value in record.tokenizer_protocol.items() if key != "decode"}
    decode = record.tokenizer_protocol.get("decode")
    settings = decode if isinstance(decode, dict) else {}
    return {**side, **{name: value for name, value in settings.items() if name != "default"}}


def _row_order(key: tuple[str, ...], newest: Record) -> tuple[Any, ...]:
    tokenizer = newest.tokenizer
    section = SECTIONS.index(tokenizer.kind)
    settings = tuple(newest.decoder_setting(name) or 0.0 for name in ("guidance", "steps"))
    return (section, tokenizer.family.lower(), tokenizer.parameters or 0, key[0], settings, key)


def _newest(records: list[Record], row_of: Callable[[Record], tuple[str, ...]]) -> tuple[list[Record], int]:
    """One record per row and group, the last one; and how many others gave way."""
    kept: dict[tuple[tuple[str, ...], str], Record] = {}
    older = 0
    for record in records:
        key = row_of(record), _group_digest(record)
        older += key in kept and kept[key] != record
        kept[key] = record
    return sorted(kept.values(), key=_record_order), older


def _rows(
    records: list[Record], columns: list[Column], row_of: Callable[[Record], tuple[str, ...]]
) -> list[Row]:
    """Rows in their order, without ranks; a row that has measured numbers is described by one of them."""
    cells: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    newest: dict[tuple[str, ...], Record] = {}
    for record in records:
        key = row_of(record)
        cells[key][_group_digest(record)] = record
        if key not in newest or record.origin != "paper" or newest[key].origin == "paper":
            newest[key] = record
    labels = row_labels(newest)
    rows = []
    for key in sorted(cells, key=lambda key: _row_order(key, newest[key])):
        row_cells = tuple(_cell(cells[key].get(column.group.digest), column.metric) for column in columns)
        if any(row_cells):
            rows.append(_row(labels[key], newest[key], row_cells))
    return rows


def row_labels(rows: dict[tuple[str, ...], Record]) -> dict[tuple[str, ...], str]:
    """Names; where two rows would bear the same name and marks, what differs in brackets."""
    labels = {key: record.tokenizer.name for key, record in rows.items()}
    namesakes: dict[tuple[str, bool, bool], list[tuple[str, ...]]] = defaultdict(list)
    for key, record in rows.items():
        namesakes[record.tokenizer.name, record.tokenizer.trained, record.origin == "paper"].append(key)
    for keys in namesakes.values():
        if len(keys) > 1:
            sides = {
                key: _flat(
                    {
                        **_told_side(rows[key]),
                        "weights": rows[key].tokenizer.weights,
                        "revision": rows[key].tokenizer.revision,
                        "record": rows[key].origin,
                    }
                )
                for key in keys
            }
            # digests say less than settings
            rest = ("configuration", "family", "version")
            told, _ = _tell_apart(sides, ["weights", "policy", "record", "revision"], last=rest)
            # a policy's name speaks for itself
            shown = {key: told[key].removeprefix("policy=") for key in keys}
            labels.update({key: f"{labels[key]} ({shown[key]})" for key in keys if shown[key]})
    return labels


def _cell(record: Record | None, metric: str) -> Cell | None:
    if record is None or metric not in record.metrics:
        return None
    marks = (INCOMPLETE if not record.complete else "") + (PUBLISHED if record.origin == "paper" else "")
    return Cell(record.metrics[metric], record, marks)


def _row(label: str, newest: Record, cells: tuple[Cell | None, ...]) -> Row:
    present = [cell for cell in cells if cell is not None]
    shared = [mark for mark in (INCOMPLETE, PUBLISHED) if all(mark in cell.marks for cell in present)]
    for mark in shared:
        cells = tuple(c and replace(c, marks=c.marks.replace(mark, "")) for c in cells)
    marks = ("" if newest.tokenizer.trained else UNTRAINED) + "".join(shared)
    return Row(label, newest.tokenizer, newest.origin, marks, cells)


def _ranked(rows: list[Row], columns: list[Column]) -> list[Row]:
    """Mark best and second-best; a column with a single candidate has neither."""
    grid = [list(row.cells) for row in rows]
    for index, column in enumerate(columns):
        candidates: dict[int, float] = {}
        for position, row in enumerate(rows):
            cell = row.cells[index]
            if cell is not None and _rankable(cell.record):
                candidates[position] = float(format_number(cell.metric.value, column.decimals))
        if len(candidates) < 2 or column.group.control is not None:
            continue
        order = sorted(set(candidates.values()), reverse=column.higher_is_better)
        for position, value in candidates.items():
            cell = grid[position][index]
            if cell is not None and value in order[:2]:
                grid[position][index] = replace(cell, rank="best" if value == order[0] else "second")
    return [replace(row, cells=tuple(cells)) for row, cells in zip(rows, grid, strict=True)]


def _rankable(record: Record) -> bool:
    return record.complete and record.origin != "paper" and record.tokenizer.kind != "reference"


def _footnotes(rows: list[Row]) -> tuple[tuple[str, str], ...]:
    used = "".join(row.marks + "".join(cell.marks for cell in row.cells if cell) for row in rows)
    return tuple((mark, text) for mark, text in MARKS.items() if mark in used)


def _notes(rows: list[Row], groups: list[Group], members: list[list[Record]], older: int) -> tuple[str, ...]:
    if not rows:
        return ("No records.",)
    notes = []
    seeds = sorted(
        {len(c.metric.per_seed) for row in rows for c in row.cells if c and c.metric.std is not None}
    )
    seeds = [count for count in seeds if count]
    if seeds:
        counts = " or ".join(str(count) for count in seeds)
        notes.append(f"± is the sample standard deviation over {counts} seeds.")
    sides: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for group, records in zip(groups, members, strict=True):
        if not _published(records):
            name = f"{group.task} v{group.version}" + (f", {group.control}" if group.control else "")
            sides[name][group.digest] = _task_side(records[-1])
    for task, by_digest in sides.items():
        _, differing = _tell_apart(by_digest, ["limit", "seeds"])
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
