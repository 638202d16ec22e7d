r"""The paper's Table 4 as LaTeX: parameters, message length, vocabulary, rFID, PSNR, IN100, MSCOCO, VG.

A view over records like every table, with one difference: a heading is a task and a metric, whatever the
protocol. So measured and published numbers stand below each other. They are never averaged: a published
row is a row of its own, carries its mark, and takes no part in best and second-best; where a measured
tokenizer has several records for a heading (other seeds, say), the newest complete one is shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comit_bench.results.layout import DASH, short_count
from comit_bench.results.records import Record
from comit_bench.results.render import tex_escape
from comit_bench.results.tables import (
    INCOMPLETE,
    MARKS,
    PUBLISHED,
    SECTIONS,
    UNTRAINED,
    format_number,
    row_key,
    row_labels,
)


@dataclass(frozen=True, slots=True)
class Heading:
    """One column: its title in the paper, and the task and metric behind it."""

    title: str
    task: str
    metric: str
    decimals: int = 2


HEADINGS = (
    Heading("rFID", "reconstruction-imagenet1k", "rfid"),
    Heading("PSNR", "reconstruction-imagenet1k", "psnr"),
    Heading("IN100", "imagenet100", "top1"),
    Heading("MSCOCO", "mscoco-pairs", "top5"),
    Heading("VG", "visual-genome", "top1"),
)
DETAILS = ("Params", "Length", "Vocab")


def paper_rows(records: Iterable[Record]) -> list[tuple[str, Record, list[Record | None]]]:
    """Rows of the table: label, newest record, and one record or None per heading.

    Args:
        records: In any order; controls and tasks without a heading are left out.
    """
    tasks = {heading.task for heading in HEADINGS}
    chosen = [r for r in records if r.task.name in tasks and r.control is None]
    chosen.sort(key=lambda r: (r.complete, r.created, r.to_json()))  # the last one is shown
    cells: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    newest: dict[tuple[str, ...], Record] = {}
    for record in chosen:
        key = row_key(record)
        cells[key][record.task.name] = newest[key] = record
    labels = row_labels(newest)

    def order(key: tuple[str, ...]) -> tuple[object, ...]:
        row = newest[key].tokenizer
        published = newest[key].origin == "paper"
        return (SECTIONS.index(row.kind), row.family.lower(), row.parameters or 0, row.name, published, key)

    return [
        (labels[key], newest[key], [cells[key].get(h.task) for h in HEADINGS])
        for key in sorted(cells, key=order)
    ]


def _marks(row: Record, cells: Sequence[Record | None]) -> str:
    present = [cell for cell in cells if cell is not None]
    marks = UNTRAINED if not row.tokenizer.trained else ""
    marks += INCOMPLETE if any(not cell.complete for cell in present) else ""
    return marks + (PUBLISHED if row.origin == "paper" else "")


def _ranks(rows: Sequence[tuple[str, Record, list[Record | None]]], index: int) -> dict[int, str]:
    """Row -> LaTeX command for best and second-best of one heading, among complete measured rows."""
    heading, values, higher = HEADINGS[index], {}, True
    for number, (_, row, cells) in enumerate(rows):
        cell = cells[index]
        if cell is None or heading.metric not in cell.metrics or row.origin == "paper":
            continue
        if cell.complete and row.tokenizer.kind != "reference":
            metric = cell.metrics[heading.metric]
            values[number] = float(format_number(metric.value, heading.decimals))
            higher = metric.higher_is_better
    if len(values) < 2:
        return {}
    best = sorted(set(values.values()), reverse=higher)[:2]
    commands = dict(zip(best, ("\\textbf", "\\underline"), strict=False))
    return {number: commands[value] for number, value in values.items() if value in commands}


def to_paper_latex(records: Iterable[Record], *, label: str = "tab:comit-bench-paper") -> str | None:
    r"""One booktabs table with the columns of the paper's Table 4; None when no record has a place in it.

    Args:
        records: Measured and published ones.
        label: For ``\ref``.
    """
    rows = paper_rows(records)
    if not rows:
        return None
    ranks = [_ranks(rows, index) for index in range(len(HEADINGS))]
    lines, used, section = [], "", None
    for number, (name, row, cells) in enumerate(rows):
        if section is not None and section != row.tokenizer.kind:
            lines.append("\\midrule")
        section = row.tokenizer.kind
        marks = _marks(row, cells)
        used += marks
        details = [row.tokenizer.message_length, row.tokenizer.vocab_size]
        texts = [name + marks, short_count(row.tokenizer.parameters)]
        texts += [DASH if value is None else str(value) for value in details]
        shown = [tex_escape(text) for text in texts]
        for index, (heading, cell) in enumerate(zip(HEADINGS, cells, strict=True)):
            if cell is None or heading.metric not in cell.metrics:
                shown.append(tex_escape(DASH))
                continue
            text = format_number(cell.metrics[heading.metric].value, heading.decimals)
            command = ranks[index].get(number)
            shown.append(f"{command}{{{text}}}" if command else text)
        lines.append(" & ".join(shown) + " \\\\")
    arrows = {"rFID": "\u2193"}
    titles = [f"{h.title} {arrows.get(h.title, chr(0x2191))}" for h in HEADINGS]
    head = " & ".join(tex_escape(text) for text in ("Tokenizer", *DETAILS, *titles))
    notes = [f"{tex_escape(mark)}\\,{tex_escape(MARKS[mark])}" for mark in MARKS if mark in used]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}[t]",
            "\\centering",
            "\\caption{Reconstruction and semantic probes. Best measured value bold, second underlined.}",
            f"\\label{{{label}}}",
            "\\small",
            f"\\begin{{tabular}}{{l{'r' * (len(DETAILS) + len(HEADINGS))}}}",
            "\\toprule",
            head + " \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
            *(["", "\\smallskip", "{\\footnotesize " + " \\\\\n".join(notes) + "\\par}"] if notes else []),
            "\\end{table}",
            "",
        ]
    )
