"""A COMiT training: its images, teacher, averages, validation and export around the loss."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import broadcast_object_list, wait_for_everyone
from torch import Tensor, nn

from comit_bench.files import atomic_path, digest_json
from comit_bench.nn.teachers import TeacherFeatures
from comit_bench.tokenizers.comit.checkpoint import config_from_spec, save
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train import validation
from comit_bench.train.card import CURVES, PICTURE, RunFacts, render
from comit_bench.train.config import TrainConfig
from comit_bench.train.curves import save_curves
from comit_bench.train.data import Broken, Images, Steps, TrainBatch, open_images, read_all, to_pixels
from comit_bench.train.features import (
    FeatureStore,
    WithMirrored,
    compute_features,
    images_digest,
    open_features,
)
from comit_bench.train.objectives.base import Process, TrainObjective, weights_facts
from comit_bench.train.objectives.comit import TrainingModule
from comit_bench.train.objectives.comit_card import about, training_data
from comit_bench.train.pictures import Sheet
from comit_bench.train.sampling import TrainPlan, mean_crops
from comit_bench.train.scaling import block_runner, compile_frozen
from comit_bench.train.schedule import alignment_ramp
from comit_bench.train.setup import make_model, make_teacher
from comit_bench.train.sharding import whole_copy


class ComitObjective(TrainObjective):
    """See the module.

    Raises:
        UsageError: Settings that do not fit each other or the data.
        MissingError: Data that are not here.
    """

    parts = ("loss", "flow", "repa", "srepa")
    columns = ("ramp", "crops")
    measures = validation.MEASURES
    judge = "val_flow"
    config: TrainConfig
    steps: Steps
    network: Comit

    def __init__(self, config: TrainConfig, process: Process) -> None:
        self.config, self.process = config, process
        train, held = open_images(config)
        self.data = digest_json(list(train.ids))
        device = process.device if config.data.on_device else None
        self.steps = Steps(config, train, rank=process.rank, ranks=process.ranks, device=device)
        self.held = read_all(held) if process.main else None
        self.broken = Broken(len(train.ids), config.data.max_broken)
        self.train_images = len(train.ids)
        self.val_images = 0 if self.held is None else len(self.held.ids)
        if self.held is not None and self.held.labels is not None:
            self.measures = (*validation.MEASURES, *validation.READ)
        self.store: FeatureStore | None = None

    def build(self) -> None:
        config = self.config
        self.teacher = make_teacher(config, self.process.device)
        dims = None if self.teacher is None else self.teacher.dims
        module = TrainingModule(make_model(config), config, dims)
        self.module = module.to(self.process.device)
        self.network = module.model
        module.runner = block_runner(compile=config.compile, recompute=config.activation_checkpointing)
        self.averaged = module.model.predictor
        if config.compile:
            compile_frozen(self.network, self.teacher)

    # -------------------------------------------------------- the teacher's features

    def open_cache(self) -> None:
        """The teacher's features on disk, if asked for; refuses when there is no room."""
        config, spec = self.config, self.config.model.spec()
        if self.teacher is None or config.teacher.cache == "none":
            return
        digest = [images_digest(self.steps.source) if self.process.main else ""]
        broadcast_object_list(digest)
        self.source: Images = self.steps.source
        if config.data.flip:
            self.source, digest = WithMirrored(self.source), [f"{digest[0]} with mirrored"]
        self.store = open_features(
            config.teacher,
            self.teacher,
            self.source,
            tokens=(spec.max_input_size // spec.patch_size) ** 2 if config.objective.repa_weight else 0,
            data=digest[0],
            device=self.process.device,
            precision=config.precision,
        )
        wait_for_everyone()  # nobody writes before all have seen that there is room

    def fill_cache(self, stopped: Callable[[], bool], *, progress: bool) -> None:
        """Each process computes its part; from then on the teacher is not needed."""
        if self.store is None or self.teacher is None:
            return
        self.store.fill(
            self.source,
            self.teacher,
            device=self.process.device,
            rank=self.process.rank,
            ranks=self.process.ranks,
            workers=self.config.data.workers,
            stopped=stopped,
            progress=progress,
        )
        wait_for_everyone()
        self.steps.features, self.teacher = self.store.take, None

    def _features(self, batch: TrainBatch, rows: slice, images: Tensor) -> TeacherFeatures | None:
        """Of some images of the batch: from the cache, or computed now; None without a teacher."""
        if batch.features is not None:
            return batch.features.select(rows).to(self.process.device)
        return None if self.teacher is None else compute_features(self.teacher, images)

    # -------------------------------------------------------- steps

    def inputs(
        self, batch: TrainBatch, rows: slice
    ) -> tuple[Tensor, TrainPlan, TeacherFeatures | None, float]:
        images = to_pixels(batch.images[rows], self.process.device)
        plan = batch.plan.select(rows).to(self.process.device)
        ramp = alignment_ramp(batch.step, self.config.objective.alignment_ramp)
        return images, plan, self._features(batch, rows, images), ramp

    def log_values(self, batch: TrainBatch) -> dict[str, float]:
        """Weight of the alignment, and crops of an image, on average over all processes where they differ."""
        crops: float = batch.plan.crops
        if self.config.crops.per == "image" or not self.config.crops.count_global:
            crops = mean_crops(self.config, step=batch.step, samples=self.steps.samples(batch.step))
        return {"ramp": alignment_ramp(batch.step, self.config.objective.alignment_ramp), "crops": crops}

    def validate(self, network: nn.Module) -> tuple[dict[str, float], Sheet | None]:
        assert self.held is not None
        return validation.validate(cast(Comit, network), self.config, self.held, device=self.process.device)

    def copy_with(self, weights: Mapping[str, Tensor]) -> nn.Module:
        return whole_copy(self.network, weights).to(self.process.device).eval()

    def export(self, network: nn.Module, facts: RunFacts, target: Path, picture: Path) -> None:
        export(cast(Comit, network), self.config, facts, target, picture=picture, logs=target.parents[1])


def export(
    model: Comit,
    config: TrainConfig,
    facts: RunFacts,
    directory: Path,
    *,
    picture: Path | None,
    logs: Path | None = None,
) -> None:
    """Write the folder, whole or not at all; an older one at the same place is replaced.

    Beside the card go ``picture`` and the learning curves of the CSV logs in the folder ``logs``.

    Raises:
        BenchError: Disk full or not writable, or weights too large for ``export.dtype``.
    """
    layout = config_from_spec(model.spec)
    layout["comit_bench"] = {
        **layout.get("comit_bench", {}),
        **weights_facts(config, facts, training_data(config)),
    }
    pictures = set()
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        save(model, temporary, config=layout, dtype=getattr(torch, config.export.dtype))
        if picture is not None and picture.is_file():
            shutil.copyfile(picture, temporary / PICTURE)
            pictures.add(PICTURE)
        if logs is not None and save_curves(logs, temporary / CURVES):
            pictures.add(CURVES)
        card = render(config, facts, about(config, model), frozenset(pictures))
        (temporary / "README.md").write_text(card, encoding="utf-8")
