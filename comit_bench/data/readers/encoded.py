"""Class-labelled images inside WebDataset shards or a Hugging Face copy, for the reader ``class-folders``.

The archives themselves are read by ``tar_shards.py`` and ``hub.py``. Here an image gets the id it has in
folders, ``<class>/<file name without suffix>``. Its class is the wnid in its name; for official validation
names it comes from ImageNet's label files; for rows of a hub copy without usable names from the ``label``
column, which follows the alphabetical order of the 1,000 wnids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, overload

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


class Encoded(Protocol):
    """A list of encoded images: :class:`TarImages`, :class:`HfImages`."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Unique names, sorted."""

    def read(self, index: int) -> bytes:
        """Content of an image file. Raises CorruptFileError if there is none, MissingError if it is gone."""

    def where(self, index: int) -> str:
        """What messages call it."""

    def digests(self, index: Sequence[int], *, cache: Path, title: str, progress: bool) -> list[bytes]:
        """sha256 of some of the files; read once, see ``comit_bench.data.digests``."""


@dataclass(frozen=True, slots=True)
class EncodedPaths(Sequence[Path]):
    """Some images of an archive; items are names for messages, :meth:`read` gives the content."""

    source: Encoded
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedPaths: ...
    def __getitem__(self, index: int | slice) -> Path | EncodedPaths:
        if isinstance(index, slice):
            return EncodedPaths(self.source, self.positions[index])
        return Path(self.source.where(self.positions[index]))

    def read(self, index: int) -> bytes:
        """The encoded image; raises as :meth:`Encoded.read`."""
        return self.source.read(self.positions[index])

    def take(self, index: Sequence[int]) -> EncodedPaths:
        """Some of the images, in this order."""
        return EncodedPaths(self.source, tuple(self.positions[i] for i in index))

    def digests(self, cache: Path, *, title: str, progress: bool) -> list[bytes]:
        """sha256 of every image."""
        return self.source.digests(self.positions, cache=cache, title=title, progress=progress)


def find_archive(spec: DatasetSpec, folder: Path, name: str) -> list[Path]:
    """The shards of a split, or the one directory of a hub copy; nothing when it lies in folders."""
    for place in (folder / candidate for candidate in spec.splits[name]):
        if place.is_dir() and (folders(place) or images(place)):
            return []
    for pattern in spec.shards.get(name, ()):
        if shards := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return shards
    return [folder / copy for copy in spec.hub_copies if (folder / copy).is_dir()][:1]


def find_encoded(spec: DatasetSpec, folder: Path, cache: Path) -> dict[str, Encoded]:
    """Split -> its archive, for the splits that no folder holds."""
    found: dict[str, Encoded] = {}
    for name in spec.splits:
        archive = find_archive(spec, folder, name)
        if archive and archive[0].is_dir():
            found[name] = _open_hub_copy(archive[0], name)
        elif archive:
            found[name] = TarImages(archive, cache=cache)
    return found


def _open_hub_copy(folder: Path, name: str) -> HfImages:
    splits = open_splits(str(folder))
    split = next((s for s in HUB_SPLITS.get(name, (name,)) if s in splits), None)
    if split is None:
        raise CorruptFileError(f"{folder}: has no split {name!r}, only {few(splits)}")
    return HfImages(splits[split], source=str(folder), split=split)


def _class_by_label(source: Encoded) -> Callable[[int], str | None]:
    """Position -> wnid by the label column of a hub copy."""
    labels = source.labels if isinstance(source, HfImages) else None
    if labels is None:
        return lambda index: None
    from timm.data.imagenet_info import ImageNetInfo

    names: Any = ImageNetInfo()
    wnids = sorted(str(name) for name in names.label_names())
    if len(wnids) != 1000 or max(labels) >= 1000 or min(labels) < 0:
        raise UnsupportedOperation(
            f"{source.where(0)}: labels reach from {min(labels)} to {max(labels)}; those of ImageNet-1k "
            "go from 0 to 999"
        )
    return lambda index: wnids[labels[index]]


def read_encoded(
    name: str,
    source: Encoded,
    classes: tuple[str, ...],
    official: Callable[[], Callable[[str], str | None]],
) -> Split:
    """One split from an archive; images of other classes are left out, and nothing is read yet.

    ``official`` is called when an official validation name turns up; it gives the function from names to
    classes.
    """
    labels = {c: i for i, c in enumerate(classes)}
    by_label = _class_by_label(source)
    by_name: Callable[[str], str | None] | None = None
    found: list[tuple[str, int, int]] = []
    for index, full in enumerate(source.ids):
        plain = _TAIL.sub("", stem(full.rsplit("/", 1)[-1]))
        match = _WNID.search(full)
        class_name = match[1] if match else None
        if class_name is None and _OFFICIAL.fullmatch(plain):
            by_name = by_name or official()
            class_name = by_name(plain)
        if class_name is None:
            class_name = by_label(index)
        if class_name is None:
            raise UnsupportedOperation(
                f"{source.where(index)}: its class cannot be told. Expected a wnid in the name "
                "(n01440764/..., n01440764_10026.jpg), an official validation name with label "
                "files beside, or a hub copy with a label column. Unpack the images into class folders."
            )
        if class_name in labels:
            found.append((f"{class_name}/{plain}", index, labels[class_name]))
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
