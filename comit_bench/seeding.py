"""Seeds: one random generator per (seed, key).

With a generator per key results cannot depend on batch, order, ranks or resume points.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

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
