"""The images a figure shows: some of the embedded scenes, or some of any folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from comit_bench.data.datasets import open_dataset
from comit_bench.data.folders import list_images
from comit_bench.data.images import load_from, upright
from comit_bench.data.split import PathList
from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation, UsageError
from comit_bench.files import DATA_VARIABLE, cache_root, user_path
from comit_bench.metrics.similarity import psnr
from comit_bench.recipes.specs import find_datasets
from comit_bench.seeding import generator_for, seed_for
from comit_bench.tokenizers.base import (
    TILE,
    Tokenizer,
    TokenizerInfo,
    Tokens,
    looks_at_crops,
    tile_rows,
)
from comit_bench.tokenizers.comit.adapter import ComitTokenizer
from comit_bench.tokenizers.contract import check_decoded, check_tokens

SCENES = "scenes"
SCENES_DATASET, SCENES_SPLIT = "scenes-objectness", "val"
BATCH = TILE  # images per call; nothing depends on it, and the progress bar moves after each
FEW = 2  # so many messages are decoded without padding
Start = Callable[[str, int, str], Callable[[int], None]]  # what, how many, unit -> advance
_log = logging.getLogger(__name__)


def _silent(what: str, total: int, unit: str) -> Callable[[int], None]:
    return lambda done: None


# Shows how far a figure is; commands set it to a progress bar, notebooks may.
progress: ContextVar[Start] = ContextVar("progress", default=_silent)


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images as a tokenizer takes them.

    Attributes:
        names: Id of every image (its relative path without suffix for scenes, with it for folders).
        images: uint8 [n, 3, S, S], preprocessed as the tokenizer declares.
        paths: The files.
        masks: Files of the salient object's masks (scenes only), same order.
        source: Where they are from, in words.
        available: How many there are to choose from; 0 when nobody knows.
        unreadable: How many of those that were chosen could not be read.
        seed: Of the choice; None when nothing was chosen.
        of_reader: Whether they are the reader's own, not embedded scenes.
        exif: Whether they were turned upright as their EXIF orientation says.
    """

    names: tuple[str, ...]
    images: Tensor
    paths: tuple[Path, ...]
    masks: tuple[Path, ...] | None = None
    source: str = ""
    available: int = 0
    unreadable: int = 0
    seed: int | None = None
    of_reader: bool = False
    exif: bool = False

    def __len__(self) -> int:
        return len(self.names)


def load_inputs(
    source: str,
    info: TokenizerInfo,
    count: int | None,
    seed: int,
    *,
    cache: Path | None = None,
    dataset: str = SCENES_DATASET,
) -> Images:
    """Choose and read images; the choice depends on names and seed alone, not on the tokenizer.

    Args:
        source: ``scenes`` (embedded scenes, val split), a data set, or a folder, searched recursively.
            Images of a folder are turned upright as their EXIF orientation says, those of a data set when
            its recipe says so.
        info: Says the preprocessing and the resolution.
        count: How many; None takes all. A folder that has fewer gives what it has. A file that cannot be
            read is skipped with a warning and another takes its place.
        seed: Another seed, another choice.
        cache: Where the embedded scenes are made; None: the cache directory.
        dataset: Which embedded scenes; salient objects with masks when nothing is said.
    """
    if count is not None and count < 1:
        raise UsageError(f"--count {count}: at least one image is needed")
    named = dataset if source == SCENES else _data_set(source)
    names, paths, masks, exif = _listed(source, cache or cache_root(), named)
    recipe = upright(info.preprocessing) if exif else info.preprocessing
    order = sorted(range(len(names)), key=lambda row: seed_for(seed, f"figure/{names[row]}"))
    kept: dict[int, Tensor] = {}
    unreadable = 0
    advance = progress.get()("reading", len(names) if count is None else min(count, len(names)), "images")
    for row in order if count is not None else range(len(names)):
        if len(kept) == count:
            break
        try:
            kept[row] = torch.from_numpy(load_from(paths, row, recipe))
            advance(1)
        except CorruptFileError as error:
            unreadable += 1
            _log.warning("%s It is left out.", error)
    if not kept:
        raise MissingError(f"{source}: none of its {len(names)} image files can be read")
    rows = sorted(kept)
    return Images(
        tuple(names[row] for row in rows),
        torch.stack([kept[row] for row in rows]),
        tuple(paths[row] for row in rows),
        None if masks is None else tuple(masks[row] for row in rows),
        source=f"{named} {SCENES_SPLIT}" if named else f"folder {Path(source).resolve().name}",
        available=len(names),
        unreadable=unreadable,
        seed=seed,
        of_reader=not embedded(source),
        exif=exif,
    )


def embedded(source: str) -> bool:
    """Whether images are made by this package."""
    named = _data_set(source)
    return source == SCENES or (named is not None and find_datasets()[named].spec.generator is not None)


def _data_set(source: str) -> str | None:
    """The data set that is meant; None when a folder is."""
    return source if source in find_datasets() and not user_path(source, "--images").is_dir() else None


