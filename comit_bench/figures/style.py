"""How figures look: sizes of a two-column paper, colours that colour-blind readers tell apart, saving.

Figures are made with ``matplotlib.figure.Figure``, never pyplot, so nothing of the reader's session
changes. Sizes are in inches.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comit_bench.files import write_atomic
from comit_bench.metrics.similarity import PSNR_CAP

COLUMN, FULL = 3.25, 6.75
# Okabe and Ito, "Color Universal Design" (2008), in the order in which lines take them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = COLOURS
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL = "cividis"  # a colour map made for readers with and without colour blindness
FONT, SMALL = 8.0, 7.0  # points
LEAST_CELL = 0.5  # a picture of a gallery is never smaller; the page grows instead
GAP, CAPTION, BREAK = 0.05, 0.13, 0.12
LINE, MARGIN, GREY = 0.125, 0.04, "#444444"  # of the words around a figure
DPI = 300
LONGEST_STEM = 150  # characters of a file name
METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # text stays text
    "savefig.bbox": None,
    "mathtext.default": "regular",
}
P = ParamSpec("P")


@contextmanager
def _own_settings() -> Iterator[None]:
    """Our settings on top of matplotlib's defaults, whatever the reader's session has changed."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator of ``draw`` functions: the style holds inside, and the figure says what it is.

    What was drawn may have an attribute ``about`` (:class:`comit_bench.figures.about.About`): its warnings
    are written at the top of the page and its lines at the bottom.
    """

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _own_settings():
            figure = draw(*args, **kwargs)
            said = getattr(next(iter((*args, *kwargs.values())), None), "about", None)
            if said is not None:
                sign(figure, top=said.warnings, bottom=said.lines)
            return figure

    return inside


def sign(figure: Figure, *, top: Sequence[str] = (), bottom: Sequence[str] = ()) -> None:
    """Write lines above and below everything; the page grows by them and what is there keeps its size."""
    width, height = figure.get_size_inches()
    most = (width - 2 * MARGIN) * 72 / SMALL  # letters as wide as they are high
    above = [part for text in top for part in _wrapped(text, most / 0.67)]  # bold
    below = [part for text in bottom for part in _wrapped(text, most / 0.55)]
    add_top, add_bottom = ((len(lines) * LINE + 0.06) * bool(lines) for lines in (above, below))
    if figure.get_layout_engine() is not None:  # made once: it would move things again
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    whole = height + add_top + add_bottom
    for axes in figure.axes:
        box = axes.get_position(original=True)
        place = (box.x0, (box.y0 * height + add_bottom) / whole, box.width, box.height * height / whole)
        axes.set_position(place)
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((x, (y * height + add_bottom) / whole))
    for legend in figure.legends:  # they lie within the page as it was
        legend.set_bbox_to_anchor((0, add_bottom / whole, 1, height / whole), figure.transFigure)
    figure.set_size_inches(width, whole)
    for number, line in enumerate(above):
        y = 1 - (number * LINE + 0.03) / whole
        figure.text(
            MARGIN / width, y, line, ha="left", va="top", fontsize=SMALL, color=VERMILION, weight="bold"
        )
    for number, line in enumerate(below, start=1):
        y = ((len(below) - number) * LINE + 0.04) / whole
        figure.text(MARGIN / width, y, line, ha="left", va="bottom", fontsize=SMALL - 0.5, color=GREY)


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), **options)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.pdf`` and ``stem.png``, each whole or not at all; equal figures are equal bytes.

    Raises:
        BenchError: The disk is full or not writable.
    """
    written = []
    for kind in METADATA:
        target = stem.with_name(f"{stem.name}.{kind}")
        write_atomic(target, _bytes(figure, kind, DPI))
        written.append(target)
    return written


def _bytes(figure: Figure, kind: str, dpi: int) -> bytes:
    stream = io.BytesIO()
    with _own_settings():
        figure.savefig(stream, format=kind, dpi=dpi, metadata=METADATA[kind])
    return stream.getvalue()


def _wrapped(text: str, width: float) -> list[str]:
    return textwrap.wrap(literal(text), max(20, int(width)), break_on_hyphens=False)


def literal(text: str) -> str:
    """A name as matplotlib draws it as it is: two dollar signs would be the ends of a formula."""
    return text.replace("$", r"\$")


class Shown:
    """A figure as the result of a notebook cell; notebooks do not display figures made without pyplot."""

    def __init__(self, figure: Figure, dpi: int = 150) -> None:
        self.figure, self.dpi = figure, dpi

    def _repr_png_(self) -> bytes:
        return _bytes(self.figure, "png", self.dpi)


