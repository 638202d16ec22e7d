"""A probe fit of ImageNet100's size on random messages: seconds per epoch."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from common import Day

IMAGES, STOP, CLASSES, LENGTH, DIM = 126_689, 6_334, 100, 256, 6  # a twentieth is held out for early stopping


def fit(day: Day, count: int) -> dict[str, Any]:
    """One epoch of the paper recipe's probe."""
    from comit_bench.probing.fit import Examples, FitTask, MessageSource
    from comit_bench.recipes.specs import ProbeSpec, find_tasks

    g = torch.Generator().manual_seed(0)
    stop = max(2, count // 20)
    codes = torch.randint(-4, 4, (count + stop, 4 if day.tiny else LENGTH, DIM), generator=g).float().div(4)
    targets = torch.randint(0, CLASSES, (count + stop,), generator=g)
    recipe: ProbeSpec = find_tasks()["imagenet100"].spec.probe
    small = {"width": 32, "heads": 2, "batch_size": 8} if day.tiny else {}
    spec = recipe.model_copy(update={"max_epochs": 1, "patience": 1, **small})
    task = FitTask(
        spec=spec,
        outputs=CLASSES,
        train=Examples(MessageSource(codes=codes[:count]), targets[:count]),
        early_stop=Examples(MessageSource(codes=codes[count:]), targets[count:]),
    )
    if day.on_gpu:
        torch.cuda.reset_peak_memory_stats(day.device)
    before = time.perf_counter()
    done = task.fit(0, device=day.device)
    day.wait()
    seconds = time.perf_counter() - before
    return {
        "seconds": seconds,
        "images_per_s": count / seconds,
        "epoch_s": seconds * IMAGES / count,
        "most_epochs": recipe.max_epochs,
        "loss": done.history[-1].train_loss,
        "peak_gib": torch.cuda.max_memory_allocated(day.device) / 2**30 if day.on_gpu else None,
    }


def run(day: Day) -> None:
    """All images; a first small fit warms the device up."""
    for name, count in (("warm-up", 64), ("float32", 64 if day.tiny else IMAGES)):
        day.attempt({"dtype": name, "images": count}, partial(fit, day, count))
