"""FlexTok in use: images -> tokens, and tokens -> images.

Results are those of the released program; the work is not. Only the registers that are kept are encoded;
the null and the masked registers are one token each; the time modulations of a run are computed together;
a plain batch replaces the original's packed sequence.

Randomness is explicit: noise is handed in, for the posterior as for the flow.

Shape legend: ``B`` batch, ``C h w`` latents, ``K`` registers of the model, ``k`` tokens, ``d`` code
dimension, ``S`` image side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from comit_bench.nn.finite import observe
from comit_bench.nn.flow import Guidance, ProjectedGuidance, integrate
from comit_bench.tokenizers.flextok.model import Decoder, FlexTok

APG = Guidance(momentum=-0.5, threshold=2.5, eta=0.0)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message: ``ids`` int64 [B, k], ``codes`` [B, k, d], ``prequant`` [B, k, d] before rounding."""

    ids: Tensor
    codes: Tensor
    prequant: Tensor


def encode_latents(model: FlexTok, latents: Tensor, tokens: int | None = None) -> Encoded:
    """Scaled latents [B, C, h, w] -> the first ``tokens`` tokens (None: all K)."""
    prequant = model.encoder(latents, tokens)
    codes = model.regularizer(prequant)
    return Encoded(model.regularizer.ids(codes), codes, prequant)


def encode(
    model: FlexTok, images: Tensor, *, tokens: int | None = None, noise: Tensor | None = None
) -> Encoded:
    """Tokenize images.

    Args:
        images: float32 [B, 3, S, S] in [-1, 1].
        tokens: Length of the prefix; None is all K.
        noise: [B, C, h, w] to sample the VAE posterior with; None takes its mean.

    Raises:
        ValueError: Images larger than the positions, or a prefix that is too long.
    """
    return encode_latents(model, model.vae.encode(images, noise), tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the flow is integrated. Defaults are what the authors recommend.

    Attributes:
        steps: Euler steps, T.
        guidance: Weight g, or a function of t in (0, 1]. The number 1 runs the conditional pass only.
        projected: Adaptive projected guidance instead of the classifier-free kind.
    """

    steps: int = 25
    guidance: float | Callable[[float], float] = 7.5
    projected: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"the number of sampling steps must be at least 1, got {self.steps}")

    @property
    def guided(self) -> bool:
        return callable(self.guidance) or self.guidance != 1

    def weight(self, time: float) -> float:
        """The guidance weight at one time."""
        return self.guidance(time) if callable(self.guidance) else self.guidance


class Observer(Protocol):
    """Sees every step: its number, x before it, conditional and unconditional velocity (None if not run)."""

    def __call__(self, step: int, x: Tensor, conditional: Tensor, unconditional: Tensor | None) -> None: ...


def sample(
    decoder: Decoder,
    codes: Tensor,
    noise: Tensor,
    *,
    keep: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Integrate from noise at t = 1 to scaled latents at t = 0.

    Args:
        decoder: The velocity network.
        codes: [B, k, d]; positions behind k count as truncated.
        noise: [B, C, h, w].
        keep: Tokens kept per image, at most k; None keeps all that are given.
        sampling: None is ``Sampling()``.
        observe: Told about every step.

    Raises:
        ValueError: ``keep`` does not fit, or latents larger than the positions.
    """
    settings = sampling or Sampling()
    given = decoder.condition(codes, keep)
    nothing = decoder.null() if settings.guided else None
    count = settings.steps
    times = [(count - step) / count for step in range(count)]
    states = decoder.time_states(torch.tensor(times, device=noise.device))
    projected = ProjectedGuidance(APG)

    def velocity(progress: float, x: Tensor) -> Tensor:
        step = round(progress * count)
        state, weight = states.at(step), settings.weight(times[step])
        conditional: Tensor = decoder(x, given, state).float()
        unconditional: Tensor | None = None if nothing is None else decoder(x, nothing, state).float()
        if observe is not None:
            observe(step, x, conditional, unconditional)
        if unconditional is None:
            return -conditional
        if settings.projected:
            return -projected(conditional, unconditional, weight=weight)
        return -(unconditional + weight * (conditional - unconditional))

    return integrate(velocity, noise.float(), steps=count)


def decode(
    model: FlexTok,
    codes: Tensor,
    noise: Tensor,
    *,
    keep: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> Tensor:
    """Codes [B, k, d] and noise [B, C, h, w] -> images [B, 3, S, S], not clamped. See :func:`sample`."""
    return model.vae.decode(sample(model.decoder, codes, noise, keep=keep, sampling=sampling))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats -> uint8: (x + 1) / 2, clamp, nearest of 255 steps."""
    return observe("pixels", images).add(1).div(2).clamp(0, 1).mul(255).round().to(torch.uint8)
