"""How well attention maps cover an object: binary maps, intersection over union, random blobs to compare with.

Shape legend: ``n`` maps, ``K`` tokens, ``h w`` grid of a map, ``S`` side of a mask, ``P`` shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 1 << 24  # pixels that are sorted at once


def pixels_kept(share: int, pixels: int) -> int:
    """How many of ``pixels`` the top ``share`` percent are: rounded, halves up, at least one."""
    return max(1, math.floor(share * pixels / 100 + 0.5))


def enlarge(maps: Tensor, side: int, how: str) -> Tensor:
    """Maps [n, h, w] -> [n, S, S]: ``nearest``, ``bilinear`` or ``bicubic``, corners not aligned."""
    if maps.shape[-2:] == (side, side):
        return maps
    how = "nearest-exact" if how == "nearest" else how
    return F.interpolate(maps[:, None], size=(side, side), mode=how)[:, 0]


def overlaps(maps: Tensor, mask: Tensor, shares: Sequence[int], *, resize: str) -> Tensor:
    """Intersection over union of the top pixels of every map with a mask.

    A map is resized to the mask first; then exactly the asked-for number of its largest pixels is kept.
    Among equal values the first in reading order win, so the number never varies.

    Args:
        maps: float [n, h, w].
        mask: bool [S, S], at least one pixel set.
        shares: Percent of the pixels.
        resize: See :func:`enlarge`.

    Returns:
        float64 [P, n], on the CPU.

    Raises:
        ValueError: A map that is not finite.
    """
    side = mask.shape[-1]
    target = mask.flatten().to(maps.device)
    size = int(target.sum())
    step = max(1, AT_ONCE // target.numel())
    parts = []
    for start in range(0, maps.shape[0], step):
        values = enlarge(maps[start : start + step].float(), side, resize).flatten(1)
        if not bool(values.isfinite().all()):
            raise ValueError("attention maps hold values that are not finite")
        order = values.sort(dim=1, descending=True, stable=True).indices
        inside = target[order].cumsum(dim=1)  # [n, S * S], object pixels among the largest so many
        columns = []
        for share in shares:
            kept = pixels_kept(share, target.numel())
            both = inside[:, kept - 1].double()
            columns.append(both / (kept + size - both))
        parts.append(torch.stack(columns).cpu())
    return torch.cat(parts, dim=1)


def shifted(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Every map rolled around its edges by a random number of cells of its own, [..., h, w].

    Args:
        maps: [K, h, w], or [H, K, h, w]: then all heads of a token move together.
        generator: CPU generator.
    """
    tokens, height, width = maps.shape[-3:]
    down = torch.randint(height, (tokens, 1), generator=generator)
    right = torch.randint(width, (tokens, 1), generator=generator)
    rows = ((torch.arange(height) - down) % height).to(maps.device)  # [K, h]
    columns = ((torch.arange(width) - right) % width).to(maps.device)  # [K, w]
    token = torch.arange(tokens, device=maps.device)[:, None, None]
    return maps[..., token, rows[:, :, None], columns[:, None, :]]
