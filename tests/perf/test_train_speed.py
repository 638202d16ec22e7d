"""Wall time of a training step, and which share of the machine's float32 or bfloat16 matrix rate it reaches.

No limits: numbers are for comparing. The least of many rounds counts, and with one CPU thread the
processor's time instead of the wall clock's. ``extra_info`` of the benchmark (and ``-s``) holds images
per second, FLOPs of the step by torch's counter, the rate of one large matrix product measured in the
same process with the same number of threads, and their quotient, the model FLOPs utilisation.

    OMP_NUM_THREADS=1 python -m pytest tests/perf/test_train_speed.py -m "perf and not gpu" -s
    python -m pytest tests/perf/test_train_speed.py -m "perf and gpu" -s
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.models.comit import Comit
from comit_bench.models.vae import build_vae
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.ema import Ema
from comit_bench.train.objective import TrainingModule
from comit_bench.train.optimizers import make_optimizer
from comit_bench.train.sampling import crop_count, plan_step
from comit_bench.train.scaling import block_runner

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.perf
CPU = torch.device("cpu")


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


class Step:
    """What a process of the trainer does per step after the data are there: forward, backward, clip,
    Adam, averages. Images are noise; the first step with ``crops`` crops is repeated."""

    def __init__(self, config: TrainConfig, device: torch.device, *, crops: int, half: bool) -> None:
        spec = config.model.spec()
        model = Comit(spec, build_vae("sd" if spec.vae.startswith("sd") else spec.vae, spec.vae_factor))
        model.predictor.init_weights(torch.Generator().manual_seed(0))
        self.module = TrainingModule(model.to(device), config, None).train()
        model.predictor.runner = block_runner(
            compile=config.compile, recompute=config.activation_checkpointing
        )
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.module, config, device)
        self.ema = Ema(model.predictor, config.optim.ema)
        number = next(s for s in range(1500, 9999) if crop_count(config.crops, seed=0, step=s) == crops)
        ids = [f"perf/{i}" for i in range(config.global_batch)]
        self.plan = plan_step(config, step=number, sample_ids=ids).to(device)
        side = spec.image_size
        self.images = torch.rand(len(ids), 3, side, side, device=device) * 2 - 1
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


def measure(benchmark: Any, step: Step, rate: float, rounds: int) -> None:
    predictor = step.module.model.predictor
    runner, predictor.runner = predictor.runner, None  # recomputed blocks are no work of the model
    with FlopCounterMode(display=False) as counter:
        step()
    predictor.runner = runner
    step()
    step.seconds.clear()
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
    seconds = min(step.seconds)  # other work on the machine only ever adds time
    flops = counter.get_total_flops()
    facts = {
        "step_ms": round(seconds * 1e3, 1),
        "images_per_s": round(len(step.images) / seconds, 1),
        "step_gflop": round(flops / 1e9, 2),
        "matrix_gflop_per_s": round(rate / 1e9, 1),
        "utilisation": round(flops / seconds / rate, 3),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    benchmark.extra_info.update(facts)
    sys.stderr.write(f"\n{benchmark.name}: {facts}\n")
    assert flops > 0


@pytest.mark.parametrize("crops", [1, 4])
def test_train_step_of_nano_on_the_cpu(benchmark: Any, crops: int) -> None:
    config = load_config("comit-nano-no-srepa")
    rate = matrix_rate(CPU, torch.float32, 1024)
    measure(benchmark, Step(config, CPU, crops=crops, half=False), rate, rounds=20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "batch"), [("comit-b", 64), ("comit-l", 32)])
def test_train_step_at_256_px_on_the_gpu(benchmark: Any, name: str, batch: int, compiled: bool) -> None:
    """Without teacher and with an untrained autoencoder: it costs the same."""
    off = ("data.kind=scenes", "teacher.name=none", "objective.repa_weight=0", "objective.srepa_weight=0")
    config = load_config(name, (*off, f"global_batch={batch}", f"compile={str(compiled).lower()}"))
    device = torch.device("cuda")
    rate = matrix_rate(device, torch.bfloat16, 8192)
    measure(benchmark, Step(config, device, crops=2, half=True), rate, rounds=10)
