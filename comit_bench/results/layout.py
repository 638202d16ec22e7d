"""What every rendering of a table has in common: its texts, and how columns fit a width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from comit_bench.results.tables import format_number

if TYPE_CHECKING:
    from comit_bench.results.tables import Cell, Column, Row, Table

DASH = "\N{EN DASH}"
CHANCE = "chance"
LABEL = "tokenizer"
RANKS = "Best bold, second-best underlined, among complete measured rows that are no reference."
LABEL_WIDTH = 38
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


def has_ranks(table: Table) -> bool:
    """Whether anything is set bold or underlined."""
    return any(cell is not None and cell.rank for row in table.rows for cell in row.cells)


def is_reference(row: Row) -> bool:
    """Whether the row only brackets the others."""
    return row.tokenizer.kind == "reference"


@dataclass(frozen=True, slots=True)
class Block:
    """Columns printed side by side, with the tokenizers' details or only their labels."""

    columns: tuple[int, ...]
    details: bool


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

        Only the first block has the details. A single column wider than ``width`` stands alone.
        """
        blocks: list[Block] = []
        current: list[int] = []

        def room() -> int:
            return width - self.label - (0 if blocks else sum(size + GAP for size in self.details))

        def flush() -> None:
            blocks.append(Block(tuple(current), not blocks))
            current.clear()

        for group in self.table.groups:
            indices = [i for i, column in enumerate(self.table.columns) if column.group == group]
            if current and self.span([*current, *indices]) > room():
                flush()
            for index in indices:
                if current and self.span([*current, index]) > room():
                    flush()
                current.append(index)
        if current or not blocks:
            flush()
        return blocks

    def span(self, indices: list[int]) -> int:
        """Width of these columns, each with the gap before it."""
        return sum(self.widths[index] + GAP for index in indices)


def measure(table: Table) -> Layout:
    """Find the widths that every column needs, its group's title included."""
    from rich.cells import cell_len

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
    for group in table.groups:
        own = [index for index, column in enumerate(table.columns) if column.group == group]
        title = max(cell_len(group.task), cell_len(group.subtitle))
        missing = title - sum(widths[index] for index in own) - GAP * (len(own) - 1)
        for turn in range(max(0, missing)):
            widths[own[turn % len(own)]] += 1
    label = min(LABEL_WIDTH, max(map(cell_len, labels)))
    return Layout(table, label, tuple(details), tuple(parts), tuple(widths))
