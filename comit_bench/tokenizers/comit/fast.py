"""COMiT's network with less work: what is not computed, and what is kept. ``model.py`` holds the equations.

- The message and the offset are embedded once for all steps of a solver: :class:`Condition`.
- Modulations depend on the time alone, and so do the buffer's queries, keys and values in the first block.
  One time for the whole batch costs one row of them, and without gradients they are kept for later calls.
- The last block computes only the rows that are read: the image's for a velocity, the buffer's for a message.
- With the hard mask no row that is read for a velocity looks at the buffer, which is left out.
- Masks are made once.

Shape legend: as in ``model.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from comit_bench.tokenizers.comit.model import (
    Block,
    MaskMode,
    Predictor,
    Sizes,
    attention_bias,
    gate,
    modulate,
)

TIMES_KEPT = 16  # at COMiT-XL about 10 MB each
Recorder = Callable[[Tensor, Tensor, Tensor | None], None]  # queries and keys of all rows, bias


@dataclass(frozen=True, slots=True)
class Condition:
    """Embedded message [B or 1, M, D] and offset [B, 1, D]: the same for every solver step."""

    message: Tensor
    offset: Tensor


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
class MessageProbe:
    """Asks some blocks how message rows attend to image rows; passes each map on as soon as it is computed.

    Attributes:
        layers: Zero-based blocks.
        softmax: Attention weights (softmax of logits and mask over *all* columns) instead of the logits
            before mask and softmax, which is what the released program returns.
        receive: Called with the layer and its maps [B, H, M, X].
    """

    layers: Sequence[int]
    softmax: bool
    receive: Callable[[int, Tensor], None]

    def record(
        self, layer: int, image: slice, message: slice, q: Tensor, k: Tensor, bias: Tensor | None
    ) -> None:
        """Compute the rows that were asked for, and only those."""
        q = q[:, :, message] * q.shape[-1] ** -0.5
        if not self.softmax:
            self.receive(layer, q @ k[:, :, image].transpose(-2, -1))
            return
        logits = q @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[message]
        self.receive(layer, logits.softmax(dim=-1)[..., image])


@lru_cache(maxsize=32)
def kept_bias(
    image: int, message: int, mode: MaskMode, rows: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The rows of :func:`attention_bias` that are computed."""
    with torch.inference_mode(False):  # kept for later calls, which may be training
        bias = attention_bias(image, message, mode)[slice(*rows)]
        return torch.empty(bias.shape, device=device, dtype=dtype).copy_(bias)


def sizes_of(rows: slice, image: int) -> Sizes:
    """How many of some rows are the offset's, the image's, and the message's or buffer's."""
    offset = max(1 - rows.start, 0)
    inside = max(min(rows.stop, 1 + image) - max(rows.start, 1), 0)
    return offset, inside, rows.stop - rows.start - offset - inside


