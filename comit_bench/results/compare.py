"""Is one row better than another? Paired tests between rows, from the outcomes kept beside their records.

Two rows are compared image by image, under one protocol and on the same images, so that what makes an image
difficult for both cancels. Interval and p of the mean difference are those of
:func:`comit_bench.metrics.statistics.difference`: images (or clusters of images) are one level, probe seeds
the other. They are analytic and no bootstrap: one over images and three seeds draws one of the seeds thrice
every ninth time, and its intervals are too short. Over images alone the two agree (tests check both). Where
outcomes are 0 or 1 and no images are clustered, McNemar's exact test stands beside it.

All comparisons of one call are corrected together, after Holm. ``smallest`` is the true difference that one
such test, alone, finds in 80 of 100 cases: what is smaller would mostly go unnoticed.

Trainings of one recipe (rows that declare one ``group``) can be compared as one row. Its units are then the
trainings, each the mean over its probe seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from comit_bench.errors import BenchError, MissingError, UsageError, did_you_mean
from comit_bench.metrics.statistics import LEVEL, difference, holm, mcnemar
from comit_bench.recipes.specs import find_tasks, kinds, recipe_root
from comit_bench.results.notation import UNTRAINED, decimals_for, format_number
from comit_bench.results.outcomes import AGAIN, OutcomeFiles, Outcomes, scale
from comit_bench.results.paired import Pair, Side, pair, side_of
from comit_bench.results.records import load_records
from comit_bench.results.rows import (
    column_digest,
    newest_records,
    record_order,
    row_key,
    row_labels,
    task_side,
)
from comit_bench.results.schema import Record
from comit_bench.results.trainings import ReadOutcomes, is_joined, join_trainings

FIRST_OUTCOMES = 3  # the schema of records that first had outcomes


@dataclass(frozen=True, slots=True)
class PairedTest:
    """One metric of one task between two rows; numbers in ``unit``, shares in percent.

    Attributes:
        version: Of the task.
        main: Whether the metric is the task's main one.
        ranked: False for metrics that must not be ranked by: one row is then higher, not better.
        value_a: Mean of row ``a`` over the images compared.
        difference: ``value_a - value_b``, with the ends ``low`` and ``high`` of its 95 % interval.
        p: Two-sided, of this comparison alone.
        corrected: The same after Holm's correction over all comparisons of the call.
        mcnemar: McNemar's exact p, uncorrected; None unless outcomes are 0 or 1 and no images clustered.
        smallest: The true difference that this test alone finds in 80 of 100 cases.
        clusters: Groups of images that stand or fall together; None when every image is its own.
        left_out: Images for which only one of the rows has a value.
        units_a: What was drawn for row ``a`` beside images, e.g. ``3 probe seeds``.
        identical: Whether the rows are equal on every image.
    """

    task: str
    version: int
    metric: str
    main: bool
    unit: str
    higher_is_better: bool
    ranked: bool
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    stderr: float
    p: float
    corrected: float
    mcnemar: float | None
    smallest: float
    images: int
    clusters: int | None
    left_out: int
    units_a: str
    units_b: str
    identical: bool

    @property
    def significant(self) -> bool:
        """At the level .05, after correction."""
        return not self.identical and self.corrected <= LEVEL

    @property
    def sentence(self) -> str:
        """The result in words."""
        where = f"on {self.task}" + ("" if self.main else f" ({self.metric})")
        if self.identical:
            return f"{self.a} and {self.b} are identical on every image {where}."
        unit = {"%": " points"}.get(self.unit, f" {self.unit}" if self.unit else "")
        decimals = decimals_for(self.unit, [self.value_a, self.value_b])

        def number(value: float) -> str:
            return format_number(value, decimals)

        sign = 1.0 if (self.difference > 0) == (self.higher_is_better or not self.ranked) else -1.0
        first, second = (self.a, self.b) if sign > 0 else (self.b, self.a)
        ends = (-self.high, -self.low) if self.difference < 0 else (self.low, self.high)
        interval = f"95 % interval {number(ends[0])} to {number(ends[1])}; corrected {p_text(self.corrected)}"
        size = number(abs(self.difference)) + unit
        if self.significant:
            word = "better" if self.ranked else "higher"
            return f"{first} is {word} than {second} {where} by {size} ({interval})."
        return (
            f"{self.a} and {self.b} cannot be told apart {where}: {size} between them ({interval}), and "
            f"differences below {number(self.smallest)}{unit} would go unnoticed."
        )


@dataclass(frozen=True, slots=True)
class Untested:
    """What could not be compared, and why; an empty ``metric`` is the whole task."""

    task: str
    metric: str
    why: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` finds.

    Attributes:
        rows: Labels, in the order given.
        tests: By task, main metric first, and pair of rows.
        untested: What the rows have and no test says anything about.
    """

    rows: tuple[str, ...]
    tests: tuple[PairedTest, ...]
    untested: tuple[Untested, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``json.dump``."""
        tests = [
            {**asdict(test), "significant": test.significant, "sentence": test.sentence}
            for test in self.tests
        ]
        return {
            "rows": list(self.rows),
            "test": "paired t over images (or clusters) and units, two-sided",
            "level": LEVEL,
            "correction": f"Holm over {len(tests)} comparisons",
            "tests": tests,
            "untested": [asdict(one) for one in self.untested],
        }


def p_text(p: float) -> str:
    """``p = .004``."""
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def compare(
    *rows: str,
    output: Path | str = "results",
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
) -> Comparison:
    """Test whether rows differ, all pairs of them.

    Args:
        *rows: Labels as tables print them, e.g. ``comit-nano (raster:9)``, or names of groups of trainings.
        output: Folder of a run. Rows that are not there are looked for among the reference records.
        tasks: Only these; default all that two of the rows have.
        metrics: Only these; default all.

    Raises:
        UsageError: Unknown or ambiguous names, or nothing that can be compared; says why.
        MissingError, CorruptFileError: Outcomes are not there, or not those of the record.
    """
    names = [name.strip() for name in rows]
    if len(names) < 2:
        raise UsageError("a comparison needs at least two rows: name them as the table prints them")
    shelf = [rows_of(load_records(folder), OutcomeFiles(folder)) for folder in folders_of(Path(output))]
    chosen = [_find(name, shelf) for name in names]
    for one, other in combinations(chosen, 2):
        if one.label == other.label and one.records == other.records:
            raise UsageError(f"{one.shown!r} is named twice: a row does not differ from itself")
    found, refused = _tests(chosen, tasks, metrics)
    corrected = holm([test.p for test in found])
    tests = tuple(replace(test, corrected=p) for test, p in zip(found, corrected, strict=True))
    return Comparison(tuple(row.shown for row in chosen), tests, tuple(dict.fromkeys(refused)))


# ------------------------------------------------------------------------------------- naming rows


@dataclass(frozen=True, slots=True)
class NamedRow:
    """A row as it can be named: its records by task, controls left out, and how their outcomes are had."""

    label: str
    name: str
    records: tuple[Record, ...]
    read: ReadOutcomes

    @property
    def shown(self) -> str:
        """As the table prints it."""
        return self.label + ("" if self.records[-1].tokenizer.trained else UNTRAINED)

    def of(self, task: str) -> list[Record]:
        """Its records of a task."""
        return [record for record in self.records if record.task.name == task]


Measured = tuple[NamedRow, Record, Outcomes]


def folders_of(output: Path) -> list[Path]:
    """Where records lie: those of a run's folder, and the reference records."""
    own = output / "records" if (output / "records").is_dir() else output
    return [own, recipe_root("results") / "reference"]


def rows_of(records: Iterable[Record], read: ReadOutcomes) -> list[NamedRow]:
    """All rows of some records, and groups of trainings, as they can be named."""
    plain = [record for record in sorted(records, key=record_order) if record.control is None]
    joined, read_joined = join_trainings(plain, read)
    rows = _rows(plain, read)
    return rows + _rows([record for record in joined if is_joined(record)], read_joined)


def _rows(records: list[Record], read: ReadOutcomes) -> list[NamedRow]:
    newest = newest_records(records, row_key)[0]
    by_key: dict[tuple[str, ...], list[Record]] = {}
    for record in newest:
        by_key.setdefault(row_key(record), []).append(record)
    labels = row_labels({key: members[-1] for key, members in by_key.items()})
    return [
        NamedRow(labels[key], _name(members[-1]), tuple(members), read)
        for key, members in sorted(by_key.items())
    ]


def _name(record: Record) -> str:
    """What a row can be called beside its label: the tokenizer's name, or that of the group."""
    tokenizer = record.tokenizer
    return tokenizer.group or "" if is_joined(record) else tokenizer.name


def _find(name: str, shelf: Sequence[Sequence[NamedRow]]) -> NamedRow:
    """The row of a name: a label, else the only row whose tokenizer or group has the name."""
    for rows in shelf:
        exact = [row for row in rows if row.shown == name] or [row for row in rows if row.label == name]
        found = exact or [row for row in rows if row.name == name and not row.label.endswith(" trainings)")]
        found = found or [row for row in rows if row.name == name]
        if len(found) > 1:
            raise UsageError(
                f"{name!r} names {len(found)} rows: {', '.join(sorted(repr(row.shown) for row in found))}. "
                "Name one of them."
            )
        if found:
            return found[0]
    known = {row.shown for rows in shelf for row in rows}
    if not known:
        raise MissingError("there are no records to compare. `comit-bench run` makes them.")
    raise UsageError(f"no row is called {name!r}.{did_you_mean(name, known)}")


@cache
def _reported_first() -> dict[str, str]:
    """Task -> what its recipe reports first; read once, since every comparison asks."""
    return {name: recipe.spec.main_metric for name, recipe in find_tasks().items()}


def main_metric(record: Record) -> str:
    """What the task's recipe reports first, else its kind, else the record."""
    kind = kinds().get(record.task.kind)
    told = [_reported_first().get(record.task.name, ""), kind.main_metric if kind else ""]
    return next((name for name in told if name in record.metrics), next(iter(record.metrics)))


# --------------------------------------------------------------------------------------- comparing


def _tests(
    rows: Sequence[NamedRow], tasks: Sequence[str] | None, metrics: Sequence[str] | None
) -> tuple[list[PairedTest], list[Untested]]:
    known = {record.task.name for row in rows for record in row.records}
    for task in tasks or ():
        if task not in known:
            raise UsageError(f"none of these rows has a record of task {task!r}.{did_you_mean(task, known)}")
    names = {name for row in rows for record in row.records for name in record.metrics}
    for metric in metrics or ():
        if metric not in names:
            raise UsageError(f"none of these rows has a metric {metric!r}.{did_you_mean(metric, names)}")
    found: list[PairedTest] = []
    refused: list[Untested] = []
    for task in tasks or sorted(known):
        for a, b in combinations(rows, 2):
            try:
                mine, theirs = _same_column(a, b, task)
                outcomes = [_outcomes(row, record) for row, record in ((a, mine), (b, theirs))]
            except UsageError as error:
                if tasks is not None:
                    raise
                refused.append(Untested(task, "", str(error)))
                continue
            for metric in _in_order(mine, theirs, metrics):
                try:
                    found.append(_test((a, mine, outcomes[0]), (b, theirs, outcomes[1]), metric))
                except UsageError as error:
                    refused.append(Untested(task, metric, str(error)))
    if not found:
        whys = dict.fromkeys(f"{one.task}{one.metric and ' ' + one.metric}: {one.why}" for one in refused)
        raise UsageError("nothing can be compared.\n" + "\n".join(whys))
    return found, refused


def _same_column(a: NamedRow, b: NamedRow, task: str) -> tuple[Record, Record]:
    """The records of two rows on a task that can be compared, complete ones first, then the newest.

    Raises:
        UsageError: There are none; names what differs.
    """
    for row in (a, b):
        if not row.of(task):
            raise UsageError(f"{row.label} has no record of it")
    theirs = {column_digest(record): record for record in b.of(task)}
    both = [(record, theirs[d]) for record in a.of(task) if (d := column_digest(record)) in theirs]
    if not both:
        raise UsageError(_unlike(a.of(task)[-1], b.of(task)[-1], a.label, b.label))
    whole = [two for two in both if two[0].complete and two[1].complete]
    if not whole:
        label, record = next((r.label, x) for r, x in zip((a, b), both[-1], strict=True) if not x.complete)
        why = (
            f"--limit {record.limit}" if record.limit else ", ".join(record.incomplete) or "part of the data"
        )
        raise UsageError(f"the record of {label} is incomplete ({why}): measure all images first")
    return max(whole, key=lambda two: (two[0].task.version, record_order(two[0])))


def _unlike(a: Record, b: Record, label_a: str, label_b: str) -> str:
    """In which way two records of a task were measured differently."""
    if a.task.version != b.task.version:
        values = [("version of the task", str(a.task.version), str(b.task.version))]
    else:
        one, other = task_side(a), task_side(b)
        keys = sorted({*one, *other})
        values = [(k, one.get(k, "none"), other.get(k, "none")) for k in keys if one.get(k) != other.get(k)]
    told = "; ".join(f"{key}: {mine} and {theirs}" for key, mine, theirs in values[:4])
    rest = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return f"{label_a} and {label_b} were measured under different protocols or data ({told}{rest})"


def _outcomes(row: NamedRow, record: Record) -> Outcomes:
    found = row.read(record)
    if found is not None:
        return found
    if record.origin == "paper":
        raise UsageError(f"the number of {row.label} is a published one: nothing is known image by image")
    if record.schema_version < FIRST_OUTCOMES:
        raise UsageError(f"the record of {row.label} is of an older version, without outcomes. {AGAIN}")
    raise UsageError(f"the record of {row.label} has no outcomes: its metrics are quantities of a whole set")


def _in_order(a: Record, b: Record, metrics: Sequence[str] | None) -> list[str]:
    """Names of metrics that both have, the main one first."""
    both = [name for name in a.metrics if name in b.metrics]
    main = main_metric(a)
    ordered = sorted(both, key=lambda name: name != main)
    return ordered if metrics is None else [name for name in metrics if name in both]


def _test(mine: Measured, theirs: Measured, metric: str) -> PairedTest:
    """One test; ``corrected`` is still p.

    Raises:
        UsageError: The metric has no outcomes, or these cannot be compared.
    """
    (a, record, _), (b, other, _) = mine, theirs
    one = record.metrics[metric]
    sides = [_side(outcomes, metric, one.unit) for _, _, outcomes in (mine, theirs)]
    two = pair(*sides)
    found = difference(two.a, two.b, two.clusters)
    values = (two.a, two.b)
    binary = two.clusters is None and all(np.isin(v / scale(one.unit), (0.0, 1.0)).all() for v in values)
    return PairedTest(
        task=record.task.name,
        version=record.task.version,
        metric=metric,
        main=metric == main_metric(record),
        unit=one.unit,
        higher_is_better=one.higher_is_better,
        ranked=not one.unranked,
        a=a.shown,
        b=b.shown,
        value_a=float(two.a.mean()),
        value_b=float(two.b.mean()),
        difference=found.value,
        low=found.low,
        high=found.high,
        stderr=found.stderr,
        p=found.p,
        corrected=found.p,
        mcnemar=mcnemar(two.a, two.b) if binary else None,
        smallest=found.smallest,
        images=two.a.shape[1],
        clusters=two.groups,
        left_out=two.left_out,
        units_a=_units(record),
        units_b=_units(other),
        identical=bool((two.a.mean(axis=0) == two.b.mean(axis=0)).all()),
    )


def _side(outcomes: Outcomes, metric: str, unit: str) -> Side:
    side = side_of(outcomes, metric, unit)
    if side is None:
        raise UsageError("untestable: a quantity of the whole set and no mean over images")
    return side


def _units(record: Record) -> str:
    count, kind = len(record.seeds), kinds().get(record.task.kind)
    probed = kind is None or kind.probed
    if is_joined(record):
        return f"{count} trainings"
    if count == 1 and not probed:
        return "no probe"
    return f"{count} {'probe ' * probed}seed{'s' * (count != 1)}"


def tests_between(rows: Sequence[NamedRow]) -> Iterator[tuple[PairedTest, Pair]]:
    """Every test of a main metric between two of some rows that can be made, uncorrected, and its values."""
    for a, b in combinations(rows, 2):
        for task in sorted({r.task.name for r in a.records} & {r.task.name for r in b.records}):
            try:
                mine, theirs = _same_column(a, b, task)
                both = (_outcomes(a, mine), _outcomes(b, theirs))
                metric = main_metric(mine)
                unit = mine.metrics[metric].unit
                values = pair(_side(both[0], metric, unit), _side(both[1], metric, unit))
                yield _test((a, mine, both[0]), (b, theirs, both[1]), metric), values
            except BenchError:
                continue
