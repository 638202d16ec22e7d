"""Figure ``gather`` (the paper's Figures 3, 4 and 10 in numbers): what a message gains with each crop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UnsupportedOperation
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import BATCH, Images, progress, psnr_of_flat
from comit_bench.figures.style import (
    BLACK,
    BLUE,
    MARKERS,
    VERMILION,
    decibels,
    gallery,
    styled,
)
from comit_bench.metrics.similarity import psnr
from comit_bench.tasks.gather import CROPS, decoded, steps_of
from comit_bench.tasks.objectness import derangement
from comit_bench.tokenizers.base import CropStep, Gathers, Tokenizer, gathers

SHOWN = (("random", 1), ("random", 3), ("random", 5), ("random", 9), ("global+random", 1))
Z95 = 1.96  # standard errors on either side of a mean
FRAMED = 5  # crops from which on their frames would hide the picture
ROOM = 2.35  # inches of the curves
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Gathering:
    """PSNR of ``m`` images after every crop, and pictures of ``n`` of them.

    Attributes:
        names: Ids of the images that are shown [n].
        images: uint8 [n, 3, S, S].
        boxes: int64 [9, n, 3], (left, top, side) of the local crops in pixels, in their order.
        pictures: uint8 [P, n, 3, S, S], one-step reconstructions of the messages of ``SHOWN``.
        picture_psnr: float64 [P, n] in dB.
        psnr: ``random`` float64 [9, m] and ``global+random`` [10, m] in dB.
        null: The same where all crops but the first are of another image; empty with one image.
        flat: float64 [m] in dB, of every image's mean colour.
        about: Words around the figure.
    """

    names: tuple[str, ...]
    images: NDArray[np.uint8]
    boxes: NDArray[np.int64]
    pictures: NDArray[np.uint8]
    picture_psnr: Floats
    psnr: dict[str, Floats]
    null: dict[str, Floats]
    flat: Floats
    about: About = NOTHING


def compute(tokenizer: Tokenizer, inputs: Images, *, count: int = 4, seed: int = 0) -> Gathering:
    """Follow messages crop by crop, as the task ``gather`` does.

    Args:
        tokenizer: Its message grows crop by crop.
        inputs: All are measured.
        count: So many are shown, spread evenly over their order: neighbours may be of one class.
        seed: Of orders and noise.
    """
    if not gathers(tokenizer):
        raise UnsupportedOperation(
            f"{tokenizer.info.name} does not build its message crop by crop, which figure 'gather' shows: "
            "take a tokenizer of the COMiT family, e.g. --tokenizer comit-nano"
        )
    images, names = inputs.images, inputs.names
    shown = np.linspace(0, len(inputs) - 1, min(count, len(inputs))).round().astype(np.int64)
    passes = sum(CROPS.values()) * (2 if len(inputs) > 1 else 1)
    advance = progress.get()(f"{tokenizer.info.name}: crop by crop", passes * len(inputs), "looks")

    def follow(row: str, later: Tensor | None = None) -> tuple[list[CropStep], Tensor]:
        steps = steps_of(tokenizer, images, names, row, seed=seed, batch_size=BATCH, later=later)
        return steps, torch.stack([_seen(tokenizer, step, names, seed, advance) for step in steps])

    def quality(seen: Tensor) -> Floats:
        return np.stack([psnr(images, one).numpy() for one in seen])

    own = {row: follow(row) for row in CROPS}
    null = {}
    if len(inputs) > 1:
        null = {row: quality(follow(row, images[derangement(names, 0, 0)])[1]) for row in CROPS}
    measured = {row: quality(seen) for row, (_, seen) in own.items()}
    boxes = torch.stack([step.boxes for step in own["random"][0]])
    return Gathering(
        tuple(names[row] for row in shown),
        images[shown].numpy(),
        boxes[:, shown].cpu().numpy(),
        np.stack([own[row][1][crops - 1, shown].numpy() for row, crops in SHOWN]),
        np.stack([measured[row][crops - 1, shown] for row, crops in SHOWN]),
        measured,
        null,
        psnr_of_flat(images).numpy(),
        _about(tokenizer, inputs),
    )


def _seen(
    tokenizer: Gathers, step: CropStep, names: Sequence[str], seed: int, advance: Callable[[int], None]
) -> Tensor:
    images = decoded(tokenizer, step.tokens, names, seed=seed, batch_size=BATCH).cpu()
    advance(len(names))
    return images


def _about(tokenizer: Gathers, inputs: Images) -> About:
    """The crops are what is shown, so no policy is named."""
    said = describe(tokenizer, inputs)
    first = said.lines[0].replace(f", policy {tokenizer.policy(None)}", "")
    said = replace(said, lines=(first, *said.lines[1:]))
    return said.plus(
        "one step: one Euler step without guidance. Bars: 95 % intervals over the images, each with an order "
        "of its own. Dashed lines: all crops but the first are of another image; what a line has above its "
        "dashed one is read from the crops. Mean colour: every image painted in its own"
    )


@styled
def draw(data: Gathering) -> Figure:
    """Left PSNR by number of crops; right a row per image: its crops, and what is known after some."""
    rows = [[data.images[i], data.images[i], *data.pictures[:, i]] for i in range(len(data.names))]
    captions = [["", "", *(decibels(value) for value in data.picture_psnr[:, i])] for i in range(len(rows))]
    heads = ["original", "order of crops"]
    heads += ["whole image" if row != "random" else _crops(count) for row, count in SHOWN]
    figure, axes = gallery(rows, column_labels=heads, captions=captions, room=ROOM, least=ROOM * 0.95)
    for i in range(len(rows)):
        _order(axes[i][1], data.boxes[:, i])
        for column, (row, crops) in enumerate(SHOWN, start=2):
            if row == "random" and crops < FRAMED:
                _frames(axes[i][column], data.boxes[:crops, i], linestyle=(0, (3, 2)))
    _curves(figure, data)
    return figure


def _crops(count: int) -> str:
    return f"{count} crop" + "s" * (count > 1)


def _order(axes: Axes, boxes: NDArray[np.int64]) -> None:
    """Frames of all crops on the darkened image, and in each its place in the order."""
    shown = axes.images[0].get_array()
    assert shown is not None
    axes.images[0].set_alpha(0.55)
    axes.set_facecolor(BLACK)
    _frames(axes, boxes)
    for place, (left, top, side) in enumerate(boxes.tolist(), start=1):
        text = axes.text(
            left + side / 2 - 0.5, top + side / 2 - 0.5, str(place), ha="center", va="center", fontsize=5.5,
            color="white", weight="bold",
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=1.2, foreground="black"), Normal()])


def _frames(axes: Axes, boxes: NDArray[np.int64], **line: Any) -> None:
    for left, top, side in boxes.tolist():
        corner = (left - 0.5, top - 0.5)
        look: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5, "alpha": 0.8, **line}
        axes.add_patch(Rectangle(corner, side, side, fill=False, **look))


def _curves(figure: Figure, data: Gathering) -> None:
    """PSNR by the number of local crops, in the room left of the pictures."""
    width, height = figure.get_size_inches()
    left, below, above = 0.42, 0.36, 0.62
    box = (left / width, below / height, (ROOM - left - 0.2) / width, (height - below - above) / height)
    axes = figure.add_axes(box)
    looks: dict[str, Any] = {"elinewidth": 0.6, "capsize": 1.5, "capthick": 0.6}
    for number, (row, colour, label) in enumerate(
        (("global+random", VERMILION, "whole image, then crops"), ("random", BLUE, "crops alone"))
    ):
        first = CROPS["random"] - CROPS[row] + 1  # the whole image is no local crop
        for values, style in ((data.psnr[row], "-"), (data.null.get(row), (0, (3, 2)))):
            if values is None:
                continue
            count = values.shape[1]
            error = Z95 * values.std(axis=1, ddof=1) / np.sqrt(count) if count > 1 else None
            own = style == "-"
            axes.errorbar(
                np.arange(len(values)) + first, values.mean(axis=1), error if own else None, color=colour,
                linestyle=style, marker=MARKERS[number] if own else None, label=label if own else None,
                alpha=1.0 if own else 0.8, **looks,
            )  # fmt: skip
    if data.null:
        axes.plot([], [], color="#555555", linestyle=(0, (3, 2)), label="later crops of another image")
    flat = float(data.flat.mean())
    if np.isfinite(flat):
        axes.axhline(flat, color=BLACK, linestyle=":", linewidth=0.8, label="mean colour")
    axes.set(xlabel="local crops", ylabel="PSNR, one step (dB)", xticks=[0, 1, 3, 5, 7, 9])
    lines, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda i: isinstance(lines[i], Line2D))  # curves first
    axes.legend(
        [lines[i] for i in order], [labels[i] for i in order],
        loc="lower left", bbox_to_anchor=(-0.2, 1.0), handlelength=1.8, labelspacing=0.2, borderaxespad=0.2,
    )  # fmt: skip
