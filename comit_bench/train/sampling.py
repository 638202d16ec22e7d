"""What is random about a training step, drawn before anything is computed.

Every number comes from a generator keyed by (seed, step, sample id), so a plan depends neither on the
number of ranks, nor on the order or the company of the images in a batch, nor on a resume point.

Shape legend: ``B`` images, ``K`` crops per image, ``C h w`` latent, ``S`` image side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from comit_bench.seeding import generator_for
from comit_bench.tokenizers.comit.model import ComitSpec
from comit_bench.train.config import CropsConfig, TrainConfig

WHOLE = -1  # both corner values of the global crop
ABSENT = -2  # and of a step before an image's first crop


@dataclass(frozen=True, slots=True, eq=False)
class TrainPlan:
    """All random choices of one step.

    Attributes:
        crops: K, the largest number of crops of an image.
        corners: int64 [K, B, 2], (top, left) in pixels; ``WHOLE`` for the global crop. Images with fewer
            crops see theirs last and are ``ABSENT`` before. Always on the CPU.
        skip: bool [B], decoded from the empty message. Always on the CPU.
        times: float32 [B] in (0, 1); 0 is noise.
        noise: float32 [B, C, h, w].
        relaxed: bool [B], the message is bounded but not rounded. Always on the CPU.
        posterior: float32 [K + 1, B, C, h, w], noise of the VAE's posterior: for the image itself, then for
            every crop (local ones use the top left part). None takes the mode.
    """

    crops: int
    corners: Tensor
    skip: Tensor
    times: Tensor
    noise: Tensor
    relaxed: Tensor
    posterior: Tensor | None = None

    def to(self, device: torch.device | str) -> TrainPlan:
        """Move times and noise. The rest steers indexing on the host: moving it would cost a sync."""
        times, noise = (x.to(device, non_blocking=True) for x in (self.times, self.noise))
        posterior = None if self.posterior is None else self.posterior.to(device, non_blocking=True)
        return TrainPlan(self.crops, self.corners, self.skip, times, noise, self.relaxed, posterior)

    def select(self, rows: slice | Sequence[int] | Tensor) -> TrainPlan:
        """The plan of some of the images (a slice or their numbers), for accumulation in pieces."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.int64).cpu()
        device_index = index if isinstance(index, slice) else index.to(self.times.device)
        corners, posterior = self.corners[:, index], self.posterior
        idle = idle_steps(corners)
        if posterior is not None:
            posterior = torch.cat([posterior[:1], posterior[1 + idle :]])[:, device_index]
        return TrainPlan(
            self.crops - idle,
            corners[idle:],
            self.skip[index],
            self.times[device_index],
            self.noise[device_index],
            self.relaxed[index],
            posterior,
        )


def idle_steps(corners: Tensor) -> int:
    """Steps of corners [K, n, 2] before anybody's first crop."""
    return int((corners[..., 0] == ABSENT).all(dim=1).sum())


def crop_count(
    crops: CropsConfig, *, seed: int, step: int, sample: str = "", whole_first: bool = False
) -> int:
    """Number of crops of a step or, with ``crops.per: image``, of a sample; a leading global one included.

    u ~ N(ln(mean) - sigma^2/2, sigma), k = 1 + Poisson(exp(u)), values above the limit become the limit:
    ``max_crops``, or one more where a leading global crop does not count (``crops.count_global``).
    ``crops.mean`` is read as the mean of the Poisson rate, that is of the crops *after* the first:
    E[k] = 1 + mean before clipping. Under this reading the default (1.0, sigma 0.5) has its mode at one
    crop, as the paper says; a mean above about 1.3 moves the mode to two.
    """
    if step < crops.warmup_steps:
        return 1
    generator = generator_for(seed, f"train-crops/{step}" + (f"/{sample}" if crops.per == "image" else ""))
    normal = torch.randn((), generator=generator, dtype=torch.float64)
    rate = torch.exp(math.log(crops.mean) - crops.sigma**2 / 2 + crops.sigma * normal)
    extra = int(torch.poisson(rate, generator=generator).item())
    return min(1 + extra, crops.max_crops + int(whole_first and not crops.count_global))


