"""What is random about a training step, drawn before anything is computed.

Every number is a function of (seed, kind of choice, step, sample), see ``draws``, so a plan depends neither
on the number of ranks, nor on the order or the company of the images in a batch, nor on a resume point. A
sample is an image in an epoch, as one number (:meth:`comit_bench.train.data.Steps.samples`).

Shape legend: ``B`` images, ``K`` crops per image, ``C h w`` latent, ``S`` image side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.tokenizers.comit.crops import CELLS, GRID
from comit_bench.tokenizers.comit.model import ComitSpec
from comit_bench.train.config import MOST_CROPS, CropsConfig, TrainConfig
from comit_bench.train.draws import Numbers, below, normals, normals_on, uniforms, words

WHOLE = -1  # both corner values of the global crop
ABSENT = -2  # and of a step before an image's first crop
Samples = Sequence[int] | Tensor | Numbers


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
        weights: float32 [B, 1, h, w] of the squared error of the velocity, of mean 1 in each image; None
            weighs all alike. See :func:`seen_weights`.
    """

    crops: int
    corners: Tensor
    skip: Tensor
    times: Tensor
    noise: Tensor
    relaxed: Tensor
    posterior: Tensor | None = None
    weights: Tensor | None = None

    def to(self, device: torch.device | str) -> TrainPlan:
        """Move times and noise. The rest steers indexing on the host: moving it would cost a sync."""
        times, noise = (x.to(device, non_blocking=True) for x in (self.times, self.noise))
        posterior = None if self.posterior is None else self.posterior.to(device, non_blocking=True)
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        return TrainPlan(self.crops, self.corners, self.skip, times, noise, self.relaxed, posterior, weights)

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
            None if self.weights is None else self.weights[device_index],
        )


def idle_steps(corners: Tensor) -> int:
    """Steps of corners [K, n, 2] before anybody's first crop."""
    return int((corners[..., 0] == ABSENT).all(dim=1).sum())


def crop_counts(
    crops: CropsConfig, *, seed: int, step: int, samples: Samples = (0,), whole_first: Any = False
) -> Numbers:
    """Numbers of crops int64 [B] of samples in a step, a leading global one included.

    With ``crops.per: batch`` the draw is the step's, and all samples have the same number but for a leading
    global crop that does not count. ``poisson``: u ~ N(ln(mean) - sigma^2/2, sigma), k = 1 + Poisson(exp(u)),
    values above the limit become the limit: ``max_crops``, or one more where a leading global crop does not
    count (``crops.count_global``). ``crops.mean`` is read as the mean of the Poisson rate, that is of the
    crops *after* the first: E[k] = 1 + mean before clipping. Under this reading the default (1.0, sigma 0.5)
    has its mode at one crop, as the paper says; a mean above about 1.3 moves the mode to two. ``uniform``:
    every number from 1 to the limit is as likely as any other.

    Args:
        crops: Those of the step (:meth:`TrainConfig.crops_at`).
        seed: Of the run.
        step: Zero-based.
        samples: [B]; with ``crops.per: batch`` only how many.
        whole_first: Whether a sample's first crop is the global one, bool [B].
    """
    numbers = _numbers(samples)
    own = numbers if crops.per == "image" else np.zeros(1, np.int64)
    limit = crops.max_crops + np.asarray(whole_first) * (not crops.count_global)
    drawn = words(seed, f"train-count/{step}", own, 1)[:, 0]
    if crops.count == "uniform":
        counts = 1 + (uniforms(drawn) * limit).astype(np.int64)
    else:
        normal = normals(seed, f"train-rate/{step}", own, 1)[:, 0].astype(np.float64)
        rate = np.exp(math.log(crops.mean) - crops.sigma**2 / 2 + crops.sigma * normal)
        counts = np.minimum(1 + _poisson(rate, uniforms(drawn)), limit)
    return np.broadcast_to(counts, numbers.shape)


def _poisson(rate: NDArray[np.float64], uniform: NDArray[np.float64]) -> Numbers:
    """Poisson numbers [n] by inversion; those above ``MOST_CROPS`` become it."""
    term = np.exp(-rate)
    below_it, numbers = term.copy(), np.zeros(len(rate), np.int64)
    for k in range(1, MOST_CROPS + 1):
        numbers += uniform >= below_it
        term = term * rate / k
        below_it += term
    return numbers


def whole_share(config: TrainConfig, crops: CropsConfig) -> float:
    """Probability that the first crop of an encoded image is the whole image."""
    encoded = 1 - config.objective.skip
    if crops.global_first_among == "encoded" or encoded == 0:
        return crops.global_first
    return crops.global_first / encoded


def _numbers(samples: Samples) -> Numbers:
    return np.asarray(samples, dtype=np.int64).reshape(-1)


def _first_and_counts(config: TrainConfig, step: int, samples: Numbers) -> tuple[NDArray[np.bool_], Numbers]:
    """Whether the first crop of each sample is the global one, and how many crops there are."""
    crops = config.crops_at(step)
    drawn = uniforms(words(config.seed, f"train-first/{step}", samples, 1))[:, 0]
    first = drawn < whole_share(config, crops)
    return first, crop_counts(crops, seed=config.seed, step=step, samples=samples, whole_first=first)


def mean_crops(config: TrainConfig, *, step: int, samples: Samples) -> float:
    """Average number of crops of some samples in a step."""
    return float(_first_and_counts(config, step, _numbers(samples))[1].mean())


