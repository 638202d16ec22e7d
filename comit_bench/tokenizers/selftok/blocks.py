"""Building blocks of SelfTok's encoder and of its decoders, sections (c) and (e) of the specification.

What is unusual:

- The encoder has two streams of different width. Queries look at latents and at each other in one
  attention; latents never see a query.
- The queries' modulation, and that of the decoder's context, depends on the *position* of a token and on
  nothing else: it is a constant of the model. Only the image stream, and the context of the last decoder
  block, are modulated by the diffusion time.
- Invisible context tokens are no key for anybody. They are left out, so no mask exists here.
- The last block of a trunk computes only what is read: in the encoder no latent row, in the decoder only
  keys and values of the context.

Shape legend: ``B`` batch, ``N`` latent tokens, ``D`` their width, ``K`` queries or context tokens, ``Q``
width of a query, ``P`` image tokens, ``H`` decoder width, ``M`` embedded scalars, ``T`` times.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.dit import Modulation

EPS = 1e-6
FEATURES = 256
MAX_PERIOD = 10000.0
FIRST, STRIDE = 1000, 8  # position of token k, on the scale of the diffusion time: 1000 + 8 k


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then scale and shift."""
    return layer_norm(x) * (1 + scale) + shift


def token_positions(count: int, device: torch.device) -> Tensor:
    """Positions of ``count`` tokens as they are embedded, float32 [count]."""
    return FIRST + STRIDE * torch.arange(count, dtype=torch.float32, device=device)


def context_table(count: int, width: int) -> Tensor:
    """The fixed table of token positions: sine, then cosine, of each; float32 [1, count, width]."""
    half = width // 2
    frequency = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = token_positions(count, torch.device("cpu")).double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()[None]


def central_crop(table: Tensor, rows: int, columns: int) -> Tensor:
    """The middle of a square table of positions: [1, G^2, D] -> [1, rows * columns, D].

    Raises:
        ValueError: More rows or columns than the table has.
    """
    side = math.isqrt(table.shape[1])
    if rows > side or columns > side:
        raise ValueError(f"{rows} x {columns} patches, but the position table is {side} x {side}")
    top, left = (side - rows) // 2, (side - columns) // 2
    grid = table.view(1, side, side, -1)[:, top : top + rows, left : left + columns]
    return grid.reshape(1, rows * columns, -1)


