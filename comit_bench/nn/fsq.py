"""Finite scalar quantization (Mentzer et al., 2023) as COMiT uses it.

Unusual here: rounding is half-to-even, levels are bounded by ``(L-1) * (1 + 1e-3) / 2`` so the outer
levels stay reachable, and everything runs in float32 even under autocast: a flipped rounding is a
flipped token.

Shape legend: ``... d`` pre-quantization vector, one value per level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from comit_bench.nn.finite import observe

EPS = 1e-3


class FSQ(nn.Module):
    """Per-dimension quantizer with ``levels[i]`` values in dimension i. Has no parameters.

    Args:
        levels: Number of values per dimension, each at least 2.

    Raises:
        ValueError: No levels, or a level below 2.
    """

    span: Tensor
    offset: Tensor
    shift: Tensor
    half_width: Tensor
    basis: Tensor
    sizes: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels must be integers of at least 2, got {list(levels)}")
        self.levels = tuple(int(level) for level in levels)
        half = [(level - 1) * (1 + EPS) / 2 for level in self.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
        constants: dict[str, tuple[Sequence[float], torch.dtype]] = {
            "span": (half, torch.float32),
            "offset": (offset, torch.float32),
            "shift": (shift, torch.float32),
            "half_width": ([level // 2 for level in self.levels], torch.float32),
            "sizes": (self.levels, torch.int64),
            "basis": ([math.prod(self.levels[:i]) for i in range(len(self.levels))], torch.int64),
        }
        for name, (values, dtype) in constants.items():
            # an explicit device: they are real even when the network is built on the meta device
            self.register_buffer(name, torch.tensor(values, dtype=dtype, device="cpu"), persistent=False)

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids: the product of the levels."""
        return math.prod(self.levels)

    @property
    def prior_id(self) -> int:
        """The id that fills the prior ("empty") message."""
        return self.vocab_size // 2

    def bound(self, z: Tensor) -> Tensor:
        """Squash [..., d] into the span of the levels, in units of one level, float32."""
        observe("latents", z)
        return torch.tanh(z.float() + self.shift) * self.span - self.offset  # autocast leaves these be

    def relaxed(self, z: Tensor) -> Tensor:
        """Bounded and renormalised but not rounded: the message output of a decoding call."""
        return self.bound(z) / self.half_width

    def forward(self, z: Tensor) -> Tensor:
        """Quantize [..., d] to codes in [-1, 1]; the gradient passes straight through."""
        bounded = self.bound(z)
        rounded = bounded + (torch.round(bounded) - bounded).detach() if z.requires_grad else bounded.round()
        return rounded / self.half_width

    def ids(self, codes: Tensor) -> Tensor:
        """Codes [..., d] -> int64 ids [...], first dimension fastest."""
        digits = torch.round(codes * self.half_width + self.half_width).long()
        return (digits * self.basis).sum(-1)

    def codes(self, ids: Tensor) -> Tensor:
        """Ids [...] in [0, vocab_size) -> float32 codes [..., d]."""
        digits = (ids.long().unsqueeze(-1) // self.basis) % self.sizes
        return (digits - self.half_width) / self.half_width
