"""How well attention maps cover an object: binary maps, intersection over union, its limits, random blobs.

Shape legend: ``n`` maps, ``K`` tokens, ``h w`` grid of a map, ``S`` side of a mask, ``P`` shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 1 << 24  # pixels of enlarged maps in memory


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
    kept = [pixels_kept(share, target.numel()) for share in shares]
    step = max(1, AT_ONCE // target.numel())
    parts = []
    for start in range(0, maps.shape[0], step):
        values = enlarge(maps[start : start + step].float(), side, resize).flatten(1)
        both = _both(values, target, kept)
        union = torch.tensor(kept, device=both.device) + target.sum() - both
        parts.append((both.double() / union).T.cpu())
    return torch.cat(parts, dim=1)


def binary(maps: Tensor, side: int, share: int, *, resize: str) -> Tensor:
    """The pixels that :func:`overlaps` keeps of every map: [n, h, w] -> bool [n, S, S]."""
    values = enlarge(maps.float(), side, resize).flatten(1)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, : pixels_kept(share, side * side)]
    kept = torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(1, order, True)
    return kept.view(-1, side, side)


def _both(values: Tensor, target: Tensor, kept: Sequence[int]) -> Tensor:
    """How many of the ``kept`` largest values of every row [n, pixels] lie in the target, [n, P]."""
    if values.device.type == "cpu":  # five times faster than torch's, which also finds the order
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=1))
    else:
        ordered = values.sort(dim=1).values
    if not bool(ordered[:, [0, -1]].isfinite().all()):  # NaN comes last
        raise ValueError("attention maps hold values that are not finite")
    pixels = values.shape[1]
    first = torch.tensor([pixels - count for count in kept], device=values.device)
    least = ordered[:, first]  # [n, P]
    both = (values[:, None, target] >= least[:, :, None]).sum(dim=2)
    surplus = (ordered[:, (first - 1).clamp(min=0)] == least) & (first > 0)
    for row, column in surplus.nonzero().tolist():  # equal values at the edge: the first ones are kept
        above, equal = values[row] > least[row, column], values[row] == least[row, column]
        chosen = above | (equal & (equal.cumsum(dim=0) <= kept[column] - above.sum()))
        both[row, column] = (chosen & target).sum()
    return both


def most_possible(pixels: int, side: int, shares: Sequence[int]) -> list[float]:
    """The highest intersection over union that any map can have at each share, [P].

    A map that keeps m pixels covers at best min(m, a) of an object's ``pixels`` a, in a union of max(m, a).
    """
    kept = [pixels_kept(share, side * side) for share in shares]
    return [min(count, pixels) / max(count, pixels) for count in kept]


def on_grid(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask as an attention map: the share of every cell that is object, bool [S, S] -> float32 [h, w]."""
    return F.adaptive_avg_pool2d(mask.float()[None], (height, width))[0]


def best_threshold(values: Tensor, mask: Tensor, *, resize: str) -> float:
    """The highest intersection over union that a map [h, w] has with a mask bool [S, S] under any threshold.

    The map is resized to the mask first.
    """
    ordered, order = enlarge(values[None].float(), mask.shape[-1], resize).flatten().sort(descending=True)
    both = mask.flatten()[order].double().cumsum(dim=0)
    kept = torch.arange(1, len(order) + 1)
    whole = torch.ones_like(kept, dtype=torch.bool)
    whole[:-1] = ordered[:-1] > ordered[1:]  # equal values are kept together
    return float((both / (kept + mask.sum() - both))[whole].max())


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
