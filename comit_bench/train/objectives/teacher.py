"""Training of ``scenes-teacher``: features of embedded scenes without class labels.

Inverse rendering: from an image on a photograph, a small convolutional network learns to predict the
object alone, in two compressed forms. From its image vector, through one Linear: where the object is
(coverage on a 16 x 16 grid) and what colour it has there (8 x 8 grid of the object on black). From
every patch vector: coverage of the patch's pixels and its mean colour. No label is used; the renderer
knows which pixels it painted. So the teacher is label-free and renderer-supervised, not self-supervised.

It sees scenes with one and with two objects whose numbers no probe uses. After training the outputs are
standardised over training scenes, so that a cosine compares what differs between images.

``python -m comit_bench.train --config scenes-teacher``. One process; a killed run continues from its
last checkpoint, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench import __version__
from comit_bench.files import atomic_path, user_path
from comit_bench.nn.teachers import WEIGHTS, ScenesTeacherNet
from comit_bench.recipes.specs import GeneratorSpec
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.checkpoints import write_tensors
from comit_bench.train.config import TeacherRun
from comit_bench.train.logs import CsvLog, read_rows
from comit_bench.train.runstate import RunState, only_training

PROBE_SCENES = 4000  # the recipes' train splits end before this number
PROBE_VAL = 1000  # and their val splits before this one
COLUMNS = ("step", "images", "learning_rate", "loss", "images_per_s")
COVER, COLOUR = 16, 8  # sides of the two targets of the image vector


def paint_with_targets(layout: Any, split: Any, start: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Scenes uint8 [n, 3, S, S] and their coverage bool [n, S, S], any object."""
    from comit_bench.data.scenes.painting import paint

    spec = GeneratorSpec(layout=layout, image_size=side)
    images, covers = [], []
    for first in range(start, start + count, 1000):
        scenes = paint(spec, split, range(first, min(first + 1000, start + count)))
        images.append(scenes.images)
        covers.append(scenes.masks.any(axis=1))
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.concatenate(covers))


class InverseRendering(nn.Module):
    """The network with the linear read-outs that it is trained through, and the loss.

    Args:
        run: Settings.
    """

    def __init__(self, run: TeacherRun) -> None:
        super().__init__()
        self.network = ScenesTeacherNet(run.spec())
        self.cover = nn.Linear(run.dim, COVER**2)
        self.colour = nn.Linear(run.dim, 3 * COLOUR**2)
        self.patch = nn.Conv2d(run.dim, run.patch**2 + 3, 1)
        self.side, self.patch_weight = run.patch, run.patch_weight
        generator = generator_for(run.seed, "scenes-teacher/init")
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    fan = parameter[0].numel()
                    parameter.normal_(0.0, math.sqrt(1.0 / fan), generator=generator)
                else:
                    parameter.zero_()
            for module in self.modules():
                if isinstance(module, nn.GroupNorm):
                    module.weight.fill_(1.0)

    def forward(self, pixels: Tensor, cover: Tensor) -> Tensor:
        """Loss of uint8 pixels [B, 3, S, S] with coverage bool [B, S, S]; mean squared errors."""
        mask = cover[:, None].float()
        images = pixels.float().div(127.5) - 1
        alone = (images + 1) * mask  # the object on black, 0..2
        cls, patches = self.network(images)
        where = F.mse_loss(self.cover(cls), F.adaptive_avg_pool2d(mask, COVER).flatten(1))
        what = F.mse_loss(self.colour(cls), F.adaptive_avg_pool2d(alone, COLOUR).flatten(1))
        inside = F.pixel_unshuffle(mask, self.side)
        mean = F.avg_pool2d(alone, self.side)
        here = F.mse_loss(self.patch(patches), torch.cat([inside, mean], dim=1))
        return where + what + self.patch_weight * here


class _Run(RunState):
    """State of a run on disk."""

    def __init__(self, run: TeacherRun, module: InverseRendering, optimizer: torch.optim.Adam) -> None:
        settings = run.model_dump(mode="json", exclude={"output", "log_every", "save_every"})
        super().__init__(
            "scenes-teacher", user_path(run.output, "output") / run.name, settings, module, optimizer
        )


def _rate(run: TeacherRun, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / run.warmup_steps)
    return run.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / run.steps))


def _batch(run: TeacherRun, step: int, total: int) -> Tensor:
    """Rows of a step, a function of seed and step alone."""
    generator = generator_for(run.seed, f"scenes-teacher/{step}")
    return torch.randint(total, (run.batch,), generator=generator)


