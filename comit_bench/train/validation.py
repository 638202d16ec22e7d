"""Validation with the averaged weights: does the message matter, and does it gather what crops show?

PSNR is of images in [-1, 1] (peak 2), averaged over images. Messages are of the global crop; those of the
columns ``gather_`` and ``read_`` are of the crops that these name. Noise and times are keyed by the image's
id, so two checkpoints are compared on the same draws; so are the orders of crops, whatever the run's seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comit_bench.nn.flow import Guidance
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.comit.codec import (
    crop_latents,
    decode,
    encode,
    encode_sequence,
    locate,
    one_step_decode,
)
from comit_bench.tokenizers.comit.crops import GLOBAL, CropPolicy
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.config import TrainConfig
from comit_bench.train.data import MemoryImages, to_pixels
from comit_bench.train.pictures import Sheet, make_sheet

MEANS = ("val_flow", "psnr_one_step", "psnr_guided", "psnr_mean_colour", "shuffled_gap")  # over images
GATHER = {  # one-step PSNR by the crops that the message was made of, as policies are written
    "gather_random_1": "random:1",
    "gather_random_3": "random:3",
    "gather_random_9": "random:9",
    "gather_global": "global",
    "gather_global_random_4": "global+random:4",
}
READ = {"read_random_9": "random:9", "read_global": "global"}  # accuracy of a linear read-out of the class
MEASURES = (*MEANS, "ids_used", "perplexity", *GATHER)
BATCH = 64
RIDGE = 0.1  # of the read-out, as a share of the images that it is fitted on
Messages = dict[str, tuple[Tensor, Tensor]]


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


def _messages(model: Comit, images: Tensor, ids: tuple[str, ...], network: FastPredictor) -> Messages:
    """Codes [B, M, d] and decoding offsets [B, 2] by policy; nine random crops give all their prefixes."""
    orders = [generator_for(0, f"gather/{name}") for name in ids]
    table = CropPolicy(order="random").indices(len(ids), orders)  # [9, B]
    mixed = torch.cat([torch.full_like(table[:1], GLOBAL), table[:3]])
    latents = crop_latents(model, images, torch.cat([table, mixed]))
    messages: Messages = {}
    for cells, steps, kept in (
        (table, latents[:9], {0: "random:1", 2: "random:3", 8: "random:9"}),
        (mixed, latents[9:], {0: "global", 3: "global+random:4"}),
    ):
        places = locate(model, cells.to(images.device), images.shape[-1])
        done = encode_sequence(model, steps, cells, places, network=network)
        messages |= {policy: (done.steps[k].codes, -places[k]) for k, policy in kept.items()}
    return messages


def read_out(vectors: Tensor, labels: Tensor) -> float:
    """Accuracy of a ridge regression on one-hot classes, fitted on a random half and measured on the other.

    Args:
        vectors: [n, D], n of 2 or more.
        labels: int64 [n].
    """
    order = torch.randperm(len(labels), generator=generator_for(0, "read-out"))
    vectors, labels = vectors.double()[order], labels[order]
    known = vectors[::2]
    classes = labels.unique()
    mean, deviation = known.mean(dim=0), known.std(dim=0, unbiased=False).clamp_min(1e-6)
    x = (known - mean) / deviation
    y = (labels[::2, None] == classes).double()
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(dim=0)))
    scores = (vectors[1::2] - mean) / deviation @ weights + y.mean(dim=0)
    return float((classes[scores.argmax(dim=1)] == labels[1::2]).double().mean())


def _gather(model: Comit, config: TrainConfig, data: MemoryImages, device: torch.device) -> dict[str, float]:
    """The columns of ``GATHER`` and, for labelled images, of ``READ``."""
    network, codec = FastPredictor(model.predictor), model.codec
    count = min(config.validation.gather, len(data.ids))
    quality: dict[str, list[Tensor]] = {policy: [] for policy in GATHER.values()}
    codes: dict[str, list[Tensor]] = {policy: [] for policy in READ.values()}
    for start in range(0, count, BATCH):
        ids = data.ids[start : min(start + BATCH, count)]
        images = to_pixels(data.images[start : start + len(ids)], device)
        noise = _draws(config, model, ids)[1].to(device)
        for policy, given in _messages(model, images, ids, network).items():
            drawn = codec.decode(one_step_decode(model, *given, noise, network=network))
            quality[policy].append(float_psnr(images, drawn).double().cpu())
            if policy in codes:
                codes[policy].append(given[0].flatten(1).cpu())
    values = {name: float(torch.cat(quality[policy]).mean()) for name, policy in GATHER.items()}
    if data.labels is None:
        return values
    labels = data.labels[:count]
    known = labels >= 0
    if int(known.sum()) > 1:
        read = {name: torch.cat(codes[policy])[known] for name, policy in READ.items()}
        values |= {name: read_out(vectors, labels[known]) for name, vectors in read.items()}
    return values


@torch.inference_mode()
def validate(
    model: Comit, config: TrainConfig, data: MemoryImages, *, device: torch.device, batch: int = BATCH
) -> tuple[dict[str, float], Sheet]:
    """Measure a model, which holds the weights to be judged.

    Returns:
        Values of ``MEASURES`` and, for labelled images, of ``READ``, and the picture of the first images.
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
    values |= _gather(model, config, data, device)
    shown = data.ids[: config.validation.pictures]
    _, noise = _draws(config, model, shown)
    images = to_pixels(data.images[: len(shown)], device)
    return values, make_sheet(model, config, images, noise.to(device), shown)
