"""Exponential moving average of the weights, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from comit_bench.train.sharding import local


class Ema:
    """Averages of a module's trainable parameters; those of sharded parameters are sharded likewise.

    Args:
        module: Its parameters that require a gradient are followed.
        decay: Share of the old average that is kept per step.
        warmup: Start with a short memory, ``min(decay, (1 + s) / (10 + s))``, so that short runs do not
            carry their random start along.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().float().clone() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after zero-based optimizer step ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        current = [local(p.detach()).float() for p in self._live.values()]
        torch._foreach_lerp_([local(a) for a in self.averages.values()], current, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averages; afterwards its own weights, bit for bit."""
        with torch.no_grad():
            own = [p.detach().clone() for p in self._live.values()]
            for name, parameter in self._live.items():
                parameter.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._live.values(), own, strict=True):
                    parameter.copy_(value)
