"""The smallest difference that each task can find at its size, from the records at hand.

For every task and its main metric: the median, over all pairs of measured rows, of the true difference that
one paired test at the level .05 finds in 80 of 100 cases. Tasks of the paper that nobody has measured are
scaled from the task of the embedded suite that stands for them: the part of the variance that images (or
clusters) have shrinks with their number, the part of probe seeds stays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from comit_bench.errors import MissingError
from comit_bench.metrics.statistics import difference
from comit_bench.results.compare import NamedRow, PairedTest, folders_of, rows_of, tests_between
from comit_bench.results.notation import decimals_for, format_number
from comit_bench.results.outcomes import OutcomeFiles
from comit_bench.results.records import load_records
from comit_bench.results.render.paper import TASKS
from comit_bench.results.trainings import is_joined

# Images of the paper's report sets; of the other two tasks they are known once the data are there.
PAPER_SIZES = {"imagenet100": 5000, "objectness-cssd": 200, "reconstruction-imagenet1k": 50_000}
HEADS = ("task", "metric", "images", "clusters", "units", "pairs of rows", "median", "least", "most")


@dataclass(frozen=True, slots=True)
class Power:
    """What one test can find.

    Attributes:
        test: The test.
        images: The part of ``test.stderr`` squared that images have, or their clusters.
    """

    test: PairedTest
    images: float

    def at(self, images: int) -> float:
        """The smallest difference that would be found with another number of images."""
        whole = self.test.stderr**2
        if not whole:
            return self.test.smallest
        scaled = self.images * self.test.images / images + max(whole - self.images, 0.0)
        return self.test.smallest * math.sqrt(scaled / whole)


def power_table(output: Path) -> str:
    """Markdown, a line per task, from the records of a run's folder; if it has none, the reference records.

    Raises:
        MissingError: No two measured rows have outcomes on one task.
    """
    for folder in folders_of(output):
        if records := load_records(folder):
            return write_power(powers(rows_of(records, OutcomeFiles(folder))))
    raise MissingError("there are no records to look at. `comit-bench run` makes them.")


def powers(rows: Sequence[NamedRow]) -> dict[str, list[Power]]:
    """Task -> every test of its main metric between two measured rows that are no references."""
    measured = [
        row
        for row in rows
        if row.records[-1].tokenizer.kind != "reference" and not is_joined(row.records[-1])
    ]
    found: dict[str, list[Power]] = defaultdict(list)
    for test, two in tests_between(measured):
        if test.stderr:
            alone = difference(two.a.mean(axis=0)[None], two.b.mean(axis=0)[None], two.clusters)
            found[test.task].append(Power(test, alone.stderr**2))
    if not found:
        raise MissingError(
            "no two measured rows have outcomes on one task. `comit-bench run` makes them, with at least two "
            "tokenizers."
        )
    return dict(found)


def write_power(found: Mapping[str, Sequence[Power]]) -> str:
    """The table of :func:`powers` as Markdown."""
    lines = [HEADS, (":--", ":--", *["--:"] * (len(HEADS) - 2))]
    lines += [_line(task, found[task]) for task in sorted(found)]
    for section, (paper, _) in TASKS["paper"].items():
        stands_for = TASKS["scenes"][section][0]
        if paper not in found and paper in PAPER_SIZES and stands_for in found:
            lines.append(_line(f"{paper} (scaled from {stands_for})", found[stands_for], PAPER_SIZES[paper]))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        "The smallest true difference that one paired test at the level .05 finds in 80 of 100 cases, for "
        "the main metric of every task, in its unit: median, least and most over all pairs of rows.\n\n"
        f"{text}\n\n"
        "Scaled lines were not measured: the variance that images have is divided by how many more there "
        "are, that of probe seeds stays. Correction for several comparisons makes what can be found larger.\n"
    )


def _line(task: str, powers: Sequence[Power], images: int | None = None) -> tuple[str, ...]:
    """One task; with ``images``, scaled to their number."""
    test = powers[0].test
    values = [one.test.smallest if images is None else one.at(images) for one in powers]
    decimals = decimals_for(test.unit, values)
    unit = f" {test.unit}" if test.unit else ""
    return (
        task,
        f"{test.metric}{unit}",
        str(test.images if images is None else images),
        "" if test.clusters is None or images is not None else str(test.clusters),
        test.units_a,
        str(len(powers)),
        *(format_number(pick(values), decimals) for pick in (median, min, max)),
    )
