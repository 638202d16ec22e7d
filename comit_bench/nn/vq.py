"""Vector quantization with a learned codebook: nearest neighbour, optionally on the unit sphere.

Unusual: with ``l2_norm`` the vectors *and* the codebook rows are normalised, and the code that enters a
decoder is the normalised row, not the stored one. The search runs in chunks of rows and in float32 even
under autocast; no one-hot matrix is ever built.

Shape legend: ``...`` any leading shape, ``d`` code dimension, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.finite import observe
from comit_bench.nn.precision import full_precision

EPS = 1e-12
CHUNK_ENTRIES = 1 << 23  # distances held at once: 32 MiB of float32


def nearest(z: Tensor, table: Tensor, *, entries: int = CHUNK_ENTRIES) -> Tensor:
    """Index of the nearest row of ``table`` by squared distance, the first one on ties.

    Args:
        z: float32 [M, d].
        table: float32 [V, d].
        entries: Distances that may exist at once.

    Returns:
        int64 [M].
    """
    squares = table.square().sum(1)
    rows = max(entries // table.shape[0], 1)
    norms = observe("latents", z.square().sum(1, keepdim=True))  # also sees what overflows when it is squared
    parts = [
        (norm + squares - 2 * (part @ table.T)).argmin(1)
        for part, norm in zip(z.split(rows), norms.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else z.new_zeros(0, dtype=torch.int64)


def most_similar(z: Tensor, table: Tensor, *, entries: int = CHUNK_ENTRIES) -> Tensor:
    """Index of the row of ``table`` with the largest inner product, as the rows are stored.

    Args:
        z: float32 [M, d].
        table: float32 [V, d].
        entries: Products that may exist at once.

    Returns:
        int64 [M].
    """
    observe("latents", z)
    rows = max(entries // table.shape[0], 1)
    parts = [(part @ table.T).argmax(1) for part in z.split(rows)]
    return torch.cat(parts) if parts else z.new_zeros(0, dtype=torch.int64)


def unit(z: Tensor) -> Tensor:
    """[..., d] at length 1; a length that overflows is noticed, for the result would be zeros."""
    observe("latents", z.square().sum(-1))
    return F.normalize(z, dim=-1, eps=EPS)


class VectorQuantizer(nn.Module):
    """A codebook of ``size`` rows; the parameter is ``embedding.weight`` [V, d].

    Args:
        size: Number of entries.
        dim: Length of one entry.
        l2_norm: Compare directions only, and hand out unit vectors.
    """

    def __init__(self, size: int, dim: int, *, l2_norm: bool) -> None:
        super().__init__()
        self.size = size
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(size, dim)

    def table(self) -> Tensor:
        """Code vectors as decoders see them: float32 [V, d]."""
        weight = self.embedding.weight.float()
        return unit(weight) if self.l2_norm else weight

    def ids(self, z: Tensor) -> Tensor:
        """[..., d] -> int64 [...]."""
        with full_precision(z.device):
            flat = z.float().flatten(0, -2)
            if self.l2_norm:
                flat = unit(flat)
            return nearest(flat, self.table()).view(z.shape[:-1])

    def codes(self, ids: Tensor) -> Tensor:
        """Ids [...] -> float32 [..., d]."""
        with full_precision(ids.device):
            return F.embedding(ids, self.table())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] -> ids [...] and codes [..., d]."""
        ids = self.ids(z)
        return ids, self.codes(ids)
