"""What sizes networks can have: checked before anything is built from them.

The largest networks here have 28 blocks and a width of 1536. The bounds are far above that, and far below
what would keep a computer busy for hours before it fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from comit_bench.errors import shown

DEPTH, WIDTH, HEADS = 512, 1 << 16, 1 << 12
SIDE, PATCH, TOKENS = 1 << 14, 1 << 10, 1 << 16
CHANNELS, ENTRIES = 1 << 12, 1 << 24
LEVELS, LEVEL, VOCABULARY = 64, 1 << 20, 1 << 31  # of a scalar quantizer: how many, how large, their product


def check_sizes(owner: object, **limits: int) -> None:
    """Attributes that must be whole numbers from 1 to a limit."""
    for name, high in limits.items():
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise ValueError(
                f"{name} must be a whole number, 1 or more and at most {high}, got {shown(value)}"
            )


def check_ratio(value: object) -> None:
    """The width of a hidden layer over that of its block."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 64:
        raise ValueError(f"mlp_ratio must be a number above 0 and at most 64, got {shown(value)}")


def check_levels(levels: Sequence[object]) -> None:
    """Levels of a finite scalar quantizer."""
    good = [v for v in levels if isinstance(v, int) and not isinstance(v, bool) and 2 <= v <= LEVEL]
    if not 1 <= len(levels) <= LEVELS or len(good) != len(levels) or math.prod(good) > VOCABULARY:
        raise ValueError(
            f"fsq_levels {shown(list(levels))}: expected 1 to {LEVELS} whole numbers, each must be 2 or "
            f"more, and their product at most {VOCABULARY}"
        )
