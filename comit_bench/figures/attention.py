"""Figure ``attention``: where tokens look while an image is decoded, beside the object's mask.

The gallery shows, for every image and share, the token whose map covers the object best (as task kind
``objectness`` counts it); the heat map shows the mean of this over images for every layer and time. The token
is chosen with the mask, which is an oracle choice: the best of K maps covers a part of any object by chance.
So the null stands beside every value: the best of the K maps of another image, as in the task.

Shape legend: ``n`` images, ``P`` shares, ``L`` layers, ``T`` times (1 for a decoder of one pass), ``S`` side
of an image, ``h w`` grid of a map.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.data.images import mask_of, upright
from comit_bench.data.readers.saliency import MASKS
from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation, UsageError
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import BATCH, Images, encode, noise_seeds, progress, rows_of, tiles_for
from comit_bench.figures.style import (
    COLUMN,
    ORANGE,
    SEQUENTIAL,
    SMALL,
    gallery,
    literal,
    new_figure,
    show,
    styled,
)
from comit_bench.metrics.overlap import binary, overlaps, shifted
from comit_bench.nn.attention import AttentionRequest
from comit_bench.recipes.kinds import ObjectnessSpec
from comit_bench.seeding import generator_for
from comit_bench.tasks.objectness import derangement, make_plan
from comit_bench.tokenizers.base import Tokenizer

SHARES = (10, 20, 30, 40)
LAYER, TIME = 0.857, 0.5  # as the recipes
SWEEP_TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
OPTIMISTIC_CELL = "the best cell was found on these very images: it is an optimistic number"
MASK_SUFFIXES = (".png", ".bmp", ".jpg")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """The best tokens of ``n`` images.

    Attributes:
        names: Ids of the images [n].
        layer: Zero-based block.
        time: Of the evaluation that was read; None for a decoder of one pass.
        shares: Percent of the pixels, [P].
        images: uint8 [n, 3, S, S].
        masks: bool [n, S, S].
        tokens: int64 [n, P], the token with the highest overlap (position in the message).
        maps: float32 [n, P, h, w], its map, mean over heads.
        binary: bool [n, P, S, S], the pixels it keeps.
        iou: float64 [n, P].
        null: float64 [n, P], the same of the maps of another image, mean over draws.
        candidates: K, the tokens among which the best was chosen.
        about: Words around the figure.
    """

    names: tuple[str, ...]
    layer: int
    time: float | None
    shares: tuple[int, ...]
    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    maps: NDArray[np.float32]
    binary: NDArray[np.bool_]
    iou: NDArray[np.float64]
    null: NDArray[np.float64]
    candidates: int
    about: About = NOTHING


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """Mean overlap of the best token by layer and time.

    Attributes:
        tokenizer: Its name.
        layers: Zero-based blocks [L].
        times: As read [T]; empty for a decoder of one pass.
        share: Percent of the pixels.
        miou: float64 [L, max(T, 1)].
        null: float64 [L, max(T, 1)], the same of the maps of another image, one draw per image.
        images: How many it is the mean of.
        candidates: K, the tokens among which the best was chosen.
        about: Words around the figure.
    """

    tokenizer: str
    layers: tuple[int, ...]
    times: tuple[float, ...]
    share: int
    miou: NDArray[np.float64]
    null: NDArray[np.float64]
    images: int
    candidates: int
    about: About = NOTHING


def find_masks(inputs: Images) -> tuple[Path, ...]:
    """Files of the masks: those of the scenes, or those beside the folder of images.

    They have the image's name and lie in ``ground_truth_mask/`` or ``ground_truth/``, as in CSSD and ECSSD,
    or in the same folder with another suffix.
    """
    if inputs.masks is not None:
        return inputs.masks
    found = []
    for path in inputs.paths:
        folders = [path.parent.parent / name for name in MASKS] + [path.parent]
        candidates = [folder / f"{path.stem}{suffix}" for folder in folders for suffix in MASK_SUFFIXES]
        mask = next((one for one in candidates if one != path and one.is_file()), None)
        if mask is None:
            raise MissingError(
                f"{path}: has no mask of its object. Figure 'attention' needs one per image, of the "
                f"same name in {folders[0]} (the layout of CSSD), or --images scenes."
            )
        found.append(mask)
    return tuple(found)


def read_masks(inputs: Images, preprocessing: str) -> tuple[Images, NDArray[np.bool_]]:
    """The images with an object, and their masks through their own crops, bool [n, S, S].

    Images whose mask is of no use are left out with a warning.

    Raises:
        MissingError: An image has no mask.
        UsageError: None of the masks can be used; says why the first cannot.
    """
    recipe = upright(preprocessing) if inputs.exif else preprocessing
    masks, rows, reasons = [], [], []
    for row, (photo, file) in enumerate(zip(inputs.paths, find_masks(inputs), strict=True)):
        try:
            cropped, mask = mask_of(photo, file, recipe)
        except CorruptFileError as error:
            reasons.append(str(error))
            continue
        if mask.problem is not None:
            reasons.append(f"{file}: no object is left to look for: {mask.problem}.")
        elif not cropped.any():
            reasons.append(f"{file}: no object is left after {recipe}.")
        else:
            masks.append(cropped)
            rows.append(row)
    if not masks:
        raise UsageError(f"{reasons[0]} Replace the mask, or choose other images (--seed, --count).")
    for reason in reasons:
        _log.warning("%s It is left out.", reason)
    kept = replace(
        inputs,
        names=tuple(inputs.names[row] for row in rows),
        images=inputs.images[rows],
        paths=tuple(inputs.paths[row] for row in rows),
        masks=None if inputs.masks is None else tuple(inputs.masks[row] for row in rows),
    )
    return kept, np.stack(masks)


def each_map(
    tokenizer: Tokenizer, inputs: Images, spec: ObjectnessSpec, policy: str | None, seed: int
) -> tuple[AttentionRequest, tuple[float, ...], dict[tuple[int, int], list[Tensor]]]:
    """What was read, when, and per (layer, time) the maps [K, h, w] of every image, means over heads."""
    try:
        plan = make_plan(spec, tokenizer)
    except UnsupportedOperation as error:
        raise UnsupportedOperation(f"{tokenizer.info.name} cannot be shown: {error}") from error
    attending: Any = tokenizer
    tokens = encode(tokenizer, inputs, policy=policy, seed=seed)
    seeds = noise_seeds(inputs.names, seed)
    found: dict[tuple[int, int], list[Tensor]] = {}

    def keep(first: int, layer: int, time: int, maps: Tensor) -> None:
        found.setdefault((layer, time), []).extend(maps.float().mean(dim=1).cpu())

    advance = progress.get()(f"{tokenizer.info.name}: reading maps", len(inputs), "images")
    with tiles_for(len(inputs)):
        for start in range(0, len(inputs), BATCH):
            rows = slice(start, start + BATCH)
            part = rows_of(tokens, rows)
            attending.attention(part, plan.request, keep, seeds=seeds[rows])
            advance(len(part))
    return plan.request, plan.read_at, found


def _null(
    maps: Sequence[Tensor], masks: NDArray[np.bool_], names: Sequence[str], spec: ObjectnessSpec, draws: int
) -> Iterator[NDArray[np.float64]]:
    """Per image float64 [P]: IoU of the best map of another image (of its own, rolled, where it is alone)."""
    partners = [derangement(names, spec.null_seed, draw) for draw in range(draws)]
    generator = generator_for(spec.null_seed, f"objectness-null/{names[0]}")
    for image, mask in enumerate(masks):
        best = []
        for partner in partners:
            others = maps[int(partner[image])] if len(maps) > 1 else shifted(maps[0], generator)
            found = overlaps(others, torch.from_numpy(mask), spec.shares, resize=spec.resize)
            best.append(found.amax(dim=1).numpy())
        yield np.mean(best, axis=0)


def _says(tokenizer: Tokenizer, inputs: Images, policy: str | None, candidates: int, left_out: int) -> About:
    """What both figures must say."""
    lines = [
        f"oracle choice: the token shown is the one of {candidates} whose map (mean over heads) covers the "
        "mask best; null: the best of as many maps of another image"
    ]
    if left_out:
        lines.append(f"incomplete: {left_out} image(s) without a mask of an object are left out")
    return describe(tokenizer, inputs, policy=policy, decodes=True).plus(*lines)


def compute(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    layer: int | float = LAYER,
    time: float = TIME,
    shares: Sequence[int] = SHARES,
    policy: str | None = None,
    seed: int = 0,
) -> Attention:
    """Find the token that covers the object best, per image and share.

    Args:
        tokenizer: One with attention maps.
        inputs: Images with masks, see :func:`find_masks`.
        layer: Zero-based block, negative from the end, or a relative depth in (0, 1).
        time: Flow time in [0, 1).
        shares: Percent of the pixels that are kept.

    Raises:
        MissingError: An image has no mask.
    """
    asked, (inputs, masks) = len(inputs), read_masks(inputs, tokenizer.info.preprocessing)
    spec = make_spec(layers=(layer,), times=(time,), shares=tuple(shares))
    request, read_at, found = each_map(tokenizer, inputs, spec, policy, seed)
    tokens, maps, kept, iou = [], [], [], []
    for mask, own in zip(masks, found[0, 0], strict=True):
        scores = overlaps(own, torch.from_numpy(mask), shares, resize=spec.resize)  # [P, K]
        best = scores.argmax(dim=1)
        tokens.append(best.numpy())
        iou.append(scores.amax(dim=1).numpy())
        maps.append(own[best].numpy())
        pixels = [
            binary(own[[token]], mask.shape[-1], share, resize=spec.resize)[0]
            for token, share in zip(best.tolist(), shares, strict=True)
        ]
        kept.append(torch.stack(pixels).numpy())
    return Attention(
        inputs.names,
        request.layers[0],
        read_at[0] if read_at else None,
        tuple(shares),
        inputs.images.numpy(),
        masks,
        np.stack(tokens),
        np.stack(maps),
        np.stack(kept),
        np.stack(iou),
        np.stack(list(_null(found[0, 0], masks, inputs.names, spec, spec.null_draws))),
        len(found[0, 0][0]),
        _says(tokenizer, inputs, policy, len(found[0, 0][0]), asked - len(inputs)),
    )


def compute_sweep(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    share: int = 20,
    times: Sequence[float] = SWEEP_TIMES,
    policy: str | None = None,
    seed: int = 0,
) -> Sweep:
    """Mean overlap of the best token for every layer and several times, from one decoding per image.

    Args:
        tokenizer: One with attention maps.
        inputs: Images with masks.
        share: Percent of the pixels that are kept.
        times: Flow times; those after the tokenizer's last evaluation, and those that fall on the same one,
            are left out.
    """
    depth = getattr(tokenizer, "attention_layers", 1)
    asked, (inputs, masks) = len(inputs), read_masks(inputs, tokenizer.info.preprocessing)
    spec = make_spec(layers=tuple(range(depth)), times=_readable(tokenizer, times), shares=(share,))
    request, read_at, found = each_map(tokenizer, inputs, spec, policy, seed)
    miou = np.zeros((len(request.layers), max(len(read_at), 1)))
    null = np.zeros_like(miou)
    advance = progress.get()("comparing with masks", len(found), "cells")
    for (row, column), maps in found.items():
        scores = [
            float(overlaps(own, torch.from_numpy(mask), (share,), resize=spec.resize).max())
            for own, mask in zip(maps, masks, strict=True)
        ]
        miou[row, column] = np.mean(scores)
        null[row, column] = np.mean(list(_null(maps, masks, inputs.names, spec, 1)))
        advance(1)
    candidates = len(found[0, 0][0])
    said = _says(tokenizer, inputs, policy, candidates, asked - len(inputs)).plus(OPTIMISTIC_CELL)
    return Sweep(
        tokenizer.info.name, request.layers, read_at, share, miou, null, len(inputs), candidates, said
    )


def _readable(tokenizer: Tokenizer, times: Sequence[float]) -> tuple[float, ...]:
    """Those of ``times`` that fall on evaluations of their own."""
    kept: dict[Any, float] = {}
    for time in times:
        try:
            read = tokenizer.attention_times((time,)) if hasattr(tokenizer, "attention_times") else ()
        except ValueError:
            continue
        kept.setdefault(read, time)
    return tuple(kept.values()) or tuple(times[:1])


def make_spec(**settings: Any) -> ObjectnessSpec:
    """A recipe's section from settings of the command line."""
    try:
        return ObjectnessSpec(**settings)
    except ValueError as error:
        raise UsageError(f"figure attention: {error}") from error


