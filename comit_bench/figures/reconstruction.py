"""Figure ``reconstruction``: originals, and what several tokenizers keep of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comit_bench.figures.about import FLAT, NOTHING, About, describe, joined
from comit_bench.figures.inputs import Images, decode, encode, noise_seeds, psnr_of_flat
from comit_bench.figures.style import decibels, gallery, styled
from comit_bench.metrics.similarity import psnr
from comit_bench.tokenizers.base import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Reconstructions:
    """Originals and reconstructions of ``n`` images by ``T`` tokenizers.

    Attributes:
        names: Ids of the images [n].
        tokenizers: Names [T].
        originals: Per tokenizer uint8 [n, 3, S, S], what it was given.
        images: Per tokenizer uint8 [n, 3, S, S], what it gave back.
        psnr: float64 [T, n] in dB, against the tokenizer's own original.
        about: Words around the figure.
    """

    names: tuple[str, ...]
    tokenizers: tuple[str, ...]
    originals: tuple[NDArray[np.uint8], ...]
    images: tuple[NDArray[np.uint8], ...]
    psnr: NDArray[np.float64]
    about: About = NOTHING


def compute(
    tokenizers: Sequence[Tokenizer], inputs: Sequence[Images], *, policy: str | None = None, seed: int = 0
) -> Reconstructions:
    """Encode and decode the same images by several tokenizers.

    Args:
        tokenizers: T of them.
        inputs: The same images for each, preprocessed as it declares (``load_inputs``).
    """
    names = {given.names for given in inputs}
    if len(names) != 1 or len(inputs) != len(tokenizers):
        raise ValueError(f"expected the same images for each of {len(tokenizers)} tokenizers, got {names}")
    images, values, said = [], [], []
    for tokenizer, given in zip(tokenizers, inputs, strict=True):
        said.append(describe(tokenizer, given, policy=policy, decodes=True))
        tokens = encode(tokenizer, given, policy=policy, seed=seed)
        decoded = decode(tokenizer, tokens, noise_seeds(given.names, seed))
        images.append(decoded.numpy())
        values.append(psnr(given.images, decoded))
    return Reconstructions(
        inputs[0].names,
        tuple(t.info.name for t in tokenizers),
        tuple(given.images.numpy() for given in inputs),
        tuple(images),
        np.stack(values),
        joined(said).plus(FLAT),
    )


def extremes(data: Reconstructions, count: int, *, best: bool = False) -> Reconstructions:
    """The ``count`` images that the first tokenizer reconstructs worst (or best), the most extreme first."""
    first = data.psnr[0]
    order = np.argsort(-first if best else first, kind="stable")[:count]
    return Reconstructions(
        tuple(data.names[i] for i in order),
        data.tokenizers,
        tuple(one[order] for one in data.originals),
        tuple(one[order] for one in data.images),
        data.psnr[:, order],
        data.about.plus(
            f"shown: the {len(order)} that {data.tokenizers[0]} reconstructs {'best' if best else 'worst'}"
        ),
    )


@styled
def draw(data: Reconstructions) -> Figure:
    """A row of originals (another where preprocessing differs), a row per tokenizer, PSNR under each.

    Under the originals stands the PSNR of their mean colour, which needs no tokenizer.
    """
    rows: list[list[NDArray[np.uint8]]] = []
    labels: list[str] = []
    captions: list[list[str] | None] = []
    sides = {one.shape[-1] for one in data.originals}
    shown: list[NDArray[np.uint8]] = []
    for t, name in enumerate(data.tokenizers):
        given = data.originals[t]
        if not any(np.array_equal(given, other) for other in shown):
            several = "" if len(sides) == 1 else f" {given.shape[-1]} px"
            rows.append(list(given))
            labels.append(f"original{several}" if not shown or several else f"original for {name}")
            flat = psnr_of_flat(torch.from_numpy(given))
            captions.append([f"flat: {decibels(value)}" for value in flat])
            shown.append(given)
        rows.append(list(data.images[t]))
        labels.append(data.about.label(name))
        captions.append([decibels(value) for value in data.psnr[t]])
    figure, _ = gallery(rows, row_labels=labels, captions=captions)
    return figure
