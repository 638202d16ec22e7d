"""Crops, locations and cropping policies of COMiT; ``README.md`` says what they are for.

A global crop is the whole image at location (0, 0); local crops lie on a 3 x 3 grid in raster
order. Locations are crop centres in [-1, 1]^2, **x first**. Unusual: the released geometry (96 px
crops, half side 128) is constant whatever the image side is; other sizes need their own
:class:`CropGeometry`.

Shape legend: ``B`` batch, ``C`` channels, ``S`` image side, ``s`` crop side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 3
CELLS = GRID * GRID
GLOBAL = -1  # the global crop in the functions below; policies number it 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CropGeometry:
    """Pixel constants of the crops: side of a local crop, half the image side for locations."""

    crop: int = 96
    half: int = 128

    def stride(self, side: int) -> int:
        """Distance between grid crops in an image of ``side`` pixels."""
        stride = (side - self.crop) // (GRID - 1)
        if stride < 1:
            raise ValueError(f"an image of {side} px has no room for a grid of {self.crop} px crops")
        return stride

    def locations(self, side: int) -> Tensor:
        """Centres of the nine grid crops, float32 [9, 2], x first."""
        stride = self.stride(side)
        cell = torch.arange(CELLS)
        corner = torch.stack([cell % GRID, cell // GRID], dim=1) * stride
        return (corner + self.crop // 2) / self.half - 1.0

    def boxes(self, side: int) -> Tensor:
        """(left, top, side) in pixels of the global crop and the nine grid crops, int64 [10, 3]."""
        cell = torch.arange(CELLS)
        corner = torch.stack([cell % GRID, cell // GRID], dim=1) * self.stride(side)
        local = torch.cat([corner, torch.full((CELLS, 1), self.crop)], dim=1)
        return torch.cat([torch.tensor([[0, 0, side]]), local])

    def local_crops(self, images: Tensor) -> Tensor:
        """All nine grid crops, [B, C, S, S] -> [B, 9, C, s, s] (a view)."""
        stride = self.stride(images.shape[-1])
        windows = images.unfold(2, self.crop, stride).unfold(3, self.crop, stride)
        windows = windows[:, :, :GRID, :GRID]  # [B, C, 3, 3, s, s]
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)

    def error_map(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Squared error summed over channels, averaged in every grid crop: [B, 3, 3]."""
        error = (reconstruction - images).square().sum(dim=1, keepdim=True)
        pooled = F.avg_pool2d(error, self.crop, self.stride(images.shape[-1]))
        return pooled[:, 0, :GRID, :GRID]


