"""What an executor hands back: numbers with their uncertainty and their chance level, in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One number of a table.

    Attributes:
        value: Mean over the probe seeds, in percent.
        std: Sample standard deviation over the seeds (divisor S - 1); None with fewer than two.
        stderr: Standard error of ``value``, see :func:`over_seeds`.
        n: Images the number was measured on.
        per_seed: One value per seed, in percent, in the order of the seeds.
        chance: Expected value of a uniform guess, in percent; None when there is no such thing.
        higher_is_better: Direction of the arrow in the table head.
        share: Whether it is a share of the n samples, which has a binomial error.
    """

    value: float
    std: float | None
    stderr: float
    n: int
    per_seed: tuple[float, ...]
    chance: float | None = None
    higher_is_better: bool = True
    share: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """All metrics of one task, and how the fits went.

    Attributes:
        metrics: Name -> number; the main metric is among them.
        extra: JSON-ready details, e.g. best epochs and seconds.
    """

    metrics: dict[str, MetricResult]
    extra: dict[str, Any] = field(default_factory=dict)


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
        share: Whether the value is a share of samples; else the binomial error is only a rough guide.
    """
    seeds = len(per_seed)
    value = math.fsum(per_seed) / seeds
    spread = math.fsum((x - value) ** 2 for x in per_seed) / (seeds - 1) if seeds > 1 else None
    p = min(max(value / 100, 0.0), 1.0)
    variance = 1e4 * p * (1 - p) / n + (spread or 0.0) / seeds
    return MetricResult(
        value=value,
        std=None if spread is None else math.sqrt(spread),
        stderr=math.sqrt(variance),
        n=n,
        per_seed=tuple(per_seed),
        chance=chance,
        share=share,
    )
