"""Figure ``bottleneck`` (paper Figure 5 c): probe accuracy and PSNR against the size of the message.

Reads records and nothing else: one point per tokenizer, at its own decoder settings and the global crop.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comit_bench.errors import MissingError
from comit_bench.figures.about import NOTHING, About, chance_lines, describe_records, row_name
from comit_bench.figures.style import (
    COLOURS,
    FULL,
    MARKERS,
    SMALL,
    bare,
    keep_near,
    literal,
    new_figure,
    styled,
)
from comit_bench.files import digest_json
from comit_bench.results.records import Metric, Record

KINDS = {"classification": "top1", "reconstruction": "psnr"}  # kind of task -> metric
CHANCES = {"top1": "accuracy of guessing: {} %", "psnr": "PSNR of one flat colour: {} dB"}


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One tokenizer. ``bits`` of a message are K log2 V; a metric that was not measured is None."""

    name: str
    tokens: int
    vocabulary: int
    accuracy: Metric | None
    psnr: Metric | None

    @property
    def bits(self) -> float:
        return self.tokens * math.log2(self.vocabulary)


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """Points in order of their bits; ``columns`` say what was measured, for accuracy and PSNR."""

    points: tuple[Point, ...]
    columns: tuple[str, str]
    about: About = NOTHING


def compute(records: Sequence[Record]) -> Bottleneck:
    """Find the tokenizers whose messages can be compared.

    Of several protocols of a kind of task the one with most tokenizers counts, of equals the newest; numbers
    of two protocols are never in one panel.

    Args:
        records: Of any tasks, measured ones count.
    """
    found = {kind: _of_one_protocol(kind, records) for kind in KINDS}
    members = {key: record for column in found.values() for key, record in column.items()}
    points = [
        Point(
            row_name(record),
            record.tokenizer.message_length or 0,
            record.tokenizer.vocab_size or 0,
            *(
                found[kind][key].metrics.get(metric) if key in found[kind] else None
                for kind, metric in KINDS.items()
            ),
        )
        for key, record in members.items()
    ]
    if len(points) < 2:
        raise MissingError(
            "there are no two tokenizers with records of a classification or reconstruction task here. Make "
            "some: comit-bench paper --only figure-5c"
        )
    points.sort(key=lambda point: (point.bits, point.name))
    columns = [next(iter(column.values()), None) for column in found.values()]
    names = [_column(record) if record else "" for record in columns]
    everything = [record for column in found.values() for record in column.values()]
    everything.sort(key=lambda record: record.tokenizer.name)
    lines = [
        "bits of a message: tokens times log2 of the vocabulary; global crop, default decoder",
        "bars: standard deviation over probe seeds (accuracy), standard error over images and seeds (PSNR)",
        *chance_lines(everything, CHANCES),
    ]
    return Bottleneck(tuple(points), (names[0], names[1]), describe_records(everything, lines))


def _of_one_protocol(kind: str, records: Sequence[Record]) -> Mapping[str, Record]:
    """Newest record per tokenizer of the column that has most of them."""
    columns: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in sorted(records, key=lambda r: (r.created, r.to_json())):
        row, decode = record.tokenizer, record.tokenizer_protocol.get("decode")
        plain = not isinstance(decode, dict) or decode.get("default", True)
        whole = record.tokenizer_protocol.get("policy") in (None, "global")
        counts = record.task.kind == kind and record.origin != "paper" and record.control is None
        if counts and plain and whole and row.kind != "reference" and row.message_length and row.vocab_size:
            data = record.task.dataset
            side = [record.task.name, record.task.version, data.fingerprint, record.task_protocol]
            # one that is fitted on each data set has other weights in every column
            weights = "fitted" if row.weights.startswith("fitted:") else row.weights
            network = [row.name, weights, record.tokenizer_protocol.get("configuration"), row.message_length]
            columns[digest_json(side)][digest_json(network)] = record
    most = max(columns.values(), key=lambda one: (len(one), max(r.created for r in one.values())), default={})
    return most


def _column(record: Record) -> str:
    told = (f"{record.task.name} v{record.task.version}", str(record.protocol.get("column", "")))
    return ", ".join(part for part in told if part)


@styled
def draw(data: Bottleneck) -> Figure:
    """Accuracy at the left, PSNR beside it, each against the bits of a message; names at the right."""
    figure = new_figure(FULL, 2.1, layout="constrained")
    panels: Any = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    for axes, values, label, column in (
        (panels[0], [p.accuracy for p in data.points], "top-1 accuracy in %", data.columns[0]),
        (panels[1], [p.psnr for p in data.points], "PSNR in dB", data.columns[1]),
    ):
        _panel(axes, data.points, values)
        axes.set(xlabel="bits per message", ylabel=f"{label} \N{UPWARDS ARROW}")
        axes.set_title((column or "not measured").replace(", ", "\n", 1), fontsize=SMALL)
    bare(panels[2])
    panels[2].legend(*panels[0].get_legend_handles_labels(), loc="center left", borderaxespad=0)
    return figure


def _panel(axes: Axes, points: Sequence[Point], values: Sequence[Metric | None]) -> None:
    for number, (point, metric) in enumerate(zip(points, values, strict=True)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label = f"{literal(point.name)}\n{point.tokens} tokens of {point.vocabulary:,}"
        y = math.nan if metric is None else metric.value
        error = None if metric is None else metric.std if metric.unit == "%" else metric.stderr
        axes.errorbar(
            [point.bits], [y], None if error is None else [error], color=colour, marker=marker, linestyle="",
            label=label, elinewidth=0.8,
        )  # fmt: skip
    keep_near(axes, [point.bits for point in points])
