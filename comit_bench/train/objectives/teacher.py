"""Training of ``scenes-teacher``: features of embedded scenes without class labels.

Inverse rendering: from an image on a photograph, a small convolutional network learns to predict the
object alone, in two compressed forms. From its image vector, through one Linear: where the object is
(coverage on a 16 x 16 grid) and what colour it has there (8 x 8 grid of the object on black). From
every patch vector: coverage of the patch's pixels and its mean colour. No label is used; the renderer
knows which pixels it painted. So the teacher is label-free and renderer-supervised, not self-supervised.

It sees scenes with one and with two objects whose numbers no probe uses. After training the outputs are
standardised over training scenes, so that a cosine compares what differs between images.

``python -m comit_bench.train --config scenes-teacher``. One process.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.teachers import ScenesTeacherNet
from comit_bench.seeding import generator_for
from comit_bench.train.card import USE_TEACHER, CardText, RunFacts, render
from comit_bench.train.config import TeacherRun
from comit_bench.train.data import Broken, channels_first, painted
from comit_bench.train.logs import read_rows
from comit_bench.train.objectives.base import (
    Process,
    RowBatch,
    RowSteps,
    TrainObjective,
    only_process,
    write_teacher,
)

PROBE_SCENES = 4000  # the recipes' train splits end before this number
PROBE_VAL = 1000  # and their val splits before this one
COVER, COLOUR = 16, 8  # sides of the two targets of the image vector


def paint_with_targets(layout: Any, split: Any, start: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Scenes uint8 [n, 3, S, S] and their coverage bool [n, S, S], any object."""
    parts = list(painted(layout, split, start, count, side))
    covers = np.concatenate([part.masks.any(axis=1) for part in parts])
    return channels_first([part.images for part in parts]), torch.from_numpy(covers)


class InverseRendering(nn.Module):
    """The network with the linear read-outs that it is trained through, and the loss."""

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

    def forward(self, pixels: Tensor, cover: Tensor) -> tuple[Tensor]:
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
        return (where + what + self.patch_weight * here,)


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


class TeacherObjective(TrainObjective):
    """See the module. The last weights are exported, standardised and rounded to float16.

    Raises:
        UsageError: Several processes.
    """

    parts = ("loss",)
    config: TeacherRun
    module: InverseRendering
    network: ScenesTeacherNet

    def __init__(self, config: TeacherRun, process: Process) -> None:
        only_process(config, process)
        self.config, self.process = config, process
        parts = [
            paint_with_targets(layout, "train", PROBE_SCENES, config.count, config.image_size)
            for layout in ("recognition", "pairs")
        ]
        self.pixels, self.covers = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        self.train_images, self.val_images = len(self.pixels), config.val_count
        self.broken = Broken(len(self.pixels), 0.0)
        self.steps = RowSteps(config.steps, self._rows)

    def _rows(self, step: int) -> Tensor:
        generator = generator_for(self.config.seed, f"scenes-teacher/{step}")
        return torch.randint(len(self.pixels), (self.config.batch,), generator=generator)

    def build(self) -> None:
        self.module = InverseRendering(self.config).to(self.process.device)
        self.network = self.module.network

    def inputs(self, batch: RowBatch, rows: slice) -> tuple[Tensor, Tensor]:
        chosen = batch.rows[rows]
        return self.pixels[chosen].to(self.process.device), self.covers[chosen].to(self.process.device)

    def export(self, network: nn.Module, facts: RunFacts, target: Path, picture: Path) -> None:
        """Standardise the features, measure what can be read off them, write the folder."""
        run, network = self.config, cast(ScenesTeacherNet, network)
        standardise(network, self.pixels[:: max(1, len(self.pixels) // 4000)].to(self.process.device))
        fresh = InverseRendering(run).network
        random = read_out(fresh, 2000, run.val_count, run.image_size)
        found = read_out(network, 4000, run.val_count, run.image_size)
        metrics = {"loss": float(read_rows(target.parent.parent / "log.csv")[-1]["loss"]), **found}
        metrics |= {f"random_{name}": value for name, value in random.items()}
        text = render(run, replace(facts, metrics=metrics), about(run, network))
        write_teacher(target, network, text)


def about(run: TeacherRun, network: ScenesTeacherNet) -> CardText:
    """What the card says of the teacher."""
    return CardText(
        tags=("scenes-teacher",),
        what=f"A small convolutional network that gives features of the embedded scenes: one vector of "
        f"{run.dim} per image and one\nper {run.patch} px patch, standardised over training scenes. "
        "Label-free, renderer-supervised (inverse rendering):\nit learnt to predict where the painter put "
        "objects and in which colour, never a class.",
        facts=(f"parameters: {sum(p.numel() for p in network.parameters()):,} (stored as float16)",),
        data=f"{run.count:,} scenes with one and {run.count:,} with two objects, none of a probe",
        measured="scenes; linear read-outs of the image vector (chance 0.1 each), also with random weights",
        names={
            "loss": "training loss at the end",
            "digit": "digit",
            "colour": "colour",
            "random_digit": "digit, random weights",
            "random_colour": "colour, random weights",
        },
        recipe=("loss: mean squared errors of coverage and colour of the whole image and of every patch",),
        use=USE_TEACHER,
    )