def run_block(
    block: Block,
    u: Tensor,
    state: BlockState,
    image: int,
    read: slice,
    bias: Tensor | None,
    record: Recorder | None = None,
) -> Tensor:
    """One block: all rows [B, N, D] -> the rows that are read [B, n, D].

    Args:
        block: Its weights.
        u: All rows; N has no buffer when nobody looks at it.
        state: Its modulations.
        image: X.
        read: Rows that are computed; N is all of them.
        bias: [n, N], or None for none.
        record: Gets the queries and keys of all rows.
    """
    attn, width, ready = block.attn, u.shape[-1], state.buffer_qkv
    x, r = state.image.unbind(0), state.message.unbind(0)
    own = u if ready is None else u[:, : -ready.shape[1]]
    h = modulate(block.norm(own), sizes_of(slice(0, own.shape[1]), image), x[:2], r[:2])
    if read == slice(0, u.shape[1]):
        qkv = attn.qkv(h)
        if ready is not None:
            qkv = torch.cat([qkv, ready.expand(u.shape[0], -1, -1)], dim=1)
        # unbound before it is transposed: the gradient is then stacked in the layout of qkv
        q, k, v = rearrange(qkv, "b n (three h c) -> b n three h c", three=3, h=attn.heads).unbind(2)
    else:
        weight, shift = attn.qkv.weight, attn.qkv.bias
        q = F.linear(h[:, read], weight[:width], shift[:width])
        q = rearrange(q, "b n (h c) -> b n h c", h=attn.heads)
        kv = F.linear(h, weight[width:], shift[width:])
        k, v = rearrange(kv, "b n (two h c) -> b n two h c", two=2, h=attn.heads).unbind(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if record is not None:
        record(q, k, bias)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    mixed = attn.proj(rearrange(mixed, "b h n c -> b n (h c)"))
    sizes = sizes_of(read, image)
    u = u[:, read] + gate(mixed, sizes, x[2], r[2])
    h = block.mlp(modulate(block.norm(u), sizes, x[3:5], r[3:5]))
    return u + gate(h, sizes, x[5], r[5])


# (block, u, state, image, read, bias) -> rows: how a network in training calls its blocks
BlockRunner = Callable[[Block, Tensor, BlockState, int, slice, Tensor | None], Tensor]


class FastPredictor:
    """A predictor in use. Make a new one when the weights have changed: it keeps what it derived from them.

    Args:
        predictor: The weights; gradients reach them.
        runner: How blocks are called.
    """

    def __init__(self, predictor: Predictor, runner: BlockRunner | None = None) -> None:
        self.predictor = predictor
        self.blocks = cast(list[Block], list(predictor.blocks))
        self.runner: BlockRunner = runner or run_block
        self._times: dict[float, TimeState] = {}

    def condition(self, codes: Tensor, offset: Tensor) -> Condition:
        """Embed codes [B, M, d] (or [1, 1, d], one code for all) and offsets [B, 2]."""
        return Condition(self.predictor.message_tokens(codes), self.predictor.offset_token(offset))

    def time_state(self, time: Tensor) -> TimeState:
        """Modulations for times [T], T = 1 or the batch size."""
        network, blocks = self.predictor, self.blocks
        vector = network.t_embedder(time)
        states = [BlockState(b.x_adaLN_modulation(vector), b.r_adaLN_modulation(vector)) for b in blocks]
        if time.shape[0] == 1:
            first, block = states[0], blocks[0]
            h = block.norm(network.buffer_tokens()) * (1 + first.message[1]) + first.message[0]
            states[0] = replace(first, buffer_qkv=block.attn.qkv(h))
        return TimeState(states, network.final_layer.adaLN_modulation(vector))

    def state_at(self, time: float, device: torch.device) -> TimeState:
        """Modulations for one time, kept for the next call unless they carry gradients."""
        kept = self._times.get(time)
        if kept is None or torch.is_grad_enabled():
            kept = self.time_state(torch.full((1,), time, device=device))
            if not torch.is_grad_enabled():
                if len(self._times) == TIMES_KEPT:
                    del self._times[next(iter(self._times))]
                self._times[time] = kept
        return kept

    def velocity(
        self,
        latents: Tensor,
        condition: Condition,
        time: TimeState,
        *,
        mask_mode: MaskMode | None = None,
        probe: MessageProbe | None = None,
    ) -> Tensor:
        """The velocity [B, C, h, w] at noisy latents.

        Args:
            latents: [B, C, h, w], h = w, multiples of the patch size.
            condition: From :meth:`condition`.
            time: From :meth:`time_state` or :meth:`state_at`.
            mask_mode: Overrides the spec's.
            probe: Records attention of some blocks (which then compute all rows, even the last).
        """
        image, _ = self._trunk(latents, condition, time, mask_mode=mask_mode, probe=probe)
        return self.predictor.velocity_head(image, time.final, latents)

    def velocity_and_hidden(
        self, latents: Tensor, condition: Condition, time: TimeState, layer: int | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Also image [B, X, D] and message tokens [B, M, D] after the zero-based block ``layer``.

        They are those of the input where ``layer`` is None.
        """
        image, u = self._trunk(latents, condition, time, hidden=layer)
        start = 1 + image.shape[1]
        hidden = u[:, 1:start], u[:, start : start + self.predictor.spec.message_length]
        return self.predictor.velocity_head(image, time.final, latents), hidden

    def message(self, latents: Tensor, condition: Condition, time: TimeState) -> Tensor:
        """The message [B, M, d] before quantization, after latents [B, C, h, w] of a crop at time 1."""
        return self.predictor.message_head(self._trunk(latents, condition, time, message=True)[0])

    def _trunk(
        self,
        latents: Tensor,
        condition: Condition,
        time: TimeState,
        *,
        message: bool = False,
        mask_mode: MaskMode | None = None,
        probe: MessageProbe | None = None,
        hidden: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image rows (or, with ``message``, buffer rows) at the end, and all rows after block ``hidden``."""
        network, mode = self.predictor, mask_mode or self.predictor.spec.mask_mode
        x, length = network.image_tokens(latents), network.spec.message_length
        buffer = message or mode == "additive"
        batch, tokens = x.shape[:2]
        edge = 1 + tokens + length
        parts = [condition.offset, x, condition.message.expand(batch, -1, -1)]
        if buffer:
            parts.append(network.buffer_tokens().expand(batch, -1, -1))
        u = torch.cat(parts, dim=1)
        tapped, every = u, slice(0, u.shape[1])
        wanted = slice(edge, edge + length) if message else slice(1, 1 + tokens)
        for index, (block, state) in enumerate(zip(self.blocks, time.blocks, strict=True)):
            asked = probe is not None and index in probe.layers
            last = index == len(self.blocks) - 1 and not asked and index != hidden
            read = wanted if last else every
            if state.buffer_qkv is not None and (last or not buffer):
                state = replace(state, buffer_qkv=None)
            bias = None
            if buffer:
                bias = kept_bias(tokens, length, mode, (read.start, read.stop), u.device, u.dtype)
            if probe is not None and asked:
                record = partial(probe.record, index, slice(1, 1 + tokens), slice(1 + tokens, edge))
                u = run_block(block, u, state, tokens, read, bias, record)
            else:
                u = self.runner(block, u, state, tokens, read, bias)
            if index == hidden:
                tapped = u
        return u if last else u[:, wanted], tapped