def file_stem(*parts: str) -> str:
    """A file name without suffix from a figure's name and what it shows: ``evolution-comit-nano``."""
    text = "-".join(part.strip() for part in parts if part.strip())
    stem = re.sub(r"[^\w.+@=-]+", "-", text)
    if len(stem) > LONGEST_STEM:  # what differs may stand at the end
        stem = f"{stem[: LONGEST_STEM - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return stem.strip("-.") or "figure"


def picture(image: Any) -> NDArray[np.uint8]:
    """[3, H, W] as a tokenizer gives it (tensor or array) -> [H, W, 3] as matplotlib takes it."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(image), 0, -1))


def show(axes: Axes, image: Any) -> None:
    """Put an image [3, H, W] or a map [H, W] on axes without ticks; pixels of small ones stay squares.

    None leaves the axes empty.
    """
    bare(axes)
    if image is None:
        return
    values = np.asarray(image)
    small = values.shape[-1] <= 128
    axes.imshow(
        values if values.ndim == 2 else picture(values), interpolation="nearest" if small else "antialiased"
    )


def decibels(value: float) -> str:
    """A PSNR as a caption; that of equal images is capped."""
    return "exact" if value >= PSNR_CAP else f"{value:.1f} dB"


def _fitting(texts: Sequence[str], cell: float) -> float:
    """Points at which the longest text is no wider than a picture and its gap."""
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    return min(SMALL - 0.5, (cell + GAP / 2) * 72 / (0.6 * max(longest, 1)))


def bare(axes: Axes) -> None:
    """No ticks, no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def keep_near(axes: Axes, values: Sequence[float]) -> None:
    """Limits of the x axis in which values that are nearly equal do not lie far apart."""
    if max(values) < 1.2 * min(values):
        axes.set_xlim(0.8 * min(values), 1.2 * max(values))


def gallery(
    rows: Sequence[Sequence[Any]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[Sequence[str] | None] | None = None,
    most_cell: float = 1.1,
    block: int | None = None,
    room: float = 0.0,
    least: float = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """A grid of square pictures with names at the left, names above, and numbers below pictures.

    Args:
        rows: Images [3, S, S] or maps [H, W]; None leaves a place empty.
        row_labels: One per row, wrapped when long.
        column_labels: One per column.
        captions: Per row None, or a short text of one or several lines for every picture.
        most_cell: Side of the largest picture in inches. The page grows rather than pictures below
            ``LEAST_CELL``.
        block: There is more space after every so many rows.
        room: Inches left free at the left, for something else.
        least: Height of the page in inches, at least; the pictures stand at its top.

    Returns:
        The figure and its axes, row by row.
    """
    columns = max(len(row) for row in rows)
    labels = [textwrap.fill(literal(text), 18) for text in row_labels or [""] * len(rows)]
    longest = max((len(line) for text in labels for line in text.split("\n")), default=0)
    left = room + longest * 0.62 * SMALL / 72 + GAP
    cell = min(max((FULL - left) / columns - GAP, LEAST_CELL), most_cell)
    ends = [bool(block) and (r + 1) % (block or 1) == 0 and r + 1 < len(rows) for r in range(len(rows))]
    lines = [max((text.count("\n") + 1 for text in texts or ()), default=0) for texts in captions or ()]
    below = [CAPTION * (lines[r] if lines else 0) + BREAK * end for r, end in enumerate(ends)]
    above = 0.0 if column_labels is None else 0.05 + 0.14 * max(t.count("\n") + 1 for t in column_labels)
    width = left + columns * (cell + GAP)
    height = max(above + len(rows) * (cell + GAP) + sum(below), least)
    figure = new_figure(width, height)
    small = _fitting([text for texts in captions or () for text in texts or ()], cell)
    head = _fitting(column_labels or (), cell)
    axes: list[list[Axes]] = []
    top = height - above
    for number, row in enumerate(rows):
        axes.append([])
        bottom = top - cell
        middle = (bottom + cell / 2) / height
        figure.text((left - GAP) / width, middle, labels[number], ha="right", va="center", fontsize=SMALL)
        for column, image in enumerate(row):
            x = left + column * (cell + GAP)
            axes[-1].append(figure.add_axes((x / width, bottom / height, cell / width, cell / height)))
            show(axes[-1][-1], image)
            texts = captions[number] if captions is not None else None
            if texts is not None:
                where = ((x + cell / 2) / width, (bottom - 0.02) / height)
                figure.text(*where, texts[column], ha="center", va="top", fontsize=small)
            if number == 0 and column_labels is not None:
                where = ((x + cell / 2) / width, (top + 0.04) / height)
                figure.text(*where, column_labels[column], ha="center", va="bottom", fontsize=head)
        top = bottom - GAP - below[number]
    return figure, axes
