"""Building blocks of FlexTok's two transformers.

What is unusual:

- Attention logits are scaled by 8 / head_dim, which is 1 / sqrt(head_dim) at head_dim 64 only; queries
  and keys pass through a LayerNorm over each head. No LayerNorm of the trunks has weights.
- Patches and registers share the weights of a block, but in the decoder each group has its own
  modulation, and the modulation lists its two gates first.
- The encoder's patches never see a register, so they attend among themselves, without a mask.
- The last block of a trunk computes only the rows that are read afterwards.

Shape legend: ``B`` batch, ``D`` width, ``H`` heads, ``c`` head dimension, ``P`` patches, ``R`` registers,
``N`` = P + R (order: patches, registers), ``T`` = 1 or B times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.dit import Modulation, sincos_grid

EPS = 1e-5
LOGIT_SCALE = 8.0  # divided by the head dimension
MAX_PERIOD = 256.0
STREAMS, PARTS = 2, 6  # (patches, registers); gates, then shift and scale of attention and of the MLP


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weights, in float32, cast back."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


def mlp_hidden(width: int, ratio: float) -> int:
    """Hidden size of the gated MLP: two thirds of ``ratio * width``, rounded down."""
    return int(2 * (ratio * width) / 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSpec:
    """A stored table of positions.

    Attributes:
        kind: ``grid`` [1, D, H, W], fixed; ``line`` [1, 1, D, N], learned; ``sum`` or ``prod``
            [2, 1, D, N], learned, one line per axis.
        size: (H, W) for ``grid``, else (N,).
        interpolate: Stretch the table to the grid instead of taking its first entries.
    """

    kind: Literal["grid", "line", "sum", "prod"]
    size: tuple[int, ...]
    interpolate: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("grid", "line", "sum", "prod"):
            raise ValueError(f"positions must be grid, line, sum or prod, got {self.kind!r}")
        if len(self.size) != (2 if self.kind == "grid" else 1) or min(self.size) < 1:
            raise ValueError(f"a {self.kind} table of positions cannot have the size {list(self.size)}")

    def shape(self, width: int) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        if self.kind == "grid":
            return (1, width, *self.size)
        return (1 if self.kind == "line" else 2, 1, width, self.size[0])

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the largest grid without interpolation."""
        return (self.size[0], self.size[-1])


