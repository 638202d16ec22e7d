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
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_step import TrainStep, matrix_rate

from comit_bench.train.config import load_config

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.perf
CPU = torch.device("cpu")


def measure(benchmark: Any, step: TrainStep, rate: float, rounds: int) -> None:
    runner, step.module.runner = step.module.runner, None  # recomputed blocks are no work of the model
    with FlopCounterMode(display=False) as counter:
        step()
    step.module.runner = runner
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
    measure(benchmark, TrainStep(config, CPU, crops=crops, half=False), rate, rounds=20)


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
    measure(benchmark, TrainStep(config, device, crops=2, half=True), rate, rounds=10)
