"""Training images from Hugging Face ``datasets`` and WebDataset shards (the readers: ``comit_bench.data``).

Both are lists of encoded images with random access, like a folder of files. So everything that
``comit_bench.train.data`` says about order, ranks, workers, continuing and broken images holds for them
unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.data.images import decode_image
from comit_bench.data.readers.encoded import Encoded
from comit_bench.data.readers.hub import ONLY, HfImages, open_splits
from comit_bench.data.readers.tar_shards import TarImages, find_shards
from comit_bench.errors import UsageError, did_you_mean
from comit_bench.files import cache_root, inside, user_path
from comit_bench.seeding import seed_for
from comit_bench.train.config import DataConfig

ALIASES = ("val", "validation", "valid")  # how sets call their validation split


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImages:
    """Some of a list of encoded images, decoded when read."""

    source: Encoded
    rows: NDArray[np.int64]
    ids: tuple[str, ...]
    recipe: str

    def read(self, index: int) -> Tensor:
        """uint8 [3, S, S]. Raises CorruptFileError for a broken image."""
        row = int(self.rows[index])
        image = decode_image(self.source.read(row), self.recipe, name=self.source.where(row))
        return torch.from_numpy(image)


def recipe_for(side: int) -> str:
    """Preprocessing of training images that come as files."""
    return f"center_crop|resize({side},bilinear)"


def split_folders(data: DataConfig, root: Path) -> tuple[Path, Path]:
    """Where the folders of the two splits would lie.

    Raises:
        UsageError: Below ``root`` there can be no folder of such a name.
    """
    return (
        inside(root, data.split, what="data.split", links=True),
        inside(root, data.val_split, what="data.val_split", links=True),
    )


def shuffled(ids: Sequence[str]) -> list[str]:
    """In an order without classes: neighbours exchange their messages in validation."""
    return sorted(ids, key=lambda name: seed_for(0, f"validation/{name}"))


def hold_out(ids: Sequence[str], count: int, source: object) -> tuple[tuple[str, ...], list[str]]:
    """Divide the images of a source without splits by a hash of their names.

    Args:
        ids: All names.
        count: Images for validation; at most a tenth and at least 2 are taken.
        source: For the message.

    Returns:
        Names for training, in their order, and for validation.
    """
    if len(ids) < 4:
        raise UsageError(f"data.source {source}: {len(ids)} images; training and validation need 4 or more")
    held = shuffled(ids)[: max(2, min(count, len(ids) // 10))]
    chosen = set(held)
    return tuple(name for name in ids if name not in chosen), held


def _picked(source: Encoded, ids: Sequence[str], side: int) -> DecodedImages:
    places = {name: i for i, name in enumerate(source.ids)}
    rows = np.array([places[name] for name in ids], dtype=np.int64)
    return DecodedImages(source, rows, tuple(ids), recipe_for(side))


def _one(source: Encoded, data: DataConfig, side: int) -> tuple[DecodedImages, DecodedImages]:
    train, held = hold_out(source.ids, data.val_count, data.source)
    return _picked(source, train, side), _picked(source, held, side)


def _two(train: Encoded, held: Encoded, data: DataConfig, side: int) -> tuple[DecodedImages, DecodedImages]:
    names = shuffled(held.ids)[: data.val_count]
    if len(names) < 2:
        raise UsageError(f"data.source {data.source}: one validation image; 2 or more are needed")
    return _picked(train, train.ids, side), _picked(held, names, side)


def _split_names(data: DataConfig, names: Sequence[str]) -> tuple[str, str | None]:
    """Training and validation split among those there are; None: hold out of the training split."""
    given = data.model_fields_set
    if list(names) == [ONLY]:
        for key in ("split", "val_split"):
            if key in given:
                raise UsageError(f"data.{key} {getattr(data, key)!r}: {data.source} has no named splits")
        return ONLY, None
    if data.split not in names:
        raise UsageError(
            f"data.split: {data.source} has no split {data.split!r}.{did_you_mean(data.split, names)}"
        )
    wanted = ALIASES if data.val_split in ALIASES else (data.val_split,)
    held = next((name for name in (data.val_split, *wanted) if name in names), None)
    if held is None and "val_split" in given:
        raise UsageError(
            f"data.val_split: {data.source} has no split {data.val_split!r}."
            f"{did_you_mean(data.val_split, names)}"
        )
    if held == data.split:
        raise UsageError(f"data.split and data.val_split are both {held!r}: name two, or leave out val_split")
    return data.split, held


def open_hf(data: DataConfig, side: int) -> tuple[DecodedImages, DecodedImages]:
    """Training and validation images of a Hugging Face data set.

    Raises:
        MissingError: The library, the directory or the repository is not here.
        UsageError: Splits, subsets or columns that are not there.
        CorruptFileError: Files that cannot be read.
    """
    source = str(data.source)
    splits = open_splits(source, subset=data.subset, revision=data.revision)
    train, held = _split_names(data, list(splits))

    def images(name: str) -> HfImages:
        return HfImages(splits[name], source=source, split=name, image_key=data.image_key, id_key=data.id_key)

    if held is None:
        return _one(images(train), data, side)
    return _two(images(train), images(held), data, side)


def open_webdataset(data: DataConfig, side: int) -> tuple[DecodedImages, DecodedImages]:
    """Training and validation images of tar shards.

    A directory with the folders ``data.split`` and ``data.val_split`` is read that way; with
    ``data.val_source``, that holds the validation images; else some are held out.

    Raises:
        MissingError: A shard is not there.
        UsageError: Patterns that cannot be read, no images, or shards in both splits.
        CorruptFileError: A shard is truncated or no tar.
    """
    source, held_source = str(data.source), data.val_source
    root = user_path(source, "data.source")
    folders = split_folders(data, root)
    if held_source is None and all(folder.is_dir() for folder in folders):
        source, held_source = map(str, folders)
    elif given := sorted({"split", "val_split"} & data.model_fields_set):
        raise UsageError(
            f"data.{given[0]}: {source} is no directory with folders {data.split}/ and {data.val_split}/, so "
            "its shards have no splits. Name the validation shards with data.val_source."
        )
    shards = find_shards(source)
    held_shards = () if held_source is None else find_shards(held_source)
    if both := set(shards) & set(held_shards):
        raise UsageError(f"{min(both)}: named by data.source and by data.val_source")
    train = TarImages(shards, cache=cache_root(), image_key=data.image_key)
    if not held_shards:
        return _one(train, data, side)
    held = TarImages(held_shards, cache=cache_root(), image_key=data.image_key)
    return _two(train, held, data, side)