def whole_share(config: TrainConfig) -> float:
    """Probability that the first crop of an encoded image is the whole image."""
    crops, encoded = config.crops, 1 - config.objective.skip
    if crops.global_first_among == "encoded" or encoded == 0:
        return crops.global_first
    return crops.global_first / encoded


def mean_crops(config: TrainConfig, *, step: int, sample_ids: Sequence[str]) -> float:
    """Average number of crops of some images in a step."""
    return sum(_crops_of(config, step, sample)[1] for sample in sample_ids) / len(sample_ids)


def plan_step(config: TrainConfig, *, step: int, sample_ids: Sequence[str]) -> TrainPlan:
    """Draw everything random about some images of a step.

    By default the number of crops depends on (seed, step) only: all ranks run the same number of message
    updates in every step, and none waits for another. Everything else is drawn per image in a fixed
    order, whatever the settings, so that changing a probability changes nothing else. Skipping and the
    kind of the first crop are independent; corners are uniform over all positions inside the image. Before
    the step ``crops.warmup_steps`` there is one, global crop. An id names a sample for good.
    """
    spec = config.model.spec()
    drawn = [_draw(config, spec, step, sample) for sample in sample_ids]
    uniforms = torch.stack([d.uniforms for d in drawn])
    normals = torch.stack([d.normal for d in drawn])
    count = max(len(d.corners) for d in drawn)
    corners = torch.full((count, len(drawn), 2), ABSENT, dtype=torch.int64)
    for image, one in enumerate(drawn):
        corners[count - len(one.corners) :, image] = one.corners
    posterior = None
    if config.objective.posterior == "sample":
        posterior = _posterior_noise(config, spec, step, sample_ids, count)
    objective = config.objective
    return TrainPlan(
        crops=count,
        corners=corners,
        skip=uniforms[:, 0] < objective.skip,
        times=torch.sigmoid(objective.time_mu + objective.time_sigma * normals),
        noise=torch.stack([d.noise for d in drawn]),
        relaxed=uniforms[:, 2] < objective.message_dropout,
        posterior=posterior,
    )


class _Drawn(NamedTuple):
    """Of one image: uniforms [3], a normal [], noise [C, h, w] and corners [k, 2]."""

    uniforms: Tensor
    normal: Tensor
    noise: Tensor
    corners: Tensor


def _uniforms(config: TrainConfig, step: int, sample: str) -> tuple[torch.Generator, Tensor]:
    """The generator of an image in a step, and the first that it draws, [3]."""
    generator = generator_for(config.seed, f"train/{step}/{sample}")
    return generator, torch.rand(3, generator=generator)


def _crops_of(config: TrainConfig, step: int, sample: str) -> tuple[bool, int]:
    """Whether the first crop of an image is the global one, and how many there are."""
    _, uniforms = _uniforms(config, step, sample)
    only_global = step < config.crops.warmup_steps
    whole_first = bool(uniforms[1] < (1.0 if only_global else whole_share(config)))
    return whole_first, crop_count(
        config.crops, seed=config.seed, step=step, sample=sample, whole_first=whole_first
    )


def _draw(config: TrainConfig, spec: ComitSpec, step: int, sample: str) -> _Drawn:
    generator, uniforms = _uniforms(config, step, sample)
    normal = torch.randn((), generator=generator)
    side = spec.max_input_size
    noise = torch.randn(spec.in_channels, side, side, generator=generator)
    whole_first, count = _crops_of(config, step, sample)
    places = spec.image_size - spec.geometry.crop + 1
    corners = torch.randint(places, (count, 2), generator=generator)
    if whole_first:
        corners[0] = WHOLE
    return _Drawn(uniforms, normal, noise, corners)


def _posterior_noise(
    config: TrainConfig, spec: ComitSpec, step: int, sample_ids: Sequence[str], count: int
) -> Tensor:
    """Standard normal [count + 1, B, C, h, w]; an image's last crops get the same for every ``count``."""
    shape = (spec.in_channels, spec.max_input_size, spec.max_input_size)
    parts = []
    for sample in sample_ids:
        generator = generator_for(config.seed, f"train-posterior/{step}/{sample}")
        drawn = [torch.randn(shape, generator=generator) for _ in range(count + 1)]
        parts.append(torch.stack([drawn[0], *reversed(drawn[1:])]))
    return torch.stack(parts, dim=1)
