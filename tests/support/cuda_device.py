"""The CUDA device that a test in ``tests/gpu`` gets: a real one, or a pretended one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pretend_cuda import Pretended
from torch import Tensor


@dataclass(frozen=True)
class Cuda:
    """The device under test.

    Attributes:
        device: ``cuda``.
        mode: Of the pretence; None on a real device.
    """

    device: torch.device
    mode: Pretended | None

    @property
    def real(self) -> bool:
        return self.mode is None

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Inside the block nothing may make the host wait for the device."""
        if self.mode is not None:
            before = len(self.mode.syncs)
            yield
            assert self.mode.syncs[before:] == []
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def check(self, one: Tensor, other: Tensor, *, share: float = 1.0, within: float = 0.0) -> None:
        """``one`` is on the device and equal to ``other`` of the CPU.

        Args:
            one: Result.
            other: What it should be.
            share: Of the numbers that must be equal on a real device, which rounds otherwise; a pretended
                one computes what the CPU computes.
            within: Differences that count as equal.
        """
        assert one.is_cuda and one.shape == other.shape and one.dtype == other.dtype
        equal = (one.cpu().double() - other.double()).abs() <= within
        assert float(equal.double().mean()) >= (share if self.real else 1.0)
