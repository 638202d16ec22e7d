"""What an executor hands back: values per seed with their sampling error and their chance level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench import seeding


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One number of a table: its values per seed and their sampling error.

    Attributes:
        per_seed: One value per seed, in the order of the seeds, in ``unit``.
        n: Images the number was measured on.
        sampling: How much ``value`` would vary with the choice of images, see
            :func:`comit_bench.seeding.over_seeds`; None when that is not known.
        chance: Expected value of a uniform guess or of the null model; None when there is no such thing.
        higher_is_better: Direction of the arrow in the table head.
        share: Whether it is a share of the n samples, which has a binomial error.
        unit: ``%``, ``dB``, or empty for plain numbers.
    """

    per_seed: tuple[float, ...]
    n: int
    sampling: float | None
    chance: float | None = None
    higher_is_better: bool = True
    share: bool = False
    unit: str = "%"

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return seeding.over_seeds(self.per_seed, None).mean

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        return seeding.over_seeds(self.per_seed, None).std

    @property
    def stderr(self) -> float | None:
        """Standard error of ``value`` over images and seeds."""
        return seeding.over_seeds(self.per_seed, self.sampling).stderr


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """All metrics of one task, and how the fits went.

    Attributes:
        metrics: Name -> number; the main metric is among them.
        extra: JSON-ready remarks on how it went, e.g. best epochs and seconds.
        details: JSON-ready break-downs that the record keeps and no table prints.
        per_image: Columns of one entry per image, ``id`` among them; stored as Parquet beside the record.
    """

    metrics: dict[str, MetricResult]
    extra: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    per_image: dict[str, Any] | None = None


def over_seeds(
    per_seed: Sequence[float], n: int, *, chance: float | None = None, share: bool = True
) -> MetricResult:
    """A share of the same ``n`` images, measured once per seed.

    Args:
        per_seed: Values in percent, at least one.
        n: Images per seed.
        chance: Expected value of a uniform guess, in percent.
        share: Whether the value is a share of samples; else its sampling error is not known.
    """
    mean = seeding.over_seeds(per_seed, None).mean
    sampling = seeding.binomial_error(mean, n) if share else None
    return MetricResult(per_seed=tuple(per_seed), n=n, sampling=sampling, chance=chance, share=share)


def over_images(
    values: NDArray[np.float64], *, unit: str, chance: float | None = None, higher_is_better: bool = True
) -> MetricResult:
    """A mean over images of a quantity measured once per seed and image.

    Args:
        values: float64 [S, n], finite.
        unit: ``%``, ``dB`` or empty.
        chance: Expected value of the null model.
        higher_is_better: Direction.
    """
    n = values.shape[1]
    return MetricResult(
        per_seed=tuple(float(value) for value in values.mean(axis=1)),
        n=n,
        sampling=float(values.mean(axis=0).std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        chance=chance,
        higher_is_better=higher_is_better,
        unit=unit,
    )


def over_set(
    per_seed: Sequence[float],
    n: int,
    *,
    unit: str = "",
    chance: float | None = None,
    higher_is_better: bool = True,
    sampling: float | None = None,
) -> MetricResult:
    """A quantity of a whole set of ``n`` images, no mean over them: a Fréchet distance, ..."""
    return MetricResult(
        per_seed=tuple(per_seed),
        n=n,
        sampling=sampling,
        chance=chance,
        higher_is_better=higher_is_better,
        unit=unit,
    )
