"""Figure ``counterfactual``: scenes with one thing changed, and the tokens that change with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comit_bench.errors import UsageError
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import Images, encode
from comit_bench.figures.style import BLUE, COLOURS, FULL, SMALL, bare, literal, new_figure, show, styled
from comit_bench.recipes.kinds import CounterfactualSpec
from comit_bench.seeding import seed_for
from comit_bench.tasks.changes import changed_ids, moved_codes, pair_up
from comit_bench.tasks.counterfactual import Assignment, assign
from comit_bench.tokenizers.base import Tokenizer

DATASET = "scenes-counterfactual"  # what ``scenes`` means here
ROW = 32  # most positions in one row; longer messages are shown as a square, in reading order
LEFT, GAP = 0.5, 0.06  # inches


@dataclass(frozen=True, slots=True, eq=False)
class CounterfactualFigure:
    """Some scenes with their edits, and where changes fall in all of them.

    Attributes:
        tokenizer: Its name.
        found: All that was measured; its edits are in alphabetical order.
        edits: int64 [F], the edits in the order in which they are shown.
        shown: int64 [s], scenes of ``found.pairs``.
        images: uint8 [s, 1 + F, 3, S, S], original and edits; zeros where there is no pair.
        by_id: Whether a change is an id that differs (0 or 1), else it is a distance.
        about: Words around the figure.
    """

    tokenizer: str
    found: Assignment
    edits: NDArray[np.int64]
    shown: NDArray[np.int64]
    images: NDArray[np.uint8]
    by_id: bool
    about: About = NOTHING


def compute(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    count: int = 2,
    policy: str | None = None,
    seed: int = 0,
) -> CounterfactualFigure:
    """Compare the messages of all scenes, and pick ``count`` to show; images are named ``<edit>/<scene>``."""
    if count < 1:
        raise UsageError(f"--count {count}: at least one scene is needed")
    pairs = pair_up(inputs.names)
    tokens = encode(tokenizer, inputs, policy=policy, seed=seed)
    if tokens.ids is None:
        changes = moved_codes(tokens.codes.float().numpy(), pairs)
    else:
        changes = changed_ids(tokens.ids.numpy().astype(np.int64), pairs)
    order = sorted(range(len(pairs.scenes)), key=lambda row: seed_for(seed, f"scene/{pairs.scenes[row]}"))
    shown = np.array(sorted(order[:count]), dtype=np.int64)
    edits = np.array([f for members in panels(pairs.edits).values() for f in members], dtype=np.int64)
    rows = np.concatenate([pairs.original[shown][:, None], pairs.edited[shown][:, edits]], axis=1)
    images = inputs.images.numpy()[rows]
    images[rows < 0] = 0
    return CounterfactualFigure(
        tokenizer=tokenizer.info.name,
        found=assign(pairs, changes, CounterfactualSpec()),
        edits=edits,
        shown=shown,
        images=images,
        by_id=tokens.ids is not None,
        about=describe(tokenizer, inputs, policy=policy).plus(
            "strips: one cell per position, grey 0, blue "
            + ("1: another id" if tokens.ids is not None else "1 or more: distance of the codes")
        ),
    )


def panels(edits: tuple[str, ...]) -> dict[str, list[int]]:
    """Edits by what is done: ``moved`` -> both objects; those of no object come last."""
    found: dict[str, list[int]] = {}
    for number in sorted(range(len(edits)), key=lambda f: ("_" not in edits[f], edits[f])):
        found.setdefault(edits[number].partition("_")[0], []).append(number)
    return found


@styled
def draw(data: CounterfactualFigure) -> Figure:
    """Above: images and strips of their positions, changed ones dark. Below: where changes fall, by edit."""
    scenes, columns = data.images.shape[:2]
    width, length = FULL, data.found.changes.change.shape[-1]
    cell = (width - LEFT) / columns - GAP
    strip = max(0.1, -(-length // _row(length)) * cell / _row(length))
    block, head, below, note = cell + strip + 2 * GAP, 0.34, 1.9, 0.2
    height = head + scenes * block + below + note
    figure = new_figure(width, height)
    for s in range(scenes):
        top = height - head - s * block
        for c in range(columns):
            x = LEFT + c * (cell + GAP)
            place = figure.add_axes((x / width, (top - cell) / height, cell / width, cell / height))
            bare(place)
            show(place, data.images[s, c])
            if s == 0:
                where = ((x + cell / 2) / width, (top + 0.04) / height)
                figure.text(*where, _title(data, c), ha="center", va="bottom", fontsize=SMALL - 0.5)
            if c:
                low = top - cell - 0.03 - strip
                place = figure.add_axes((x / width, low / height, cell / width, strip / height))
                _strip(place, data.found.changes.change[data.shown[s], data.edits[c - 1]])
        middle = (top - cell - 0.03 - strip / 2) / height
        figure.text(
            (LEFT + cell) / width, middle, "changed tokens", ha="right", va="center", fontsize=SMALL - 1
        )
    bottom, top = note + 0.35, note + below - 0.45
    area = {"left": (LEFT + 0.02) / width, "right": 0.995, "bottom": bottom / height, "top": top / height}
    _profiles(figure, data, area, above=0.43 / (top - bottom))
    figure.text(0.01, 0.04 / height, _scores(data), ha="left", va="bottom", fontsize=SMALL)
    return figure


def _title(data: CounterfactualFigure, column: int) -> str:
    if column == 0:
        return "original"
    return literal(data.found.pairs.edits[int(data.edits[column - 1])]).replace("_", "\n")


def _row(length: int) -> int:
    return length if length <= ROW else math.ceil(math.sqrt(length))


def _strip(axes: Axes, change: NDArray[np.float64]) -> None:
    """One cell per position, in reading order; the darker, the more it changed."""
    row = _row(len(change))
    cells = np.full(-(-len(change) // row) * row, np.nan)
    cells[: len(change)] = np.minimum(change, 1.0)
    shades: Any = LinearSegmentedColormap.from_list("changed", ["#E6E6E6", BLUE])
    grid = cells.reshape(-1, row)
    axes.imshow(grid, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    bare(axes)
    lines: dict[str, Any] = {"color": "white", "linewidth": 0.3}
    for x in range(1, row):
        axes.axvline(x - 0.5, **lines)
    for y in range(1, len(grid)):
        axes.axhline(y - 0.5, **lines)


def _profiles(figure: Figure, data: CounterfactualFigure, area: dict[str, float], *, above: float) -> None:
    """A panel for each thing that is done: profiles of the objects over the null's band.

    Args:
        figure: Where to draw.
        data: What to draw.
        area: Edges of the panels, as shares of the page.
        above: Where the legend's upper edge lies above the panels, as a share of their height.
    """
    found, groups = data.found, panels(data.found.pairs.edits)
    places = figure.subplots(1, len(groups), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.1, **area})[
        0
    ]
    positions = np.arange(1, found.profiles.shape[1] + 1)
    objects = sorted({name.partition("_")[2] for name in found.pairs.edits if "_" in name})
    for axes, (name, members) in zip(places, groups.items(), strict=True):
        band = axes.fill_between(
            positions, 100 * found.band[1], 100 * found.band[2], step="mid", color="#BBBBBB", linewidth=0
        )
        for member in members:
            thing = found.pairs.edits[member].partition("_")[2]
            colour = COLOURS[objects.index(thing)] if thing else COLOURS[-1]
            style = "--" if thing and objects.index(thing) else "-"
            axes.step(positions, 100 * found.profiles[member], where="mid", color=colour, linestyle=style,
                      linewidth=1.0, label=literal(thing or name))  # fmt: skip
        axes.set_title(literal(name), pad=3)
        axes.set(xlabel="position", xlim=(0.5, positions[-1] + 0.5))
        axes.tick_params(length=2)
    places[0].set_ylim(bottom=0)
    places[0].set_ylabel("share of changes (%)")
    handles, labels = places[0].get_legend_handles_labels()
    places[-1].legend(
        [*handles, band], [*labels, "null, 95 %"], loc="upper right", bbox_to_anchor=(1, 1 + above),
        ncols=len(handles) + 1, handlelength=1.6, borderaxespad=0, columnspacing=1.2,
    )  # fmt: skip


def _scores(data: CounterfactualFigure) -> str:
    parts = [
        f"{name} {100 * score.value:.1f} % (null {100 * score.chance:.1f} ± {100 * score.null.std():.2f})"
        for name, score in data.found.scores.items()
    ]
    return (
        f"{literal(data.about.label(data.tokenizer))}, {len(data.found.pairs.scenes)} scenes: "
        + ", ".join(parts)
    )
