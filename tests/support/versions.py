"""Marks for what older releases of torch cannot do; the package supports torch from 2.6 on."""

from __future__ import annotations

import pytest
import torch

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
needs_fsdp2_on_cpu = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 runs on GPUs only"
)
