"""Validation with the averaged weights: does the message matter, and how much of the code is used?

PSNR is of images in [-1, 1] (peak 2), averaged over images. Messages are of the global crop. Noise and
times are keyed by the image's id, so two checkpoints are compared on the same draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comit_bench.nn.flow import Guidance
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.comit.codec import decode, encode, one_step_decode
from comit_bench.tokenizers.comit.crops import CropPolicy
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.config import TrainConfig
from comit_bench.train.data import MemoryImages, to_pixels
from comit_bench.train.pictures import Sheet, make_sheet

MEANS = ("val_flow", "psnr_one_step", "psnr_guided", "psnr_mean_colour", "shuffled_gap")  # over images
MEASURES = (*MEANS, "ids_used", "perplexity")


def float_psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal to noise in dB per image, in float32 for images in [-1, 1]; ``others`` are clamped.

    Reconstructions are not rounded to bytes first, unlike those of ``metrics.similarity.psnr``.
    """
    error = (images - others.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


def perplexity(counts: Tensor) -> float:
    """Exponential of the entropy of a histogram."""
    share = counts[counts > 0].double()
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def _draws(config: TrainConfig, model: Comit, ids: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Times [B] and noise [B, C, h, w], a function of seed and id."""
    spec, objective = model.spec, config.objective
    times, noise = [], []
    for name in ids:
        generator = generator_for(config.seed, f"validation/{name}")
        normal = torch.randn((), generator=generator)
        times.append(torch.sigmoid(objective.time_mu + objective.time_sigma * normal))
        shape = (spec.in_channels, spec.max_input_size, spec.max_input_size)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(times), torch.stack(noise)


def _measure(
    model: Comit, config: TrainConfig, images: Tensor, ids: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """``MEANS`` float64 [B, 5] and ids int64 [B, M] of one batch."""
    codec, network = model.codec, FastPredictor(model.predictor)
    times, noise = (part.to(images.device) for part in _draws(config, model, ids))
    message = encode(model, images, CropPolicy(global_crop=True, num_crops=1), network=network)
    latents = codec.encode(images)
    t = times[:, None, None, None]
    condition = network.condition(message.codes, message.offset)
    velocity = network.velocity((1 - t) * noise + t * latents, condition, network.time_state(times))
    flow = (velocity - (latents - noise)).square().flatten(1).mean(dim=1)
    settings = config.validation
    guidance = Guidance(weight=settings.guidance)
    given = message.codes, message.offset, noise
    others = message.codes.roll(1, 0), message.offset, noise
    shown = (
        codec.decode(one_step_decode(model, *given, network=network)),
        codec.decode(decode(model, *given, steps=settings.steps, guidance=guidance, network=network).latents),
        images.mean(dim=(2, 3), keepdim=True).expand_as(images),
        codec.decode(one_step_decode(model, *others, network=network)),
    )
    one_step, guided, flat, mixed_up = (float_psnr(images, picture) for picture in shown)
    values = torch.stack([flow, one_step, guided, flat, one_step - mixed_up], dim=1)
    return values.double().cpu(), message.ids.cpu()


@torch.inference_mode()
def validate(
    model: Comit, config: TrainConfig, data: MemoryImages, *, device: torch.device, batch: int = 64
) -> tuple[dict[str, float], Sheet]:
    """Measure a model, which holds the weights to be judged.

    Returns:
        Values of ``MEASURES``, and the picture of the first images.
    """
    all_values: list[Tensor] = []
    all_ids: list[Tensor] = []
    for start in range(0, len(data.ids), batch):
        # the last batch reaches back, so that no image is alone with its own message
        rows = slice(max(0, min(start, len(data.ids) - batch)), start + batch)
        found, ids = _measure(model, config, to_pixels(data.images[rows], device), data.ids[rows])
        fresh = len(ids) - (start - rows.start)
        all_values.append(found[-fresh:])
        all_ids.append(ids[-fresh:])
    means = torch.cat(all_values).mean(dim=0).tolist()
    counts = torch.bincount(torch.cat(all_ids).flatten())
    values = dict(zip(MEANS, means, strict=True))
    values |= {"ids_used": int((counts > 0).sum()), "perplexity": perplexity(counts)}
    shown = data.ids[: config.validation.pictures]
    _, noise = _draws(config, model, shown)
    images = to_pixels(data.images[: len(shown)], device)
    return values, make_sheet(model, config, images, noise.to(device), shown)
