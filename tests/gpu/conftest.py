"""Every test here runs twice: on a pretended CUDA device, always, and on a real one with ``-m gpu``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_device import Cuda
from pretend_cuda import pretend_cuda


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    """The device."""
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield Cuda(torch.device("cuda"), None)
        return
    with pretend_cuda() as mode:
        yield Cuda(torch.device("cuda"), mode)
