"""Figure ``sweeps``: reconstruction against solver evaluations, guidance, policy and message size.

Reads records and nothing else. Curves (a) and (b) are those of the paper's Figure 5; the last panel is
the bottleneck: quality against the bits of a message, a point per tokenizer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comit_bench.errors import MissingError
from comit_bench.figures.about import NOTHING, About, chance_lines, describe_records, row_name
from comit_bench.figures.style import COLOURS, COLUMN, FULL, MARKERS, keep_near, literal, new_figure, styled
from comit_bench.files import digest_json
from comit_bench.results.records import Record

DISTANCES = {"rfid": "rFID", "fd_scenes_teacher": "FD (scenes-teacher)"}
KIND = "reconstruction"
AXES = {
    "steps": "function evaluations (NFE)",
    "guidance": "guidance weight",
    "policy": "cropping policy",
    "bits": "bits per message",
}


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One tokenizer along one axis.

    Attributes:
        label: Its name, with what else stays fixed and differs from other curves.
        x: float64 [p], ascending; positions in ``Panel.ticks`` where the axis has words.
        distance: float64 [p] Fréchet distance, NaN where it was not measured.
        psnr: float64 [p] in dB.
        psnr_error: float64 [p], standard error over images; NaN where unknown.
        names: Tokenizers, one per point, where the points are not of one tokenizer; else empty.
    """

    label: str
    x: NDArray[np.float64]
    distance: NDArray[np.float64]
    psnr: NDArray[np.float64]
    psnr_error: NDArray[np.float64]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """All curves along one axis; ``ticks`` are the words of an axis without numbers."""

    axis: str
    curves: tuple[Curve, ...]
    ticks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Sweeps:
    """The sweeps of one column of the table: one task under one protocol.

    Attributes:
        task: Name of the task.
        column: What its protocol says for headers, e.g. ``32 px, 500 images``.
        metric: Name of the Fréchet distance, or empty when there is none.
        panels: One per axis along which there are at least two points.
        about: Words around the figure.
    """

    task: str
    column: str
    metric: str
    panels: tuple[Panel, ...]
    about: About = NOTHING


def compute(records: Sequence[Record]) -> list[Sweeps]:
    """Find the sweeps among records, column by column.

    A curve holds what differs in nothing but the axis: same weights, policy, options and other decoder
    settings. A curve needs two points.

    Args:
        records: Of any tasks; only measured records of kind ``reconstruction`` count, the newest of each.
    """
    columns: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.created):
        if record.task.kind == KIND and record.origin != "paper":
            columns[digest_json([record.task.name, record.task.version, record.task_protocol])].append(record)
    if not columns:
        raise MissingError(
            "there are no records of a reconstruction task here. "
            "Make some: comit-bench sweep --steps 1,2,5,10,25"
        )
    made = {digest: _sweeps(members) for digest, members in columns.items()}
    found = _told_apart({digest: sweeps for digest, sweeps in made.items() if sweeps.panels})
    if not found:
        raise MissingError(
            "no two records differ in steps, guidance, policy or tokenizer alone, so there is nothing to "
            "draw. Make a sweep: comit-bench sweep --steps 1,2,5,10,25"
        )
    return sorted(found, key=lambda sweeps: (sweeps.task, sweeps.column))


def _told_apart(several: dict[str, Sweeps]) -> list[Sweeps]:
    """Columns of one task that are called alike get a part of their digest into the file name."""

    def name(sweeps: Sweeps) -> tuple[Any, ...]:
        return sweeps.task, sweeps.column, sweeps.about.file_parts

    names = [name(sweeps) for sweeps in several.values()]
    return [
        replace(one, about=replace(one.about, file_parts=(*one.about.file_parts, digest[7:15])))
        if names.count(name(one)) > 1
        else one
        for digest, one in several.items()
    ]


