"""Seeds: one random generator per (seed, key), and how certain a mean over seeds is.

With a generator per key results cannot depend on batch, order, ranks or resume points.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, key: str) -> int:
    """A 63-bit seed that depends on nothing but ``seed`` and ``key``."""
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, key: str) -> torch.Generator:
    """A CPU generator for one sample, e.g. ``generator_for(0, "val/red_3/000017")``."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, key))


class Spread(NamedTuple):
    """A mean over seeds and its two uncertainties, in the unit of the values.

    Attributes:
        mean: Over the seeds.
        std: Sample standard deviation over the seeds (divisor S - 1); None with one seed.
        stderr: Standard error of ``mean``, see :func:`over_seeds`; None when a part of it is not known.
    """

    mean: float
    std: float | None
    stderr: float | None


def over_seeds(values: Sequence[float], sampling: float | None) -> Spread:
    """Join the error over images and the variance over seeds; nothing else computes a standard error.

    ::

        stderr^2 = sampling^2 + std^2 / S

    The S seeds see the same images, so more seeds do not shrink the first term; the second is the variance
    of a mean of S independent seeds. With one seed the second is not known and only the first is left.
    What a seed adds to single images is in both terms: where seeds differ only by that, ``stderr`` is too
    large by a factor of at most ``sqrt(1 + S)`` (shares) or ``sqrt(2)`` (means over images). It is never
    too small in the mean.

    Args:
        values: One per seed, S >= 1.
        sampling: How much the mean would vary with the choice of images: :func:`binomial_error` for a share
            of images, the standard error of the mean over images (each image's mean over the seeds) for a
            mean. None for what is neither, e.g. a Fréchet distance; then there is no standard error.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("a metric needs at least one value, one per seed")
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    error = None if sampling is None else math.hypot(sampling, (std or 0.0) / math.sqrt(len(values)))
    return Spread(mean, std, error)


def binomial_error(percent: float, n: int) -> float:
    """Sampling error of a share of ``n`` images, in percent: ``100 * sqrt(p (1 - p) / n)``."""
    p = min(max(percent / 100, 0.0), 1.0)
    return 100 * math.sqrt(p * (1 - p) / n)
