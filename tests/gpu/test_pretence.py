"""The pretended device refuses what a real one refuses, and counts what makes the host wait."""

from __future__ import annotations

import pytest
import torch
from pretend_cuda import pretend_cuda


def test_operands_must_be_on_one_device() -> None:
    with pretend_cuda():
        x = torch.zeros(3, 2, device="cuda")
        assert x.is_cuda and (x + torch.tensor(1.0)).is_cuda and x.cpu().device.type == "cpu"
        assert torch.equal((x + 1).cpu(), torch.ones(3, 2))
        for wrong in (
            lambda: x + torch.zeros(3, 2),
            lambda: torch.cat([x, torch.zeros(1, 2)]),
            lambda: torch.nn.Linear(2, 2)(x),
            lambda: torch.bincount(torch.zeros(2, dtype=torch.int64), weights=x[0]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()


def test_indices_generators_and_numpy() -> None:
    with pretend_cuda():
        x = torch.zeros(3, 2, device="cuda")
        with pytest.raises(RuntimeError, match="indices on cuda"):
            torch.zeros(3)[torch.tensor([1], device="cuda")]
        with pytest.raises(RuntimeError, match="cannot draw on cuda"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="cannot draw on cpu"):
            torch.randn(2, generator=torch.Generator("cuda"))
        with pytest.raises(RuntimeError, match="cannot draw on cuda"):
            x.normal_(generator=torch.Generator())
        assert torch.randn(2, device="cuda", generator=torch.Generator("cuda")).is_cuda
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            x.numpy()


def test_waiting_is_counted() -> None:
    with pretend_cuda() as cuda:
        x = torch.zeros(3, 2, device="cuda")
        assert cuda.syncs == []
        row = torch.tensor([0])
        x.to("cpu"), x.sum().item(), x.nonzero(), x[row], row.to("cuda"), x[x > 0], x.tolist()
        assert len(cuda.syncs) == 7
        there = row.to("cuda", non_blocking=True)
        x[there], x + 1.0, x.masked_fill(x > 0, 2.0)
        assert len(cuda.syncs) == 7


def test_modules_move_in_place_and_outside_nothing_works() -> None:
    with pretend_cuda():
        layer = torch.nn.Linear(2, 2)
        weight = layer.weight
        layer.to("cuda")
        assert layer.weight is weight and weight.is_cuda
        layer(torch.ones(1, 2, device="cuda")).sum().backward()
        assert weight.grad is not None and weight.grad.is_cuda
    with pytest.raises(RuntimeError, match="outside"):
        weight + 1
    assert torch.Generator("cpu").device.type == "cpu" and not isinstance(torch.zeros(1), type(weight))
