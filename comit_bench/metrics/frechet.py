"""Distances between two sets of images by their feature vectors: Fréchet, kernel, precision and recall.

Everything is float64. Means and scatter matrices are gathered piece by piece, so that features of all
images need not be in memory together; pieces are merged in the order of the shards (Chan, Golub and
LeVeque, 1983), always by one thread, so the bits do not depend on who computed which shard, when, and
with how many cores.

Sources of the definitions: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID), Kynkäänniemi et al.
2019 (improved precision and recall).

Shape legend: ``n`` images, ``D`` length of a feature vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from comit_bench.seeding import generator_for

Matrix = NDArray[np.float64]
KID_SUBSETS, KID_SIZE, KID_SEED = 100, 1000, 0
NEIGHBOURS = 3
CHUNK = 1024  # rows of a distance matrix that are in memory together


@dataclass(frozen=True, eq=False, slots=True)
class Statistics:
    """What a Fréchet distance needs to know of a set.

    Attributes:
        count: Images.
        mean: float64 [D].
        scatter: float64 [D, D], sum of the outer products of what differs from the mean.
    """

    count: int
    mean: Matrix
    scatter: Matrix

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Statistics:
        """Statistics of some feature vectors [n, D], n >= 1."""
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or len(values) == 0:
            raise ValueError(f"expected feature vectors [n, D] with n >= 1, got shape {values.shape}")
        with threadpool_limits(1):
            mean = values.mean(axis=0)
            centred = values - mean
            return cls(len(values), mean, centred.T @ centred)

    def merged(self, other: Statistics) -> Statistics:
        """Statistics of both sets together."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        spread = np.outer(step, step) * (self.count * other.count / count)
        return Statistics(count, mean, self.scatter + other.scatter + spread)

    @property
    def covariance(self) -> Matrix:
        """Unbiased, float64 [D, D]."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        return self.scatter / (self.count - 1)


def statistics_of(pieces: Iterable[NDArray[np.floating]]) -> Statistics:
    """Statistics of feature vectors [n, D] that come in pieces; the order of pieces decides the last bits."""
    total: Statistics | None = None
    for piece in pieces:
        part = Statistics.of(piece)
        total = part if total is None else total.merged(part)
    if total is None:
        raise ValueError("there are no features to sum up")
    return total


def frechet_distance(one: Statistics, two: Statistics) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, at least 0.

    The trace of the root is the sum of the singular values of ``C1^(1/2) C2^(1/2)``, taken from two
    symmetric eigenproblems: no general matrix root, no complex rounding errors, and singular
    covariances (fewer images than dimensions) need no offset on the diagonal.
    """
    with threadpool_limits(1):
        step = one.mean - two.mean
        first, second = one.covariance, two.covariance
        product = _root(first).T @ _root(second)
        traces = np.trace(first) + np.trace(second) - 2 * np.linalg.svd(product, compute_uv=False).sum()
    return max(float(step @ step + traces), 0.0)


def distance_to_point(reference: Statistics, feature: NDArray[np.floating]) -> float:
    """Fréchet distance to a set whose images are all the same: what a constant decoder would get."""
    step = reference.mean - np.asarray(feature, dtype=np.float64)
    return float(step @ step + np.trace(reference.covariance))


def _root(covariance: Matrix) -> Matrix:
    """R [D, D] with R R^T = covariance; rounding below zero is cut off."""
    values, vectors = np.linalg.eigh(covariance)
    root: Matrix = vectors * np.sqrt(np.clip(values, 0.0, None))
    return root


def kernel_distance(
    reference: NDArray[np.floating],
    other: NDArray[np.floating],
    *,
    subsets: int = KID_SUBSETS,
    size: int = KID_SIZE,
    seed: int = KID_SEED,
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the cubic kernel ``(x.y / D + 1)^3``.

    Args:
        reference: [n, D].
        other: [n, D].
        subsets: How many random subsets of both are averaged.
        size: Images per subset; sets that are no larger are compared whole, once.
        seed: Of the subsets; a subset depends on it and its own number only.

    Returns:
        Mean over the subsets, and their sample standard deviation (0 for one).
    """
    one, two = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in (reference, other))
    count = min(len(one), len(two))
    if count < 2:
        raise ValueError("a kernel distance needs at least two images")
    if count <= size and len(one) == len(two):
        return float(_discrepancy(one, two)), 0.0
    values = []
    for number in range(subsets):
        generator = generator_for(seed, f"kid/{number}")
        rows = [torch.randperm(len(x), generator=generator)[: min(size, count)] for x in (one, two)]
        values.append(float(_discrepancy(one[rows[0]], two[rows[1]])))
    return float(np.mean(values)), float(np.std(values, ddof=1)) if subsets > 1 else 0.0


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    def without_diagonal(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    with threadpool_limits(1):
        return without_diagonal(x) + without_diagonal(y) - 2 * kernel(x, y).mean()


def precision_recall(
    reference: NDArray[np.floating], other: NDArray[np.floating], *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall, in percent.

    Precision is the share of ``other`` that lies in a ball around a reference image that reaches to
    that image's k-th nearest reference neighbour; recall exchanges the two sets.
    """
    one, two = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in (reference, other))
    if min(len(one), len(two)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images")
    return _covered(one, two, neighbours), _covered(two, one, neighbours)


def _covered(centres: Tensor, points: Tensor, neighbours: int) -> float:
    """Percent of ``points`` inside the union of balls around ``centres``."""
    inside = torch.zeros(len(points), dtype=torch.bool)
    for start in range(0, len(centres), CHUNK):
        part = centres[start : start + CHUNK]
        reach = _squared_distances(part, centres).kthvalue(neighbours + 1, dim=1).values  # the 1st is itself
        inside |= (_squared_distances(part, points) <= reach[:, None]).any(dim=0)
    return 100.0 * float(inside.double().mean())


def _squared_distances(one: Tensor, two: Tensor) -> Tensor:
    """float64 [n, D] and [m, D] -> [n, m], by one matrix product; rounding below zero is cut off."""
    lengths = one.square().sum(dim=1)[:, None] + two.square().sum(dim=1)
    return lengths.sub_(one @ two.T, alpha=2).clamp_min_(0)
