"""Attention maps of a few images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest
from comit_bench.tokenizers.base import Attends, Tokens


def gather_attention(
    tokenizer: Attends, tokens: Tokens, request: AttentionRequest, *, seeds: Sequence[int]
) -> Tensor:
    """float32 [layers, times, B, H, K, h, w] on the CPU; ``times`` is 1 for a decoder of a single pass."""
    found: dict[tuple[int, int], list[Tensor]] = {}

    def keep(first: int, layer: int, time: int, maps: Tensor) -> None:
        found.setdefault((layer, time), []).append(maps.float().cpu())

    tokenizer.attention(tokens, request, keep, seeds=seeds)
    times = 1 + max(time for _, time in found)
    layers = [
        torch.stack([torch.cat(found[layer, time]) for time in range(times)])
        for layer in range(len(request.layers))
    ]
    return torch.stack(layers)
