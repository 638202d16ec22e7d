"""COMiT in use: images -> crops -> message, and message -> image.

A fixed policy sends all its crops through the VAE in one batch; an adaptive policy continues from the
message it already has instead of encoding the sequence again after every choice; the conditional and
unconditional velocities of guidance share one batch.

Randomness is explicit everywhere: a :data:`NoiseSource` is asked for every Gaussian tensor. ``network`` is
what computes; None makes one for the call, and a :class:`FastPredictor` that is handed in keeps what it
derived from the weights until the next.

Shape legend: ``B`` batch, ``M`` message length, ``d`` code dimension, ``C h w`` latent, ``S`` image
side, ``K`` crops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.finite import observe
from comit_bench.nn.flow import Guidance, ProjectedGuidance, integrate, reached
from comit_bench.tokenizers.comit.crops import (
    CELLS,
    GLOBAL,
    CropPolicy,
    encoding_offsets,
    select_cells,
)
from comit_bench.tokenizers.comit.fast import Condition, FastPredictor, MessageProbe
from comit_bench.tokenizers.comit.model import Comit, MaskMode

# (what, crop step, image indices in the batch, shape of one image's noise) -> [len(images), *shape]
NoiseSource = Callable[[Literal["latent", "adaptive"], int, Sequence[int], tuple[int, ...]], Tensor]
# {latent side: (image indices, latents)} of one crop step: one entry unless an explicit order mixes
# global and local crops at the same step; an image that is in none keeps its message
Latents = dict[int, tuple[Tensor, Tensor]]
CENTRE = CELLS // 2


def noise_from_generators(generators: Sequence[torch.Generator]) -> NoiseSource:
    """Every image draws from its own CPU generator, so noise does not depend on the batch."""

    def draw(what: str, step: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generators[i]) for i in images])

    return draw


@dataclass(frozen=True, slots=True)
class EncodeStep:
    """What happened at one crop.

    Attributes:
        cells: int64 [B], 0..8 or ``GLOBAL``.
        offsets: [B, 2], fed with the crop.
        prequant: [B, M, d] message before quantization.
        codes: [B, M, d].
        scores: [B, 3, 3] error map that chose the next crop (adaptive, not after the last crop).
    """

    cells: Tensor
    offsets: Tensor
    prequant: Tensor
    codes: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A finished message.

    Attributes:
        ids: int64 [B, M].
        codes: float32 [B, M, d] in [-1, 1].
        offset: [B, 2] decoding offset: minus the location of the last crop.
        steps: One entry per crop.
    """

    ids: Tensor
    codes: Tensor
    offset: Tensor
    steps: list[EncodeStep]


def locate(model: Comit, cells: Tensor, side: int) -> Tensor:
    """Locations of cells int64 [...] -> [..., 2]; the global crop sits at (0, 0)."""
    table = torch.cat([torch.zeros(1, 2), model.spec.geometry.locations(side)])
    return table.to(cells.device, non_blocking=True)[cells + 1]


