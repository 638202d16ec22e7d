"""One training step: images per second, share of the matrix peak, memory, and the three largest costs.

Networks start untrained and there is no teacher; data are noise. Arithmetic is counted by torch; the peak is
one large bfloat16 product on the same device, a minute earlier.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import Day

OFF = ("data.kind=scenes", "teacher.name=none", "objective.repa_weight=0", "objective.srepa_weight=0")
# (preset, images, crops, further settings); what takes long to compile comes last
STEPS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("comit-nano", 256, 2, ()),
    ("comit-b", 64, 2, ()),
    ("comit-l", 32, 2, ()),
    ("comit-b", 64, 2, ("activation_checkpointing=true",)),
    ("comit-xl", 16, 2, ()),
    ("comit-b", 64, 2, ("compile=true",)),
)


def costs(day: Day, step: Any) -> list[dict[str, Any]]:
    """The three operations that take most of the device's time in one step."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if day.on_gpu else [])]
    with profile(activities=kinds) as seen:
        step()
    names = ("self_device_time_total", "self_cuda_time_total") if day.on_gpu else ("self_cpu_time_total",)

    def time_of(entry: Any) -> float:
        return float(next(getattr(entry, name) for name in names if hasattr(entry, name)))

    table = [e for e in seen.key_averages() if not e.key.startswith(("cuda", "ProfilerStep"))]
    if day.on_gpu:  # operations, not the kernels below them, which would count twice
        table = [e for e in table if e.key.startswith(("aten::", "autograd::", "torch::", "Optimizer"))]
    total = sum(map(time_of, table)) or 1.0
    largest = sorted(table, key=time_of, reverse=True)[:3]
    return [{"name": e.key, "share": time_of(e) / total, "calls": e.count} for e in largest]


def measure(
    day: Day, rate: float, name: str, images: int, crops: int, extra: tuple[str, ...]
) -> dict[str, Any]:
    """One step, repeated."""
    from torch.utils.flop_counter import FlopCounterMode
    from train_step import TrainStep

    from comit_bench.train.config import load_config

    config = load_config(name, (*OFF, f"global_batch={images}", *extra))
    step = TrainStep(config, day.device, crops=crops, half=day.on_gpu)
    runner, step.module.runner = step.module.runner, None  # what is computed again is no work of the network
    with FlopCounterMode(display=False) as counter:
        step()
    step.module.runner = runner
    step()
    if day.on_gpu:
        torch.cuda.reset_peak_memory_stats(day.device)
    step.seconds.clear()
    for _ in range(2 if day.tiny else 8):
        step()
        if sum(step.seconds) > 4:
            break
    seconds, flops = min(step.seconds), counter.get_total_flops()
    return {
        "images_per_s": images / seconds,
        "step_s": seconds,
        "step_tflop": flops / 1e12,
        "of_peak": flops / seconds / rate,
        # of the images alone, without their local crops
        "vae_share": day.best_of(lambda: step.module._latents(step.images), budget=0.5) / seconds,
        "peak_gib": torch.cuda.max_memory_allocated(day.device) / 2**30 if day.on_gpu else None,
        "costs": costs(day, step),
    }


def run(day: Day) -> None:
    """Small networks first."""
    from train_step import matrix_rate

    large = not day.tiny
    dtype = torch.bfloat16 if day.on_gpu else torch.float32
    rate = matrix_rate(day.device, dtype, 8192 if large else 256)
    steps = STEPS if large else (("comit-nano", 4, 2, ("optim.name=adam",)),)
    for number, (name, images, crops, extra) in enumerate(steps):
        if day.left < (40 if "compile=true" in extra else 8):
            left_out = [" ".join((name, *extra)) for name, _, _, extra in steps[number:]]
            day.write(what="left out for want of time", names=left_out)
            return
        facts = {"name": name, "images": images, "crops": crops, "settings": " ".join(extra)}
        day.attempt(facts, partial(measure, day, rate, name, images, crops, extra))