def tint(image: NDArray[np.uint8], kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image [3, S, S], dimmed where a token does not look and orange where it does."""
    grey = image.mean(axis=0, keepdims=True) / 255
    colour = np.array(to_rgb(ORANGE))[:, None, None]
    mixed = np.where(kept[None], 0.45 * grey + 0.55 * colour, 0.4 * image / 255)
    tinted: NDArray[np.uint8] = np.rint(255 * mixed).astype(np.uint8)
    return tinted


@styled
def draw(data: Attention) -> Figure:
    """A row per image: the image, its mask, the map of one token, the best token's pixels at each share.

    Under each stand IoU and, in brackets, that of the null; under the map its range.
    """
    middle = len(data.shares) // 2 - (len(data.shares) % 2 == 0)  # the share whose token's map is shown
    rows: list[list[Any]] = []
    captions: list[list[str]] = []
    for n, image in enumerate(data.images):
        mask = np.repeat(data.masks[n][None].astype(np.uint8) * 255, 3, axis=0)
        tinted = [tint(image, kept) for kept in data.binary[n]]
        rows.append([image, mask, data.maps[n, middle], *tinted])
        tokens = [f"token {token}" for token in data.tokens[n]]
        values = [
            f"IoU {value:.2f} (null {null:.2f})\n{token}"
            for value, null, token in zip(data.iou[n], data.null[n], tokens, strict=True)
        ]
        low, high = float(data.maps[n, middle].min()), float(data.maps[n, middle].max())
        captions.append(["", "", f"{low:.2g} .. {high:.2g}\n{tokens[middle]}", *values])
    when = "" if data.time is None else f", t = {data.time:.2g}"
    means = zip(data.shares, data.iou.mean(axis=0), data.null.mean(axis=0), strict=True)
    shares = [
        f"best of {data.candidates}, top {share} %\nmean {iou:.2f} (null {null:.2f})"
        for share, iou, null in means
    ]
    labels = ["image", "mask", f"map\nlayer {data.layer}{when}", *shares]
    figure, axes = gallery(
        rows,
        column_labels=labels,
        captions=captions,
        most_cell=0.92,
    )
    for row in axes:
        row[2].images[0].set(cmap=SEQUENTIAL)
    return figure


@styled
def draw_sweep(data: Sweep) -> Figure:
    """A heat map of the mean overlap, layers by times; in every cell the value and, in brackets, the null."""
    rows, columns = data.miou.shape
    width, height = COLUMN, 0.85 + 0.27 * rows
    figure = new_figure(width, height)
    axes = figure.add_axes((0.45 / width, 0.4 / height, 1 - 1.0 / width, 1 - 0.75 / height))
    show(axes, data.miou)
    low, high = float(data.miou.min()), float(data.miou.max())
    axes.images[0].set(cmap=SEQUENTIAL, clim=(low, max(high, low + 1e-6)))
    axes.set(aspect="auto", ylabel="layer (from 0)", xlabel="time" if data.times else "one pass")
    axes.set_yticks(range(rows), [str(layer) for layer in data.layers])
    axes.set_xticks(range(columns), [f"{time:.2g}" for time in data.times] or [""])
    axes.tick_params(length=0)
    for row in range(rows):
        for column in range(columns):
            value = data.miou[row, column]
            colour = "white" if value < (low + high) / 2 else "black"
            null = data.null[row, column]
            text = f"{value:.2f}\n({null:.2f})".replace("0.", ".")
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=SMALL - 1.5,
                color=colour,
                linespacing=0.95,
            )
    axes.set_title(
        f"{literal(data.about.label(data.tokenizer))}: IoU of the best of {data.candidates} tokens\n"
        f"(null in brackets), top {data.share} %, {data.images} images",
        fontsize=SMALL,
    )
    bar = figure.add_axes((1 - 0.45 / width, 0.4 / height, 0.08 / width, 1 - 0.75 / height))
    figure.colorbar(axes.images[0], cax=bar).ax.tick_params(labelsize=SMALL - 1)
    return figure