class PositionTable(nn.Module):
    """Positions as the checkpoint stores them, key ``posembs``."""

    def __init__(self, spec: TableSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.posembs = nn.Parameter(torch.zeros(spec.shape(width)), requires_grad=spec.kind != "grid")

    def _axis(self, line: Tensor, count: int) -> Tensor:
        """[D, N] -> [D, count]."""
        if self.spec.interpolate and count != line.shape[-1]:
            return F.interpolate(line[None], size=count, mode="linear", align_corners=True)[0]
        return line[:, :count]

    def line(self, count: int) -> Tensor:
        """The first ``count`` positions of a 1D table, [count, D]."""
        if count > self.spec.size[0]:
            raise ValueError(f"{count} registers, but the table has {self.spec.size[0]} positions")
        return self.posembs[0, 0, :, :count].T

    def grid(self, rows: int, columns: int) -> Tensor:
        """A patch grid, row-major, [rows * columns, D]."""
        high, wide = self.spec.sides
        if not self.spec.interpolate and (rows > high or columns > wide):
            raise ValueError(
                f"a grid of {rows} x {columns} patches is larger than the position table ({high} x {wide})"
            )
        if self.spec.kind == "grid":
            table: Tensor = self.posembs
            if self.spec.interpolate and (rows, columns) != (high, wide):
                table = F.interpolate(table, size=(rows, columns), mode="bilinear", align_corners=True)
            return rearrange(table[0, :, :rows, :columns], "d h w -> (h w) d")
        down = self._axis(self.posembs[0, 0], rows)[:, :, None]
        right = self._axis(self.posembs[1, 0], columns)[:, None, :]
        both = down + right if self.spec.kind == "sum" else down * right
        return rearrange(both, "d h w -> (h w) d")

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """The fixed sine-cosine table (square grids), or a truncated normal of std 0.02."""
        if self.spec.kind == "grid":
            side, width = self.spec.size[0], self.posembs.shape[1]
            if self.spec.size != (side, side):
                raise ValueError(f"the layout of a {self.spec.size} table is not known: use the stored one")
            grid = sincos_grid(side, width).roll(width // 2, dims=-1)  # rows before columns
            self.posembs.copy_(rearrange(grid, "1 (h w) d -> 1 d h w", h=side))
        else:
            nn.init.trunc_normal_(self.posembs, std=0.02, a=-0.04, b=0.04, generator=generator)


class PatchEmbed(nn.Module):
    """Linear map of patches whose vector is ordered (row, column, channel), channel fastest."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.patch_proj = nn.Linear(channels * patch[0] * patch[1], width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, P, D]."""
        p, q = self.patch
        if x.shape[-2] % p or x.shape[-1] % q:
            raise ValueError(f"latents of {list(x.shape[-2:])} cannot be cut into patches of {p} x {q}")
        tokens: Tensor = self.patch_proj(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q))
        return tokens


class TimeEmbed(nn.Module):
    """Cosine-first features of t * 1000 / max_timestep with periods up to 256, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int, features: int, max_timestep: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        half = features // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")  # real even on the meta device
        frequencies = (1000.0 / max_timestep) * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        angle = time.float()[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return embedded


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys and no biases."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h c) -> b h n c", c=self.head_dim)

    def queries(self, x: Tensor) -> Tensor:
        """[B, rows, D] -> [B, H, rows, c]."""
        return layer_norm(self._heads(self.wq(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> two of [B, H, N, c]."""
        return layer_norm(self._heads(self.wk(x))), self._heads(self.wv(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(8/c q k + mask) v, [B, H, rows, c]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=LOGIT_SCALE / self.head_dim)

    def output(self, mixed: Tensor) -> Tensor:
        """[B, H, rows, c] -> [B, rows, D]."""
        out: Tensor = self.proj(rearrange(mixed, "b h n c -> b n (h c)"))
        return out


class SwiGlu(nn.Module):
    """fc2(SiLU(fc1 x) * fc3 x), no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(F.silu(self.fc1(x)) * self.fc3(x))
        return out


class CausalBlock(nn.Module):
    """Encoder block: patches see patches, register i sees patches and registers 0..i."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGlu(width, mlp_hidden(width, mlp_ratio))

    def forward(self, h: Tensor, patches: int, mask: Tensor, *, registers_only: bool) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, R, D] of the registers.

        Args:
            h: Patches, then registers.
            patches: P.
            mask: bool [R, N], what each register sees.
            registers_only: Compute no patch row (last block).
        """
        x = layer_norm(h)
        k, v = self.attn.keys_values(x)
        if registers_only:
            q, h = self.attn.queries(x[:, patches:]), h[:, patches:]
            mixed = self.attn.attend(q, k, v, mask)
        else:
            q = self.attn.queries(x)
            seen = self.attn.attend(q[:, :, :patches], k[:, :, :patches], v[:, :, :patches])
            mixed = torch.cat([seen, self.attn.attend(q[:, :, patches:], k, v, mask)], dim=2)
        h = h + self.attn.output(mixed)
        out: Tensor = h + self.mlp(layer_norm(h))
        return out


class ModulatedBlock(nn.Module):
    """Decoder block with adaLN-zero: full attention, one modulation for patches, one for registers.

    Args:
        width: D.
        head_dim: c.
        mlp_ratio: Of the gated MLP.
        streams: 2, or 1 when both groups share a modulation.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float, streams: int = STREAMS) -> None:
        super().__init__()
        self.streams = streams
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGlu(width, mlp_hidden(width, mlp_ratio))
        self.adaLN_modulation = Modulation(width, PARTS * streams)

    def modulation(self, time_vector: Tensor) -> Tensor:
        """[T, D] -> [2 streams, 6, T, 1, D]."""
        parts: Tensor = self.adaLN_modulation(time_vector)
        split = rearrange(parts, "(s k) t 1 d -> s k t 1 d", s=self.streams)
        return split.expand(STREAMS, -1, -1, -1, -1)

    @staticmethod
    def _shift_scale(x: Tensor, state: Tensor, shift: int, patches: int) -> Tensor:
        def one(rows: Tensor, stream: Tensor) -> Tensor:
            return rows * (1 + stream[shift + 1]) + stream[shift]

        if x.shape[1] == patches:
            return one(x, state[0])
        return torch.cat([one(x[:, :patches], state[0]), one(x[:, patches:], state[1])], dim=1)

    @staticmethod
    def _gate(x: Tensor, state: Tensor, part: int, patches: int) -> Tensor:
        if x.shape[1] == patches:
            return x * state[0, part]
        return torch.cat([x[:, :patches] * state[0, part], x[:, patches:] * state[1, part]], dim=1)

    def forward(
        self, h: Tensor, state: Tensor, patches: int, bias: Tensor | None, *, patches_only: bool
    ) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, P, D] of the patches.

        Args:
            h: Patches, then registers.
            state: From :meth:`modulation`.
            patches: P.
            bias: [B or 1, 1, 1, N] added to the logits of every key, or None.
            patches_only: Compute no register row (last block).
        """
        x = self._shift_scale(layer_norm(h), state, 2, patches)
        k, v = self.attn.keys_values(x)
        if patches_only:
            x, h = x[:, :patches], h[:, :patches]
        mixed = self.attn.output(self.attn.attend(self.attn.queries(x), k, v, bias))
        h = h + self._gate(mixed, state, 0, patches)
        out = self.mlp(self._shift_scale(layer_norm(h), state, 4, patches))
        return h + self._gate(out, state, 1, patches)
