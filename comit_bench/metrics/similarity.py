"""How alike two images are, pixel by pixel: PSNR and SSIM of uint8 images, one number per image.

Shape legend: ``B`` images, ``S`` side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

PSNR_CAP = 100.0  # dB; identical images would have infinitely many
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
K1, K2, RANGE = 0.01, 0.03, 255.0
TILE = 8  # images per SSIM call; a fixed number bounds the memory and keeps the bits


def squared_error(one: Tensor, two: Tensor) -> Tensor:
    """Mean squared difference per image: uint8 [B, 3, S, S] twice -> float64 [B], from exact integer sums."""
    if one.dtype != torch.uint8 or two.dtype != torch.uint8 or one.shape != two.shape:
        raise ValueError(
            f"expected two uint8 batches of one shape, got {one.dtype} {list(one.shape)} and {two.dtype} "
            f"{list(two.shape)}"
        )
    difference = one.int() - two.int()
    return difference.square().flatten(1).sum(dim=1).double() / difference[0].numel()


def psnr_of(error: Tensor) -> Tensor:
    """``10 log10(255^2 / error)`` in dB, at most ``PSNR_CAP``: mean squared errors [B] -> float64 [B]."""
    floor = RANGE**2 * 10 ** (-PSNR_CAP / 10)
    return 10 * torch.log10(RANGE**2 / error.double().clamp_min(floor))


def psnr(one: Tensor, two: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image: uint8 [B, 3, S, S] twice -> float64 [B] in dB."""
    return psnr_of(squared_error(one, two))


def ssim(one: Tensor, two: Tensor) -> Tensor:
    """Structural similarity per image (Wang et al. 2004): uint8 [B, 3, S, S] twice -> float64 [B], at most 1.

    Gaussian window of 11 x 11 pixels with standard deviation 1.5 around every pixel, the image mirrored at
    its edges, as torchmetrics computes it (a test compares); the mean over pixels and colour channels.
    """
    if min(one.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} px, got {list(one.shape)}")
    parts = [_ssim(one[i : i + TILE], two[i : i + TILE]) for i in range(0, len(one), TILE)]
    return torch.cat(parts)


def _ssim(one: Tensor, two: Tensor) -> Tensor:
    x, y = one.double(), two.double()
    rows, columns = (_blur(side, x.device) for side in x.shape[-2:])

    def local_mean(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    mx, my = local_mean(x), local_mean(y)
    vx, vy = ((local_mean(z * z) - m * m).clamp_min(0) for z, m in ((x, mx), (y, my)))
    covariance = local_mean(x * y) - mx * my
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    means = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return (means * (2 * covariance + c2) / (vx + vy + c2)).flatten(1).mean(dim=1)


def _blur(side: int, device: torch.device) -> Tensor:
    """float64 [side, side]: a row per position of the window, its weights along one axis."""
    reach = WINDOW // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=device)
    window = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    places = torch.arange(side, device=device)[:, None] + offsets.long()  # [side, WINDOW]
    places = places.abs()
    places = torch.where(places < side, places, 2 * (side - 1) - places)  # mirrored at the last pixel
    matrix = torch.zeros(side, side, dtype=torch.float64, device=device)
    return matrix.scatter_add_(1, places, (window / window.sum()).expand(side, WINDOW))
