"""How certain a mean over images is, and whether two of them differ.

A metric was measured on the same ``n`` images by ``U`` units: probe seeds, or trainings of one recipe. The
value of unit u on image i is taken as ``m + a_i + b_u + e_ui``: images are more or less difficult, units
better or worse, and the rest belongs to the pair. Images and units are both samples of what could have been
drawn, so the squared standard error of the mean over all has a part for each::

    V_images + max(V_units - V_rest, 0)

``V_images`` is the variance over images of each image's mean over units, divided by n; with clusters (images
that stand or fall together, such as those of one pair) it is taken over the clusters' sums. ``V_units`` is
the variance over the units' means divided by U. Both hold ``V_rest``, the residual variance divided by n U,
which is counted once. A single unit has no V_units: the error is then that of the images alone. Degrees of
freedom are those of Welch and Satterthwaite.

The difference of two rows is taken image by image, so what makes an image difficult for both cancels; the
units of the two sides are independent. Why not the bootstrap over seeds: with three seeds it draws the same
one thrice every ninth time and its intervals are too short (``tests/unit/test_statistics.py`` measures both
against a known truth; over images alone the two agree).

Every probe worker imports this module for its estimates; scipy is imported by the tests that need it.

Shape legend: ``U`` units, ``n`` images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Names = Sequence[str] | NDArray[Any]  # of clusters, or their numbers
LEVEL = 0.05  # of intervals and tests
POWER = 0.8  # with which a difference counts as one that could have been found


class Estimate(NamedTuple):
    """A mean over images and units.

    Attributes:
        value: The mean.
        std: Sample standard deviation over the units (divisor U - 1); None with one.
        stderr: Standard error of ``value``; None with a single image.
    """

    value: float
    std: float | None
    stderr: float | None


class Difference(NamedTuple):
    """Mean of one row minus mean of another, in the unit of the values.

    Attributes:
        value: The difference.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Two-sided, without correction for other comparisons.
        stderr: Standard error.
        smallest: The smallest true difference that such a test finds in 80 of 100 cases.
    """

    value: float
    low: float
    high: float
    p: float
    stderr: float
    smallest: float


class _Parts(NamedTuple):
    """Variances of a mean: of the images (``groups`` independent ones), of the units, and the rest."""

    images: float
    groups: int
    units: float
    rest: float


def _sums(values: Floats, clusters: Names | None) -> Floats:
    """[U, n] -> [U, G], sums over the images of each cluster; without clusters every image is one."""
    if clusters is None:
        return values
    names, group = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(values), len(names)))
    np.add.at(sums.T, group, values.T)
    return sums


def _parts(values: Floats, clusters: Names | None) -> _Parts:
    units, n = values.shape
    sums = _sums(values - values.mean(), clusters)  # [U, G]; of the whole 0
    groups = sums.shape[1]
    correction = groups / max(groups - 1, 1) / n**2
    image = sums.mean(axis=0)
    unit = sums.mean(axis=1)
    if units == 1:
        return _Parts(correction * float(image @ image), groups, 0.0, 0.0)
    between = float(unit @ unit) * (groups / n) ** 2 / (units * (units - 1))
    rest = sums - image - unit[:, None]
    inside = correction * float((rest**2).sum()) / (units * (units - 1))
    return _Parts(correction * float(image @ image), groups, between, inside)


def estimate(values: Floats, clusters: Names | None = None) -> Estimate:
    """Mean over images and units, and how certain it is.

    Args:
        values: float64 [U, n], finite.
        clusters: [n], names; images of one name are not independent.

    Raises:
        ValueError: There are no values.
    """
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be [units, images] and not empty, got {list(values.shape)}")
    means = values.mean(axis=1)
    std = float(means.std(ddof=1)) if len(means) > 1 else None
    parts = _parts(values, clusters)
    error = math.sqrt(parts.images + max(parts.units - parts.rest, 0.0))
    return Estimate(float(means.mean()), std, error if parts.groups > 1 else None)


def difference(a: Floats, b: Floats, clusters: Names | None = None) -> Difference:
    """Compare two rows on the same images.

    Args:
        a: float64 [U, n], finite.
        b: float64 [V, n], the same images in the same order; the units need not be as many.
        clusters: As in :func:`estimate`.

    Raises:
        ValueError: The images differ in number, or there are fewer than two images or clusters.
    """
    from scipy.special import stdtr, stdtrit

    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} images cannot be compared in pairs")
    gap = a.mean(axis=0) - b.mean(axis=0)  # [n]
    both = _parts(gap[None], clusters)
    if both.groups < 2:
        raise ValueError("a comparison needs at least two images that are independent of each other")
    sides = [(_parts(side, clusters), len(side)) for side in (a, b)]
    extra = max(sum(part.units - part.rest for part, _ in sides), 0.0)
    variance = both.images + extra
    value, error = float(gap.mean()), math.sqrt(variance)
    if error <= 1e-12 * max(1.0, abs(value)):  # the same difference on every image: no spread to judge by
        return Difference(value, value, value, _signs(gap), 0.0, 0.0)
    doubt = both.images**2 / (both.groups - 1)
    doubt += sum(part.units**2 / (count - 1) for part, count in sides if count > 1) * (extra > 0)
    degrees = variance**2 / doubt
    reach = float(stdtrit(degrees, 1 - LEVEL / 2)) * error
    p = 2 * float(stdtr(degrees, -abs(value) / error))
    smallest = reach + float(stdtrit(degrees, POWER)) * error
    return Difference(value, value - reach, value + reach, p, error, smallest)


def _signs(gap: Floats) -> float:
    """Exact two-sided test that a difference is as often above 0 as below it; [n] -> p."""
    from scipy.special import bdtr

    more, less = int((gap > 1e-12).sum()), int((gap < -1e-12).sum())
    return min(1.0, 2 * float(bdtr(min(more, less), more + less, 0.5))) if more + less else 1.0


def mcnemar(a: Floats, b: Floats) -> float:
    """McNemar's exact test on outcomes 0 or 1: p of as many images won by either side.

    With several units an image is won by the side that is right in the larger share of its units; the
    test knows nothing of how much units vary.

    Args:
        a: float64 [U, n].
        b: float64 [V, n].
    """
    return _signs(a.mean(axis=0) - b.mean(axis=0))


def holm(p: Sequence[float]) -> list[float]:
    """Values of p, corrected after Holm for being several; in the order given."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def influences(value: float, left_out: Floats) -> Floats:
    """What each image contributes to a quantity that is no mean: values with that quantity as their mean.

    The infinitesimal jackknife's: ``value + (n - 1) (mean of left_out - left_out)``. Their standard error is
    the jackknife's, so that average precision is tested like any mean over images.

    Args:
        value: On all n images.
        left_out: float64 [n], on all images but one.
    """
    found: Floats = value + (len(left_out) - 1) * (left_out.mean() - left_out)
    return found
