"""Training on CUDA: a step in bfloat16, the whole loop with its checkpoints, and what memory says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_device import Cuda
from torch import Tensor

from comit_bench import load_tokenizer
from comit_bench.errors import BenchError, memory_runs_out
from comit_bench.nn.vae import DctVae
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train import checkpoint
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.comit import LossParts, TrainingModule
from comit_bench.train.sampling import plan_step

TINY = (
    "model.depth=2", "model.width=32", "model.heads=2", "model.message_length=4", "optim.name=adam",
    "model.representation_layer=1", "global_batch=8", "device_batch=4", "data.count=20", "data.val_count=4",
    "curriculum=[]", "crops.mean=3", "save_every=1", "validate_every=2", "log_every=1", "steps=2",
    "validation.steps=2", "validation.pictures=1", "keep_last=9",
)  # fmt: skip


def step_of(run: TrainConfig, device: torch.device, *, half: bool) -> tuple[LossParts, TrainingModule]:
    """Loss and gradients of one batch of noise."""
    network = Comit(run.model.spec(), DctVae(4))
    network.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    module = TrainingModule(network, run, None).to(device)
    step = next(n for n in range(99) if plan_step(run, step=n, samples=range(8)).crops > 2)
    plan = plan_step(run, step=step, samples=range(8)).to(device)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        parts = module(images.to(device), plan, None, 1.0)
        parts.total.backward()
    return parts, module


@pytest.mark.parametrize("half", [False, True])
def test_a_step_has_the_loss_and_gradients_of_the_cpu(cuda: Cuda, half: bool) -> None:
    run = load_config("comit-nano-no-srepa", (*TINY, "crops.mean=4"))
    parts, module = step_of(run, cuda.device, half=half)
    if not cuda.real:
        assert parts.total.is_cuda and all(p.grad.is_cuda for p in module.parameters() if p.requires_grad)  # type: ignore[union-attr]
        return
    wanted, plain = step_of(run, torch.device("cpu"), half=False)
    assert float(parts.total) == pytest.approx(float(wanted.total), rel=3e-2 if half else 1e-4)
    norms = []
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad is not None and other.grad is not None and bool(one.grad.isfinite().all())
            norms.append(((one.grad.cpu() - other.grad).norm(), other.grad.norm()))
    difference, size = (torch.stack(x).norm() for x in zip(*norms, strict=True))
    assert float(difference / size) < (0.3 if half else 1e-3)


def test_a_step_does_not_wait_for_the_device(cuda: Cuda) -> None:
    run = load_config("comit-nano-no-srepa", TINY)
    network = Comit(run.model.spec(), DctVae(4))
    network.predictor.init_weights(torch.Generator().manual_seed(0))
    module = TrainingModule(network, run, None).to(cuda.device)
    plans = [plan_step(run, step=n, samples=range(8)) for n in range(20)]
    images = torch.zeros(8, 3, 32, 32, device=cuda.device)

    def step(number: int) -> Tensor:
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16):
            total: Tensor = module(images, plans[number].to(cuda.device), None, 1.0).total
        total.backward()
        return total

    for number in range(20) if cuda.real else (0, 1, 2):
        step(number)  # masks are built once
    with cuda.without_waiting():
        for number in range(20) if cuda.real else (0, 1, 2):
            step(number)


@pytest.mark.parametrize(
    "extra", [("precision=bfloat16",), ("teacher.cache=disk", "objective.repa_weight=0.5")]
)
def test_the_loop_trains_resumes_and_exports(cuda: Cuda, extra: tuple[str, ...], tmp_path: Path) -> None:
    run = load_config("comit-nano", (*TINY, *extra, f"output={tmp_path}"))
    with torch.enable_grad():
        first = Trainer(run.model_copy(update={"steps": 1}), device="cuda", progress=False)
        assert first.fit() is not None and first.device.type == "cuda"
        trainer = Trainer(run, device="cuda", progress=False)
        exported = trainer.fit()
    assert exported is not None and trainer.counters.step == 2
    assert [checkpoint.step_of(p) for p in checkpoint.found(trainer.checkpoints)] == [1, 2]
    assert all(math.isfinite(value) for value in trainer.metrics.values())
    tokenizer = load_tokenizer(str(exported), device="cuda")
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).codes.is_cuda


def test_out_of_memory_says_what_to_lower(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_config("comit-nano-no-srepa", (*TINY, f"output={tmp_path}"))
    trainer = Trainer(run, device="cuda", progress=False)

    def forward(*args: Any) -> Any:
        if cuda.real:
            return torch.empty(1 << 46, device=cuda.device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(trainer, "module", forward)
    with pytest.raises(
        BenchError, match=r"out of memory \(CUDA out of memory.*allocate.*\)\. Lower device_batch"
    ):
        trainer.fit()
    with pytest.raises(BenchError, match="help"), memory_runs_out("help"):
        forward()
