"""What is random about a training step, drawn before anything is computed.

Every number comes from a generator keyed by (seed, step, sample id), so a plan depends neither on the
number of ranks, nor on the order or the company of the images in a batch, nor on a resume point.

Shape legend: ``B`` images, ``K`` crops per image, ``C h w`` latent, ``S`` image side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comit_bench.models.comit import ComitSpec
from comit_bench.seeding import generator_for
from comit_bench.train.config import CropsConfig, TrainConfig

WHOLE = -1  # both corner values of the global crop


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """All random choices of one step.

    Attributes:
        crops: K, the same for every image.
        corners: int64 [K, B, 2], (top, left) in pixels; -1 for the global crop. Always on the CPU.
        skip: bool [B], decoded from the empty message. Always on the CPU.
        times: float32 [B] in (0, 1); 0 is noise.
        noise: float32 [B, C, h, w].
        relaxed: bool [B], the message is bounded but not rounded. Always on the CPU.
    """

    crops: int
    corners: Tensor
    skip: Tensor
    times: Tensor
    noise: Tensor
    relaxed: Tensor

    def to(self, device: torch.device | str) -> StepPlan:
        """Move times and noise. The rest steers indexing on the host: moving it would cost a sync."""
        times, noise = (x.to(device, non_blocking=True) for x in (self.times, self.noise))
        return StepPlan(self.crops, self.corners, self.skip, times, noise, self.relaxed)

    def select(self, rows: slice | Sequence[int] | Tensor) -> StepPlan:
        """The plan of some of the images (a slice or their numbers), for accumulation in pieces."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.int64).cpu()
        device_index = index if isinstance(index, slice) else index.to(self.times.device)
        return StepPlan(
            self.crops,
            self.corners[:, index],
            self.skip[index],
            self.times[device_index],
            self.noise[device_index],
            self.relaxed[index],
        )


def crop_count(crops: CropsConfig, *, seed: int, step: int) -> int:
    """Number of crops of a step, a leading global one included.

    u ~ N(ln(mean) - sigma^2/2, sigma), k = 1 + Poisson(exp(u)), values above ``max_crops`` become
    ``max_crops``. ``crops.mean`` is read as the mean of the Poisson rate, that is of the crops *after*
    the first: E[k] = 1 + mean before clipping. Under this reading the default (1.0, sigma 0.5) has its
    mode at one crop, as the paper says; a mean above about 1.3 moves the mode to two.
    """
    if step < crops.warmup_steps:
        return 1
    generator = generator_for(seed, f"train-crops/{step}")
    normal = torch.randn((), generator=generator, dtype=torch.float64)
    rate = torch.exp(math.log(crops.mean) - crops.sigma**2 / 2 + crops.sigma * normal)
    extra = int(torch.poisson(rate, generator=generator).item())
    return min(1 + extra, crops.max_crops)


def plan_step(config: TrainConfig, *, step: int, sample_ids: Sequence[str]) -> StepPlan:
    """Draw everything random about some images of a step.

    The number of crops depends on (seed, step) only. All ranks therefore run the same number of
    message updates in every step, and none waits for another. Everything else is drawn per image in
    a fixed order, whatever the settings, so that changing a probability changes nothing else. Skipping
    and the kind of the first crop are independent; corners are uniform over all positions inside
    the image.

    Args:
        config: The run.
        step: Optimizer step, from 0. Before ``crops.warmup_steps`` there is one, global crop.
        sample_ids: One id per image; an id names a sample for good.

    Raises:
        ValueError: Images smaller than a local crop.
    """
    spec = config.model.spec()
    places = spec.image_size - spec.geometry.crop + 1
    if places < 1:
        raise ValueError(f"a {spec.geometry.crop} px crop does not fit into {spec.image_size} px images")
    count = crop_count(config.crops, seed=config.seed, step=step)
    only_global = step < config.crops.warmup_steps
    drawn = [_draw(config, spec, places, count, step, sample) for sample in sample_ids]
    uniforms = torch.stack([d[0] for d in drawn])
    normals = torch.stack([d[1] for d in drawn])
    corners = torch.stack([d[3] for d in drawn], dim=1)
    whole_first = uniforms[:, 1] < (1.0 if only_global else config.crops.global_first)
    corners[0, whole_first] = WHOLE
    objective = config.objective
    return StepPlan(
        crops=count,
        corners=corners,
        skip=uniforms[:, 0] < objective.skip,
        times=torch.sigmoid(objective.time_mu + objective.time_sigma * normals),
        noise=torch.stack([d[2] for d in drawn]),
        relaxed=uniforms[:, 2] < objective.message_dropout,
    )


def _draw(
    config: TrainConfig, spec: ComitSpec, places: int, count: int, step: int, sample: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uniforms [3], a normal [], noise [C, h, w] and corners [K, 2] of one image."""
    generator = generator_for(config.seed, f"train/{step}/{sample}")
    uniforms = torch.rand(3, generator=generator)
    normal = torch.randn((), generator=generator)
    side = spec.max_input_size
    noise = torch.randn(spec.in_channels, side, side, generator=generator)
    return uniforms, normal, noise, torch.randint(places, (count, 2), generator=generator)
