"""Float32 where float32 is meant: whatever surrounds it, and on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside; the meta device has none. Inputs that autocast has rounded must be cast back."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Float32 factors as they are on CUDA; torch otherwise rounds those of convolutions to TF32 (10 bits)."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    flags: list[tuple[Any, str, object]] = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    try:
        before = [getattr(place, name) for place, name, _ in flags]
    except RuntimeError:  # somebody has used the names that came with torch 2.9; only these are left then
        flags = [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
        before = [getattr(place, name) for place, name, _ in flags]
    try:
        for place, name, value in flags:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(flags, before, strict=True):
            setattr(place, name, value)
