"""Tables as files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from comit_bench.files import write_atomic
from comit_bench.results.records import Record
from comit_bench.results.render.paper import PAPER_FILE, to_paper_latex
from comit_bench.results.render.text import to_csv, to_latex, to_markdown
from comit_bench.results.table import Table


def write_tables(table: Table, directory: Path, records: Iterable[Record] = (), **marks: Any) -> list[Path]:
    """Write ``table.csv``, ``table.md`` and ``table.tex``, each whole or not at all.

    When ``records`` have numbers of the paper's tables, ``table-paper.tex`` has those in its layout, with the
    ``outcomes`` and ``marks`` given as for :func:`~comit_bench.results.table.build_table`.

    Returns:
        The paths.

    Raises:
        BenchError: Disk full or not writable.
    """
    contents = {"table.csv": to_csv, "table.md": to_markdown, "table.tex": to_latex}
    texts = {directory / name: render(table) for name, render in contents.items()}
    paper = to_paper_latex(records, **marks)
    if paper is not None:
        texts[directory / PAPER_FILE] = paper
    for path, text in texts.items():
        write_atomic(path, text)
    return list(texts)
