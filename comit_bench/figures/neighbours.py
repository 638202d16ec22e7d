"""Figure ``neighbours`` (paper Figure 9): images, and those with the nearest messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comit_bench.errors import UsageError
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import Images, encode, progress
from comit_bench.figures.style import BLUE, VERMILION, gallery, styled
from comit_bench.seeding import seed_for
from comit_bench.tasks.retrieval import chance_of_hit, nearest
from comit_bench.tokenizers.base import Tokenizer

DATASET = "scenes-recognition"  # what ``scenes`` means here: images in class folders


@dataclass(frozen=True, slots=True, eq=False)
class Neighbourhood:
    """``q`` queries with their ``k`` nearest neighbours among ``n`` images.

    Attributes:
        names: Ids of the queries and their neighbours, [q][1 + k].
        classes: Their classes, [q][1 + k]: the folder an image lies in; None when all lie in one.
        images: uint8 [q, 1 + k, 3, S, S].
        distance: float64 [q, k], cosine distances.
        recall: Percent of all n images whose nearest neighbour is of their class, and percent with one of
            their class among the k nearest; None without classes.
        chance: The same for random orders.
        about: Words around the figure.
    """

    names: tuple[tuple[str, ...], ...]
    classes: tuple[tuple[str, ...], ...] | None
    images: NDArray[np.uint8]
    distance: NDArray[np.float64]
    recall: tuple[float, float] | None
    chance: tuple[float, float] | None
    about: About = NOTHING


def classes_of(names: Sequence[str]) -> list[str] | None:
    """The folder of every image; None when there are fewer than two folders."""
    folders = [name.rpartition("/")[0] for name in names]
    return folders if len(set(folders)) > 1 else None


def compute(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    queries: int = 5,
    k: int = 8,
    policy: str | None = None,
    seed: int = 0,
) -> Neighbourhood:
    """Search the neighbours of every image, and show those of some.

    Args:
        tokenizer: Any.
        inputs: All images that are searched.
        queries: How many images are shown with their neighbours.
        k: Neighbours of each.
        policy: Of the messages.
        seed: Also of the choice of queries.
    """
    if queries < 1:
        raise UsageError(f"--count {queries}: at least one query is needed")
    if not 1 <= k < len(inputs):
        raise UsageError(
            f"{k} neighbours of {len(inputs)} images: each has {len(inputs) - 1} others. Search more "
            "(--pool) or show fewer (--neighbours)."
        )
    codes = encode(tokenizer, inputs, policy=policy, seed=seed).codes
    advance = progress.get()("neighbours of", len(inputs), "images")
    found = nearest(lambda rows: codes[rows], len(inputs), k, progress=advance)
    order = sorted(range(len(inputs)), key=lambda row: seed_for(seed, f"query/{inputs.names[row]}"))
    chosen = sorted(order[:queries])
    table = np.concatenate([np.array(chosen)[:, None], found.index[chosen]], axis=1)  # [q, 1 + k]
    folders = classes_of(inputs.names)
    recall = chance = None
    result = "all images lie in one folder, so there are no classes and no recall"
    if folders is not None:
        labels = np.unique(folders, return_inverse=True)[1].astype(np.int64)
        same = labels[found.index] == labels[:, None]
        recall = (100 * float(same[:, 0].mean()), 100 * float(same.any(axis=1).mean()))
        chance = (100 * chance_of_hit(labels, 1), 100 * chance_of_hit(labels, k))
        result = (
            f"of all {len(inputs)}: recall@1 {recall[0]:.1f} % (chance {chance[0]:.1f} %), "
            f"recall@{k} {recall[1]:.1f} % (chance {chance[1]:.1f} %)"
        )
    return Neighbourhood(
        names=tuple(tuple(inputs.names[i] for i in row) for row in table.tolist()),
        classes=None if folders is None else tuple(tuple(folders[i] for i in row) for row in table.tolist()),
        images=inputs.images.numpy()[table],
        distance=found.distance[chosen],
        recall=recall,
        chance=chance,
        about=describe(tokenizer, inputs, policy=policy).plus(result),
    )


@styled
def draw(data: Neighbourhood) -> Figure:
    """A row per query: the image, then its neighbours with their distance; ✓ or ✗ for the class."""
    captions: list[Sequence[str] | None] = []
    for number, row in enumerate(data.distance):
        marks = ["" if right is None else ("✓ " if right else "✗ ") for right in _right(data, number)]
        captions.append(["", *(f"{mark}{gap:.2f}" for mark, gap in zip(marks, row, strict=True))])
    labels = [name[0] for name in data.names] if data.classes is None else [c[0] for c in data.classes]
    count = data.distance.shape[1]
    figure, axes = gallery(
        [list(row) for row in data.images],
        row_labels=[label.replace("_", " ") for label in labels],
        column_labels=["query", *(str(k + 1) for k in range(count))],
        captions=captions,
    )
    for number, row in enumerate(axes):
        for place, right in zip(row[1:], _right(data, number), strict=True):
            if right is not None:
                _frame(place, right)
    return figure


def _right(data: Neighbourhood, number: int) -> list[bool | None]:
    if data.classes is None:
        return [None] * data.distance.shape[1]
    mine, *others = data.classes[number]
    return [other == mine for other in others]


def _frame(axes: Axes, right: bool) -> None:
    axes.spines[:].set(visible=True, color=BLUE if right else VERMILION, linewidth=1.4)
    if not right:
        axes.spines[:].set(linestyle=(0, (3, 1.5)))
