"""SelfTok's networks with less work: what is left out, and what is kept. ``model.py`` holds the equations.

- Modulations by position, and the renderer's by the time 1, depend on no image: computed once.
- All times of a sampling run are embedded in one batch, the codes once.
- Tokens that are not visible are left out of the context, so no mask exists.
- The first encoder block has one row of queries for all images, the last computes no latents; the last
  decoder block computes only keys and values of its context.

Shape legend: as in ``model.py``; ``k`` visible tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from comit_bench.nn.precision import full_precision
from comit_bench.tokenizers.selftok.model import (
    DualBlock,
    JointBlock,
    Selftok,
    attend,
    layer_norm,
    modulated,
    to_heads,
    token_positions,
)


@dataclass(frozen=True, slots=True)
class TimeStates:
    """Modulations of T times: image per block [6, T, 1, H], last context and head [2, T, 1, H]."""

    blocks: list[Tensor]
    last_context: Tensor
    head: Tensor

    def at(self, index: int) -> TimeStates:
        """One of the times, for the whole batch."""
        one = slice(index, index + 1)
        return TimeStates([b[:, one] for b in self.blocks], self.last_context[:, one], self.head[:, one])


def joint_block(
    block: JointBlock, context: Tensor, image: Tensor, own: Tensor, state: Tensor, *, sees_image: bool
) -> tuple[Tensor, Tensor]:
    """One decoder block on the visible tokens.

    Args:
        block: Its weights.
        context: [B, k, H]. In the last block it comes back as it was.
        image: [B, P, H], or [1, P, H] while it is the same for every message.
        own: Modulation of the context, [6, 1, k, H], or [2, T, 1, H] in the last block.
        state: Modulation of the image, [6, T, 1, H].
        sees_image: Whether context queries look at the image.
    """
    batch, visible, width = context.shape
    x_block, context_block = block.x_block, block.context_block
    qkv = x_block.attn.qkv(modulated(image, state[0], state[1])).expand(batch, -1, -1)
    q, k, v = (to_heads(part, block.heads) for part in qkv.chunk(3, dim=-1))
    y, project = modulated(context, own[0], own[1]), context_block.attn.qkv
    if block.last:
        parts = F.linear(y, project.weight[width:], project.bias[width:]).chunk(2, dim=-1)
    else:
        parts = project(y).chunk(3, dim=-1)
    *q_c, k_c, v_c = (to_heads(part, block.heads) for part in parts)
    keys, values = torch.cat([k_c, k], dim=2), torch.cat([v_c, v], dim=2)
    if block.last:
        return context, x_block.update(image, attend(q, keys, values), state)
    if sees_image:
        mixed = attend(torch.cat([q_c[0], q], dim=2), keys, values)
        context = context_block.update(context, mixed[:, :visible], own)
        return context, x_block.update(image, mixed[:, visible:], state)
    context = context_block.update(context, attend(q_c[0], k_c, v_c), own)
    return context, x_block.update(image, attend(q, keys, values), state)


class FastSelftok:
    """A network in use. Make a new one when the weights have changed: it keeps what it derived from them."""

    def __init__(self, model: Selftok) -> None:
        self.encoder, self.decoder = model.encoder, model.model

    @cached_property
    def query_states(self) -> list[Tensor]:
        """Modulations of the encoder's blocks, float32 [6, 1, K, Q] each."""
        device = self.encoder.query_tokens.device
        positions = token_positions(self.encoder.tokens, device)
        with full_precision(device):
            return [cast(DualBlock, block).modulation(positions) for block in self.encoder.blocks]

    @cached_property
    def context_states(self) -> list[Tensor]:
        """Modulations of the context for all blocks but the last, float32 [6, 1, K, H] each."""
        device = self.decoder.context_pos_embed.device
        positions = token_positions(self.decoder.tokens, device)
        with full_precision(device):
            return [block.context_block.positional(positions) for block in self.decoder.blocks()[:-1]]

    @cached_property
    def render_state(self) -> TimeStates:
        """Modulations of the renderer's time, in float32."""
        device = self.decoder.context_pos_embed.device
        with full_precision(device):
            return self.time_states(torch.ones(1, device=device))

    def time_states(self, times: Tensor) -> TimeStates:
        """Modulations of times [T] in 0..1."""
        decoder, blocks = self.decoder, self.decoder.blocks()
        c = decoder.t_embedder(times.float())
        images = [block.x_block.adaLN_modulation(c) for block in blocks]
        last = blocks[-1].context_block.adaLN_modulation(c)
        return TimeStates(images, last, decoder.final_layer.adaLN_modulation(c))

    def queries(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> queries [B, K, Q]."""
        x, q = self.encoder.embed(latents), cast(Tensor, self.encoder.query_tokens)
        blocks = cast(list[DualBlock], list(self.encoder.blocks))
        for index, (block, state) in enumerate(zip(blocks, self.query_states, strict=True)):
            n = layer_norm(x)
            q = block.update_queries(n, q, state)
            if index < len(blocks) - 1:
                x = block.update_latents(x, n)
        return q

    def decode(self, x: Tensor | None, context: Tensor, time: TimeStates) -> Tensor:
        """Velocity at x [B, C, h, w], or, for None, the rendered latents.

        Args:
            x: Noisy latents.
            context: From ``Decoder.context``, of the visible tokens only, [B, k, H].
            time: From :meth:`time_states`, of one time or of one per image.
        """
        image, rows = self.decoder.image_tokens(x)
        for index, block in enumerate(self.decoder.blocks()):
            own = time.last_context if block.last else self.context_states[index][:, :, : context.shape[1]]
            context, image = joint_block(
                block, context, image, own, time.blocks[index], sees_image=self.decoder.sees_image
            )
        out: Tensor = self.decoder.final_layer(image, time.head, rows)
        return out
