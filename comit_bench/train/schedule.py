"""What depends on the step number alone: learning rate and weight of the alignment losses."""

from __future__ import annotations

import math

FLOOR = 0.05  # of the peak, where a cosine ends


def learning_rate(step: int, *, peak: float, warmup: int, cosine_steps: int | None = None) -> float:
    """Linear warm-up, then inverse square root: ``peak * min(s / warmup, sqrt(warmup / s))``, s = step + 1.

    ``step`` is zero-based; without warm-up the rate stays at its peak. With ``cosine_steps`` it falls along a
    cosine to 5 % of the peak at this step and is constant afterwards, in place of the inverse square root.
    """
    count = step + 1
    if cosine_steps is not None:
        share = min(step / cosine_steps, 1.0)
        warm = min(1.0, count / warmup) if warmup else 1.0
        return peak * warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))
    if warmup == 0:
        return peak
    return peak * min(count / warmup, math.sqrt(warmup / count))


def alignment_ramp(step: int, ramp: int) -> float:
    """Factor in [0, 1] on the alignment weights: rises linearly from 0 over ``ramp`` steps."""
    return 1.0 if ramp == 0 else min(1.0, step / ramp)
