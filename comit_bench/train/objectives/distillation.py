"""Training of ``drawings-teacher``: a small network learns to give the features of a large one.

The large network (EfficientNet-Lite0) sees every training scene once; its features are kept on disk. What is
learnt are their first ``dim`` principal components over the training scenes, each scaled to deviation 1: of
the image vector, and of the vector of every 8 px cell. The loss is the mean squared error, so a component
that the small network cannot see stays small in its features.

No label of the drawings and nothing of the renderer is used. The large network learnt from ImageNet-1k with
its labels, so the features carry what those say about photographs of things.

``python -m comit_bench.train --config drawings-teacher``. One process; needs the extra ``teacher``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.data.scenes.atlas import load_drawings
from comit_bench.data.scenes.painting import paint
from comit_bench.errors import UsageError
from comit_bench.nn.teachers import DrawingsTeacherNet, Teacher, TeacherFeatures, load_teacher
from comit_bench.recipes.specs import GeneratorSpec
from comit_bench.seeding import generator_for
from comit_bench.train.card import USE_TEACHER, CardText, RunFacts, render
from comit_bench.train.config import DistillationRun
from comit_bench.train.data import Broken, channels_first, painted_drawings, to_pixels
from comit_bench.train.features import FeatureStore, images_digest, open_features
from comit_bench.train.logs import read_rows
from comit_bench.train.objectives.base import (
    Process,
    RowBatch,
    RowSteps,
    TrainObjective,
    only_process,
    write_teacher,
)

SAMPLE = 4000  # scenes that the components are found on, at most
PROBE_SCENES = 10_000  # scenes of the recognition recipe end before this number
PER_CONCEPT = 20  # scenes of the gallery
NEIGHBOURS, SHARPNESS = 10, 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """``(x - mean) @ directions`` has deviation 1 on the data: [d], [d, k]."""

    mean: Tensor
    directions: Tensor

    def of(self, vectors: Tensor) -> Tensor:
        """[..., d] -> [..., k]."""
        return (vectors - self.mean) @ self.directions


def principal_components(vectors: Tensor, count: int) -> Components:
    """The first components of float32 [n, d], computed in float64; the largest weight of each is positive.

    Raises:
        UsageError: Fewer dimensions or vectors than components.
    """
    if count > min(vectors.shape[1], len(vectors) - 1):
        raise UsageError(
            f"dim={count}: the large network gives {len(vectors)} vectors of {vectors.shape[1]}, which have "
            f"no more than {min(vectors.shape[1], len(vectors) - 1)} components"
        )
    mean = vectors.double().mean(0)
    centred = vectors.double() - mean
    powers, basis = torch.linalg.eigh(centred.T @ centred / len(vectors))
    powers, basis = powers.flip(0)[:count], basis.flip(1)[:, :count]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    directions = basis * signs / powers.clamp_min(powers[0] * 1e-9).sqrt()
    return Components(mean.float(), directions.float())


class Distillation(nn.Module):
    """The small network and its loss."""

    def __init__(self, run: DistillationRun) -> None:
        super().__init__()
        self.network = DrawingsTeacherNet(run.spec())
        self.patch_weight = run.patch_weight
        generator = generator_for(run.seed, "drawings-teacher/init")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.weight.normal_(0.0, math.sqrt(1 / module.weight[0].numel()), generator=generator)
                    cast(Tensor, module.bias).zero_()

    def forward(self, images: Tensor, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of [B, 3, S, S] in [-1, 1] with targets [B, dim] and [B, X, dim]; then its two errors."""
        found, cells = self.network(images)
        whole = F.mse_loss(found, cls)
        each = F.mse_loss(cells.flatten(2).transpose(1, 2), patches)
        return whole + self.patch_weight * each, whole.detach(), each.detach()


def neighbours(gallery: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """What the nearest vectors of a gallery say of others, by cosine.

    ``NEIGHBOURS`` vectors vote with weight ``exp(cosine / SHARPNESS)``.

    Args:
        gallery: [n, d].
        labels: int64 [n].
        queries: [m, d].

    Returns:
        Labels int64 [m].
    """
    cosines, nearest = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).topk(NEIGHBOURS)
    votes = torch.zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[nearest], (cosines / SHARPNESS).exp()).argmax(1)


def across_vendors(vectors: Callable[[Tensor], Tensor], count: int, side: int) -> float:
    """Share of things in drawings of the validation vendors that neighbours among train's name right.

    Args:
        vectors: uint8 [n, 3, S, S] -> image vectors [n, d].
        count: Scenes of validation.
        side: Pixels.
    """
    spec = GeneratorSpec(name="drawings", layout="recognition", image_size=side)
    found, labels = [], []
    per = PER_CONCEPT * len(load_drawings().concepts)
    for split, number in (("train", per), ("val", count)):
        scenes = paint(spec, split, range(PROBE_SCENES, PROBE_SCENES + number))  # type: ignore[arg-type]
        found.append(vectors(channels_first([scenes.images])))
        labels.append(torch.from_numpy(np.ascontiguousarray(scenes.concepts[:, 0])))
    return float((neighbours(found[0], labels[0], found[1]) == labels[1]).float().mean())


