"""Vector quantization by the nearest row of a codebook, in slices and without one-hot matrices.

Shape legend: ``n`` vectors, ``V`` rows of the codebook, ``d`` code dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES = 1 << 22  # distances held at once: 16 MB


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """Index of the row of ``table`` with the smallest squared distance, the lowest on ties.

    Args:
        vectors: [n, d].
        table: [V, d].

    Returns:
        int64 [n]. Computed in float32 whatever the ambient autocast: a flipped minimum is another token.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, table = vectors.float(), table.float()
        half = table.square().sum(dim=-1) / 2  # |v - e|^2 / 2 less |v|^2 / 2, which is the same for all rows
        rows = max(1, SCORES // table.shape[0])
        return torch.cat([(half - part @ table.t()).argmin(dim=-1) for part in vectors.split(rows)])


class Codebook(nn.Module):
    """A plain codebook; key ``embedding.weight``."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)


class VectorQuantizer(Codebook):
    """Nearest neighbour, on the unit sphere when ``l2_norm`` is set.

    Args:
        size: Rows of the codebook, V.
        dim: Code dimension, d.
        l2_norm: Compare directions; the codes are then the *normalised* rows.
    """

    def __init__(self, size: int, dim: int, *, l2_norm: bool = True) -> None:
        super().__init__(size, dim)
        self.l2_norm = l2_norm

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids."""
        return self.embedding.num_embeddings

    def table(self) -> Tensor:
        """The codes of all ids, float32 [V, d]."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1, eps=1e-12) if self.l2_norm else weight

    def ids(self, vectors: Tensor) -> Tensor:
        """[..., d] -> int64 ids [...]."""
        flat = vectors.float().flatten(0, -2)
        if self.l2_norm:
            flat = F.normalize(flat, dim=-1, eps=1e-12)
        return nearest(flat, self.table()).view(vectors.shape[:-1])

    def codes(self, ids: Tensor) -> Tensor:
        """Ids [...] -> float32 codes [..., d]."""
        rows = self.embedding.weight[ids].float()
        return F.normalize(rows, dim=-1, eps=1e-12) if self.l2_norm else rows
