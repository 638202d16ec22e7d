"""Pieces that the diffusion transformers share: positions, patches, the time and its modulation, the MLP.

Shape legend: ``B`` batch, ``D`` width, ``X`` image tokens, ``T`` = 1 or B times.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 256


def sincos_grid(side: int, width: int) -> Tensor:
    """Fixed 2D positions, float32 [1, side^2, width]: first half encodes the column, then the row."""
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D/2]
    column = line[None, :, :].expand(side, -1, -1)
    row = line[:, None, :].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch, flattened row-major."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, X, D]."""
        tokens: Tensor = rearrange(self.proj(x), "b d h w -> b (h w) d")
        return tokens


class Modulation(nn.Sequential):
    """SiLU then a Linear to ``parts`` vectors per time; keys ``1.weight``, ``1.bias``."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, time_vector: Tensor) -> Tensor:
        """[T, D] -> [parts, T, 1, D]."""
        out: Tensor = self[1](self[0](time_vector))
        return rearrange(out, "t (p d) -> p t 1 d", p=self.parts)


class ScalarEmbed(nn.Module):
    """256 features of ``scale`` times a scalar, cosines first, then a two-layer MLP.

    Scalars reach thousands, where the last bit of a frequency shows: everything up to the features is
    float32, in this order.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        half = FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")  # real even on the meta device
        frequencies = torch.exp(-math.log(10000.0) * steps / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, scalars: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        angle = self.scale * scalars.float()[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return embedded


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
