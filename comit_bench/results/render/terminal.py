"""A table on the terminal: rules like those of a printed one, blocks when it is too wide."""

from __future__ import annotations

import os
import unicodedata
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from comit_bench.results.render.layout import (
    CHANCE,
    DASH,
    GAP,
    LABEL,
    Block,
    Layout,
    chance_texts,
    detail_texts,
    heading,
    is_reference,
    measure,
    spread_text,
    value_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from comit_bench.results.table import Row, Table


PIPE_WIDTH = 120


def stdout_console(width: int) -> Console:
    """Standard output; a pipe or a file has no width of its own: ``COLUMNS``, else ``width``."""
    console = Console(markup=False, emoji=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return console
    return Console(width=max(console.width, width), markup=False, emoji=False)


def print_terminal(table: Table, console: Console | None = None) -> None:
    """Print on ``console`` (default: stdout), in plain ASCII where its encoding has nothing better."""
    console = console or stdout_console(PIPE_WIDTH)
    styled = console.is_terminal and not console.is_dumb_terminal
    for line in terminal_lines(table, console.width, styled=styled):
        readable = in_encoding(line.plain, console.encoding)
        if readable != line.plain:
            line.plain = readable
        console.print(line, no_wrap=True, overflow="ignore", crop=False, highlight=False)


_ASCII = str.maketrans(DASH + "±↑↓─†‡§¶…×é→—✓✗█▏▎▍▌▋▊▉", "-+^v-+#$!~xe>-yn########")


def in_encoding(text: str, encoding: str) -> str:
    """Text that can be written in an encoding; what it does not have is replaced, one sign by one sign.

    The signs of tables and bars become ASCII; of other letters the accents are lost, or they become ``?``.
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        pass
    else:
        return text

    def plain(letter: str) -> str:
        for other in (letter, letter.translate(_ASCII), unicodedata.normalize("NFKD", letter)[0]):
            try:
                other.encode(encoding)
            except UnicodeEncodeError:
                continue
            return other
        return "?"

    return "".join(map(plain, text))


def terminal_lines(table: Table, width: int, *, styled: bool = True) -> list[Text]:
    """The table as lines of rich text.

    Args:
        table: What to print.
        width: Columns available; a table that is wider continues in further blocks below.
        styled: Whether the reader will see bold and underlined.
    """
    layout = measure(table, width)
    lines: list[Text] = [Text(part, "bold") for part in wrap(table.title, max(20, width))]
    for number, block in enumerate(layout.blocks(width)):
        if number:
            lines.append(Text())
        lines += _terminal_block(table, layout, block)
    notes = [*table.legend] if styled else []
    notes += [*table.notes, *(f"{mark} {text}" for mark, text in table.footnotes)]
    for note in notes:
        lines += [Text(part, style="dim") for part in wrap(note, max(20, width), subsequent_indent="  ")]
    return lines


def _terminal_block(table: Table, layout: Layout, block: Block) -> list[Text]:
    details = layout.details if block.details else ()
    total = layout.label + sum(d + GAP for d in details) + layout.span(list(block.columns))
    lines = _titles(layout, block, total)
    head = Text(_fit(LABEL, layout.label))
    for name, size in zip(table.details, details, strict=False):
        head.append(" " * GAP + _right(name, size))
    for index in block.columns:
        marks = layout.parts[index][2]
        title = _right(heading(table.columns[index]), layout.widths[index] - marks)
        head.append(" " * GAP + title + " " * marks)
    head.stylize("bold")
    lines += [head, Text("─" * total)]
    bare = len(lines)
    chances = chance_texts(table)
    if chances is not None and any(chances[index] != DASH for index in block.columns):
        line = Text(_fit(CHANCE, layout.label) + " " * sum(d + GAP for d in details), style="dim")
        for index in block.columns:
            line.append(" " * GAP).append(_terminal_number(chances[index], "", "", layout, index))
        lines.append(line)
    shown = [table.rows[number] for number in block.rows]
    body = [row for row in shown if not is_reference(row)]
    for row in shown:
        if body and row is body[0] and len(lines) > bare:
            lines.append(Text("─" * total, style="dim"))
        lines.append(_terminal_row(table, layout, block, row))
    return [*lines, Text("─" * total)]


def _titles(layout: Layout, block: Block, total: int) -> list[Text]:
    """Task over its columns, what tells it from others below, a rule under both."""
    table = layout.table
    groups = list(dict.fromkeys(table.columns[index].group for index in block.columns))
    spans = [
        layout.span([i for i in block.columns if table.columns[i].group == group]) - GAP for group in groups
    ]
    left = " " * (total - sum(span + GAP for span in spans))
    names, subtitles, rules = Text(left, "bold"), Text(left), Text(left, "dim")
    for group, span in zip(groups, spans, strict=True):
        rules.append(" " * GAP + "─" * span)
        for line, text in ((names, group.task), (subtitles, group.subtitle)):
            if len(groups) == 1 and span < cell_len(text) <= total:  # there is room over the labels
                line.plain = _right(text, total)
            else:
                line.append(" " * GAP + _center(text, span))
    lines = [Text("─" * total), names, subtitles, rules]
    return lines if groups else lines[:1]


def _terminal_row(table: Table, layout: Layout, block: Block, row: Row) -> Text:
    line = Text(_fit(row.label + row.marks, layout.label, keep=len(row.marks)))
    if block.details:
        for text, size in zip(detail_texts(row), layout.details, strict=True):
            line.append(" " * GAP + _right(text, size))
    for index in block.columns:
        column, cell = table.columns[index], row.cells[index]
        line.append(" " * GAP)
        if cell is None:
            line.append(_terminal_number(DASH, "", "", layout, index))
            continue
        number = _terminal_number(
            value_text(cell, column), spread_text(cell, column), cell.marks, layout, index
        )
        style = {"best": "bold", "second": "underline"}.get(cell.rank or "")
        if style:
            start = len(number.plain) - len(number.plain.lstrip())
            number.stylize(style, start, start + len(number.plain.strip().rstrip(cell.marks or " ")))
        line.append(number)
    if is_reference(row):
        line.stylize("dim")
    return line


def _terminal_number(value: str, spread: str, marks: str, layout: Layout, index: int) -> Text:
    """Right-aligned so that decimal points and ± stand above each other."""
    value_width, spread_width, marks_width = layout.parts[index]
    text = value.rjust(value_width)
    if spread_width:
        text += f" ± {spread.rjust(spread_width)}" if spread else " " * (spread_width + 3)
    size = len(text) + marks_width
    marked = text.rstrip() + marks if marks else text
    return Text(marked.ljust(size).rjust(layout.widths[index]))


def _right(text: str, width: int) -> str:
    return " " * (width - cell_len(text)) + text


def _center(text: str, width: int) -> str:
    free = width - cell_len(text)
    if free < 0:
        return set_cell_size(text, width - 1) + "…"
    return " " * (free // 2) + text + " " * (free - free // 2)


def _fit(text: str, width: int, keep: int = 0) -> str:
    """Pad to ``width``, or cut the middle out; the last ``keep`` characters always stay."""
    if cell_len(text) <= width:
        return text + " " * (width - cell_len(text))
    tail = text[-max(keep, (width - 1) // 2) :]
    return set_cell_size(text, width - 1 - cell_len(tail)) + "…" + tail