def crop_latents(
    model: Comit,
    images: Tensor,
    table: Tensor,
    *,
    first_step: int = 0,
    noise: NoiseSource | None = None,
) -> list[Latents]:
    """VAE latents of crops, all local ones in one batch and all global ones in another.

    Args:
        images: [B, 3, S, S] in [-1, 1].
        table: int64 [K, B] of cells.
        first_step: Step number of ``table[0]`` for the noise source.
        noise: Sample the posterior with this; None takes its mode.

    Returns:
        One :data:`Latents` per step.
    """
    codec, device = model.codec, images.device
    steps: list[Latents] = [{} for _ in range(table.shape[0])]
    table = table.cpu()  # which crop goes where is counted on the host, whatever computes the latents
    for is_global in (True, False):
        step, image = ((table == GLOBAL) == is_global).nonzero().unbind(1)  # ordered by step
        if not len(step):
            continue
        source = image if is_global else image * CELLS + table[step, image]
        if noise is None:
            source, inverse = torch.unique(source, return_inverse=True)  # repeated crops are encoded once
        pixels = images if is_global else model.spec.geometry.local_crops(images).flatten(0, 1)
        pixels = pixels[source.to(device, non_blocking=True)]
        present, drawn = step.unique().tolist(), None
        if noise is not None:
            shape = (model.spec.in_channels, *(n // codec.factor for n in pixels.shape[-2:]))
            parts = [noise("latent", first_step + k, image[step == k].tolist(), shape) for k in present]
            drawn = torch.cat(parts).to(images)
        latents = codec.encode(pixels, drawn)
        if noise is None:
            latents = latents[inverse.to(device, non_blocking=True)]
        for k in present:
            rows = (step == k).nonzero().flatten()
            where, part = (x.to(device, non_blocking=True) for x in (image[rows], rows))
            steps[k][latents.shape[-1]] = (where, latents[part])
    return steps


def update(network: FastPredictor, latents: Latents, message: Tensor, offsets: Tensor) -> Tensor:
    """One encoding step: pre-quantization message [B, M, d] after a crop.

    ``message`` is codes [B, M, d], or [1, 1, d] for the prior, whose positions are all equal.
    """
    time = network.state_at(1.0, offsets.device)
    out: Tensor | None = None
    for images, x in latents.values():
        everything = images.shape[0] == offsets.shape[0]
        r = message if everything or message.shape[0] == 1 else message[images]
        o = offsets if everything else offsets[images]
        z = network.message(x, network.condition(r, o), time)
        if everything:
            return z
        out = z.new_zeros(offsets.shape[0], *z.shape[1:]) if out is None else out
        out[images] = z
    assert out is not None
    return out


def _changed(model: Comit, latents: Latents, prequant: Tensor, before: Tensor) -> Tensor:
    """The message after a step: quantized, but unchanged for the images that the step left out."""
    after: Tensor = model.quantizer(prequant)
    seen = [images for images, _ in latents.values()]
    if sum(len(images) for images in seen) == len(after):
        return after
    here = torch.zeros(len(after), dtype=torch.bool, device=after.device)
    here[torch.cat(seen)] = True
    return torch.where(here[:, None, None], after, before)


def _result(model: Comit, steps: list[EncodeStep], locations: Tensor) -> Encoded:
    codes = steps[-1].codes
    return Encoded(model.quantizer.ids(codes), codes, -locations, steps)


def encode_sequence(
    model: Comit,
    latents: Sequence[Latents],
    cells: Tensor,
    locations: Tensor,
    *,
    backprop_updates: int | None = None,
    network: FastPredictor | None = None,
) -> Encoded:
    """Run the message through crops whose latents are known.

    Args:
        latents: One entry per step, as :func:`crop_latents` returns them.
        cells: int64 [K, B], kept in the trace.
        locations: [K, B, 2].
        backprop_updates: Updates before the last this many run without gradient; None keeps all.
    """
    network = network or FastPredictor(model.predictor)
    message = model.prior(1, locations.device)[:, :1]
    steps = []
    fixed = 0 if backprop_updates is None else max(len(latents) - backprop_updates, 0)
    for k, (x, cell, offset) in enumerate(zip(latents, cells, encoding_offsets(locations), strict=True)):
        if 0 < k == fixed:  # autocast may have kept weights that it cast without gradient
            torch.clear_autocast_cache()
        with torch.no_grad() if k < fixed else nullcontext():
            prequant = update(network, x, message, offset)
            message = _changed(model, x, prequant, message)
        steps.append(EncodeStep(cell, offset, prequant, message))
    return _result(model, steps, locations[-1])


def encode(
    model: Comit,
    images: Tensor,
    policy: CropPolicy,
    *,
    generators: Sequence[torch.Generator] | None = None,
    noise: NoiseSource | None = None,
    posterior: Literal["mode", "sample"] = "mode",
    network: FastPredictor | None = None,
    later: Tensor | None = None,
) -> Encoded:
    """Tokenize images under a cropping policy.

    Args:
        images: float32 [B, 3, S, S] in [-1, 1].
        policy: Which crops, in which order.
        generators: One CPU generator per image for random orders, and for noise unless ``noise`` is given.
        noise: Explicit noise for adaptive policies and posterior sampling.
        posterior: ``mode`` (deterministic) or ``sample`` (released) VAE latents.
        later: Like ``images``; all crops after the first are cut out of these. Not for adaptive policies.
    """
    if noise is None and generators is not None:
        noise = noise_from_generators(generators)
    if posterior not in ("mode", "sample"):
        raise ValueError(f"posterior must be 'mode' or 'sample', got {posterior!r}")
    sampled = posterior == "sample" and model.codec.stochastic
    if sampled and noise is None:
        raise ValueError("posterior='sample' needs generators or explicit noise")
    latent_noise = noise if sampled else None
    network = network or FastPredictor(model.predictor)
    if policy.adaptive:
        if later is not None:
            raise ValueError("an adaptive policy chooses crops by one image: later crops cannot be another's")
        if noise is None:
            raise ValueError("an adaptive policy needs generators or explicit noise")
        return _encode_adaptive(model, network, images, policy, noise, latent_noise)
    cells = policy.indices(images.shape[0], generators)
    own = cells if later is None else cells[:1]
    latents = crop_latents(model, images, own, noise=latent_noise)
    if later is not None:
        latents += crop_latents(model, later, cells[1:], first_step=1, noise=latent_noise)
    cells = cells.to(images.device, non_blocking=True)
    return encode_sequence(model, latents, cells, locate(model, cells, images.shape[-1]), network=network)


def encode_crops(
    model: Comit,
    crops: Sequence[Tensor],
    locations: Sequence[Tensor],
    policy: CropPolicy,
    *,
    noise: NoiseSource | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Encoded:
    """Tokenize crops that are already extracted: lists of [B, 3, h, w] and of locations [B, 2].

    With a null VAE the crops are latents. Only the order and truncation of the policy apply: with
    ``global_crop`` entry 0 counts as the global crop for ``random``; explicit indices name entries.
    """
    if policy.adaptive:
        raise ValueError("an adaptive policy chooses its own crops: pass images, not extracted crops")
    if len(crops) != len(locations) or not crops:
        raise ValueError(f"got {len(crops)} crops and {len(locations)} locations: expected equally many")
    batch = crops[0].shape[0]
    first = int(policy.global_crop)
    order = policy.indices(batch, generators, cells=len(crops) - first) + first
    if int(order.max()) >= len(crops):
        raise ValueError(f"the order names crop {int(order.max())}, but only {len(crops)} were given")
    codec, places = model.codec, torch.stack(list(locations))
    encoded: dict[int, Tensor] = {}
    for index in torch.unique(order).tolist():
        shape = (model.spec.in_channels, *(n // codec.factor for n in crops[index].shape[-2:]))
        drawn = None if noise is None else noise("latent", index, range(batch), shape).to(crops[index])
        encoded[index] = codec.encode(crops[index], drawn)
    latents: list[Latents] = []
    for row in order:
        chosen = [encoded[index][image] for image, index in enumerate(row.tolist())]
        entry: Latents = {}
        for side in {x.shape[-1] for x in chosen}:
            images = [image for image, x in enumerate(chosen) if x.shape[-1] == side]
            entry[side] = (torch.tensor(images), torch.stack([chosen[image] for image in images]))
        latents.append(entry)
    return encode_sequence(model, latents, order, places[order, torch.arange(batch)])


def one_step_decode(
    model: Comit, codes: Tensor, offset: Tensor, noise: Tensor, *, network: FastPredictor | None = None
) -> Tensor:
    """One Euler step from noise without guidance: the latent y + v(0, y), [B, C, h, w]."""
    network = network or FastPredictor(model.predictor)
    time = network.state_at(0.0, codes.device)
    return noise + network.velocity(noise, network.condition(codes, offset), time)


def _encode_adaptive(
    model: Comit,
    network: FastPredictor,
    images: Tensor,
    policy: CropPolicy,
    noise: NoiseSource,
    latent_noise: NoiseSource | None,
) -> Encoded:
    batch, side = images.shape[0], images.shape[-1]
    if side != model.spec.image_size:
        raise ValueError(
            f"an adaptive policy compares with decoded images of {model.spec.image_size} px, got {side} px"
        )
    shape = (model.spec.in_channels, model.spec.max_input_size, model.spec.max_input_size)
    first = GLOBAL if policy.global_crop else CENTRE
    cells = torch.full((batch,), first, device=images.device)
    forbidden = torch.zeros(batch, CELLS, dtype=torch.bool, device=images.device)
    if first == CENTRE:
        forbidden[:, CENTRE] = True
    message = model.prior(1, images.device)[:, :1]
    location = locate(model, cells, side)
    offsets = torch.zeros_like(location)
    steps: list[EncodeStep] = []
    for k in range(cast(int, policy.num_crops)):
        latents = crop_latents(model, images, cells[None], first_step=k, noise=latent_noise)[0]
        prequant = update(network, latents, message, offsets)
        message = model.quantizer(prequant)
        if k + 1 == policy.num_crops:
            steps.append(EncodeStep(cells, offsets, prequant, message))
            break
        y = noise("adaptive", k, range(batch), shape).to(images, non_blocking=True)
        decoded = model.codec.decode(one_step_decode(model, message, -location, y, network=network))
        scores = model.spec.geometry.error_map(decoded, images)
        steps.append(EncodeStep(cells, offsets, prequant, message, scores))
        cells, forbidden = select_cells(scores, forbidden, shared=policy.shared)
        new_location = locate(model, cells, side)
        offsets, location = new_location - location, new_location
    return _result(model, steps, location)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A sampled latent [B, C, h, w], and the message-to-image maps that nobody else received.

    Attributes:
        latents: [B, C, h, w].
        attention: (position in request.layers, in request.times) -> [B, H, M, h/P, w/P].
    """

    latents: Tensor
    attention: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def decode(
    model: Comit,
    codes: Tensor,
    offset: Tensor,
    noise: Tensor,
    *,
    steps: int = 10,
    solver: str = "euler",
    guidance: Guidance | None = None,
    attention: AttentionRequest | None = None,
    receive: MapReceiver | None = None,
    finish: bool = True,
    network: FastPredictor | None = None,
) -> Decoded:
    """Sample a latent from a message.

    Args:
        codes: [B, M, d].
        offset: [B, 2] decoding offset of the message.
        noise: [B, C, h, w], the latent at t = 0.
        steps: Grid intervals.
        solver: ``euler`` or ``midpoint``.
        guidance: None is ``Guidance()``: weight 7.5, momentum -0.5.
        attention: Also hand out message-to-image maps, all from this one sampling run.
        receive: Gets them as they are computed; None keeps them all in the result. Times that no
            evaluation reaches are left out.
        finish: Go on after the last map; else the latent is that of this time and nothing else is computed.

    Raises:
        ValueError: Unknown solver, steps below 1, or a layer that does not exist.
    """
    settings = guidance or Guidance()
    network = network or FastPredictor(model.predictor)
    if attention is not None:
        attention.check(model.spec.depth)
    conditional = network.condition(codes, offset)
    both = prior = None
    if settings.active:
        prior = network.condition(model.prior(1, codes.device)[:, :1], offset)
        message = torch.cat([conditional.message, prior.message.expand_as(conditional.message)])
        both = Condition(message, torch.cat([conditional.offset, prior.offset]))
    combine = ProjectedGuidance(settings)
    kept: dict[tuple[int, int], Tensor] = {}
    keep: MapReceiver = receive or (lambda layer, time, maps: kept.__setitem__((layer, time), maps))
    reader = None if attention is None else _MapReader(attention, keep)
    mode: MaskMode | None = "hard" if attention and attention.path == "hard" else None

    def velocity(time: float, y: Tensor) -> Tensor | None:
        state = network.state_at(time, y.device)
        if reader is None and both is not None:
            return combine(*network.velocity(torch.cat([y, y]), both, state).chunk(2))
        probe = None if reader is None else reader.probe(time, y.shape[-2] // model.spec.patch_size)
        v = network.velocity(y, conditional, state, probe=probe, mask_mode=mode)
        if reader is not None and not reader.left and not finish:
            return None
        if prior is None:
            return v
        return combine(v, network.velocity(y, prior, state))

    return Decoded(integrate(velocity, noise, steps=steps, solver=solver), kept)


class _MapReader:
    """Knows which times of a request are still to be read; hands maps on as grids."""

    def __init__(self, request: AttentionRequest, receive: MapReceiver) -> None:
        self.request, self.receive = request, receive
        self.left = sorted(range(len(request.times)), key=request.times.__getitem__)

    def probe(self, time: float, rows: int) -> MessageProbe | None:
        """For one evaluation: records the maps of every time that it answers; None when there is none."""
        due = [number for number in self.left if reached(time, self.request.times[number])]
        if not due:
            return None
        del self.left[: len(due)]

        def hand_on(layer: int, maps: Tensor) -> None:
            grids = rearrange(maps, "b heads m (h w) -> b heads m h w", h=rows)
            for number in due:
                self.receive(self.request.layers.index(layer), number, grids)

        return MessageProbe(self.request.layers, softmax=self.request.softmax, receive=hand_on)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats -> uint8: clamp, (x + 1) * 127.5, truncate."""
    return observe("pixels", images).clamp(-1, 1).add(1).mul(127.5).to(torch.uint8)
