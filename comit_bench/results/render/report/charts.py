"""Curves and break-downs of the report, from what records hold beside their metrics."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from comit_bench.files import digest_json
from comit_bench.results.compare import main_metric
from comit_bench.results.notation import format_number, one_line
from comit_bench.results.rows import column_digest, row_key, row_labels
from comit_bench.results.schema import Record

WIDTH, HEIGHT = 640.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 12.0, 40.0
TICKS = 5
COLOURS = 8  # of series in the style sheet
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart, in the chart's own units."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A line as SVG: ``path`` and the places of its markers."""

    label: str
    style: int
    path: str
    dots: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with everything that a template needs to draw it.

    Attributes:
        x_ticks, y_ticks: (place, text) along each axis.
        table: Rows of values, for readers who do not see the picture; the first one is the head.
    """

    title: str
    note: str
    x_title: str
    y_title: str
    lines: tuple[Drawn, ...]
    x_ticks: tuple[tuple[str, str], ...]
    y_ticks: tuple[tuple[str, str], ...]
    table: tuple[tuple[str, ...], ...]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between two ends."""
    if log:
        found = [10.0**e for e in range(math.ceil(math.log10(low) - 1e-9), int(math.log10(high) + 1e-9) + 1)]
        return found if len(found) > 1 else [low, high]
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= TICKS)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, int(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e7 else f"{value:.3g}"


def chart(
    title: str,
    note: str,
    axes: tuple[str, str],
    series: Sequence[Series],
    *,
    log: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """Draw some lines; None when there is nothing to draw.

    Args:
        title: Of the chart.
        note: Words below it.
        axes: Titles of the two axes.
        series: The lines; points that a logarithm does not have are left out.
        log: Logarithmic axes, both.
        from_zero: Whether the vertical axis starts at 0.
    """
    lines = []
    for one in series:
        points = tuple(p for p in one.points if not log or min(p) > 0)
        if points:
            lines.append(Series(one.label, points))
    every = [point for one in lines for point in one.points]
    if not every or len({x for x, _ in every}) < 2:
        return None
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*every, strict=True))
    low = min(low, 0.0) if from_zero else low
    if low == high:
        low, high = low - 0.5, high + 0.5
    turn: Callable[[float], float] = math.log10 if log else float

    def across(x: float) -> str:
        share = (turn(x) - turn(left)) / (turn(right) - turn(left))
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    def up(y: float) -> str:
        share = (turn(y) - turn(low)) / (turn(high) - turn(low))
        return f"{HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = []
    for number, one in enumerate(lines):
        places = tuple((across(x), up(y)) for x, y in one.points)
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        drawn.append(Drawn(one.label, number % COLOURS, path, places if len(places) <= 20 else ()))
    return Chart(
        *(title, note, *axes, tuple(drawn)),
        tuple((across(x), _short(x)) for x in _ticks(left, right, log)),
        tuple((up(y), _short(y)) for y in _ticks(low, high, log)),
        _as_table(axes[0], lines),
    )


def _as_table(head: str, lines: Sequence[Series]) -> tuple[tuple[str, ...], ...]:
    values = [dict(one.points) for one in lines]
    rows = [(head, *(one.label for one in lines))]
    for x in sorted({x for one in values for x in one}):
        rows.append((_short(x), *(f"{one[x]:.4g}" if x in one else "–" for one in values)))
    return tuple(rows)


def labels_of(records: Sequence[Record]) -> dict[tuple[str, ...], str]:
    """Labels as tables print them, by row."""
    return {key: one_line(text) for key, text in row_labels({row_key(r): r for r in records}).items()}


def charts(records: Sequence[Record]) -> list[Chart]:
    """Every curve that these records hold: fits, prefixes and sweeps, use of codebooks."""
    own = [record for record in records if record.origin != "paper" and record.control is None]
    labels = labels_of(own)
    found = [*_fits(own, labels), *_gathers(own, labels), *_sweeps(own), *_codebooks(own, labels)]
    return [one for one in found if one is not None]


def _numbers(value: Any) -> list[float]:
    """A list of numbers out of a record's details; empty for anything else."""
    numbers = value if isinstance(value, list) else []
    good = all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers)
    return [float(v) for v in numbers] if good else []


