"""How a COMiT message grows crop by crop, for the figures ``evolution`` and ``policies``.

Shape legend: ``n`` images, ``K`` crops, ``M`` message length, ``d`` code dimension, ``S`` image side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.figures.inputs import Images, generators, noise_seeds, progress
from comit_bench.tokenizers.base import TILE
from comit_bench.tokenizers.comit.adapter import ComitTokenizer
from comit_bench.tokenizers.comit.codec import locate, noise_from_generators, to_uint8
from comit_bench.tokenizers.comit.crops import CropGeometry, CropPolicy


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Messages after every crop and what each says about the image.

    Attributes:
        cells: int64 [K, n], 0..8 in raster order or ``GLOBAL``.
        codes: float32 [K, n, M, d].
        offsets: float32 [K, n, 2], decoding offsets.
        one_step: uint8 [K, n, 3, S, S], one Euler step without guidance.
        errors: float32 [K, n, 3, 3]: squared error of the one-step image summed over channels (values in
            [-1, 1]) and averaged in every region that a local crop can see. For an adaptive policy these
            are the very maps that choose the next crop.
    """

    cells: Tensor
    codes: Tensor
    offsets: Tensor
    one_step: Tensor
    errors: Tensor


class _Recorder:
    """The noise that an adaptive encoding draws, kept so that its pictures can be made again.

    Args:
        own: Generators of the images.
        looked: Called when the encoding has come to the next crop.
    """

    def __init__(self, own: Sequence[torch.Generator], looked: Callable[[], None]) -> None:
        self._draw = noise_from_generators(own)
        self._looked = looked
        self.drawn: dict[int, Tensor] = {}

    def __call__(
        self, what: Literal["latent", "adaptive"], step: int, images: Sequence[int], shape: tuple[int, ...]
    ) -> Tensor:
        noise = self._draw(what, step, images, shape)
        if what == "adaptive":
            self.drawn[step] = noise
            self._looked()
        return noise


def trace(tokenizer: ComitTokenizer, inputs: Images, policy: str | None, seed: int) -> Trace:
    """Encode images and look at the message after every crop.

    The messages are those that ``tokenizer.encode`` makes with the same generators. One-step images start
    from the noise that the adaptive choice saw; under other policies from one noise per image, the same
    for every crop.

    Images are taken one by one, so that nothing depends on the others and one photo costs one. Runs compute
    in tiles of 8 and round otherwise: an id at a rounding boundary may be its neighbour there. Policies whose
    images share crops get their tile.

    Raises:
        UsageError: Not a policy.
    """
    parsed = tokenizer.policy(policy)
    size = TILE if parsed.shared else 1
    crops = parsed.num_crops if parsed.adaptive else len(parsed.indices(1, [torch.Generator()]))
    looks = len(inputs) * (crops or 1) * (2 if parsed.adaptive else 1)  # adaptive: also to choose
    advance = progress.get()(f"{tokenizer.info.name}: crop by crop", looks, "looks")
    parts = []
    for start in range(0, len(inputs), size):
        rows = torch.arange(start, start + size).clamp_(max=len(inputs) - 1)
        names = [inputs.names[row] for row in rows.tolist()]
        looked = partial(advance, min(size, len(inputs) - start))
        parts.append(_tile(tokenizer, inputs.images[rows], names, parsed, seed, looked))
    joined = [torch.cat(columns, dim=1)[:, : len(inputs)] for columns in zip(*parts, strict=True)]
    return Trace(*joined)


def _tile(
    tokenizer: ComitTokenizer,
    images: Tensor,
    names: Sequence[str],
    policy: CropPolicy,
    seed: int,
    looked: Callable[[], None],
) -> tuple[Tensor, ...]:
    """Cells, codes, offsets, one-step images and error maps of one tile, each [K, b, ...]."""
    own = generators(names, seed)
    recorder = _Recorder(own, looked)
    steps = tokenizer.messages(images, policy, own, noise=recorder).steps
    fixed = torch.stack([tokenizer.noise(number) for number in noise_seeds(names, seed)])
    if policy.adaptive:  # nothing was drawn after the last crop, because no choice follows
        recorder("adaptive", len(steps) - 1, range(len(names)), tuple(fixed.shape[1:]))
    pixels = images.float().div(255).sub(0.5).div(0.5)
    columns: list[tuple[Tensor, ...]] = []
    for k, step in enumerate(steps):
        offset = -locate(tokenizer.model, step.cells, images.shape[-1])
        seen = tokenizer.one_step(step.codes, offset, recorder.drawn.get(k, fixed)).float().cpu()
        error = tokenizer.model.spec.geometry.error_map(seen, pixels)
        looked()
        columns.append((step.cells.cpu(), step.codes.float().cpu(), offset.cpu(), to_uint8(seen), error))
    return tuple(torch.stack(column) for column in zip(*columns, strict=True))


def one_step_images(
    tokenizer: ComitTokenizer, codes: Tensor, offsets: Tensor, seeds: Sequence[int]
) -> Tensor:
    """One-step images uint8 [n, 3, S, S] of messages, one by one.

    Args:
        tokenizer: What decodes.
        codes: [n, M, d].
        offsets: [n, 2].
        seeds: Of the noise of each.
    """
    noise = torch.stack([tokenizer.noise(seed) for seed in seeds])
    advance = progress.get()(f"{tokenizer.info.name}: one step", len(codes), "images")
    parts = []
    for row in range(len(codes)):
        one = slice(row, row + 1)
        parts.append(to_uint8(tokenizer.one_step(codes[one], offsets[one], noise[one])).cpu())
        advance(1)
    return torch.cat(parts)


def boxes(trace: Trace, geometry: CropGeometry) -> NDArray[np.int64]:
    """Frames of all crops of a trace in pixels: int64 [K, n, 3] of (left, top, side)."""
    frames: NDArray[np.int64] = geometry.boxes(trace.one_step.shape[-1])[trace.cells + 1].numpy()
    return frames
