"""What depends on the step number alone: learning rate and weight of the alignment losses."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up, then inverse square root: ``peak * min(s / warmup, sqrt(warmup / s))``, s = step + 1.

    Args:
        step: Zero-based optimizer step.
        peak: Reached at the end of the warm-up.
        warmup: Steps; 0 keeps the rate at its peak.
    """
    if warmup == 0:
        return peak
    count = step + 1
    return peak * min(count / warmup, math.sqrt(warmup / count))


def alignment_ramp(step: int, ramp: int) -> float:
    """Factor in [0, 1] on the alignment weights: rises linearly from 0 over ``ramp`` steps."""
    return 1.0 if ramp == 0 else min(1.0, step / ramp)
