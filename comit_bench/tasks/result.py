"""What a task hands back, and its metrics as the record stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.results.schema import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All metrics of one task, and how the fits went.

    Attributes:
        metrics: Name -> number; the main metric is among them.
        extra: JSON-ready remarks on how it went, e.g. best epochs and seconds.
        details: JSON-ready break-downs that the record keeps and no table prints.
        per_image: Outcomes: columns of one entry per image, ``id`` among them; stored as Parquet beside the
            record.
    """

    metrics: dict[str, Metric]
    extra: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    per_image: dict[str, Any] | None = None


def over_seeds(
    per_seed: Sequence[float], n: int, *, chance: float | None = None, share: bool = True
) -> Metric:
    """A share of the same ``n`` images, measured once per seed.

    Args:
        per_seed: Values in percent, at least one.
        n: Images per seed.
        chance: Expected value of a uniform guess, in percent.
        share: Whether the value is a share of samples; else its sampling error is not known.
    """
    return Metric.from_seeds(per_seed, n=n, chance=chance, binomial=share)


def over_images(
    values: NDArray[np.float64], *, unit: str, chance: float | None = None, higher_is_better: bool = True
) -> Metric:
    """A mean over images of a quantity measured once per seed and image.

    Args:
        values: float64 [S, n], finite.
        unit: ``%``, ``dB`` or empty.
        chance: Expected value of the null model.
        higher_is_better: Direction.
    """
    n = values.shape[1]
    sampling = float(values.mean(axis=0).std(ddof=1)) / math.sqrt(n) if n > 1 else None
    per_seed = values.mean(axis=1).tolist()
    return over_set(
        per_seed, n, unit=unit, chance=chance, higher_is_better=higher_is_better, sampling=sampling
    )


def over_set(
    per_seed: Sequence[float],
    n: int,
    *,
    unit: str = "",
    chance: float | None = None,
    higher_is_better: bool = True,
    sampling: float | None = None,
) -> Metric:
    """A quantity of a whole set of ``n`` images, no mean over them: a Fréchet distance, ..."""
    return Metric.from_seeds(
        per_seed,
        n=n,
        chance=chance,
        higher_is_better=higher_is_better,
        unit=unit,
        binomial=False,
        sampling=sampling,
    )


def same_for_all(seeds: Sequence[int], once: dict[str, Metric]) -> Result:
    """A row about which nothing is random: the same value for every seed."""
    std = 0.0 if len(seeds) > 1 else None
    return Result(
        metrics={
            name: metric.model_copy(update={"per_seed": (metric.value,) * len(seeds), "std": std})
            for name, metric in once.items()
        }
    )
