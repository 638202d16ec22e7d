"""A training step for measurements, and the rate of large matrix products to compare it with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from comit_bench.nn.vae import build_vae
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.config import TrainConfig
from comit_bench.train.ema import Ema
from comit_bench.train.objectives.comit import TrainingModule
from comit_bench.train.optimizers import make_optimizer
from comit_bench.train.sampling import crop_counts, plan_step
from comit_bench.train.scaling import block_runner


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_for(device: torch.device) -> Callable[[], float]:
    """With one CPU thread the processor's time: it leaves out what other programs on the machine took."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int, rounds: int = 10) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, clock = float("inf"), clock_for(device)
    for _ in range(rounds + 1):
        wait(device)
        start = clock()
        a @ b
        wait(device)
        best = min(best, clock() - start)
    return 2 * side**3 / best


class TrainStep:
    """What a process of the trainer does per step after the data are there: forward, backward, clip,
    Adam, averages. Images are noise; the first step with ``crops`` crops is repeated."""

    def __init__(self, config: TrainConfig, device: torch.device, *, crops: int, half: bool) -> None:
        spec = config.model.spec()
        model = Comit(spec, build_vae("sd" if spec.vae.startswith("sd") else spec.vae, spec.vae_factor))
        model.predictor.init_weights(torch.Generator().manual_seed(0))
        self.module = TrainingModule(model.to(device), config, None).train()
        self.module.runner = block_runner(compile=config.compile, recompute=config.activation_checkpointing)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.module, config, device)
        self.ema = Ema(model.predictor, config.optim.ema)
        number = next(s for s in range(1500, 9999) if crop_counts(config.crops, seed=0, step=s)[0] == crops)
        self.plan = plan_step(config, step=number, samples=range(config.global_batch)).to(device)
        side = spec.image_size
        self.images = torch.rand(config.global_batch, 3, side, side, device=device) * 2 - 1
        self.device, self.half = device, half
        self.seconds: list[float] = []

    def __call__(self) -> None:
        clock = clock_for(self.device)
        start = clock()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.module(self.images, self.plan, None, 1.0).total
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.update(0)
        wait(self.device)
        self.seconds.append(clock() - start)