def _by_task(records: Sequence[Record], key: str) -> dict[str, list[tuple[Record, Any]]]:
    """Column -> the records with some detail, and that detail."""
    found: dict[str, list[tuple[Record, Any]]] = defaultdict(list)
    for record in records:
        if key in record.details:
            found[column_digest(record)].append((record, record.details[key]))
    return found


def _fits(records: Sequence[Record], labels: dict[tuple[str, ...], str]) -> Iterator[Chart | None]:
    """Score of the early-stop images by epoch, mean over the seeds that were still being fitted."""
    for members in _by_task(records, "fits").values():
        series = []
        for record, fits in members:
            curves = [_numbers(one) for one in fits.get("early_stop", [])] if isinstance(fits, dict) else []
            longest = max(map(len, curves), default=0)
            points = []
            for epoch in range(longest):
                there = [one[epoch] for one in curves if len(one) > epoch]
                points.append((epoch + 1.0, sum(there) / len(there)))
            series.append(Series(labels[row_key(record)], tuple(points)))
        task, score = members[0][0].task, members[0][1]
        name = str(score.get("score", "score")) if isinstance(score, dict) else "score"
        yield chart(
            f"Fits of probes: {one_line(task.title)}",
            "Score on the early-stop images after each epoch, mean over the fits that are still going on. "
            "These images are held out of the training split; no reported number is from them.",
            ("epoch", f"{one_line(name)} %"),
            series,
        )


def _gathers(records: Sequence[Record], labels: dict[tuple[str, ...], str]) -> Iterator[Chart | None]:
    """What a message gains with each crop, and what it gains from crops of another image."""
    for members in _by_task(records, "gather").values():
        policies: dict[str, list[Series]] = defaultdict(list)
        for record, said in members:
            curves = said.get("by_crops") if isinstance(said, dict) else None
            for policy, curve in curves.items() if isinstance(curves, dict) else ():
                for key, words in (("psnr", ""), ("null_psnr", ", later crops of another image")):
                    values = _numbers(curve.get(key)) if isinstance(curve, dict) else []
                    points = tuple((k + 1.0, value) for k, value in enumerate(values))
                    policies[policy].append(Series(labels[row_key(record)] + words, points))
        for policy, series in policies.items():
            yield chart(
                f"{one_line(members[0][0].task.title)}: crops {one_line(policy)}",
                "Quality of what the message draws after each crop, mean over images.",
                ("crops", "PSNR dB"),
                series,
            )


AXES = {
    "steps": "function evaluations of the decoder",
    "guidance": "guidance weight",
    "tokens": "tokens of the message that are kept",
}


def _sweeps(records: Sequence[Record]) -> Iterator[Chart | None]:
    """The main metric along a setting in which some records of one tokenizer differ, and in nothing else."""
    for axis, words in AXES.items():
        groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            if record.decoder_setting(axis) is not None:
                groups[column_digest(record)][_but(record, axis)].append(record)
        for lines in groups.values():
            series, last = [], next(iter(lines.values()))[0]
            name = main_metric(last)
            for members in lines.values():
                points = {
                    r.decoder_setting(axis) or 0.0: r.metrics[name].value
                    for r in members
                    if name in r.metrics
                }
                if len(points) > 1:
                    series.append(Series(one_line(members[0].tokenizer.name), tuple(sorted(points.items()))))
            unit = last.metrics[name].unit if name in last.metrics else ""
            yield chart(
                f"{one_line(last.task.title)}, by {words}",
                "A line per tokenizer; its points are records that differ in this setting alone.",
                (words, f"{one_line(name)} {unit}".strip()),
                series,
            )


def _but(record: Record, axis: str) -> str:
    """Identity of a row without one of its settings."""
    side = {
        key: {k: v for k, v in value.items() if k not in (axis, "default")}
        if isinstance(value, dict)
        else value
        for key, value in record.tokenizer_protocol.items()
        if key != "configuration"
    }
    return digest_json([record.tokenizer.name, record.tokenizer.weights, record.tokenizer.revision, side])


