"""What an executor hands back: numbers with their uncertainty and their chance level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One number of a table.

    Attributes:
        value: Mean over the seeds, in ``unit``.
        std: Sample standard deviation over the seeds (divisor S - 1); None with fewer than two.
        stderr: Standard error of ``value``, see :func:`over_seeds`.
        n: Images the number was measured on.
        per_seed: One value per seed, in the order of the seeds.
        chance: Expected value of a uniform guess or of the null model; None when there is no such thing.
        higher_is_better: Direction of the arrow in the table head.
        share: Whether it is a share of the n samples, which has a binomial error.
        unit: ``%``, ``dB``, or empty for plain numbers.
    """

    value: float
    std: float | None
    stderr: float | None
    n: int
    per_seed: tuple[float, ...]
    chance: float | None = None
    higher_is_better: bool = True
    share: bool = True
    unit: str = "%"


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
    """Sum up a share measured once per seed on the same ``n`` images.

    The standard error joins two independent sources: which images happen to be in the report set
    (binomial, ``p (1 - p) / n``; all seeds see the same images, so more seeds do not shrink it) and
    which seeds happened to be used (``std^2 / S``). With a single seed only the first is known.

    Args:
        per_seed: Values in percent, at least one.
        n: Images per seed.
        chance: Expected value of a uniform guess, in percent.
        share: Whether the value is a share of samples; else it has no standard error.
    """
    seeds = len(per_seed)
    value = math.fsum(per_seed) / seeds
    spread = math.fsum((x - value) ** 2 for x in per_seed) / (seeds - 1) if seeds > 1 else None
    p = min(max(value / 100, 0.0), 1.0)
    variance = 1e4 * p * (1 - p) / n + (spread or 0.0) / seeds
    return MetricResult(
        value=value,
        std=None if spread is None else math.sqrt(spread),
        stderr=math.sqrt(variance) if share else None,
        n=n,
        per_seed=tuple(per_seed),
        chance=chance,
        share=share,
    )


def over_images(
    values: NDArray[np.float64], *, unit: str, chance: float | None = None, higher_is_better: bool = True
) -> MetricResult:
    """Sum up a quantity measured once per seed and image.

    The standard error is that of the mean over images (each image's mean over seeds): how much another
    set of ``n`` images would vary.

    Args:
        values: float64 [S, n], finite.
        unit: ``%``, ``dB`` or empty.
        chance: Expected value of the null model.
        higher_is_better: Direction.
    """
    seeds, n = values.shape
    per_seed = tuple(float(value) for value in values.mean(axis=1))
    spread = float(values.mean(axis=0).std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return MetricResult(
        value=math.fsum(per_seed) / seeds,
        std=float(np.std(per_seed, ddof=1)) if seeds > 1 else None,
        stderr=spread,
        n=n,
        per_seed=per_seed,
        chance=chance,
        higher_is_better=higher_is_better,
        share=False,
        unit=unit,
    )


def over_set(
    per_seed: Sequence[float],
    n: int,
    *,
    unit: str = "",
    chance: float | None = None,
    higher_is_better: bool = True,
) -> MetricResult:
    """Sum up a quantity of a whole set of ``n`` images, no mean over them: a Fréchet distance, ..."""
    return MetricResult(
        value=math.fsum(per_seed) / len(per_seed),
        std=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        stderr=None,
        n=n,
        per_seed=tuple(per_seed),
        chance=chance,
        higher_is_better=higher_is_better,
        share=False,
        unit=unit,
    )