def _sweeps(records: list[Record]) -> Sweeps:
    newest = {digest_json([r.tokenizer.name, r.tokenizer.weights, r.tokenizer_protocol]): r for r in records}
    chosen = list(newest.values())
    metric = next((name for name in DISTANCES if any(name in r.metrics for r in chosen)), "")
    panels = [_along(chosen, axis, metric) for axis in ("steps", "guidance", "policy")]
    panels.append(_bottleneck(chosen, metric))
    last = chosen[-1]
    return Sweeps(
        last.task.name,
        _column(last),
        metric,
        tuple(panel for panel in panels if panel.curves),
        _about(chosen, metric),
    )


def _about(records: list[Record], metric: str) -> About:
    """What readers must know about the points: whose they are, of what, and what a flat colour would give."""
    limits = sorted({str(record.limit) for record in records if not record.complete and record.limit})
    task = records[-1].task
    lines = [", ".join(part for part in (f"{task.name} v{task.version}", _column(records[-1])) if part)]
    called = {metric: DISTANCES.get(metric, ""), "psnr": "PSNR"}
    lines += chance_lines(
        records, {name: f"{what} of one flat colour: {{}}" for name, what in called.items()}
    )
    lines.append("bars: standard error of PSNR over images and seeds")
    told = f" (--limit {', '.join(limits)})" if limits else ""
    return describe_records(records, (_same_for_all(records), "; ".join(lines)), told=told)


def _same_for_all(records: list[Record]) -> str:
    """Tokenizers, and the settings in which they do not differ."""
    told = [", ".join(sorted({record.tokenizer.name for record in records}))]
    policies = {record.tokenizer_protocol.get("policy") for record in records}
    told += [f"policy {policy}" for policy in policies if policy is not None and len(policies) == 1]
    for axis in ("steps", "guidance"):
        values = {record.decoder_setting(axis) for record in records}
        told += [f"{axis} {value:g}" for value in values if value is not None and len(values) == 1]
    return ", ".join(told)


def _column(record: Record) -> str:
    return str(record.protocol.get("column", ""))


def evaluations(record: Record) -> float | None:
    """Evaluations of the velocity per image: two per step of a midpoint solver; guidance doubles nothing."""
    steps = record.decoder_setting("steps")
    side: Any = record.tokenizer_protocol.get("decode") or {}
    return None if steps is None else steps * (2 if side.get("solver") == "midpoint" else 1)


def _side(record: Record, *without: str) -> dict[str, Any]:
    """The tokenizer's side of a protocol in which some settings do not count."""
    side: dict[str, Any] = {k: v for k, v in record.tokenizer_protocol.items() if k not in without}
    for part in ("decode", "options"):
        if isinstance(side.get(part), dict):
            side[part] = {k: v for k, v in side[part].items() if k not in (*without, "default")}
    return side


def _along(records: list[Record], axis: str, metric: str) -> Panel:
    place: Callable[[Record], Any] = {
        "steps": evaluations,
        "guidance": lambda record: record.decoder_setting("guidance"),
        "policy": lambda record: record.tokenizer_protocol.get("policy"),
    }[axis]
    groups: dict[str, dict[Any, Record]] = defaultdict(dict)
    for record in records:
        if (x := place(record)) is not None:
            row = record.tokenizer
            groups[digest_json([row.name, row.weights, _side(record, axis)])][x] = record
    curves = [points for points in groups.values() if len(points) > 1]
    ticks = tuple(sorted({x for points in curves for x in points})) if axis == "policy" else ()
    labels = _labels([next(iter(points.values())) for points in curves], axis)
    made = []
    for label, points in zip(labels, curves, strict=True):
        numbered = {float(ticks.index(x)) if ticks else float(x): record for x, record in points.items()}
        made.append(_curve(label, sorted(numbered.items()), metric))
    return Panel(axis, tuple(sorted(made, key=lambda curve: curve.label)), ticks)


def _labels(records: list[Record], axis: str) -> list[str]:
    """Names, untrained ones marked; where one name has several curves, what stays fixed along each."""
    names = [row_name(record) for record in records]
    labels = []
    for record, name in zip(records, names, strict=True):
        parts = []
        if names.count(name) > 1:
            policy = record.tokenizer_protocol.get("policy")
            parts += [str(policy)] if axis != "policy" and policy is not None else []
            for other in ("steps", "guidance"):
                value = record.decoder_setting(other)
                parts += [f"{other} {value:g}"] if other != axis and value is not None else []
        labels.append(f"{name} ({', '.join(parts)})" if parts else name)
    return labels