def _codebooks(records: Sequence[Record], labels: dict[tuple[str, ...], str]) -> Iterator[Chart | None]:
    """How often ids are used, and how much each position says."""
    for members in _by_task(records, "rank_frequency").values():
        series = []
        for record, found in members:
            ranks, counts = (
                (_numbers(found.get(k)) for k in ("rank", "count")) if isinstance(found, dict) else ([], [])
            )
            series.append(Series(labels[row_key(record)], tuple(zip(ranks, counts, strict=False))))
        yield chart(
            f"How often ids are used: {one_line(members[0][0].task.title)}",
            "Ids of the vocabulary from the most to the least frequent one; both axes are logarithmic.",
            ("rank of the id", "times used"),
            series,
            log=True,
        )
    for members in _by_task(records, "entropy_by_position").values():
        series = [
            Series(labels[row_key(record)], tuple((i + 1.0, bits) for i, bits in enumerate(_numbers(found))))
            for record, found in members
        ]
        yield chart(
            f"Bits at each position of the message: {one_line(members[0][0].task.title)}",
            "Entropy of the ids at every position, over the images of the task.",
            ("position in the message", "bits"),
            series,
            from_zero=True,
        )


# --------------------------------------------------------------------------------------- break-downs


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A small table: what a metric is by kind of question; ``lines`` are (label, texts)."""

    title: str
    note: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]


def breakdowns(records: Sequence[Record]) -> list[Breakdown]:
    """Relations by predicate, changes by edit, and how long probes were fitted."""
    own = [record for record in records if record.origin != "paper" and record.control is None]
    labels = labels_of(own)
    found = []
    for members in _by_task(own, "by_predicate").values():
        values = [(record, _predicates(said)) for record, said in members]
        note = "Percent of the triplets of each predicate for which the true one comes first."
        found.append(_breakdown(values, labels, "by predicate", note))
    for members in _by_task(own, "changed_by_edit").values():
        values = [(record, _edits(record, said)) for record, said in members]
        note = "Percent of the positions of the message that an edit of the scene changes."
        found.append(_breakdown(values, labels, "tokens that change, by edit", note))
    return [one for one in [*found, *_epochs(own, labels)] if one.lines]


def _predicates(said: Any) -> dict[str, Any]:
    """Predicate -> score."""
    parts = said.items() if isinstance(said, dict) else ()
    return {
        str(name): next((value for key, value in one.items() if key != "n"), None)
        for name, one in parts
        if isinstance(one, dict)
    }


def _edits(record: Record, said: Any) -> dict[str, Any]:
    """Edit -> share."""
    edits = record.details.get("edits")
    names = [str(edit).replace("_", " ") for edit in edits] if isinstance(edits, list) else []
    return dict(zip(names, _numbers(said), strict=False))


def _breakdown(
    members: Sequence[tuple[Record, dict[str, Any]]],
    labels: dict[tuple[str, ...], str],
    what: str,
    note: str,
) -> Breakdown:
    lines = [(labels[row_key(record)], values) for record, values in members]
    heads = list(dict.fromkeys(name for _, values in lines for name in values))

    def text(value: Any) -> str:
        return format_number(float(value), 1) if isinstance(value, int | float) else "–"

    return Breakdown(
        f"{one_line(members[0][0].task.title)}: {what}",
        note,
        tuple(map(one_line, heads)),
        tuple((label, tuple(text(values.get(head)) for head in heads)) for label, values in lines),
    )


_EPOCHS = re.compile(r"^(best_epoch|epochs_run): (\[.*\])$")


def _epochs(records: Sequence[Record], labels: dict[tuple[str, ...], str]) -> Iterator[Breakdown]:
    """How long probes were fitted: the best epoch and the last one, by seed."""
    tasks: dict[str, None] = {}
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        notes = {m[1]: re.findall(r"\d+", m[2]) for note in record.notes if (m := _EPOCHS.match(note))}
        best, run = notes.get("best_epoch", []), notes.get("epochs_run", [])
        if not best or len(best) != len(run):
            continue
        tasks[record.task.name] = None
        seeds = [f"{b}/{r}" for b, r in zip(best, run, strict=True)]
        rest = f" and {len(seeds) - 3} more" if len(seeds) > 3 else ""
        mark = " ¶" if record.unconverged else ""
        rows[labels[row_key(record)]][record.task.name] = ", ".join(seeds[:3]) + rest + mark
    if rows:
        yield Breakdown(
            "How long probes were fitted",
            "Best epoch / epochs run, one pair per fit (probe seeds, and parts of the data where there are "
            "several). A fit ends when its early-stop score has not risen for some epochs; ¶ was cut off.",
            tuple(map(one_line, tasks)),
            tuple((label, tuple(by.get(task, "–") for task in tasks)) for label, by in rows.items()),
        )
