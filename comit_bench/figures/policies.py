"""Figure ``policies`` (paper Figure 10): what messages of different crops give back; PSNR by crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comit_bench.figures.about import FLAT, NOTHING, About, describe
from comit_bench.figures.inputs import (
    Images,
    decode,
    encode,
    noise_seeds,
    psnr_of_flat,
    require_comit,
    together,
)
from comit_bench.figures.style import (
    BLACK,
    COLOURS,
    COLUMN,
    MARKERS,
    decibels,
    gallery,
    new_figure,
    styled,
)
from comit_bench.figures.tracing import one_step_images, trace
from comit_bench.metrics.similarity import psnr
from comit_bench.tokenizers.base import Tokenizer, Tokens
from comit_bench.tokenizers.comit.adapter import ComitTokenizer
from comit_bench.tokenizers.comit.crops import CELLS

DEFAULT_POLICIES = ("global", "raster:9", "random:9", "adaptive:9", "global+raster:10")
ORDERS = {"raster": "fixed order", "random": "random order", "adaptive": "adaptive order"}


@dataclass(frozen=True, slots=True, eq=False)
class PolicyGallery:
    """Reconstructions of ``n`` images under ``P`` policies.

    Attributes:
        names: Ids of the images [n].
        policies: Canonical names [P].
        images: uint8 [n, 3, S, S], the originals.
        reconstructions: uint8 [P, n, 3, S, S], fully decoded.
        psnr: float64 [P, n] in dB.
        about: Words around the figure.
    """

    names: tuple[str, ...]
    policies: tuple[str, ...]
    images: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]
    psnr: NDArray[np.float64]
    about: About = NOTHING


@dataclass(frozen=True, slots=True, eq=False)
class PolicyCurves:
    """PSNR of ``n`` images after 1 .. ``K`` crops in ``O`` orders.

    Attributes:
        orders: ``raster``, ``random``, ``adaptive`` [O]; without the global crop.
        one_step: float64 [O, K, n] in dB: one Euler step, the same noise for one image everywhere.
        full: float64 [O, K, n] in dB: decoded as for a reconstruction, the same noise.
        flat: float64 [n] in dB, of every image's mean colour: what a decoder that sees nothing gets.
        about: Words around the figure.
    """

    orders: tuple[str, ...]
    one_step: NDArray[np.float64]
    full: NDArray[np.float64]
    flat: NDArray[np.float64]
    about: About = NOTHING


def compute(
    tokenizer: Tokenizer, inputs: Images, *, policies: Sequence[str] = DEFAULT_POLICIES, seed: int = 0
) -> PolicyGallery:
    """Reconstruct images from messages of different crops; ``policies`` are names of ``parse_policy``."""
    comit = require_comit(tokenizer, "policies")
    canonical = tuple(str(comit.policy(name)) for name in policies)
    seeds = noise_seeds(inputs.names, seed)
    messages = together([encode(comit, inputs, policy=name, seed=seed) for name in canonical])
    found = decode(comit, messages, seeds * len(canonical)).unflatten(0, (len(canonical), -1))
    return PolicyGallery(
        inputs.names,
        canonical,
        inputs.images.numpy(),
        found.numpy(),
        np.stack([psnr(inputs.images, images) for images in found]),
        _about(comit, inputs).plus(FLAT),
    )


def _about(comit: ComitTokenizer, inputs: Images) -> About:
    """The policies are rows or curves, so none is named."""
    said = describe(comit, inputs, decodes=True)
    return replace(said, lines=(said.lines[0].replace(f", policy {comit.policy(None)}", ""), *said.lines[1:]))


def compute_curves(
    tokenizer: Tokenizer, inputs: Images, *, crops: int = CELLS, seed: int = 0
) -> PolicyCurves:
    """PSNR against the number of local crops (1 to 9), for a fixed, a random and an adaptive order.

    A message after k of the crops is the message of the same policy with k crops, so one encoding gives a
    whole curve.
    """
    comit = require_comit(tokenizer, "policies")
    seeds = noise_seeds(inputs.names, seed) * crops
    truth = inputs.images.repeat(crops, 1, 1, 1)
    one_step, full = [], []
    for order in ORDERS:
        found = trace(comit, inputs, f"{order}:{crops}", seed)
        codes, offsets = found.codes.flatten(0, 1), found.offsets.flatten(0, 1)  # [K * n, ...]
        shape = (crops, len(inputs))
        one_step.append(psnr(truth, one_step_images(comit, codes, offsets, seeds)).reshape(shape))
        full.append(psnr(truth, decode(comit, Tokens(None, codes, offsets), seeds)).reshape(shape))
    flat = psnr_of_flat(inputs.images).numpy()
    said = _about(comit, inputs).plus(
        "bars: standard error over images; mean colour: images painted in it, which needs no tokenizer"
    )
    return PolicyCurves(tuple(ORDERS), np.array(one_step), np.array(full), flat, said)


@styled
def draw(data: PolicyGallery) -> Figure:
    """A row of originals and a row per policy, PSNR in dB under each.

    Under the originals stands the PSNR of their mean colour, which needs no tokenizer.
    """
    captions = [[decibels(value) for value in row] for row in data.psnr]
    flat = [f"flat: {decibels(value)}" for value in psnr_of_flat(torch.from_numpy(data.images))]
    figure, _ = gallery(
        [list(data.images), *(list(row) for row in data.reconstructions)],
        row_labels=["original", *data.policies],
        captions=[flat, *captions],
    )
    return figure


@styled
def draw_curves(data: PolicyCurves) -> Figure:
    """Mean PSNR with its standard error over images against the number of crops, two panels."""
    figure = new_figure(COLUMN, 0.62 * COLUMN + 0.2, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title, values in zip(
        panels, ("one step", "full decode"), (data.one_step, data.full), strict=True
    ):
        count = values.shape[-1]
        crops = np.arange(1, values.shape[1] + 1)
        for number, order in enumerate(data.orders):
            error = values[number].std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else None
            axes.errorbar(
                crops + (number - 1) * 0.12, values[number].mean(axis=-1), error,
                color=COLOURS[number], marker=MARKERS[number], label=ORDERS[order],
                elinewidth=0.6, capsize=1.5, capthick=0.6,
            )  # fmt: skip
        flat = float(data.flat.mean())
        if np.isfinite(flat):
            axes.axhline(flat, color=BLACK, linestyle=(0, (4, 2)), linewidth=0.9, label="mean colour")
        axes.set(title=title, xlabel="crops", xticks=crops[::2])
    panels[0].set_ylabel("PSNR (dB)")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=2, handlelength=1.6, columnspacing=1.0)
    return figure
