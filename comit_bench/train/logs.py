"""CSV logs that survive a restart: rows after the resumed step are taken back."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from comit_bench.files import write_atomic


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a log; none when it does not exist. A last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if None not in row and None not in row.values()]


class CsvLog:
    """One row per logged step; the first of ``columns`` is ``step``."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)

    def start(self, resumed: int) -> None:
        """Write the header; rows after step ``resumed`` are removed: they will be written again."""
        kept = [row for row in read_rows(self.path) if row["step"].isdigit() and int(row["step"]) <= resumed]
        write_atomic(self.path, _text(self.columns, kept if resumed else []))

    def append(self, row: Mapping[str, float | int]) -> None:
        """Write one row; floats with all their digits."""
        values = {name: repr(row[name]) for name in self.columns if name in row}
        line = _text(self.columns, [values]).split("\n", 1)[1]
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(line)
