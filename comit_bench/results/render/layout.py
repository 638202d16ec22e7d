"""What every rendering of a table has in common: its texts, and how columns fit a width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len

from comit_bench.results.notation import format_number

if TYPE_CHECKING:
    from comit_bench.results.table import Cell, Column, Row, Table

DASH = "\N{EN DASH}"
CHANCE = "chance"
LABEL = "tokenizer"
LABEL_WIDTH = 38
LEAST_LABEL = 12  # of a terminal however narrow
PAPER = "paper"  # origin of published rows
GAP = 2


def short_count(count: int | None) -> str:
    """``1234567`` -> ``1.23M``; None -> dash."""
    if count is None:
        return DASH
    for size, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size * 0.9995:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return str(count)


def detail_texts(row: Row) -> tuple[str, ...]:
    """One text per name in the table's ``details``."""
    if row.details:
        return row.details
    numbers = (row.tokenizer.message_length, row.tokenizer.vocab_size)
    return (short_count(row.tokenizer.parameters), *(DASH if n is None else str(n) for n in numbers))


def heading(column: Column) -> str:
    """Metric, unit and an arrow in the direction that is better."""
    unit = f" {column.unit}" if column.unit else ""
    return f"{column.metric}{unit} {'↑' if column.higher_is_better else '↓'}"


def value_text(cell: Cell, column: Column) -> str:
    """The mean at the column's precision."""
    return format_number(cell.metric.value, column.decimals)


def spread_text(cell: Cell, column: Column) -> str:
    """The standard deviation over seeds, or nothing."""
    return "" if cell.metric.std is None else format_number(cell.metric.std, column.decimals)


def number_text(cell: Cell, column: Column) -> str:
    """``mean ± std``, or only the mean of a single seed."""
    spread = spread_text(cell, column)
    return value_text(cell, column) + (f" ± {spread}" if spread else "")


def chance_texts(table: Table) -> list[str] | None:
    """Chance levels as printed, or None when no column has one."""
    if all(column.chance is None for column in table.columns):
        return None
    return [DASH if c.chance is None else format_number(c.chance, c.decimals) for c in table.columns]


def is_reference(row: Row) -> bool:
    """Whether the row only brackets the others."""
    return row.tokenizer.kind == "reference"


@dataclass(frozen=True, slots=True)
class Block:
    """Columns printed side by side, and the rows that have something to say there.

    Attributes:
        columns: Positions in ``table.columns``.
        rows: Positions in ``table.rows``.
        details: Whether the tokenizers' details stand beside their labels.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    details: bool


def shown_rows(table: Table, columns: Sequence[int]) -> tuple[int, ...]:
    """The rows of a block.

    Published numbers are rows of their own and columns of their own, so most of their cells are empty: such a
    row is shown only where it has a value. Measured rows are shown all, so that what is missing is seen,
    unless none of them has a value here.
    """

    def has_value(row: Row) -> bool:
        return any(row.cells[index] is not None for index in columns)

    measured = not columns or any(row.origin != PAPER and has_value(row) for row in table.rows)
    return tuple(
        number
        for number, row in enumerate(table.rows)
        if has_value(row) or (measured and row.origin != PAPER)
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Widths in characters; ``parts`` are the widths of value, spread and marks per column."""

    table: Table
    label: int
    details: tuple[int, ...]
    parts: tuple[tuple[int, int, int], ...]
    widths: tuple[int, ...]

    def blocks(self, width: int) -> list[Block]:
        """Split the columns so that every block fits; groups stay whole when they can.

        A block has the details when one of its rows is shown there for the first time, if there is room for
        them. A single column wider than ``width`` stands alone.
        """
        blocks: list[Block] = []
        current: list[int] = []
        known: set[int] = set()

        def block(columns: list[int]) -> Block:
            rows = shown_rows(self.table, columns)
            details = not known.issuperset(rows) or not (blocks or columns)
            room = width - self.label - self.span(columns[:1])
            return Block(tuple(columns), rows, details and self.beside <= room)

        def fits(columns: list[int]) -> bool:
            return self.label + self.beside * block(columns).details + self.span(columns) <= width

        def flush() -> None:
            blocks.append(block(current))
            known.update(blocks[-1].rows if blocks[-1].details else ())
            current.clear()

        for group in self.table.groups:
            indices = [i for i, column in enumerate(self.table.columns) if column.group == group]
            if current and not fits([*current, *indices]):
                flush()
            for index in indices:
                if current and not fits([*current, index]):
                    flush()
                current.append(index)
        if current or not blocks:
            flush()
        return blocks

    @property
    def beside(self) -> int:
        """Width of the details, each with the gap before it."""
        return sum(size + GAP for size in self.details)

    def span(self, indices: Sequence[int]) -> int:
        """Width of these columns, each with the gap before it."""
        return sum(self.widths[index] + GAP for index in indices)


def measure(table: Table, width: int | None = None) -> Layout:
    """Find the widths that every column needs, its group's title included.

    Args:
        table: What is printed.
        width: Of the terminal: where it is narrow, labels and titles are cut rather than numbers.
    """
    labels = [LABEL, CHANCE, *(row.label + row.marks for row in table.rows)]
    details = [
        max(map(cell_len, texts)) for texts in zip(table.details, *map(detail_texts, table.rows), strict=True)
    ]
    chances = chance_texts(table) or [""] * len(table.columns)
    parts, widths = [], []
    for index, column in enumerate(table.columns):
        cells = [cell for row in table.rows if (cell := row.cells[index]) is not None]
        value = max(len(text) for text in [DASH, chances[index], *(value_text(c, column) for c in cells)])
        spread = max(len(text) for text in ["", *(spread_text(c, column) for c in cells)])
        marks = max(len(text) for text in ["", *(c.marks for c in cells)])
        parts.append((value, spread, marks))
        number = value + (spread + 3 if spread else 0) + marks
        widths.append(max(number, cell_len(heading(column)) + marks))
    label = min(LABEL_WIDTH, max(map(cell_len, labels)))
    room = None
    if width is not None:
        label = min(label, max(LEAST_LABEL, width - GAP - max(widths, default=0)))
        room = width - label - GAP
    for group in table.groups:
        own = [index for index, column in enumerate(table.columns) if column.group == group]
        title = max(cell_len(group.task), cell_len(group.subtitle))
        missing = min(title, room or title) - sum(widths[index] for index in own) - GAP * (len(own) - 1)
        for turn in range(max(0, missing)):
            widths[own[turn % len(own)]] += 1
    return Layout(table, label, tuple(details), tuple(parts), tuple(widths))