def _bottleneck(records: list[Record], metric: str) -> Panel:
    """A point per tokenizer at its own decoder settings; of several policies the one measured first."""
    points: dict[tuple[float, str], Record] = {}
    for record in records:
        row = record.tokenizer
        decode: Any = record.tokenizer_protocol.get("decode")
        plain = decode is None or decode.get("default", True)
        if plain and row.message_length and row.vocab_size and row.kind != "reference":
            points.setdefault((row.message_length * math.log2(row.vocab_size), row_name(record)), record)
    if len({bits for bits, _ in points}) < 2:
        return Panel("bits", ())
    ordered = sorted(points.items())
    curve = _curve("", [(bits, record) for (bits, _), record in ordered], metric)
    return Panel("bits", (replace(curve, names=tuple(name for (_, name), _ in ordered)),))


def _curve(label: str, points: Sequence[tuple[float, Record]], metric: str) -> Curve:
    """Points in order of their x; NaN where there is no number."""
    values = []
    for x, record in points:
        distance, psnr = record.metrics.get(metric), record.metrics.get("psnr")
        values.append((x, distance and distance.value, psnr and psnr.value, psnr and psnr.stderr))
    return Curve(label, *np.array(values, dtype=np.float64).T)


@styled
def draw(data: Sweeps) -> Figure:
    """A column of two panels per axis: Fréchet distance above, PSNR below, with its standard error."""
    rows = (["distance"] if data.metric else []) + ["psnr"]
    columns = len(data.panels)
    figure = new_figure(COLUMN if columns == 1 else FULL, 0.5 + 1.55 * len(rows), layout="constrained")
    grid: Any = figure.subplots(len(rows), columns, sharex="col", squeeze=False)
    names = {
        name for panel in data.panels for curve in panel.curves for name in curve.names or (curve.label,)
    }
    looks = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(sorted(names))
    }
    for column, panel in enumerate(data.panels):
        for row, name in enumerate(rows):
            _panel(grid[row, column], panel, name, looks)
        grid[-1, column].set_xlabel(AXES[panel.axis])
        if columns > 1:
            grid[0, column].set_title(f"({'abcd'[column]})", loc="left")
    for row, name in enumerate(rows):
        better = "↓" if name == "distance" else "↑"
        grid[row, 0].set_ylabel(f"{DISTANCES[data.metric] if name == 'distance' else 'PSNR in dB'} {better}")
    drawn: dict[str, Any] = {}
    for line in (line for axes in grid.flat for line in axes.lines):
        drawn.setdefault(str(line.get_label()), line)  # the first: a curve rather than a lone point
    lines = [drawn[name] for name in looks]
    figure.legend(
        lines,
        [literal(name) for name in looks],
        loc="outside upper center",
        ncols=min(4 if columns > 1 else 2, len(looks)),
    )
    return figure


def _panel(axes: Axes, panel: Panel, name: str, looks: dict[str, tuple[str, str]]) -> None:
    for curve in panel.curves:
        y = curve.distance if name == "distance" else curve.psnr
        if panel.axis == "bits":
            for x, value, point in zip(curve.x, y, curve.names, strict=True):
                colour, marker = looks[point]
                axes.plot(x, value, linestyle="", marker=marker, color=colour, label=point)
            keep_near(axes, curve.x.tolist())
            continue
        colour, marker = looks[curve.label]
        line = "" if panel.ticks else "-"
        axes.plot(curve.x, y, color=colour, marker=marker, label=curve.label, linestyle=line)
        if name == "psnr" and np.isfinite(curve.psnr_error).all():
            axes.errorbar(curve.x, y, curve.psnr_error, color=colour, fmt="none", elinewidth=0.8)
    if panel.axis == "steps":
        _log_axis(axes, sorted({float(x) for curve in panel.curves for x in curve.x}))
    if panel.ticks:
        words = [literal(tick) for tick in panel.ticks]
        axes.set_xticks(range(len(words)), words, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)


def _log_axis(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis that is labelled at the values that were measured."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)
