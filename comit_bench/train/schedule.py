"""What depends on the step number alone: learning rate and weight of the alignment losses."""

from __future__ import annotations

import math

FLOOR = 0.05  # of the peak, where a cosine ends


def learning_rate(step: int, *, peak: float, warmup: int, cosine_steps: int | None = None) -> float:
    """Linear warm-up, then inverse square root: ``peak * min(s / warmup, sqrt(warmup / s))``, s = step + 1.

    Args:
        step: Zero-based optimizer step.
        peak: Reached at the end of the warm-up.
        warmup: Steps; 0 keeps the rate at its peak.
        cosine_steps: A cosine from the peak to 5 % of it at this step, constant afterwards, in place of
            the inverse square root.
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