@torch.inference_mode()
def _outputs(network: ScenesTeacherNet, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Image vectors [n, dim] and patch vectors [n, dim, g, g] of uint8 pixels."""
    done = [network(part.float().div(127.5) - 1) for part in pixels.split(256)]
    return torch.cat([c for c, _ in done]), torch.cat([p for _, p in done])


@torch.no_grad()
def standardise(network: ScenesTeacherNet, pixels: Tensor) -> None:
    """Set the network's output statistics so that features have mean 0 and deviation 1 on ``pixels``."""
    network.forget_statistics()
    cls, patches = _outputs(network, pixels)
    network.cls_mean.copy_(cls.mean(0))
    network.cls_deviation.copy_(cls.std(0).clamp_min(1e-4))
    network.patch_mean.copy_(patches.mean((0, 2, 3)))
    network.patch_deviation.copy_(patches.std((0, 2, 3)).clamp_min(1e-4))


def read_out(network: ScenesTeacherNet, count: int, val_count: int, side: int) -> dict[str, float]:
    """Accuracy of linear read-outs of digit and colour from image vectors; measures, never trains.

    The classes go round by number (digits in ones, colours in tens), which is how the painter labels.
    """
    from sklearn.linear_model import LogisticRegression

    vectors, labels = [], []
    for split, start, n in (("train", PROBE_SCENES, count), ("val", PROBE_VAL, val_count)):
        pixels, _ = paint_with_targets("recognition", split, start, n, side)
        vectors.append(_outputs(network, pixels)[0].numpy())
        numbers = np.arange(start, start + n)
        labels.append({"digit": numbers % 10, "colour": numbers // 10 % 10})
    scores = {}
    for name in ("digit", "colour"):
        model = LogisticRegression(max_iter=300).fit(vectors[0], labels[0][name])
        scores[name] = float(model.score(vectors[1], labels[1][name]))
    return scores


def _card(run: TeacherRun, facts: dict[str, Any]) -> str:
    settings = json.dumps(run.model_dump(mode="json"), indent=1)
    return f"""---
license: apache-2.0
library_name: comit_bench
tags: [comit_bench, scenes-teacher]
---
# {run.name}

A small convolutional network ({facts["parameters"]:,} parameters) that gives features of the embedded scenes:
one vector of {run.dim} per image and one per {run.patch} px patch, standardised over training scenes. Made by
comit_bench {__version__}.

Label-free, renderer-supervised (inverse rendering): it learnt to predict where the painter put objects and
in which colour, never a class. {run.count:,} scenes with one and {run.count:,} with two objects, none of
which any probe uses; {run.steps:,} steps of {run.batch}.

- loss at the end: {facts["loss"]:.4f}
- linear read-out of the image vector on {run.val_count} held-out scenes: digit {facts["digit"]:.3f}, colour
  {facts["colour"]:.3f} (chance 0.1 each); with random weights: digit {facts["random_digit"]:.3f}, colour
  {facts["random_colour"]:.3f}
- time: {facts["seconds"] / 60:.1f} min on {facts["hardware"]}
- command: `{facts["command"]}`

Settings:

```json
{settings}
```
"""


def fit_teacher(run: TeacherRun, *, progress: bool = True, command: str = "") -> Path:
    """Train, measure and export.

    Returns:
        The folder with ``config.json``, ``model.safetensors`` and the card; ``teacher.path`` takes it.

    Raises:
        UsageError: Settings that do not fit, or a checkpoint of other ones.
        BenchError: Another training runs in this folder, or it cannot be written.
    """
    with only_training(run.output.expanduser() / run.name):
        return _fit(run, progress, command)


def _fit(run: TeacherRun, progress: bool, command: str) -> Path:
    from tqdm import tqdm

    module = InverseRendering(run)
    random_scores = read_out(module.network, 2000, run.val_count, run.image_size)
    optimizer = torch.optim.Adam(module.parameters(), lr=run.learning_rate)
    state = _Run(run, module, optimizer)
    parts = [
        paint_with_targets(layout, "train", PROBE_SCENES, run.count, run.image_size)
        for layout in ("recognition", "pairs")
    ]
    pixels, covers = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    first = state.load()
    log = CsvLog(state.directory / "log.csv", COLUMNS)
    log.start(first)
    logged = read_rows(log.path)  # a finished run that is exported again has no steps left to take a mean of
    losses, started, mean = [], time.monotonic(), float(logged[-1]["loss"]) if logged else math.nan
    before = state.seconds
    bar = tqdm(range(first, run.steps), run.name, run.steps, initial=first, disable=not progress, unit="step")
    for step in bar:
        rows = _batch(run, step, len(pixels))
        loss = module(pixels[rows], covers[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(run, step)
        optimizer.step()
        losses.append(loss.detach())
        done, now = step + 1, time.monotonic()
        state.seconds = before + now - started
        if done % run.log_every == 0 or done == run.steps:
            mean = float(torch.stack(losses).mean())
            rate = round((done - first) * run.batch / (now - started), 1)
            losses.clear()
            log.append({"step": done, "images": done * run.batch, "learning_rate": _rate(run, step),
                        "loss": mean, "images_per_s": rate})  # fmt: skip
            bar.set_postfix_str(f"loss {mean:.4f} {rate} img/s")
        if done % run.save_every == 0 or done == run.steps:
            state.save(done)
    standardise(module.network, pixels[:: max(1, len(pixels) // 4000)])
    return _export(run, module.network, state, mean, random_scores, command)


def _export(
    run: TeacherRun,
    network: ScenesTeacherNet,
    state: _Run,
    loss: float,
    random_scores: dict[str, float],
    command: str,
) -> Path:
    scores = read_out(network, 4000, run.val_count, run.image_size)
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "loss": loss,
        "seconds": state.seconds,
        "hardware": f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "command": command,
        **scores,
        **{f"random_{name}": value for name, value in random_scores.items()},
    }
    target = state.directory / run.name
    with atomic_path(target) as temporary:
        temporary.mkdir()
        write_tensors(temporary / WEIGHTS, {k: v.half() for k, v in network.state_dict().items()})
        (temporary / "config.json").write_text(json.dumps(asdict(network.spec), indent=1) + "\n")
        (temporary / "README.md").write_text(_card(run, facts), encoding="utf-8")
    return target
