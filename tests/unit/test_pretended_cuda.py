"""Every path of the package that runs on a GPU, on a pretended one: no tensor, index or generator of the
wrong device, and the same numbers as on the CPU (see ``tests/support/pretend_cuda.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretend_cuda import PretendTensor, pretend_cuda
from small_tokenizers import SMALL_TOKENIZERS, pictures, streams

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
POLICIES = (
    None, "global", "global+raster:3", "random:3", "adaptive:3", "global+adaptive:3", "adaptive-shared:3",
    "random-shared:2", "order:4,0,8",
)  # fmt: skip


def test_the_pretence_refuses_what_cuda_refuses() -> None:
    with pretend_cuda() as cuda:
        x = torch.zeros(3, 2, device="cuda")
        assert x.is_cuda and (x + torch.tensor(1.0)).is_cuda and x.cpu().device == CPU
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(3, 2)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, torch.zeros(1, 2)])
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(2, 2)(x)
        with pytest.raises(RuntimeError, match="indices on cuda"):
            torch.zeros(3)[torch.tensor([1], device="cuda")]
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, generator=torch.Generator("cuda"))
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            x.numpy()
        cuda.syncs.clear()
        assert torch.randn(2, device="cuda", generator=torch.Generator("cuda")).is_cuda and not cuda.syncs
        x.to("cpu"), x.sum().item(), x.nonzero(), x[torch.tensor([0])], torch.zeros(2).to("cuda")
        assert len(cuda.syncs) == 5
        torch.zeros(2).to("cuda", non_blocking=True), x[torch.tensor([0], device="cuda", dtype=torch.int64)]
        assert len(cuda.syncs) == 6  # the last index was made on the host


def close(one: Any, other: Any, exact: bool = True, *, steps: int = 0) -> None:
    """On the device, and equal up to ``steps``: kernels of another memory layout round otherwise."""
    assert isinstance(one, PretendTensor) and one.shape == other.shape and one.dtype == other.dtype
    assert not exact or float((one.cpu().double() - other.double()).abs().max()) <= steps


@pytest.mark.parametrize("name", SMALL_TOKENIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_images(name: str, dtype: torch.dtype) -> None:
    plain: Any = SMALL_TOKENIZERS[name](device=CPU, dtype=dtype)
    images = pictures(plain, 3)
    wanted = plain.encode(images, generators=streams(3))
    decoded = plain.decode(wanted, seeds=range(3))
    with pretend_cuda():
        tokenizer: Any = SMALL_TOKENIZERS[name](device=CUDA, dtype=dtype)
        tokens = tokenizer.encode(images if name == "comit-nano" else images.to(CUDA), generators=streams(3))
        exact = dtype == torch.float32  # autocast rounds other operations on CUDA than on the CPU
        if tokens.ids is not None:
            close(tokens.ids, wanted.ids, exact)
            close(tokenizer.codes_from_ids(tokens.ids.cpu()), tokens.codes.cpu())
        close(tokens.codes, wanted.codes, exact)
        made = tokenizer.decode(wanted, seeds=range(3))  # from the host, as a store on disk hands them over
        close(made, decoded, exact, steps=1)
        if name == "comit-sd":
            close(tokenizer.decode(tokens, seeds=range(3)), made.cpu(), exact)
