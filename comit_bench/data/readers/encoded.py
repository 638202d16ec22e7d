"""Class-labelled images inside WebDataset shards or a Hugging Face copy, for the reader ``class-folders``.

The archives themselves are read by ``tar_shards.py`` and ``hub.py``. Here an image gets the id it has in
folders, ``<class>/<file name without suffix>``. Its class is the wnid in its name; for official validation
names it comes from ImageNet's label files; for rows of a hub copy without usable names from the ``label``
column, which follows the alphabetical order of the 1,000 wnids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from comit_bench.data.readers.common import few, folders, images, stem
from comit_bench.data.readers.hub import HfImages, open_splits
from comit_bench.data.readers.tar_shards import TarImages
from comit_bench.data.split import Split
from comit_bench.errors import CorruptFileError, UnsupportedOperation
from comit_bench.recipes.specs import DatasetSpec

_WNID = re.compile(r"(?:^|[/_])(n\d{8})(?=[/_.]|$)")
_TAIL = re.compile(r"_n\d{8}$")
_OFFICIAL = re.compile(r"ILSVRC2012_val_\d{8}")
HUB_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid")}


class EncodedPaths(Sequence[Path]):
    """Images inside archives, in the order of a split.

    Items are names for messages; :meth:`read` gives the content.
    """

    __slots__ = ("_rows", "_source")

    def __init__(self, source: Any, rows: tuple[int, ...]) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedPaths: ...
    def __getitem__(self, index: int | slice) -> Path | EncodedPaths:
        if isinstance(index, slice):
            return EncodedPaths(self._source, self._rows[index])
        return Path(self._source.where(self._rows[index]))

    def read(self, index: int) -> bytes:
        """The encoded image. Raises CorruptFileError when there is none, MissingError when it vanished."""
        content: bytes = self._source.read(self._rows[index])
        return content

    def take(self, rows: Sequence[int]) -> EncodedPaths:
        """Some of the images, in this order."""
        return EncodedPaths(self._source, tuple(self._rows[row] for row in rows))

    def digests(self, cache: Path, *, title: str, progress: bool) -> list[bytes]:
        """sha256 of every image; read once, see ``comit_bench.data.digests``."""
        found: list[bytes] = self._source.digests(self._rows, cache=cache, title=title, progress=progress)
        return found


def _in_folders(spec: DatasetSpec, folder: Path, name: str) -> bool:
    """Whether a directory of the split holds class folders or images."""
    for candidate in spec.splits[name]:
        place = folder / candidate
        if place.is_dir() and (folders(place) or images(place)):
            return True
    return False


def _shards(spec: DatasetSpec, folder: Path, name: str) -> list[Path]:
    """Shards of the first pattern that some files fit."""
    for pattern in spec.shards.get(name, ()):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def _hub_copy(spec: DatasetSpec, folder: Path) -> Path | None:
    return next((folder / place for place in spec.hub_copies if (folder / place).is_dir()), None)


def has_encoded(spec: DatasetSpec, folder: Path, name: str) -> bool:
    """Whether a split that is not in folders lies in shards or a hub copy."""
    if _in_folders(spec, folder, name):
        return False
    return bool(_shards(spec, folder, name)) or _hub_copy(spec, folder) is not None


def find_encoded(spec: DatasetSpec, folder: Path, cache: Path) -> dict[str, Any]:
    """Split -> its archive, for the splits that no folder holds.

    Raises:
        MissingError: The library for hub copies is not installed.
        CorruptFileError: A shard is damaged.
    """
    found: dict[str, Any] = {}
    for name in spec.splits:
        if not has_encoded(spec, folder, name):
            continue
        if shards := _shards(spec, folder, name):
            found[name] = TarImages(shards, cache=cache)
        else:
            found[name] = _HubImages(_hub_copy(spec, folder), name)
    return found


class _HubImages:
    """One split of a hub copy, with the ``label`` column beside the images."""

    def __init__(self, folder: Path | None, name: str) -> None:
        assert folder is not None
        splits = open_splits(str(folder))
        split = next((s for s in HUB_SPLITS.get(name, (name,)) if s in splits), None)
        if split is None:
            raise CorruptFileError(f"{folder}: has no split {name!r}, only {few(splits)}")
        rows = splits[split]
        self._images = HfImages(rows, source=str(folder), split=split)
        self.ids = self._images.ids
        self.labels: list[int] | None = None
        if "label" in rows.column_names:
            # HfImages sorts by id; ids with a row number end in it, named ones are told by their name.
            plain = [f"{split}/{row:08d}" for row in range(len(rows))]
            if self.ids == tuple(sorted(plain)):
                self.labels = [int(label) for label in rows.select_columns(["label"])[:]["label"]]

    def where(self, index: int) -> str:
        return self._images.where(index)

    def read(self, index: int) -> bytes:
        return self._images.read(index)

    def digests(self, rows: Sequence[int], *, cache: Path, title: str, progress: bool) -> list[bytes]:
        return self._images.digests(rows, cache=cache, title=title, progress=progress)


def _class_by_label(source: Any) -> Callable[[int], str | None]:
    """Row -> wnid by the label column of a hub copy."""
    labels = getattr(source, "labels", None)
    if labels is None:
        return lambda row: None
    from timm.data.imagenet_info import ImageNetInfo

    names: Any = ImageNetInfo()
    wnids = sorted(str(name) for name in names.label_names())
    if len(wnids) != 1000 or max(labels) >= 1000 or min(labels) < 0:
        raise UnsupportedOperation(
            f"{source.where(0)}: labels reach from {min(labels)} to {max(labels)}; those of ImageNet-1k "
            "go from 0 to 999"
        )
    return lambda row: wnids[labels[row]]


def read_encoded(
    name: str,
    source: Any,
    classes: tuple[str, ...],
    official: Callable[[], Callable[[str], str | None]],
) -> Split:
    """One split from an archive; its contents are not read yet.

    Args:
        name: The split.
        source: Has ``ids``, ``read`` and ``where``.
        classes: The class list; images of other classes are left out.
        official: Called when an official validation name turns up; gives the function from names to classes.
    """
    labels = {c: i for i, c in enumerate(classes)}
    by_label = _class_by_label(source)
    by_name: Callable[[str], str | None] | None = None
    found: list[tuple[str, int, int]] = []
    for row, full in enumerate(source.ids):
        plain = _TAIL.sub("", stem(full.rsplit("/", 1)[-1]))
        match = _WNID.search(full)
        class_name = match[1] if match else None
        if class_name is None and _OFFICIAL.fullmatch(plain):
            by_name = by_name or official()
            class_name = by_name(plain)
        if class_name is None:
            class_name = by_label(row)
        if class_name is None:
            raise UnsupportedOperation(
                f"{source.where(row)}: its class cannot be told. Expected a wnid in the name (n01440764/..., "
                "n01440764_10026.jpg), an official validation name with label files beside, or a hub copy "
                "with a label column. Unpack the images into class folders."
            )
        if class_name in labels:
            found.append((f"{class_name}/{plain}", row, labels[class_name]))
    found.sort()
    ids = tuple(entry[0] for entry in found)
    if len(set(ids)) < len(ids):
        twice = next(a for a, b in pairwise(ids) if a == b)
        raise CorruptFileError(f"{source.where(0)} and others: image {twice} is there twice")
    present = {entry[2] for entry in found}
    if absent := [c for label, c in enumerate(classes) if label not in present]:
        raise CorruptFileError(
            f"split {name!r} in {source.where(0)} and others: no image of {len(absent)} of {len(classes)} "
            f"classes: {few(absent)}"
        )
    numbers = np.array([entry[2] for entry in found], dtype=np.int64)
    return Split(name, ids, EncodedPaths(source, tuple(entry[1] for entry in found)), numbers)
