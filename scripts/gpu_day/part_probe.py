"""A probe fit of ImageNet100's size on random messages: seconds per epoch.

In float32 and with rounded products; and scores of both on messages that can be learned.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from common import Day

from comit_bench.probing.fit import Examples, FitTask, MessageSource, Precision, is_top1
from comit_bench.recipes.specs import ProbeSpec, find_tasks

IMAGES, STOP, CLASSES, LENGTH, DIM = 126_689, 6_334, 100, 256, 6  # a twentieth is held out for early stopping


def fit(day: Day, count: int, precision: Precision) -> dict[str, Any]:
    """One epoch of the paper recipe's probe."""
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
        precision=precision,
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


def scores(day: Day, precision: Precision) -> dict[str, Any]:
    """Shares of right answers where a class shows in one code among noise."""
    g = torch.Generator().manual_seed(0)
    train, rest, classes = (64, 32, 4) if day.tiny else (8000, 2000, 20)
    targets = torch.randint(0, classes, (train + 2 * rest,), generator=g)
    codes = torch.randn(len(targets), 16, classes, generator=g)
    codes[:, 0] += 2.0 * torch.nn.functional.one_hot(targets, classes)
    ends = {"train": (0, train), "early_stop": (train, train + rest), "report": (train + rest, len(targets))}
    parts = {name: Examples(MessageSource(codes=codes[a:b]), targets[a:b]) for name, (a, b) in ends.items()}
    epochs = 2 if day.tiny else 20
    spec = ProbeSpec(width=64, heads=4, batch_size=64, learning_rate=1e-3, max_epochs=epochs, patience=5)
    task = FitTask(spec=spec, outputs=classes, precision=precision, **parts)
    found = []
    for seed in range(3):
        outputs = task.fit(seed, device=day.device).outputs
        assert outputs is not None
        found.append(float(is_top1(outputs, targets[train + rest :]).mean()))
    return {"score": sum(found) / len(found), "of_seeds": found}


def run(day: Day) -> None:
    """All images; a first small fit warms the device up."""
    count = 64 if day.tiny else IMAGES
    fits: tuple[tuple[str, int, Precision], ...] = (
        ("warm-up", 64, "float32"), ("float32", count, "float32"), ("bfloat16", count, "bfloat16"),
    )  # fmt: skip
    for name, images, precision in fits:
        day.attempt({"dtype": name, "images": images}, partial(fit, day, images, precision))
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        day.attempt({"scores": precision}, partial(scores, day, precision))
