"""The plain pre-norm transformer of ALIT and TiTok, with the released parameter names.

Unusual: a stack may be told which rows of its output are read; its last block then computes only those
(keys and values still cover the whole sequence), with the same result.

Shape legend: ``B`` batch, ``n`` sequence length, ``W`` width, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class AttentionProbe:
    """Asks some blocks of a stack for their attention weights; holds them after the call.

    Args:
        layers: Zero-based blocks.
        queries: Rows of the sequence whose attention is kept.
        keys: Columns that are kept; the softmax always runs over all of them.
    """

    def __init__(self, layers: Sequence[int], *, queries: slice, keys: slice) -> None:
        self.layers = frozenset(layers)
        self.queries, self.keys = queries, keys
        self.maps: dict[int, Tensor] = {}  # layer -> [B, H, queries, keys]

    def record(self, layer: int, q: Tensor, k: Tensor, start: int) -> None:
        """Keep the weights of one block. ``q`` [B, H, ., W/H] begins at sequence row ``start``."""
        wanted = slice(self.queries.start - start, self.queries.stop - start)
        logits = (q[:, :, wanted].float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
        self.maps[layer] = logits.softmax(dim=-1)[..., self.keys]


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection (rows q, k, v)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, h: Tensor, read: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the read rows, keys and values of all rows, [B, H, ., W/H] each."""
        width, weight, bias = h.shape[-1], self.in_proj_weight, self.in_proj_bias
        if read == slice(0, h.shape[1]):
            q, kv = F.linear(h, weight, bias).split([width, 2 * width], dim=-1)
        else:
            q = F.linear(h[:, read], weight[:width], bias[:width])
            kv = F.linear(h, weight[width:], bias[width:])
        q = rearrange(q, "b n (h c) -> b h n c", h=self.heads)
        k, v = rearrange(kv, "b n (two h c) -> two b h n c", two=2, h=self.heads)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k / sqrt(W/H)) v, projected: [B, rows, W]."""
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(rearrange(mixed, "b h n c -> b n (h c)"))
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width)

    def forward(
        self, x: Tensor, read: slice, probe: AttentionProbe | None = None, layer: int = -1
    ) -> Tensor:
        """[B, n, W] -> [B, read rows, W]."""
        q, k, v = self.attn.project(self.ln_1(x), read)
        if probe is not None and layer in probe.layers:
            probe.record(layer, q, k, read.start)
        x = x[:, read] + self.attn.attend(q, k, v)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """A stack of blocks, keys ``transformer.{i}.…``; no norm before or after."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(
        self, x: Tensor, *, read: slice | None = None, probe: AttentionProbe | None = None
    ) -> Tensor:
        """Run the stack.

        Args:
            x: [B, n, W].
            read: Rows of the output that are wanted; None is all.
            probe: Records attention; the rows it asks for must be among those read.
        """
        whole = slice(0, x.shape[1])
        for index, block in enumerate(self.transformer):
            last = index + 1 == len(self.transformer)
            x = block(x, whole if read is None or not last else read, probe, index)
        return x