@dataclass(frozen=True, kw_only=True, slots=True)
class CropPolicy:
    """Which crops, in which order.

    Attributes:
        order: ``raster``, ``random``, ``adaptive``, or explicit candidate indices: one list for all
            images, or ``[k][j]`` = index of the k-th crop of image j. With ``global_crop`` candidate
            0 is the global crop and 1..9 are the local ones, else 0..8 are the local ones.
        global_crop: Whether the global crop is a candidate (and comes first unless explicit).
        num_crops: Keep this many; None keeps all.
        shared: Released batch behaviour: one forbidden map (adaptive) or one permutation (random)
            for the whole batch. The default treats every image on its own.
    """

    order: str | tuple[int, ...] | tuple[tuple[int, ...], ...] = "raster"
    global_crop: bool = False
    num_crops: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.order, str) and self.order not in ("raster", "random", "adaptive"):
            raise ValueError(
                f"unknown crop order {self.order!r}: expected raster, random, adaptive or a list of indices"
            )
        candidates = CELLS + int(self.global_crop)
        limit = candidates if self.order in ("raster", "random") else None
        if self.num_crops is not None and self.num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, got {self.num_crops}")
        if limit and self.num_crops and self.num_crops > limit:
            raise ValueError(f"{self.num_crops} crops asked for, but {self.order} has only {limit}")
        if self.order == "adaptive" and self.num_crops is None:
            raise ValueError("an adaptive policy needs num_crops, e.g. adaptive:3")
        if not isinstance(self.order, str):
            rows = [row if isinstance(row, tuple) else (row,) for row in self.order]
            bad = sorted({i for row in rows for i in row if not 0 <= i < candidates})
            if bad or not rows or not all(rows):
                raise ValueError(f"crop indices must lie in 0..{candidates - 1}, got {bad or self.order}")

    @property
    def adaptive(self) -> bool:
        return self.order == "adaptive"

    def indices(
        self, batch: int, generators: Sequence[torch.Generator] | None = None, *, cells: int = CELLS
    ) -> Tensor:
        """Crop of every step and image, int64 [steps, B]: ``GLOBAL`` or below ``cells``. Not for adaptive."""
        first = int(self.global_crop)
        if self.order == "raster":
            table = torch.arange(cells + first)[:, None].expand(-1, batch)
        elif self.order == "random":
            if generators is None:
                raise ValueError("a random policy needs one generator per image")
            own = generators[: 1 if self.shared else None]
            draws = [
                torch.cat([torch.arange(first), torch.randperm(cells, generator=g) + first]) for g in own
            ]
            table = torch.stack(draws, dim=1).expand(-1, batch)
        else:
            assert not isinstance(self.order, str)
            rows = [row if isinstance(row, tuple) else (row,) * batch for row in self.order]
            if any(len(row) != batch for row in rows):
                raise ValueError(
                    f"the explicit order is for {len(rows[0])} images, but the batch has {batch}"
                )
            table = torch.tensor(rows)
        table = table[: self.num_crops]
        return table - first  # candidate 0 becomes GLOBAL when there is a global crop

    def __str__(self) -> str:
        if self.order == "raster" and self.global_crop and self.num_crops == 1:
            return "global"
        if isinstance(self.order, str):
            name = self.order + ("-shared" if self.shared else "")
            count = self.num_crops or CELLS + int(self.global_crop)
        else:
            if self.order and isinstance(self.order[0], tuple):
                return f"per-image:{self.order}"
            kept = self.order[: self.num_crops]
            name, count = "order", ",".join(str(i) for i in kept)  # type: ignore[assignment]
        return ("global+" if self.global_crop else "") + f"{name}:{count}"


_PATTERN = re.compile(
    r"(?P<g>global\+)?(?P<name>raster|random|random-shared|adaptive|adaptive-shared|order):(?P<arg>[0-9,]{1,300})"
)


def parse_policy(text: str) -> CropPolicy:
    """Read a policy name.

    The names are ``global``, ``[global+](raster|random|adaptive)[-shared]:N`` and
    ``[global+]order:i,j,…``; N counts the global crop.
    """
    cleaned = text.strip().lower()
    if cleaned == "global":
        return CropPolicy(global_crop=True, num_crops=1)
    match = _PATTERN.fullmatch(cleaned)
    if match is None or (match["name"] != "order" and "," in match["arg"]):
        raise ValueError(
            f"unknown cropping policy {text[:80]!r}: expected global, raster:N, random:N, adaptive:N, "
            "each optionally after 'global+' and with '-shared' before the colon (random, adaptive), "
            "or order:i,j,k"
        )
    has_global = match["g"] is not None
    if match["name"] == "order":
        parts = [part for part in match["arg"].split(",")]
        if not all(parts):
            raise ValueError(f"cropping policy {text!r} has an empty index")
        return CropPolicy(order=tuple(int(part) for part in parts), global_crop=has_global)
    order, _, suffix = match["name"].partition("-")
    return CropPolicy(
        order=order, global_crop=has_global, num_crops=int(match["arg"]), shared=suffix == "shared"
    )


def encoding_offsets(locations: Tensor) -> Tensor:
    """Offsets fed with each crop, [steps, B, 2] locations -> [steps, B, 2]; the first is (0, 0)."""
    return torch.cat([torch.zeros_like(locations[:1]), locations[1:] - locations[:-1]])


def select_cells(scores: Tensor, forbidden: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Choose the next cell of an adaptive policy: the largest error that is not forbidden.

    Args:
        scores: Error maps [B, 3, 3].
        forbidden: Boolean [B, 9].
        shared: Forbid a chosen cell for the whole batch (released) or for its image only.

    Returns:
        Chosen cells int64 [B] (0 when all are forbidden) and the new forbidden map.
    """
    masked = scores.flatten(1).masked_fill(forbidden, float("-inf"))
    chosen = masked.argmax(dim=1)
    taken = F.one_hot(chosen, CELLS).bool()
    if shared:
        taken = taken.any(dim=0, keepdim=True)
    return chosen, forbidden | taken