def flips(seed: int, samples: Samples, share: float) -> Tensor:
    """Which samples are shown mirrored left to right, bool [B]: a share of them, whatever the step."""
    return torch.from_numpy(uniforms(words(seed, "train-flip", _numbers(samples), 1))[:, 0] < share)


def plan_step(
    config: TrainConfig, *, step: int, samples: Samples, device: torch.device | None = None
) -> TrainPlan:
    """Draw everything random about some samples of a step.

    By default the number of crops depends on (seed, step) only: all ranks run the same number of message
    updates in every step, and none waits for another. Every kind of choice has a stream of its own, so
    changing a probability changes nothing else. Skipping and the kind of the first crop are independent.
    Corners are uniform over all positions inside the image or, with ``crops.places: grid``, over the cells
    of the inference grid; the cells of one sample are then all different, as those of ``random:N`` are.
    With ``device`` noise is drawn there, from the same words and rounded as the device does.
    """
    spec, objective, seed = config.model.spec(), config.objective, config.seed
    numbers = _numbers(samples)

    def uniform(kind: str) -> NDArray[np.float64]:
        return uniforms(words(seed, f"train-{kind}/{step}", numbers, 1))[:, 0]

    def normal(kind: str, *shape: int) -> Tensor:
        stream, count = f"train-{kind}/{step}", math.prod(shape)
        if device is not None and count > 1:
            return normals_on(device, seed, stream, numbers, count).view(len(numbers), *shape)
        return torch.from_numpy(normals(seed, stream, numbers, count)).view(len(numbers), *shape)

    latent = spec.in_channels, spec.max_input_size, spec.max_input_size
    corners = _corners(config, spec, step, numbers)
    count, posterior = len(corners), None
    if objective.posterior == "sample":  # an image's last crops get the same for every count
        drawn = normal("posterior", count + 1, *latent).transpose(0, 1)
        posterior = torch.cat([drawn[:1], drawn[1:].flip(0)])
    logits = objective.time_mu + objective.time_sigma * normal("time", 1)[:, 0].double().numpy()
    times = 1 / (1 + np.exp(-logits))
    skip = torch.from_numpy(uniform("skip") < objective.skip)
    return TrainPlan(
        crops=count,
        corners=corners,
        skip=skip,
        times=torch.from_numpy(times.astype(np.float32)),
        noise=normal("noise", *latent),
        relaxed=torch.from_numpy(uniform("relaxed") < objective.message_dropout),
        posterior=posterior,
        weights=seen_weights(spec, corners, skip, config.crops_at(step).unseen_weight),
    )


def seen_weights(spec: ComitSpec, corners: Tensor, skip: Tensor, unseen: float) -> Tensor | None:
    """Weights of latent cells: 1 where a crop has looked, ``unseen`` where none has, then mean 1 per image.

    What no crop shows cannot be in the message: its error is noise that hides what is to be learned, most of
    all while crops are few. Cells that a crop covers in part lie between; images that are decoded from the
    empty message have equal weights.

    Args:
        spec: Of the network.
        corners: int64 [K, B, 2], see :class:`TrainPlan`.
        skip: bool [B].
        unseen: 0 to 1; at 1 nothing is weighed.

    Returns:
        float32 [B, 1, h, w], or None for equal weights.
    """
    if unseen == 1:
        return None
    edges = torch.arange(spec.max_input_size + 1) * spec.vae_factor
    start = corners[..., None]
    covered = torch.minimum(start + spec.geometry.crop, edges[1:]) - torch.maximum(start, edges[:-1])
    share = covered.clamp_min(0) / spec.vae_factor  # [K, B, 2, h]: of every row and column of cells
    seen = share[:, :, 0, :, None] * share[:, :, 1, None, :]
    seen[corners[..., 0] == WHOLE] = 1
    seen[corners[..., 0] == ABSENT] = 0
    best = seen.amax(dim=0).masked_fill(skip[:, None, None], 1)
    weights = unseen + (1 - unseen) * best
    return (weights / weights.mean(dim=(1, 2), keepdim=True))[:, None]


def _corners(config: TrainConfig, spec: ComitSpec, step: int, samples: Numbers) -> Tensor:
    """int64 [K, B, 2]; see :class:`TrainPlan`."""
    first, counts = _first_and_counts(config, step, samples)
    drawn = words(config.seed, f"train-places/{step}", samples, CELLS + 1)
    places = crop_corners(spec, config.crops_at(step).places, drawn)
    places[first, 0] = WHOLE
    most = int(counts.max())
    number = np.arange(most) - (most - counts[:, None])  # of a sample's own crops, [B, K]
    corners = np.take_along_axis(places, np.maximum(number, 0)[..., None], axis=1)
    corners[number < 0] = ABSENT
    return torch.from_numpy(corners).transpose(0, 1).contiguous()


def crop_corners(spec: ComitSpec, places: str, drawn: NDArray[np.uint64]) -> Numbers:
    """Words [B, 10] -> corners [B, 10, 2] of local crops anywhere in the image or on the inference grid.

    On the grid, the first nine of a sample are all different, and so are the last nine, for samples whose
    first crop is the global one.
    """
    if places == "uniform":
        last = spec.image_size - spec.geometry.crop
        return np.stack([below(drawn, last + 1), below(drawn << np.uint64(32), last + 1)], axis=-1)
    cells = drawn[:, 1:].argsort(axis=1, kind="stable")
    cells = np.concatenate([cells[:, -1:], cells], axis=1)
    stride = spec.geometry.stride(spec.image_size)
    return np.stack([cells // GRID, cells % GRID], axis=-1) * stride
