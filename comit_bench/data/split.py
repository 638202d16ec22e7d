"""What an opened data set is: samples, files and labels, whatever format they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from comit_bench.data.digests import file_digests
from comit_bench.data.images import upright

Kind = Literal["classes", "multilabel", "relations", "masks"]


@dataclass(frozen=True, slots=True)
class PathList(Sequence[Path]):
    """Paths below one directory, made when asked for: a million ``Path`` objects would take 0.5 GB."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> Path | PathList:
        if isinstance(index, slice):
            return PathList(self.root, self.names[index])
        return self.root / self.names[index]

    def take(self, index: Sequence[int]) -> PathList:
        """Some of the paths, in this order."""
        return PathList(self.root, tuple(self.names[i] for i in index))

    def digests(self, cache: Path, *, title: str, progress: bool) -> list[bytes]:
        """sha256 of every file, see ``comit_bench.data.digests``."""
        return file_digests(self.root, self.names, cache=cache, title=title, progress=progress)


@dataclass(frozen=True, slots=True, eq=False)
class Triplets:
    """Relations of a split. Words are positions in the data set's vocabularies.

    Attributes:
        table: int64 [m, 4], the samples: (position of the image, subject word, predicate word, object
            word), unique and sorted.
        known: int64 [k, 4], all relations of the split's images that can be said in the vocabularies, also
            those that the area filter took out of ``table``. They are true of their image, so none of them
            may serve as a negative for it. A superset of ``table``; empty stands for "the same".
    """

    table: NDArray[np.int64]
    known: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 4), dtype=np.int64))

    def take(self, index: Sequence[int]) -> Triplets:
        """Those of some images, which are numbered anew; ``index`` must ascend."""
        return Triplets(_renumbered(self.table, index), _renumbered(self.known, index))


def _renumbered(table: NDArray[np.int64], index: Sequence[int]) -> NDArray[np.int64]:
    kept = table[np.isin(table[:, 0], index)]
    kept[:, 0] = np.searchsorted(index, kept[:, 0])
    return kept


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Samples of one split, sorted by id.

    Attributes:
        name: Name in the recipe, e.g. ``val``.
        ids: Unique, and equal on every machine and for every layout of the files.
        paths: The files, same order.
        labels: By :attr:`OpenData.kind`, in the order of ``ids``. classes: int64 [n], positions in
            the class list. multilabel: bool [n, C]. relations: :class:`Triplets`. masks: paths [n].
        exif: Whether images are turned upright as their EXIF orientation says.
        attributes: Name -> [n] texts: what else is known of every image; empty for most data sets.
        contents: sha256 of every image's file, 32 bytes each, same order; empty where nobody has looked.
        mask_contents: The same of every mask's file.
    """

    name: str
    ids: tuple[str, ...]
    paths: Sequence[Path]
    labels: Any
    exif: bool = False
    attributes: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    contents: tuple[bytes, ...] = ()
    mask_contents: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def preprocessing(self, declared: str) -> str:
        """What a tokenizer that declares ``declared`` gets of these images."""
        return upright(declared) if self.exif else declared

    def take(self, index: Sequence[int]) -> Split:
        """Some of the samples; ``index`` must ascend."""
        paths: Any = self.paths
        plain = isinstance(self.labels, np.ndarray)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index),
            paths=paths.take(index),
            labels=self.labels[np.asarray(index, dtype=np.int64)] if plain else self.labels.take(index),
            attributes={k: texts[np.asarray(index, dtype=np.int64)] for k, texts in self.attributes.items()},
            contents=tuple(self.contents[i] for i in index) if self.contents else (),
            mask_contents=tuple(self.mask_contents[i] for i in index) if self.mask_contents else (),
        )

    def with_contents(self, cache: Path, *, progress: bool) -> Split:
        """The same with what its files hold; each is read once, see ``comit_bench.data.digests``."""
        found = [
            tuple(paths.digests(cache, title=f"contents of {what}{self.name} (once)", progress=progress))
            for paths, what in ((self.paths, ""), (self.labels, "masks of "))
            if hasattr(paths, "digests")
        ]
        return replace(self, contents=found[0], mask_contents=found[1] if len(found) > 1 else ())


@dataclass(frozen=True, slots=True, eq=False)
class OpenData:
    """An opened data set.

    Attributes:
        name: Name of its recipe.
        version: Version of its recipe.
        classes: Class or category names, labels are positions in it; for relations the words of objects.
        splits: Split name -> samples.
        fingerprint: ``sha256:<hex>`` of the whole; empty where nobody has looked into the files.
        fingerprints: The same per split, over ids, contents and labels.
        folder: Where it was found.
        kind: What ``Split.labels`` holds.
        predicates: Words of predicates; empty unless ``kind`` is relations.
        missing: Sample id -> reason, for annotated images whose file is not there. They are in no split.
        notes: Facts about the splits, as plain JSON values: a record stores them. ``synonyms`` of relations
            (``words`` and ``predicates`` -> groups) are no negatives of each other.
        max_broken: Share of the images (and masks) that may be missing or broken.
        expected: What the whole data set has, for official ones: images by split, or for annotated sets
            images that the annotation files list, by file.
        found: The same as it is here.
    """

    name: str
    version: int
    classes: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str
    fingerprints: dict[str, str]
    folder: Path
    kind: Kind = "classes"
    predicates: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    max_broken: float = 1.0
    expected: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)

    @property
    def exif(self) -> bool:
        """Whether images are turned upright as their EXIF orientation says."""
        return any(split.exif for split in self.splits.values())

    def counted(self, broken: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """What is expected and what is seen, of what matters to a use of the splits that ``broken`` names.

        Args:
            broken: Split -> images that cannot be read, for every split that is used.
        """
        by_split = self.kind in ("classes", "masks")  # the files of the others are pooled
        keys = [key for key in self.expected if not by_split or key in broken]
        seen = {key: self.found.get(key, 0) - (broken.get(key, 0) if by_split else 0) for key in keys}
        return {key: self.expected[key] for key in keys}, seen

    def shortcomings(self, broken: Mapping[str, int]) -> list[str]:
        """Why a use of the splits that ``broken`` names is not one of the whole data set; empty when it is.

        As many images as the recipe allows to be broken may be missing (``max_broken``).
        """
        expected, seen = self.counted(broken)
        told = [
            f"{key}: {seen[key]:,} images, the whole has {wanted:,}"
            for key, wanted in expected.items()
            if abs(seen[key] - wanted) > self.max_broken * wanted
        ]
        bad = len(self.missing) + sum(broken.values())
        total = len(self.missing) + sum(map(len, self.splits.values()))
        if bad > self.max_broken * total:
            told.append(f"{bad:,} of {total:,} images are missing or broken")
        return told
