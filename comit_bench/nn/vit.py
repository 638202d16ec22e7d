"""Plain pre-norm transformer blocks with one packed q, k, v projection.

Shared by the tokenizers whose released files name their layers ``ln_1``, ``attn.in_proj_weight``,
``attn.out_proj``, ``ln_2``, ``mlp.c_fc`` and ``mlp.c_proj`` (TiTok, ALIT). Full attention, no mask, no
dropout, exact (erf) GELU, LayerNorm eps 1e-5.

Unusual: a block computes only the rows that somebody reads, and projects rows that are the same for
every image once per call. Neither changes a result.

Shape legend: ``B`` batch, ``N`` sequence length, ``D`` width, ``H`` heads, ``R`` rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.attention import AttentionRequest, MapReceiver

EVERY_ROW = slice(None)


class PackedAttention(nn.Module):
    """Multi-head self-attention; rows of ``in_proj_weight`` are q, then k, then v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def qkv(self, h: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, 3D]."""
        return F.linear(h, self.in_proj_weight, self.in_proj_bias)

    def queries(self, h: Tensor) -> Tensor:
        """[B, R, D] -> [B, R, D]."""
        width = h.shape[-1]
        return F.linear(h, self.in_proj_weight[:width], self.in_proj_bias[:width])

    def keys_values(self, h: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, 2D]."""
        width = h.shape[-1]
        return F.linear(h, self.in_proj_weight[width:], self.in_proj_bias[width:])

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Queries [B, R, D] over keys and values [B, N, 2D] -> [B, R, D], output projection included."""
        q = rearrange(q, "b n (h c) -> b h n c", h=self.heads)
        k, v = rearrange(kv, "b n (two h c) -> two b h n c", two=2, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.out_proj(rearrange(out, "b h n c -> b n (h c)"))
        return mixed


class PlainMlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class PlainBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = PackedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = PlainMlp(width, mlp_ratio * width)

    def forward(self, x: Tensor, *, read: slice = EVERY_ROW, shared: int = 0) -> Tensor:
        """One block.

        Args:
            x: [B, N, D].
            read: Rows of the output that are wanted; the others are not computed.
            shared: That many leading rows are equal for all images: projected once. Needs all rows read.

        Returns:
            [B, R, D].
        """
        width = x.shape[-1]
        if read != EVERY_ROW:
            h = self.ln_1(x)
            q, kv = self.attn.queries(h[:, read]), self.attn.keys_values(h)
            x = x[:, read]
        else:
            qkv = self.attn.qkv(self.ln_1(x[:, shared:]))
            if shared:
                first = self.attn.qkv(self.ln_1(x[:1, :shared]))
                qkv = torch.cat([first.expand(x.shape[0], -1, -1), qkv], dim=1)
            q, kv = qkv[..., :width], qkv[..., width:]
        x = x + self.attn.attend(q, kv)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class AttentionProbe:
    """Asks some blocks of a stack for their attention weights, and passes each on as soon as it is computed.

    Args:
        layers: Zero-based blocks.
        queries: Rows of the sequence whose attention is wanted.
        keys: Columns that are wanted; the softmax always runs over all of them.
        receive: Called with the layer and its weights [B, H, queries, keys]; None keeps them in ``maps``.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        queries: slice,
        keys: slice,
        receive: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.layers = frozenset(layers)
        self.queries, self.keys = queries, keys
        self.maps: dict[int, Tensor] = {}  # layer -> [B, H, queries, keys]
        self._receive = receive or self.maps.__setitem__

    def record(self, layer: int, attention: PackedAttention, h: Tensor) -> None:
        """Compute the weights of one block from its normalised input [B, n, W]."""
        q = rearrange(attention.queries(h[:, self.queries]), "b n (h c) -> b h n c", h=attention.heads)
        k = rearrange(attention.keys_values(h)[..., : h.shape[-1]], "b n (h c) -> b h n c", h=attention.heads)
        logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
        self._receive(layer, logits.softmax(dim=-1)[..., self.keys])


def grid_probe(
    request: AttentionRequest, receive: MapReceiver, *, depth: int, side: int, tokens: int
) -> AttentionProbe:
    """How much the positions of a grid look at tokens, in a sequence [class, side^2 positions, tokens].

    Args:
        request: Which blocks; a pass has no time and one path.
        receive: Gets [B, H, tokens, side, side] of every layer, time 0, as soon as it is computed: softmax
            over *all* keys (class, positions, tokens), so a map is not normalised over space.
        depth: Number of blocks.
        side: Of the grid.
        tokens: Their number.

    Raises:
        ValueError: A layer that does not exist, or one that is asked for twice.
    """
    request.check(depth)
    edge = 1 + side**2

    def hand_on(layer: int, maps: Tensor) -> None:
        grids = rearrange(maps, "b heads (h w) k -> b heads k h w", h=side)
        receive(request.layers.index(layer), 0, grids)

    rows = {"queries": slice(1, edge), "keys": slice(edge, edge + tokens)}
    return AttentionProbe(request.layers, **rows, receive=hand_on)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    *,
    read: slice = EVERY_ROW,
    shared: int = 0,
    probe: AttentionProbe | None = None,
) -> Tensor:
    """A stack of :class:`PlainBlock`: [B, N, D] -> [B, R, D].

    Args:
        blocks: The stack.
        x: Input sequence.
        read: Rows wanted after the last block.
        shared: Leading rows of the input that are equal for all images.
        probe: Records attention.
    """
    stack = list(blocks)
    for index, block in enumerate(stack):
        if probe is not None and index in probe.layers:
            assert isinstance(block, PlainBlock)
            probe.record(index, block.attn, block.ln_1(x))
        if index == len(stack) - 1 and read != EVERY_ROW:
            x = block(x, read=read)
        else:
            x = block(x, shared=shared if index == 0 else 0)
    return x