def _listed(
    source: str, cache: Path, dataset: str | None
) -> tuple[Sequence[str], Sequence[Path], Sequence[Path] | None, bool]:
    """Names, files, masks, and whether images are turned upright."""
    if dataset is None:
        folder = user_path(source, "--images")
        names = list_images(folder)
        return names, PathList(folder, names), None, True
    root = os.environ.get(DATA_VARIABLE)
    data = open_dataset(
        find_datasets()[dataset],
        data_root=user_path(root, DATA_VARIABLE) if root else None,
        cache=cache,
        progress=progress.get() is not _silent,
        contents=False,
    )
    split = data.splits[SCENES_SPLIT]
    masks = cast(Sequence[Path], split.labels) if data.kind == "masks" else None
    return split.ids, split.paths, masks, split.exif


def generators(names: Sequence[str], seed: int) -> list[torch.Generator]:
    """One generator per image for everything random about its encoding."""
    return [generator_for(seed, name) for name in names]


def noise_seeds(names: Sequence[str], seed: int) -> list[int]:
    """One decoding seed per image."""
    return [seed_for(seed, name) for name in names]


@contextmanager
def _tiles_of(rows: int) -> Iterator[None]:
    """Tokenizers compute in tiles of this many images, or of their own size where that is smaller."""
    token = tile_rows.set(max(1, min(rows, tile_rows.get())))
    try:
        yield
    finally:
        tile_rows.reset(token)


def tiles_for(count: int) -> AbstractContextManager[None]:
    """Tiles in which ``count`` messages are decoded: few are not padded."""
    return _tiles_of(count if count <= FEW else TILE)


def encode(
    tokenizer: Tokenizer, inputs: Images, *, policy: str | None = None, seed: int = 0, batch: int = BATCH
) -> Tokens:
    """Messages of all images, on the CPU; each image has its own generator, so batches change nothing.

    Fewer images than a tile are not padded to one: one photo costs one, not eight. Sums are then rounded
    otherwise than in runs, so an id at a rounding boundary may be its neighbour there. Policies that share
    crops between the images of a tile keep its size.

    Raises:
        UsageError: Not a policy of this tokenizer.
    """
    if policy is not None and not looks_at_crops(tokenizer):
        _log.warning("%s looks at whole images: policy %s is ignored for it", tokenizer.info.name, policy)
        policy = None
    parts = []
    advance = progress.get()(f"{tokenizer.info.name}: encoding", len(inputs), "images")
    with _tiles_of(TILE if "-shared" in (policy or "").lower() else len(inputs)):
        for start in range(0, len(inputs), batch):
            stop = start + batch
            own = generators(inputs.names[start:stop], seed)
            tokens = tokenizer.encode(inputs.images[start:stop], policy=policy, generators=own)
            check_tokens(tokenizer, tokens, len(own))
            parts.append(tokens)
            advance(len(own))
    return together(parts)


def decode(tokenizer: Tokenizer, tokens: Tokens, seeds: Sequence[int], *, batch: int = BATCH) -> Tensor:
    """Reconstructions uint8 [n, 3, S, S] on the CPU, from noise of these seeds.

    More than ``FEW`` messages are decoded in whole tiles, so that pixels are those of a run; fewer without
    padding, where a few of ten thousand values may be one level off.
    """
    parts = []
    advance = progress.get()(f"{tokenizer.info.name}: decoding", len(tokens), "images")
    with tiles_for(len(tokens)):
        for start in range(0, len(tokens), batch):
            rows = slice(start, start + batch)
            part = rows_of(tokens, rows)
            try:
                decoded = tokenizer.decode(part, seeds=seeds[rows])
                parts.append(check_decoded(decoded, tokenizer.info, len(part)).cpu())
            except (UnsupportedOperation, NotImplementedError) as error:
                raise UnsupportedOperation(
                    f"{tokenizer.info.name} cannot decode its messages ({error}), so there is no "
                    "reconstruction to show. `comit-bench figure ls` says which figures need a decoder."
                ) from error
            advance(len(part))
    return torch.cat(parts)


def rows_of(tokens: Tokens, rows: slice) -> Tokens:
    """Some of several messages."""
    ids = None if tokens.ids is None else tokens.ids[rows]
    return Tokens(ids, tokens.codes[rows], None if tokens.offsets is None else tokens.offsets[rows])


def together(parts: Sequence[Tokens]) -> Tokens:
    """Messages one after the other, so that they are decoded in full tiles."""
    ids = [part.ids.cpu() for part in parts if part.ids is not None]
    offsets = [part.offsets.cpu() for part in parts if part.offsets is not None]
    codes = torch.cat([part.codes.cpu() for part in parts])
    return Tokens(torch.cat(ids) if ids else None, codes, torch.cat(offsets) if offsets else None)


def require_comit(tokenizer: Tokenizer, figure: str) -> ComitTokenizer:
    """The tokenizer, when it looks at crops."""
    if not isinstance(tokenizer, ComitTokenizer):
        raise UnsupportedOperation(
            f"{tokenizer.info.name} does not build its message crop by crop, which figure {figure!r} shows: "
            "take a tokenizer of the COMiT family, e.g. --tokenizer comit-nano"
        )
    return tokenizer


def psnr_of_flat(images: Tensor) -> Tensor:
    """PSNR of every image painted in its own mean colour in dB, float64 [n]; needs no tokenizer."""
    flat = images.double().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8)
    return psnr(images, flat.expand_as(images))