class DistillationObjective(TrainObjective):
    """See the module. The last weights are exported, rounded to float16.

    Raises:
        UsageError: Several processes.
        MissingError: The large network's weights are not here.
    """

    parts = ("loss", "cls_error", "patch_error")
    config: DistillationRun
    module: Distillation
    network: DrawingsTeacherNet
    store: FeatureStore | None = None
    components: tuple[Components, Components] | None = None  # of image vectors, of patches

    def __init__(self, config: DistillationRun, process: Process) -> None:
        only_process(config, process)
        self.config, self.process = config, process
        self.large = self._load()
        self.source = painted_drawings("train", 0, config.count, config.image_size)
        self.train_images, self.val_images = config.count, config.val_count
        self.broken = Broken(config.count, 0.0)
        self.steps = RowSteps(config.steps, self._rows)

    def _load(self) -> Teacher:
        teacher, spec = self.config.teacher, self.config.spec()
        grid = spec.image_size // spec.patch
        return cast(
            Teacher, load_teacher(teacher.name, path=teacher.path, grid=grid, device=self.process.device)
        )

    def _rows(self, step: int) -> Tensor:
        generator = generator_for(self.config.seed, f"drawings-teacher/{step}")
        return torch.randint(self.config.count, (self.config.batch,), generator=generator)

    def build(self) -> None:
        self.module = Distillation(self.config).to(self.process.device)
        self.network = self.module.network

    def open_cache(self) -> None:
        spec = self.config.spec()
        self.store = open_features(
            self.config.teacher,
            self.large,
            self.source,
            tokens=(spec.image_size // spec.patch) ** 2,
            data=images_digest(self.source),
            device=self.process.device,
            precision=self.config.precision,
        )

    def fill_cache(self, stopped: Callable[[], bool], *, progress: bool) -> None:
        if self.store is None:
            return
        device = self.process.device
        self.store.fill(self.source, self.large, device=device, stopped=stopped, progress=progress)
        sample = self.store.take(range(0, self.config.count, max(1, self.config.count // SAMPLE)))
        whole = principal_components(sample.cls, self.config.dim)
        self.components = whole, principal_components(sample.patches.flatten(0, 1), self.config.dim)

    def _targets(self, features: TeacherFeatures) -> TeacherFeatures:
        if self.components is None:  # an export without a step to take
            self.open_cache()
            self.fill_cache(lambda: False, progress=False)
        assert self.components is not None
        whole, each = self.components
        return TeacherFeatures(whole.of(features.cls), each.of(features.patches))

    def inputs(self, batch: RowBatch, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        assert self.store is not None
        chosen, device = batch.rows[rows], self.process.device
        targets = self._targets(self.store.take(chosen)).to(device)
        return to_pixels(self.source.images[chosen], device), targets.cls, targets.patches

    def export(self, network: nn.Module, facts: RunFacts, target: Path, picture: Path) -> None:
        """Measure what the features know of new vendors' drawings, write the folder."""
        run, network = self.config, cast(DrawingsTeacherNet, network)
        metrics = {
            k: float(v) for k, v in read_rows(target.parent.parent / "log.csv")[-1].items() if k in self.parts
        }
        fresh = Distillation(run).to(self.process.device).network
        measured = {"small": self._of(network), "random": self._of(fresh), "large": self._of_large}
        for name, vectors in measured.items():
            metrics[name] = across_vendors(vectors, run.val_count, run.image_size)
        text = render(run, replace(facts, metrics=metrics), about(run, network))
        write_teacher(target, network, text)

    def _of(self, network: DrawingsTeacherNet) -> Callable[[Tensor], Tensor]:
        @torch.inference_mode()
        def vectors(pixels: Tensor) -> Tensor:
            parts = [network(to_pixels(part, self.process.device))[0].cpu() for part in pixels.split(100)]
            return torch.cat(parts)

        return vectors

    def _of_large(self, pixels: Tensor) -> Tensor:
        parts = [self.large.features(to_pixels(part, self.process.device)) for part in pixels.split(20)]
        found = TeacherFeatures(
            *(torch.cat([getattr(p, k) for p in parts]).cpu() for k in ("cls", "patches"))
        )
        return self._targets(found).cls


def about(run: DistillationRun, network: DrawingsTeacherNet) -> CardText:
    """What the card says of the teacher."""
    large = run.teacher.name
    learnt = "ImageNet-1k and its labels" if large == "efficientnet-lite0" else "unlabelled photographs"
    return CardText(
        tags=("drawings-teacher",),
        what=f"A small convolutional network that gives features of scenes of drawings: one vector of "
        f"{run.dim} per image and one\nper 8 px cell. It learnt to give the first {run.dim} principal "
        f"components of {large}'s\nfeatures, each scaled to deviation 1. No label of the drawings and "
        f"nothing of the renderer was used;\n{large} itself learnt from {learnt}.",
        facts=(f"parameters: {sum(p.numel() for p in network.parameters()):,} (stored as float16)",),
        data="scenes of one to three drawings of the training vendors",
        measured="scenes of one drawing; share named right by the nearest scenes of the training vendors",
        names={
            "loss": "training loss at the end",
            "cls_error": "mean squared error of the image vector at the end",
            "patch_error": "mean squared error of the cells' vectors at the end",
            "small": "nearest neighbours, this network",
            "random": "nearest neighbours, random weights",
            "large": f"nearest neighbours, {large}",
        },
        recipe=("loss: mean squared error of the image vector and of every cell's vector",),
        use=USE_TEACHER,
    )
