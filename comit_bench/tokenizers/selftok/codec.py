"""SelfTok in use: images -> tokens, tokens -> latents -> images.

``network`` is what computes; None makes one for the call, and a :class:`FastSelftok` that is handed in keeps
what it derived from the weights until the next.

Unusual: the grid of times is float32 with a definition of its own, because the number of visible tokens
is cut off to a whole one and would jump with the last bit of a time.

Randomness is explicit: the sampler's noise is handed in. Nothing else is random.

Shape legend: ``B`` batch, ``C h w`` latents, ``K`` tokens, ``d`` code dimension, ``S`` image side, ``N``
steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from comit_bench.nn.finite import observe
from comit_bench.tokenizers.selftok.fast import FastSelftok
from comit_bench.tokenizers.selftok.model import TIME_SCALE, Schedule, Selftok


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message.

    Attributes:
        ids: int64 [B, K].
        codes: [B, K, d], what enters a decoder.
        prequant: [B, K, d'] after ``project_in``, before normalisation.
        queries: [B, K, Q] of the last block.
    """

    ids: Tensor
    codes: Tensor
    prequant: Tensor
    queries: Tensor


def encode_latents(model: Selftok, latents: Tensor, network: FastSelftok | None = None) -> Encoded:
    """Scaled latents [B, C, h, w] -> message."""
    encoder = model.encoder
    queries = (network or FastSelftok(model)).queries(latents)
    prequant = encoder.quantizer.project(queries)
    ids = encoder.quantizer.ids(prequant)
    return Encoded(ids, encoder.codes(ids), prequant, queries)


def encode(model: Selftok, images: Tensor, network: FastSelftok | None = None) -> Encoded:
    """Tokenize images float32 [B, 3, S, S] in [-1, 1]."""
    if model.vae is None:
        raise ValueError("this network has no VAE: it takes latents only")
    return encode_latents(model, model.vae.encode(images).float(), network)


def time_grid(steps: int) -> Tensor:
    """Times from 1 to 0, float32 [steps + 1], counted from the nearer end and rounded once."""
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, got {steps}")
    width = torch.tensor(-1.0 / steps, dtype=torch.float32).double()
    index = torch.arange(steps + 1, dtype=torch.float64)
    grid = torch.where(index < (steps + 1) // 2, 1.0 + index * width, -(steps - index) * width)
    return grid.float() + 0.0  # no negative zero at the end


def visible_counts(times: Tensor, schedule: Schedule, tokens: int) -> list[int]:
    """How many leading tokens are visible at each of the times, 1 to ``tokens``."""
    starts = (0, *schedule.ends[:-1])
    found = []
    for t in (TIME_SCALE * times.float()).to(torch.int64).tolist():
        j = max(index for index, start in enumerate(starts) if start <= t)
        within = (t - starts[j]) * schedule.counts[j] // (schedule.ends[j] - starts[j])
        found.append(min(within + sum(schedule.counts[:j]), tokens - 1) + 1)
    return found


class Observer(Protocol):
    """Sees every step: its number, visible tokens, x before it and the velocity."""

    def __call__(self, step: int, visible: int, x: Tensor, velocity: Tensor) -> None: ...


def sample(
    model: Selftok,
    codes: Tensor,
    noise: Tensor,
    *,
    schedule: Schedule,
    steps: int = 50,
    network: FastSelftok | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Integrate from noise at time 1 to scaled latents at time 0.

    Args:
        model: With a diffusion decoder.
        codes: [B, K, d].
        noise: [B, C, h, w].
        schedule: Which tokens are visible when.
        steps: Euler steps, N.
        observe: Told about every step.

    Raises:
        ValueError: Not one step, or latents larger than the positions.
    """
    grid = time_grid(steps)
    counts = visible_counts(grid[:-1], schedule, model.spec.tokens)
    network = network or FastSelftok(model)
    states = network.time_states(grid[:-1].to(noise.device))
    context = model.model.context(codes)
    x = noise.float()
    for step, (visible, width) in enumerate(zip(counts, -grid.diff(), strict=True)):
        velocity = network.decode(x, context[:, :visible], states.at(step)).float()
        if observe is not None:
            observe(step, visible, x, velocity)
        x = x - width.item() * velocity
    return x


def render(model: Selftok, codes: Tensor, network: FastSelftok | None = None) -> Tensor:
    """Codes [B, K, d] -> scaled latents [B, C, h, w], in one step without noise."""
    network = network or FastSelftok(model)
    return network.decode(None, model.model.context(codes), network.render_state)


def decode_latents(model: Selftok, latents: Tensor) -> Tensor:
    """Scaled latents -> images [B, 3, S, S] in [0, 1], float32."""
    if model.vae is None:
        raise ValueError("this network has no VAE: it makes latents only")
    pixels = observe("pixels", model.vae.decode(latents))  # clamping would hide an infinity
    return pixels.clamp(-1, 1).float().add(1).div(2)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] floats -> uint8, the nearest of 256 levels."""
    return images.mul(255).round().to(torch.uint8)
