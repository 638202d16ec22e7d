"""Two rows on the same images: how their outcomes are brought together, and which rows a column sets bold.

Shape legend: ``U`` units (probe seeds or trainings), ``n`` images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comit_bench.errors import UsageError
from comit_bench.metrics.statistics import LEVEL, difference, holm
from comit_bench.results.outcomes import Floats, Outcomes, scale

Rank = Literal["best", "second"]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One metric of one row.

    Attributes:
        ids: [n].
        values: float64 [U, n], in the metric's unit; NaN where the metric means nothing for the image.
        clusters: int64 [n], images of one number are not independent; or None.
    """

    ids: Sequence[str]
    values: Floats
    clusters: NDArray[np.int64] | None

    def __post_init__(self) -> None:
        finite = np.isfinite(self.values)
        if some := int((finite.any(axis=0) & ~finite.all(axis=0)).sum()):
            raise UsageError(f"{some} images have a value under some seeds only (NaN under the others)")


def side_of(outcomes: Outcomes, metric: str, unit: str) -> Side | None:
    """A metric's side; None when it is no mean over images, so that nothing is known image by image.

    Raises:
        UsageError: Values are missing for some seeds only.
    """
    if metric not in outcomes.values:
        return None
    numbers = None
    if outcomes.clusters is not None:
        _, numbers = np.unique(np.asarray(outcomes.clusters), return_inverse=True)
    return Side(outcomes.ids, scale(unit) * outcomes.values[metric], numbers)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Values of two rows on the images for which both have one, in one order.

    Attributes:
        a: float64 [U, m].
        b: float64 [V, m].
        clusters: int64 [m] or None.
        left_out: Images for which only one of the rows has a value.
    """

    a: Floats
    b: Floats
    clusters: NDArray[np.int64] | None
    left_out: int

    @property
    def groups(self) -> int | None:
        """Number of clusters."""
        return None if self.clusters is None else len(np.unique(self.clusters))


def pair(a: Side, b: Side) -> Pair:
    """Bring two sides together.

    Raises:
        UsageError: They were measured on different images, or fewer than two that are independent.
    """
    order = _order(a.ids, b.ids)
    other = b.values[:, order]
    if (a.clusters is None) != (b.clusters is None) or (
        a.clusters is not None and b.clusters is not None and (a.clusters != b.clusters[order]).any()
    ):
        raise UsageError("their images are clustered in different ways")
    mine, theirs = np.isfinite(a.values).all(axis=0), np.isfinite(other).all(axis=0)
    both = np.flatnonzero(mine & theirs)
    clusters = None if a.clusters is None else a.clusters[both]
    found = Pair(a.values[:, both], other[:, both], clusters, int((mine != theirs).sum()))
    independent = len(both) if found.groups is None else found.groups
    if independent < 2:
        what = "image" if found.groups is None else "cluster of images"
        count = "no" if not independent else "a single"
        raise UsageError(f"{count} {what} has a value for both: a comparison needs at least two")
    return found


def _order(a: Sequence[str], b: Sequence[str]) -> NDArray[np.int64]:
    """Where in ``b`` the images of ``a`` are, int64 [n]."""
    if list(a) == list(b):
        return np.arange(len(a))
    place = {name: number for number, name in enumerate(b)}
    alone = [name for name in a if name not in place] or [name for name in b if name not in set(a)]
    if alone or len(place) != len(a) or len(set(a)) != len(a):
        example = f", for example {alone[0]!r}" if alone else ""
        raise UsageError(f"they were measured on different images ({len(a)} and {len(b)}){example}")
    return np.array([place[name] for name in a], dtype=np.int64)


def ranks(sides: Mapping[int, Side], values: Mapping[int, float], *, higher: bool) -> dict[int, Rank]:
    """Which rows of a column are not significantly worse than its best, and than the best of the rest.

    The latter only where others are: a second place that all of the rest share says nothing, and the last of
    two is no second best.

    All pairs are tested and corrected together, so that of rows which are equal one is wrongly told from
    another in at most 5 of 100 columns, although the best one was picked by its score.

    Args:
        sides: At least two rows, by any key.
        values: Their means.
        higher: Whether more is better.

    Raises:
        UsageError: Two rows cannot be compared, see :func:`pair`.
    """
    pairs = list(combinations(sorted(sides), 2))
    found = [pair(sides[one], sides[other]) for one, other in pairs]
    corrected = holm([difference(two.a, two.b, two.clusters).p for two in found])
    apart = {frozenset(two) for two, p in zip(pairs, corrected, strict=True) if p <= LEVEL}
    order = sorted(sides, key=lambda key: -values[key] if higher else values[key])
    best = [key for key in order if frozenset((order[0], key)) not in apart]
    rest = [key for key in order if key not in best]
    second = [key for key in rest if frozenset((rest[0], key)) not in apart]
    return {**dict.fromkeys(best, "best"), **dict.fromkeys(second if second != rest else (), "second")}
