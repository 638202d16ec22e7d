"""Figure ``evolution`` (paper Figures 3 and 4): what a message knows after each crop, and what it misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke
from numpy.typing import NDArray

from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import Images, psnr_of_flat, require_comit
from comit_bench.figures.style import SEQUENTIAL, VERMILION, decibels, gallery, show, styled
from comit_bench.figures.tracing import boxes, trace
from comit_bench.metrics.similarity import psnr
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.comit.crops import CELLS, GLOBAL

DEFAULT_POLICY = "adaptive:6"


@dataclass(frozen=True, slots=True, eq=False)
class Evolution:
    """Messages of ``n`` images after each of ``K`` crops.

    Attributes:
        names: Ids of the images [n].
        images: uint8 [n, 3, S, S].
        cells: int64 [K, n]: 0..8 in raster order, -1 for the whole image.
        boxes: int64 [K, n, 3], (left, top, side) of every crop in pixels.
        one_step: uint8 [K, n, 3, S, S].
        errors: float32 [K, n, 3, 3], see :class:`comit_bench.figures.tracing.Trace`.
        psnr: float64 [K, n] in dB, of the one-step images.
        about: Words around the figure.
    """

    names: tuple[str, ...]
    images: NDArray[np.uint8]
    cells: NDArray[np.int64]
    boxes: NDArray[np.int64]
    one_step: NDArray[np.uint8]
    errors: NDArray[np.float32]
    psnr: NDArray[np.float64]
    about: About = NOTHING


def compute(
    tokenizer: Tokenizer, inputs: Images, *, policy: str | None = DEFAULT_POLICY, seed: int = 0
) -> Evolution:
    """Follow messages of a COMiT tokenizer crop by crop."""
    comit = require_comit(tokenizer, "evolution")
    said = describe(comit, inputs, policy=policy, default_policy=DEFAULT_POLICY)
    flat = float(psnr_of_flat(inputs.images).mean())
    found = trace(comit, inputs, policy, seed)
    return Evolution(
        inputs.names,
        inputs.images.numpy(),
        found.cells.numpy(),
        boxes(found, comit.model.spec.geometry),
        found.one_step.numpy(),
        found.errors.numpy(),
        np.stack([psnr(inputs.images, seen) for seen in found.one_step]),
        said.plus(
            "one step: one Euler step without guidance; painting images in their own mean colour has "
            f"{decibels(flat)} in the mean. Colours of the errors run from 0 to the largest of the row; a "
            "frame: the next crop"
        ),
    )


@styled
def draw(data: Evolution) -> Figure:
    """Three rows per image: the crop on the original, the one-step reconstruction, 100 x error by region.

    The latest crop has a solid frame, earlier ones a thin dashed one. A region that the policy looks at
    next has a frame in the error map.
    """
    steps, count = data.cells.shape
    rows: list[list[Any]] = []
    labels: list[str] = []
    captions: list[list[str] | None] = []
    for i in range(count):
        rows += [[data.images[i]] * steps, list(data.one_step[:, i]), [None] * steps]
        top = 100 * float(data.errors[:, i].max())
        labels += ["original", "one step", f"100 × squared error (0 to {short(top)})"]
        captions += [None, [decibels(value) for value in data.psnr[:, i]], None]
    columns = ["whole image" if (data.cells[k] == GLOBAL).all() else f"crop {k + 1}" for k in range(steps)]
    figure, axes = gallery(
        rows,
        row_labels=labels,
        column_labels=columns,
        captions=captions,
        most_cell=0.95,
        block=3,
    )
    for i in range(count):
        top = float(data.errors[:, i].max())
        for k in range(steps):
            for earlier in range(k):
                if data.cells[earlier, i] != GLOBAL:
                    _frame(axes[3 * i][k], data.boxes[earlier, i], latest=False)
            _frame(axes[3 * i][k], data.boxes[k, i], latest=True)
            following = int(data.cells[k + 1, i]) if k + 1 < steps else None
            _error_map(axes[3 * i + 2][k], data.errors[k, i], top, following)
    return figure


def _frame(axes: Axes, box: NDArray[np.int64], *, latest: bool) -> None:
    left, top, side = (int(v) for v in box)
    style: dict[str, Any] = {"linewidth": 1.4} if latest else {"linewidth": 0.6, "linestyle": (0, (3, 2))}
    patch = Rectangle(
        (left - 0.5, top - 0.5), side, side, fill=False, edgecolor="white" if not latest else VERMILION,
        joinstyle="miter", **style,
    )  # fmt: skip
    if latest:  # readable on any background
        patch.set_path_effects([withStroke(linewidth=2.2, foreground="white"), Normal()])
    axes.add_patch(patch)


def _error_map(axes: Axes, errors: NDArray[np.float32], top: float, following: int | None) -> None:
    """Regions overlap in the image; here each is one square, with its number."""
    show(axes, errors)
    axes.images[0].set(cmap=SEQUENTIAL, clim=(0.0, max(top, 1e-12)))
    side = errors.shape[0]
    bounds = axes.get_position()
    points = bounds.width * axes.figure.get_figure(root=True).get_size_inches()[0] * 72 / side
    for cell in range(CELLS):
        row, column = divmod(cell, side)
        value = float(errors[row, column])
        axes.text(
            column, row, short(100 * value), ha="center", va="center", fontsize=min(6.0, points / 2.3),
            color="white" if value < 0.55 * top else "black",
        )  # fmt: skip
    if following is not None and following != GLOBAL:
        row, column = divmod(following, side)
        axes.add_patch(
            Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, fill=False, edgecolor=VERMILION, linewidth=1.2)
        )


def short(value: float) -> str:
    """Two significant digits in little space, for a number of about 0 to 1000: ``2.1``, ``13``, ``130``."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
