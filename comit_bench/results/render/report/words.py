"""What the records say, in sentences: what was measured, and what is significantly better than what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from comit_bench.metrics.statistics import holm
from comit_bench.results.compare import PairedTest, rows_of, tests_between
from comit_bench.results.notation import one_line
from comit_bench.results.render.report.views import Line, Section, distinct
from comit_bench.results.schema import Record
from comit_bench.results.trainings import ReadOutcomes, is_joined


def pairwise(records: Sequence[Record], read: ReadOutcomes) -> dict[str, list[PairedTest]]:
    """Task -> tests of its main metric between all measured rows that are no reference.

    Those of one task are corrected together, after Holm, as the marks of a table's column are.
    """
    rows = [
        row
        for row in rows_of([record for record in records if record.origin != "paper"], read)
        if row.records[-1].tokenizer.kind != "reference" and not is_joined(row.records[-1])
    ]
    found: dict[str, list[PairedTest]] = defaultdict(list)
    for test, _ in tests_between(rows):
        found[test.task].append(test)
    return {
        task: [
            replace(test, corrected=p)
            for test, p in zip(tests, holm([test.p for test in tests]), strict=True)
        ]
        for task, tests in found.items()
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a task says about the rows.

    Attributes:
        section: Of the task.
        best: Rows that are not significantly worse than the best; empty where nothing was tested.
        worse: The others that were tested.
        untested: Rows with a number that no test says anything about.
        why: In place of ``best``, why there is none.
        unnoticed: The smallest differences that single tests find in 80 of 100 cases: ``1.4 to 2.8 points``.
    """

    section: Section
    best: tuple[Line, ...]
    worse: tuple[Line, ...]
    untested: tuple[Line, ...]
    why: str
    unnoticed: str


def verdict(section: Section, tests: Sequence[PairedTest]) -> Verdict:
    """By the marks of the section's main metric."""
    rankable = [line for line in section.ordered if line.kind in ("learned", "baseline")]
    best = tuple(line for line in rankable if line.cells[section.main].rank == "best")
    tested = {test.a for test in tests} | {test.b for test in tests}
    rest = [line for line in rankable if line not in best]
    named = {line.label + line.marks for line in rest}
    compared = bool(best) and (tested >= named or any(line.cells[section.main].rank for line in rest))
    worse = tuple(line for line in rest if compared and (line.label + line.marks) in tested)
    why = ""
    if not best:
        cell = rankable[0].cells[section.main] if rankable else None
        why = (
            "only one measured row: there is nothing to compare"
            if len(rankable) == 1
            else "no measured row"
            if cell is None
            else "nothing is known image by image, or the metric must not be ranked by"
        )
    return Verdict(
        section, best, worse, tuple(line for line in rest if line not in worse), why, _unnoticed(tests)
    )


def _unnoticed(tests: Sequence[PairedTest]) -> str:
    sizes = sorted(test.smallest for test in tests if not test.identical and test.smallest)
    if not sizes:
        return ""
    unit = {"%": " points"}.get(tests[0].unit, f" {tests[0].unit}" if tests[0].unit else "")
    decimals = 3 if sizes[-1] < 0.095 else 2 if sizes[-1] < 0.95 else 1
    ends = distinct(f"{size:.{decimals}f}" for size in (sizes[0], sizes[-1]))
    return " to ".join(ends) + unit


@dataclass(frozen=True, slots=True)
class Facts:
    """The first lines of the page, as (number, what) and sentences."""

    counts: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    when: str


def facts(records: Sequence[Record], found: Sequence[Section], lines: Sequence[Line]) -> Facts:
    """What was measured, on what."""
    own = [record for record in records if record.origin != "paper"]
    kinds = {kind: sum(line.kind == kind for line in lines) for kind in ("learned", "baseline", "reference")}
    measured = [section for section in found if not section.published]
    tasks = distinct(section.task for section in measured)
    data = distinct(record.task.dataset.name for record in own)
    published = len(records) - len(own)
    counts = [
        (str(kinds["learned"]), "learned tokenizer" + "s" * (kinds["learned"] != 1)),
        (str(kinds["baseline"]), "baseline" + "s" * (kinds["baseline"] != 1)),
        (str(kinds["reference"]), "reference row" + "s" * (kinds["reference"] != 1)),
        (str(len(tasks)), "task" + "s" * (len(tasks) != 1)),
        (str(len(own)), "measured record" + "s" * (len(own) != 1)),
    ]
    if published:
        counts.append((str(published), "published record" + "s" * (published != 1)))
    sentences = [
        f"Measured on {_listed(data)}. References bracket the others: they know labels or see pixels, "
        "and are never ranked."
        if data
        else "Nothing was measured here: all numbers are published ones."
    ]
    short = [record for record in own if not record.complete]
    if short:
        sentences.append(
            f"{len(short)} of {len(own)} records are incomplete (‡): only part of the data was used, so they "
            "are not ranked."
        )
    untrained = distinct(record.tokenizer.name for record in own if not record.tokenizer.trained)
    if untrained:
        sentences.append(f"Untrained (†), with random weights: {_listed(untrained)}.")
    times = sorted(record.created for record in own or records)
    when = ""
    if times:
        ends = distinct(time.strftime("%Y-%m-%d") for time in (times[0], times[-1]))
        when = " to ".join(ends)
    return Facts(tuple(c for c in counts if c[0] != "0"), tuple(map(one_line, sentences)), when)


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
