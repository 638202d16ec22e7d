"""What the Trainer asks of what is learned."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comit_bench.errors import UsageError
from comit_bench.files import atomic_path
from comit_bench.nn.teachers import WEIGHTS, DrawingsTeacherNet, ScenesTeacherNet
from comit_bench.tokenizers.checkpoints import write_tensors
from comit_bench.train.card import RunFacts
from comit_bench.train.config import AnyRun, AutoencoderRun, DistillationRun, TeacherRun
from comit_bench.train.data import Broken, StepSource
from comit_bench.train.optimizers import Together
from comit_bench.train.pictures import Sheet
from comit_bench.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class Process:
    """Where a process computes, and which of how many it is."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


class TrainObjective(ABC):
    """One thing that can be learned. The constructor opens the data, :meth:`build` makes the network.

    Attributes:
        parts: What ``module`` answers, by name: scalars, the first of which is minimised.
        columns: Further columns of the training log (:meth:`log_values`).
        measures: Columns of the validation log; without any there is no validation.
        judge: The measure whose lowest value marks the best checkpoint.
        config, process: Settings, and where to compute.
        steps: Batches by step.
        broken: Counts images that could not be read.
        data: Digest of the training images' ids, where the settings do not tell.
        train_images, val_images: How many different ones.
        module: What is trained, on the device.
        network: What is measured and exported.
        averaged: The part of it whose averaged weights are exported; None exports the last weights.
    """

    parts: tuple[str, ...]
    columns: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    judge: str | None = None
    config: AnyRun
    process: Process
    steps: StepSource
    broken: Broken
    data: str = ""
    train_images: int
    val_images: int
    module: nn.Module
    network: nn.Module
    averaged: nn.Module | None = None

    @abstractmethod
    def build(self) -> None:
        """Make ``module``, ``network`` and ``averaged``; raises as the network's loader does."""

    @abstractmethod
    def inputs(self, batch: Any, rows: slice) -> tuple[Any, ...]:
        """Arguments of ``module`` for some images of a batch, on the device."""

    @abstractmethod
    def export(self, network: nn.Module, facts: RunFacts, target: Path, picture: Path) -> None:
        """Write the folder of the finished network, whole or not at all.

        Args:
            network: ``network``, or a copy of it, with the weights to export.
            facts: For the card.
            target: The folder.
            picture: Picture of the last validation, where there is one.
        """

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        optim = self.config.optim
        return learning_rate(
            step, peak=optim.learning_rate, warmup=optim.warmup_steps, cosine_steps=optim.cosine_steps
        )

    def open_cache(self) -> None:
        """Look for what is computed once and kept, before the first step."""
        return

    def fill_cache(self, stopped: Callable[[], bool], *, progress: bool) -> None:
        """Compute what is missing; ``stopped`` ends it with KeyboardInterrupt."""
        return

    def after(self, batch: Any, optimizer: Together) -> None:
        """Called after every optimizer step that was taken."""
        return

    def log_values(self, batch: Any) -> dict[str, float]:
        """Values of ``columns`` in this step."""
        return {}

    def validate(self, network: nn.Module) -> tuple[dict[str, float], Sheet | None]:
        """Values of ``measures``, and a picture."""
        raise NotImplementedError

    def copy_with(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A network of its own with these weights of ``averaged``, where weights can be sharded."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """A step's images in memory, by number."""

    step: int
    rows: Tensor
    broken: dict[str, str] = field(default_factory=dict)


class RowSteps:
    """``count`` batches of images that are held in memory; ``rows`` gives the numbers of a step's images."""

    def __init__(self, count: int, rows: Callable[[int], Tensor]) -> None:
        self.count, self.rows = count, rows

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> RowBatch:
        return RowBatch(step, self.rows(step))

    def global_ids(self, step: int) -> Sequence[str]:
        """Names of a step's images."""
        return [f"scene {row}" for row in self.rows(step).tolist()]


def only_process(run: AutoencoderRun | TeacherRun | DistillationRun, process: Process) -> None:
    """Refuse what small trainings do not do."""
    if process.ranks > 1:
        raise UsageError(
            f"{run.name} is small and trains in one process: start it without torchrun or accelerate launch"
        )


def write_teacher(target: Path, network: ScenesTeacherNet | DrawingsTeacherNet, card: str) -> None:
    """Write the folder of a network of features, rounded to float16, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.mkdir()
        write_tensors(temporary / WEIGHTS, {k: v.half() for k, v in network.state_dict().items()})
        (temporary / "config.json").write_text(json.dumps(asdict(network.spec), indent=1) + "\n")
        (temporary / "README.md").write_text(card, encoding="utf-8")


def weights_facts(config: AnyRun, facts: RunFacts, data: str) -> dict[str, Any]:
    """What a configuration says about exported weights, for tables."""
    told = {"trained": True, "training_data": data, "weights_licence": config.weights_licence}
    return {**told, "steps": facts.step, **({"group": config.group} if config.group else {})}
