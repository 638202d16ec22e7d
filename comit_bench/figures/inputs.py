"""The images a figure shows: some of the embedded scenes, or some of any folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from comit_bench.data.datasets import PathList, open_dataset
from comit_bench.data.folders import list_images
from comit_bench.data.images import load_image, upright
from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation, UsageError
from comit_bench.files import cache_root
from comit_bench.recipes import find_datasets
from comit_bench.seeding import generator_for, seed_for
from comit_bench.tokenizers.base import Tokenizer, TokenizerInfo, Tokens
from comit_bench.tokenizers.comit import ComitTokenizer

SCENES = "scenes"
SCENES_DATASET, SCENES_SPLIT = "scenes-objectness", "val"
BATCH = 32  # images per call; nothing depends on it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Images as a tokenizer takes them.

    Attributes:
        names: Id of every image (its relative path without suffix for scenes, with it for folders).
        images: uint8 [n, 3, S, S], preprocessed as the tokenizer declares.
        paths: The files.
        masks: Files of the salient object's masks (scenes only), same order.
    """

    names: tuple[str, ...]
    images: Tensor
    paths: tuple[Path, ...]
    masks: tuple[Path, ...] | None = None

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
) -> Inputs:
    """Choose and read images; the choice depends on names and seed alone, not on the tokenizer.

    Args:
        source: ``scenes`` (embedded scenes, val split) or a folder, searched recursively; its images are
            turned upright as their EXIF orientation says.
        info: Says the preprocessing and the resolution.
        count: How many; None takes all. A folder that has fewer gives what it has. A file that cannot be
            read is skipped with a warning and another takes its place.
        seed: Another seed, another choice.
        cache: Where the embedded scenes are made; None: the cache directory.
        dataset: Which embedded scenes; salient objects with masks when nothing is said.

    Raises:
        MissingError: No such folder, no image in it, or none that can be read.
        UsageError: ``count`` is below 1.
    """
    if count is not None and count < 1:
        raise UsageError(f"--count {count}: at least one image is needed")
    names, paths, masks = _listed(source, cache or cache_root(), dataset)
    recipe = info.preprocessing if source == SCENES else upright(info.preprocessing)
    order = sorted(range(len(names)), key=lambda row: seed_for(seed, f"figure/{names[row]}"))
    kept: dict[int, Tensor] = {}
    for row in order if count is not None else range(len(names)):
        if len(kept) == count:
            break
        try:
            kept[row] = torch.from_numpy(load_image(paths[row], recipe))
        except CorruptFileError as error:
            _log.warning("%s It is left out.", error)
    if not kept:
        raise MissingError(f"{source}: none of its {len(names)} image files can be read")
    rows = sorted(kept)
    return Inputs(
        tuple(names[row] for row in rows),
        torch.stack([kept[row] for row in rows]),
        tuple(paths[row] for row in rows),
        None if masks is None else tuple(masks[row] for row in rows),
    )


def _listed(
    source: str, cache: Path, dataset: str
) -> tuple[Sequence[str], Sequence[Path], Sequence[Path] | None]:
    if source != SCENES:
        folder = Path(source).expanduser()
        names = list_images(folder)
        return names, PathList(folder, names), None
    data = open_dataset(find_datasets()[dataset], data_root=None, cache=cache, progress=False)
    split = data.splits[SCENES_SPLIT]
    masks = cast(Sequence[Path], split.labels) if data.kind == "masks" else None
    return split.ids, split.paths, masks


def generators(names: Sequence[str], seed: int) -> list[torch.Generator]:
    """One generator per image for everything random about its encoding."""
    return [generator_for(seed, name) for name in names]


def noise_seeds(names: Sequence[str], seed: int) -> list[int]:
    """One decoding seed per image."""
    return [seed_for(seed, name) for name in names]


def encode(
    tokenizer: Tokenizer, inputs: Inputs, *, policy: str | None = None, seed: int = 0, batch: int = BATCH
) -> Tokens:
    """Messages of all images, on the CPU; each image has its own generator, so batches change nothing.

    Raises:
        UsageError: Not a policy of this tokenizer.
    """
    if policy is not None and getattr(tokenizer, "policy", None) is None:
        _log.warning("%s looks at whole images: policy %s is ignored for it", tokenizer.info.name, policy)
        policy = None
    parts = []
    for start in range(0, len(inputs), batch):
        stop = start + batch
        own = generators(inputs.names[start:stop], seed)
        parts.append(tokenizer.encode(inputs.images[start:stop], policy=policy, generators=own))
    return _join(parts)


def decode(tokenizer: Tokenizer, tokens: Tokens, seeds: Sequence[int], *, batch: int = BATCH) -> Tensor:
    """Reconstructions uint8 [n, 3, S, S] on the CPU.

    Raises:
        UnsupportedOperation: The tokenizer has no decoder; the message names it.
    """
    parts = []
    for start in range(0, len(tokens), batch):
        rows = slice(start, start + batch)
        part = Tokens(
            None if tokens.ids is None else tokens.ids[rows],
            tokens.codes[rows],
            None if tokens.offsets is None else tokens.offsets[rows],
        )
        try:
            parts.append(tokenizer.decode(part, seeds=seeds[rows]).cpu())
        except (UnsupportedOperation, NotImplementedError) as error:
            raise UnsupportedOperation(
                f"{tokenizer.info.name} cannot decode its messages ({error}), so there is no reconstruction "
                "to show. `comit-bench figure ls` says which figures need a decoder."
            ) from error
    return torch.cat(parts)


def _join(parts: Sequence[Tokens]) -> Tokens:
    ids = [part.ids.cpu() for part in parts if part.ids is not None]
    offsets = [part.offsets.cpu() for part in parts if part.offsets is not None]
    codes = torch.cat([part.codes.cpu() for part in parts])
    return Tokens(torch.cat(ids) if ids else None, codes, torch.cat(offsets) if offsets else None)


def require_comit(tokenizer: Tokenizer, figure: str) -> ComitTokenizer:
    """The tokenizer, when it looks at crops.

    Raises:
        UnsupportedOperation: It is of another family.
    """
    if not isinstance(tokenizer, ComitTokenizer):
        raise UnsupportedOperation(
            f"{tokenizer.info.name} does not build its message crop by crop, which figure {figure!r} shows: "
            "take a tokenizer of the COMiT family, e.g. --tokenizer comit-nano"
        )
    return tokenizer


def psnr(one: Tensor, two: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Peak signal-to-noise ratio of every image in dB, float64 [n]; infinite for equal images.

    ``10 log10(255^2 / MSE)``, the mean over pixels and channels of one image.

    Args:
        one: uint8 [n, 3, S, S].
        two: The same shape.
    """
    error = (one.double() - two.double()).square().flatten(1).mean(dim=1).numpy()
    with np.errstate(divide="ignore"):
        return cast(np.ndarray[tuple[int], np.dtype[np.float64]], 10 * np.log10(255.0**2 / error))
