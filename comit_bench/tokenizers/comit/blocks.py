"""Building blocks of the COMiT backbone, section (c) of the spec.

Unusual: image rows and message+buffer rows are modulated apart and the offset row not at all; the last
block of a call computes only the rows that are read; the first one may get its buffer rows ready-made.

Shape legend: as in ``comit.py``: ``B`` batch, ``D`` width, ``H`` heads, ``M`` message length, ``X`` image
tokens, ``N`` = 1 + X + 2M (order: offset, image, message, buffer), ``T`` = 1 or B times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.dit import Modulation

TIME_FEATURES = 256
Pair = tuple[Tensor, Tensor]


class TimeEmbed(nn.Module):
    """Cosine-first sinusoidal features of 1000 t, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        half = TIME_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")  # real even on the meta device
        frequencies = torch.exp(-math.log(10000.0) * steps / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        angle = 1000.0 * time.float()[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return embedded


@dataclass(frozen=True, slots=True)
class BlockState:
    """What one block derives from the time: image and message modulations, [6, T, 1, D] each.

    ``buffer_qkv`` [1, M, 3D] is set for the first block when there is one time for the batch.
    """

    image: Tensor
    message: Tensor
    buffer_qkv: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TimeState:
    """All modulations of one time (or of one per image)."""

    blocks: list[BlockState]
    final: Tensor  # [2, T, 1, D]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the token groups lie in the sequence, and which rows the last block must compute."""

    image: int
    message: int
    has_buffer: bool
    read: slice

    @property
    def total(self) -> int:
        return 1 + self.image + self.message * (1 + int(self.has_buffer))

    @property
    def conditioned(self) -> int:
        """Offset, image and message rows; the buffer follows."""
        return 1 + self.image + self.message


def split_groups(u: Tensor, rows: Rows, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cut rows that begin at sequence position ``start`` into offset, image and message+buffer."""
    a = max(1 - start, 0)
    b = max(1 + rows.image - start, 0)
    # one split, not three slices: its gradient is one concatenation instead of three padded tensors
    offset, image, message = u.split([a, b - a, u.shape[1] - b], dim=1)
    return offset, image, message


# (queries, keys, bias, rows) of a block whose attention is wanted
AttentionRecorder = Callable[[Tensor, Tensor, Tensor | None, Rows], None]


class Attention(nn.Module):
    """Multi-head attention with one packed projection; the bias or mask comes from outside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, h: Tensor, read: slice, extra_qkv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the read rows, keys and values of all rows, [B, H, ., D/H] each.

        ``extra_qkv`` [1, M, 3D] are ready-made rows that follow ``h`` in the sequence.
        """
        width = h.shape[-1]
        total = h.shape[1] + (0 if extra_qkv is None else extra_qkv.shape[1])
        if read == slice(0, total):
            qkv = self.qkv(h)
            if extra_qkv is not None:
                qkv = torch.cat([qkv, extra_qkv.expand(h.shape[0], -1, -1)], dim=1)
            # unbound before it is transposed: the gradient is then stacked in the layout of qkv
            q, k, v = rearrange(qkv, "b n (three h c) -> b n three h c", three=3, h=self.heads).unbind(2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(h[:, read], weight[:width], bias[:width])
        kv = F.linear(h, weight[width:], bias[width:])
        if extra_qkv is not None:  # first block is also the last one: all rows are at hand
            extra = extra_qkv.expand(h.shape[0], -1, -1)
            every_q = torch.cat([F.linear(h, weight[:width], bias[:width]), extra[..., :width]], dim=1)
            q, kv = every_q[:, read], torch.cat([kv, extra[..., width:]], dim=1)
        q = rearrange(q, "b n (h c) -> b h n c", h=self.heads)
        k, v = rearrange(kv, "b n (two h c) -> b n two h c", two=2, h=self.heads).unbind(2)
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k / sqrt(D/H) + bias) v -> [B, rows, D]."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed: Tensor = self.proj(rearrange(out, "b h n c -> b n (h c)"))
        return mixed


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Pre-norm transformer block with one modulation for image rows and one for message rows."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.x_adaLN_modulation = Modulation(width, 6)
        self.r_adaLN_modulation = Modulation(width, 6)

    def shift_scale(self, u: Tensor, image: Pair, message: Pair, rows: Rows, start: int) -> Tensor:
        """LayerNorm, then scale and shift every group by its own modulation (shift, scale)."""
        o, x, r = split_groups(self.norm(u), rows, start)
        x = x * (1 + image[1]) + image[0]
        r = r * (1 + message[1]) + message[0]
        return torch.cat([o, x, r], dim=1)

    def gate(self, u: Tensor, image: Tensor, message: Tensor, rows: Rows, start: int) -> Tensor:
        """Scale a residual branch by its gate; the offset row has none."""
        o, x, r = split_groups(u, rows, start)
        return torch.cat([o, x * image, r * message], dim=1)

    def forward(
        self,
        u: Tensor,
        state: BlockState,
        rows: Rows,
        read: slice,
        bias: Tensor | None,
        record: AttentionRecorder | None,
    ) -> Tensor:
        """[B, N, D] -> [B, read rows, D]."""
        # In the first block the buffer rows are the same for every image: their q, k, v are ready.
        shared = state.buffer_qkv
        h = u if shared is None else u[:, : rows.conditioned]
        x, r = state.image.unbind(0), state.message.unbind(0)
        q, k, v = self.attn.project(self.shift_scale(h, (x[0], x[1]), (r[0], r[1]), rows, 0), read, shared)
        if record is not None:
            record(q, k, bias, rows)
        start = read.start
        u = u[:, read] + self.gate(self.attn.attend(q, k, v, bias), x[2], r[2], rows, start)
        h = self.mlp(self.shift_scale(u, (x[3], x[4]), (r[3], r[4]), rows, start))
        return u + self.gate(h, x[5], r[5], rows, start)


# (block, u, state, rows, read, bias) -> u: how a network in training calls its blocks
BlockRunner = Callable[[Block, Tensor, BlockState, Rows, slice, Tensor | None], Tensor]


class AttentionProbe:
    """Asks some blocks for their attention logits, and passes each on as soon as it is computed.

    Args:
        layers: Zero-based blocks, or a single one.
        rows: ``message`` or ``all``; columns follow: image columns for ``message``, all for ``all``.
        softmax: Keep attention weights (softmax of logits and mask over *all* columns) instead of
            the logits before mask and softmax, which is what the released program returns.
        receive: Called with the layer and its maps; None keeps them all in ``maps``.
    """

    def __init__(
        self,
        layers: int | Sequence[int],
        rows: Literal["message", "all"] = "message",
        *,
        softmax: bool = False,
        receive: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.layers = frozenset([layers] if isinstance(layers, int) else layers)
        self.rows = rows
        self.softmax = softmax
        self.maps: dict[int, Tensor] = {}  # layer -> [B, H, M, X] or [B, H, N, N]
        self._receive = receive or self.maps.__setitem__

    def at(self, layer: int) -> AttentionRecorder | None:
        """What the block ``layer`` calls with its queries, keys, mask and rows; None when not asked."""
        return partial(self._record, layer) if layer in self.layers else None

    def _record(self, layer: int, q: Tensor, k: Tensor, bias: Tensor | None, rows: Rows) -> None:
        """Compute the rows that were asked for, and only those. ``q`` and ``k`` hold all rows."""
        wanted = slice(0, rows.total)
        columns = wanted
        if self.rows == "message":
            wanted, columns = slice(1 + rows.image, rows.conditioned), slice(1, 1 + rows.image)
        q = q[:, :, wanted] * q.shape[-1] ** -0.5
        if not self.softmax:
            self._receive(layer, q @ k[:, :, columns].transpose(-2, -1))
            return
        logits = q @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[wanted]
        self._receive(layer, logits.softmax(dim=-1)[..., columns])


class FinalLayer(nn.Module):
    """LayerNorm and Linear; the velocity head also has a modulation."""

    def __init__(self, width: int, out: int, *, modulated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        if modulated:
            self.adaLN_modulation = Modulation(width, 2)

    def forward(self, u: Tensor, modulation: Tensor | None = None) -> Tensor:
        """[B, rows, D] -> [B, rows, out]."""
        h = self.norm(u)
        if modulation is not None:
            h = h * (1 + modulation[1]) + modulation[0]
        out: Tensor = self.linear(h)
        return out
