"""Learning curves for the model card, drawn from the CSV logs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from comit_bench.files import atomic_path
from comit_bench.train.logs import read_rows
from comit_bench.train.validation import GATHER

Panel = tuple[str, tuple[tuple[str, str, str], ...]]  # title, ((log, column, name in the legend), ...)
PANELS: tuple[Panel, ...] = (
    ("flow-matching loss", (("log", "flow", "training"), ("validation", "val_flow", "validation"))),
    (
        "PSNR (dB)",
        (
            ("validation", "psnr_one_step", "one step"),
            ("validation", "psnr_guided", "guided"),
            ("validation", "psnr_mean_colour", "mean colour"),
        ),
    ),
    ("shuffled-message gap (dB)", (("validation", "shuffled_gap", "validation"),)),
    ("perplexity of the ids", (("validation", "perplexity", "validation"),)),
    (
        "one-step PSNR by crops (dB)",
        tuple(("validation", name, policy) for name, policy in GATHER.items()),
    ),
    ("images per second", (("log", "images_per_s", "training"),)),
)


def _points(rows: Sequence[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    kept = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in kept], [value for _, value in kept]


def draw_curves(run: Path) -> Figure | None:
    """Six panels over steps from a run's ``log.csv`` and ``validation.csv``, None when both are empty."""
    logs = {name: read_rows(run / f"{name}.csv") for name in ("log", "validation")}
    if not any(logs.values()):
        return None
    figure = Figure(figsize=(12, 5.4), dpi=100, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for log, column, name in lines:
            steps, values = _points(logs[log], column)
            marker = "." if len(steps) < 30 else ""
            style = "--" if column == "psnr_mean_colour" else "-"
            axes.plot(steps, values, style, marker=marker, label=name, linewidth=1.3)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=9)
    return figure


def save_curves(run: Path, path: Path) -> bool:
    """Write :func:`draw_curves` as a PNG; False when there is nothing to draw."""
    figure = draw_curves(run)
    if figure is None:
        return False
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return True