class ScalarEmbed(nn.Module):
    """256 features of a scalar, cosines first, then a two-layer MLP.

    Scalars reach thousands, where the last bit of a frequency shows: everything up to the features is
    float32, in this order.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        half = FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")  # real even on the meta device
        frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, scalars: Tensor) -> Tensor:
        """[M] -> [M, width]."""
        angle = scalars.float()[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return embedded


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, W] -> [B, heads, L, W / heads]."""
    out: Tensor = rearrange(x, "b n (h c) -> b h n c", h=heads)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads [B, h, L, c] -> [B, L, h c]."""
    mixed = F.scaled_dot_product_attention(q, k, v)
    out: Tensor = rearrange(mixed, "b h n c -> b n (h c)")
    return out


class DualAttention(nn.Module):
    """Attention of latents among themselves, and of queries over latents and queries."""

    def __init__(self, width: int, heads: int, query_width: int, query_heads: int) -> None:
        super().__init__()
        self.heads, self.query_heads = heads, query_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.to_query_kv = nn.Linear(width, 2 * query_width)
        self.query_linear = nn.Linear(query_width, 3 * query_width)
        self.query_proj = nn.Linear(query_width, query_width)

    def latents(self, n: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (to_heads(part, self.heads) for part in self.qkv(n).chunk(3, dim=-1))
        out: Tensor = self.proj(attend(q, k, v))
        return out

    def queries(self, n: Tensor, u: Tensor) -> Tensor:
        """Latents [B, N, D] and queries [B or 1, K, Q] -> [B, K, Q]."""
        own = self.query_linear(u).expand(n.shape[0], -1, -1)
        q, k_q, v_q = (to_heads(part, self.query_heads) for part in own.chunk(3, dim=-1))
        k_x, v_x = (to_heads(part, self.query_heads) for part in self.to_query_kv(n).chunk(2, dim=-1))
        out: Tensor = self.query_proj(attend(q, torch.cat([k_x, k_q], 2), torch.cat([v_x, v_q], 2)))
        return out


class DualBlock(nn.Module):
    """One encoder block.

    Args:
        width: D.
        heads: Of the latents.
        query_width: Q.
        query_heads: Of the queries.
        mlp_ratio: Hidden size of both MLPs over their width.
    """

    def __init__(self, width: int, heads: int, query_width: int, query_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = DualAttention(width, heads, query_width, query_heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.q_mlp = Mlp(query_width, int(query_width * mlp_ratio))
        self.adaLN_modulation = Modulation(query_width, 6)
        self.t_embedder = ScalarEmbed(query_width)

    def modulation(self, positions: Tensor) -> Tensor:
        """[K] -> [6, 1, K, Q]: shift, scale, gate of the attention, then of the MLP."""
        parts: Tensor = self.adaLN_modulation(self.t_embedder(positions))
        return parts.transpose(1, 2)

    def forward(
        self, x: Tensor, q: Tensor, state: Tensor, *, queries_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, N, D] and queries [B or 1, K, Q] -> the same with B.

        Args:
            x: Latents.
            q: Queries; one row when they are the same for every image (first block).
            state: From :meth:`modulation`.
            queries_only: Leave the latents as they are (last block).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = state
        n = layer_norm(x)
        q = q + gate1 * self.attn.queries(n, modulated(q, shift1, scale1))
        q = q + gate2 * self.q_mlp(modulated(q, shift2, scale2))
        if not queries_only:
            x = x + self.attn.latents(n)
            x = x + self.mlp(layer_norm(x))
        return x, q


class StreamAttention(nn.Module):
    """The projections of one stream of a joint attention; ``proj`` is missing where nothing is updated."""

    def __init__(self, width: int, *, updates: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if updates:
            self.proj = nn.Linear(width, width)

    def keys_values(self, x: Tensor) -> Tensor:
        """[B, L, H] -> [B, L, 2 H] without computing queries."""
        width = x.shape[-1]
        return F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])


class StreamBlock(nn.Module):
    """Context or image side of a joint block.

    Args:
        width: H.
        mlp_ratio: Hidden size of the MLP over the width.
        updates: Whether the stream goes on; the context of the last block does not.
        positional: Modulated by token positions, through an embedder of its own.
    """

    def __init__(self, width: int, mlp_ratio: float, *, updates: bool, positional: bool) -> None:
        super().__init__()
        self.attn = StreamAttention(width, updates=updates)
        self.adaLN_modulation = Modulation(width, 6 if updates else 2)
        if updates:
            self.mlp = Mlp(width, int(width * mlp_ratio))
        if positional:
            self.t_embedder = ScalarEmbed(width)

    def update(self, s: Tensor, mixed: Tensor, state: Tensor) -> Tensor:
        """Stream [B or 1, L, H] and what attention gave it [B, L, H] -> [B, L, H]."""
        s = s + state[2] * self.attn.proj(mixed)
        out: Tensor = s + state[5] * self.mlp(modulated(s, state[3], state[4]))
        return out


class JointBlock(nn.Module):
    """Context and image with their own weights and one attention over both.

    Args:
        width: H.
        heads: Attention heads.
        mlp_ratio: Hidden size of the MLPs over the width.
        last: The context is only looked at.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, last: bool) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.context_block = StreamBlock(width, mlp_ratio, updates=not last, positional=not last)
        self.x_block = StreamBlock(width, mlp_ratio, updates=True, positional=False)

    def _parts(self, x: Tensor, count: int) -> list[Tensor]:
        return [to_heads(part, self.heads) for part in x.chunk(count, dim=-1)]

    def forward(
        self, context: Tensor, image: Tensor, own: Tensor, state: Tensor, *, sees_image: bool
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            context: [B, k, H], the visible tokens.
            image: [B, P, H], or one row when it is the same for all (first block of a renderer).
            own: Modulation of the context, [6, 1, k, H]; [2, T, 1, H] in the last block.
            state: Modulation of the image, [6, T, 1, H].
            sees_image: Whether context queries look at the image.

        Returns:
            Context and image; the context of the last block comes back as it was.
        """
        batch, visible = context.shape[:2]
        y = modulated(image, state[0], state[1])
        q, k, v = self._parts(self.x_block.attn.qkv(y).expand(batch, -1, -1), 3)
        y = modulated(context, own[0], own[1])
        if self.last:
            k_c, v_c = self._parts(self.context_block.attn.keys_values(y), 2)
            q_c = None
        else:
            q_c, k_c, v_c = self._parts(self.context_block.attn.qkv(y), 3)
        keys, values = torch.cat([k_c, k], dim=2), torch.cat([v_c, v], dim=2)
        if q_c is not None and sees_image:
            mixed = attend(torch.cat([q_c, q], dim=2), keys, values)
            context = self.context_block.update(context, mixed[:, :visible], own)
            return context, self.x_block.update(image, mixed[:, visible:], state)
        if q_c is not None:
            context = self.context_block.update(context, attend(q_c, k_c, v_c), own)
        return context, self.x_block.update(image, attend(q, keys, values), state)
