"""Readers of official dataset formats: from a recipe to image paths, labels and a fingerprint.

The reader ``class-folders`` takes ``<split>/<class>/*`` and, for ImageNet's validation set, also the flat
folder of ``ILSVRC2012_val_*.JPEG`` as it comes out of the official archive. A flat split needs labels;
``labels`` of the recipe lists where they may lie, relative to the dataset's folder:

- ``labels[<split>]``: a ``.csv`` as Kaggle ships it (``ImageId,PredictionString``, class name first), or
  the devkit's ``ILSVRC2012_validation_ground_truth.txt`` (one 1-based ILSVRC2012 id per image);
- ``labels["synsets"]``: what those ids mean, as the devkit's ``meta.mat`` or as a text file with one class
  name per line *in devkit order*. That order is not the alphabetical one of ``LOC_synset_mapping.txt``
  and many ``synsets.txt``; an alphabetical file is refused, because it would permute all labels.

A sample's id is ``<class>/<file name without suffix>`` in every layout. Ids, their order, all that is
derived from ids, and fingerprints therefore agree between a flat and a foldered copy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from comit_bench.data.labels import (
    read_class_list,
    read_devkit_synsets,
    read_ground_truth,
    read_solution_csv,
)
from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation, UsageError
from comit_bench.files import digest_json
from comit_bench.recipes import DatasetSpec, Recipe

EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp"})
READERS = ("class-folders",)
DATA_VARIABLE = "COMIT_BENCH_DATA"

_log = logging.getLogger(__name__)


class PathList(Sequence[Path]):
    """Paths below one directory, made when asked for: a million ``Path`` objects would take 0.5 GB."""

    __slots__ = ("_names", "root")

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self.root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> Path | PathList:
        if isinstance(index, slice):
            return PathList(self.root, self._names[index])
        return self.root / self._names[index]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Samples of one split, sorted by id.

    Attributes:
        name: Name in the recipe, e.g. ``val``.
        ids: ``<class>/<stem>``, unique, equal on every machine and for every layout.
        paths: The files, same order.
        labels: int64 [n], positions in the class list.
    """

    name: str
    ids: tuple[str, ...]
    paths: Sequence[Path]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class ClassificationData:
    """An opened classification dataset.

    Attributes:
        name: Name of its recipe.
        version: Version of its recipe.
        classes: Class names; labels are positions in it.
        splits: Split name -> samples.
        fingerprint: ``sha256:<hex>`` of the whole; the generator's digest for an embedded dataset.
        fingerprints: The same per split.
        folder: Where it was found.
    """

    name: str
    version: int
    classes: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str
    fingerprints: dict[str, str]
    folder: Path

    def split_fingerprint(self, name: str) -> str:
        """``sha256:<hex>`` over the ids, suffixes, sizes and labels of one split."""
        return self.fingerprints[name]


@dataclass(frozen=True, slots=True, order=True)
class _Sample:
    id: str
    file: str  # relative to the split's directory
    size: int
    label: int


def open_dataset(
    recipe: Recipe[DatasetSpec],
    *,
    data_root: Path | None,
    cache: Path,
    progress: bool = True,
    class_list: Path | None = None,
) -> ClassificationData:
    """Find a dataset on this machine, or make it when its recipe has a generator, and list its samples.

    Args:
        recipe: The dataset's recipe.
        data_root: Directory that holds the recipe's ``folder``; not used with a generator.
        cache: Cache directory, where generated datasets go.
        progress: Show progress bars (on stderr).
        class_list: File with one class name per line that replaces the recipe's own list.

    Raises:
        MissingError: The folder, a split, a class or the labels of a flat split are not there.
        CorruptFileError: A class folder without images, or label files that contradict themselves.
        UnsupportedOperation: The recipe's reader does not exist yet.
        UsageError: A class list that cannot be used, or a recipe without splits.
    """
    spec = recipe.spec
    if spec.reader not in READERS:
        raise UnsupportedOperation(
            f"{recipe.path}: reader {spec.reader!r} cannot be used yet. "
            f"Readers that work: {', '.join(READERS)}."
        )
    if not spec.splits:
        raise UsageError(f"{recipe.path}: declares no splits, so there is nothing to read")
    made: str | None = None
    if spec.generator is not None:
        from comit_bench.data.scenes import generate

        folder = cache / "datasets" / spec.folder
        made = generate(spec.generator, folder, progress=progress)
    else:
        folder = _find_folder(spec, data_root)
    if class_list is None and spec.class_list is not None:
        class_list = recipe.path.parent / spec.class_list
    wanted = None if class_list is None else read_class_list(class_list)
    places = {name: _find_split(spec, folder, name) for name in spec.splits}
    classes = wanted if wanted is not None else _classes_from(spec, places)
    reader = _ClassFolders(spec, folder, classes, exact=wanted is not None, progress=progress)
    splits: dict[str, Split] = {}
    prints: dict[str, str] = {}
    for name, place in places.items():
        samples = reader.read(name, place)
        splits[name] = _as_split(name, place, samples)
        prints[name] = _fingerprint(samples, made)
    whole = made or digest_json({"classes": list(classes), "splits": prints})
    if spec.checksum is not None and whole != spec.checksum:
        _log.warning(
            "%s: the data in %s have the fingerprint %s, the recipe expects %s. "
            "Scores on them cannot be compared with published ones.",
            *(spec.name, folder, whole, spec.checksum),
        )
    return ClassificationData(spec.name, spec.version, classes, splits, whole, prints, folder)


def holdout(ids: Sequence[str], fraction: float, salt: str) -> NDArray[np.bool_]:
    """Choose about ``fraction`` of the ids by a hash, each independently of all others.

    Args:
        ids: Sample ids; neither their order nor which others are there changes the choice.
        fraction: 0 (none) to 1 (all).
        salt: Another salt makes another choice.

    Returns:
        bool [n], True for the chosen ones.

    Raises:
        UsageError: ``fraction`` is outside 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"holdout fraction {fraction} must be between 0 and 1")
    start = hashlib.sha256(salt.encode("utf-8") + b"\0")

    def draw(name: str) -> int:
        state = start.copy()
        state.update(name.encode("utf-8", "surrogateescape"))
        return int.from_bytes(state.digest()[:6], "big")

    draws = np.fromiter((draw(name) for name in ids), dtype=np.int64, count=len(ids))
    return draws < fraction * 2.0**48


def _few(names: Iterable[str], count: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")


def _how_to_get(spec: DatasetSpec) -> str:
    source = spec.obtain or spec.homepage
    return f" Where it comes from: {source.strip()}" if source else ""


def _how_to_point(spec: DatasetSpec) -> str:
    return (
        f" Pass --data-root DIR, or set {DATA_VARIABLE}=DIR, where DIR is the folder that "
        f"contains {spec.folder}/."
    )


def _find_folder(spec: DatasetSpec, data_root: Path | None) -> Path:
    if data_root is None:
        raise MissingError(
            f"dataset {spec.name}: no data root is set.{_how_to_point(spec)}{_how_to_get(spec)}"
        )
    folder = data_root / spec.folder
    if folder.is_dir():
        return folder
    inside = any((data_root / place).is_dir() for places in spec.splits.values() for place in places)
    hint = f" {data_root} itself looks like the dataset: its parent is wanted." if inside else ""
    raise MissingError(
        f"dataset {spec.name}: {folder} is not there.{hint}{_how_to_point(spec)}{_how_to_get(spec)}"
    )


def _find_split(spec: DatasetSpec, folder: Path, name: str) -> Path:
    for candidate in spec.splits[name]:
        if (folder / candidate).is_dir():
            return folder / candidate
    looked = " or ".join(f"{candidate}/" for candidate in spec.splits[name])
    raise MissingError(
        f"dataset {spec.name}: {folder} has no split {name!r}: looked for {looked} there."
        f"{_how_to_point(spec)}{_how_to_get(spec)}"
    )


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _folders(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if not _hidden(e.name) and e.is_dir())


def _images(directory: Path) -> list[tuple[str, int]]:
    """Name and size of every image file directly in ``directory``."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if _hidden(entry.name) or os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:  # noqa: PTH122
                continue
            try:
                if entry.is_dir():
                    continue
                found.append((entry.name, entry.stat().st_size))
            except FileNotFoundError as error:
                raise MissingError(f"{entry.path}: a link that leads nowhere; restore its target") from error
    return found


def _classes_from(spec: DatasetSpec, places: dict[str, Path]) -> tuple[str, ...]:
    """Without a class list: all folder names, sorted."""
    per_split = {name: set(_folders(place)) for name, place in places.items()}
    classes = sorted(set().union(*per_split.values()))
    for name, place in places.items():
        if not per_split[name]:
            raise MissingError(f"{place}: has no class folders, and {spec.name} has no class list")
        if absent := [c for c in classes if c not in per_split[name]]:
            _log.warning("%s: split %s has no folder for %d of %d classes: %s",
                         *(place, name, len(absent), len(classes), _few(absent)))  # fmt: skip
    return tuple(classes)


def _as_split(name: str, place: Path, samples: list[_Sample]) -> Split:
    for before, after in pairwise(samples):
        if before.id == after.id:
            raise CorruptFileError(
                f"{place / after.file}: differs from {before.file} only in its suffix, and one id cannot "
                "stand for two images. Rename or remove one of them."
            )
    return Split(
        name,
        tuple(sample.id for sample in samples),
        PathList(place, tuple(sample.file for sample in samples)),
        np.fromiter((sample.label for sample in samples), dtype=np.int64, count=len(samples)),
    )


def _fingerprint(samples: list[_Sample], made: str | None) -> str:
    digest = hashlib.sha256((made or "").encode() + b"\n")
    for s in samples:
        suffix = os.path.splitext(s.file)[1]  # noqa: PTH122 (a Path per file is too slow)
        line = f"{s.id}{suffix}\t{s.size}\t{s.label}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return "sha256:" + digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _ClassFolders:
    """The reader for ``<split>/<class>/*`` and ImageNet's flat validation folder."""

    spec: DatasetSpec
    folder: Path
    classes: tuple[str, ...]
    exact: bool  # a class list says which classes must be there
    progress: bool

    def read(self, name: str, place: Path) -> list[_Sample]:
        """All samples of a split, sorted by id."""
        present = set(_folders(place))
        wanted = [c for c in self.classes if c in present]
        loose = _images(place)
        if loose and wanted:
            raise CorruptFileError(
                f"{place}: has class folders and also {len(loose)} images outside of them "
                f"({_few(sorted(n for n, _ in loose), 2)}). Sort these into their class folders, "
                "or remove them."
            )
        samples = self._flat(name, place, loose) if loose else self._foldered(place, wanted)
        return sorted(samples)

    def _foldered(self, place: Path, wanted: list[str]) -> list[_Sample]:
        if self.exact and len(wanted) < len(self.classes):
            present = set(wanted)
            absent = [c for c in self.classes if c not in present]
            raise MissingError(
                f"{place}: {len(absent)} of {len(self.classes)} class folders are missing: {_few(absent)}."
                f"{_how_to_get(self.spec)}"
            )
        from tqdm import tqdm

        labels = {c: label for label, c in enumerate(self.classes)}
        samples: list[_Sample] = []
        with ThreadPoolExecutor(8) as pool:  # listing waits for the disk, above all for a remote one
            listed = pool.map(lambda c: _images(place / c), wanted)
            bar = tqdm(
                listed,
                f"listing {place.name}",
                len(wanted),
                delay=1.0,
                leave=False,
                disable=not self.progress,
            )
            for class_name, files in zip(wanted, bar, strict=True):
                if not files:
                    raise CorruptFileError(
                        f"{place / class_name}: a class folder without images "
                        f"({', '.join(sorted(EXTENSIONS))}). Fill or remove it."
                    )
                label = labels[class_name]
                for file, size in files:
                    relative = f"{class_name}/{file}"
                    samples.append(_Sample(_stem(relative), relative, size, label))
        return samples

    def _flat(self, name: str, place: Path, files: list[tuple[str, int]]) -> list[_Sample]:
        class_of = self._labels(name, place)
        labels = {c: label for label, c in enumerate(self.classes)}
        samples, unlabelled, counts = [], [], np.zeros(len(self.classes), dtype=np.int64)
        for file, size in files:
            class_name = class_of(_stem(file))
            if class_name is None:
                unlabelled.append(file)
            elif class_name in labels:
                label = labels[class_name]
                counts[label] += 1
                samples.append(_Sample(f"{class_name}/{_stem(file)}", file, size, label))
        if unlabelled:
            raise CorruptFileError(
                f"{place}: {len(unlabelled)} of {len(files)} images have no label in "
                f"{self._candidate(name)}: {_few(sorted(unlabelled))}"
            )
        if absent := [c for c, n in zip(self.classes, counts, strict=True) if n == 0]:
            raise MissingError(
                f"{place}: no image belongs to {len(absent)} of {len(self.classes)} classes: {_few(absent)}"
            )
        return samples

    def _candidate(self, key: str) -> Path | None:
        places = (self.folder / candidate for candidate in self.spec.labels.get(key, ()))
        return next((place for place in places if place.is_file()), None)

    def _labels(self, name: str, place: Path) -> Callable[[str], str | None]:
        """Function from the stem of a file in a flat split to its class name, or None."""
        path = self._candidate(name)
        if path is None:
            looked = ", ".join(self.spec.labels.get(name, ())) or "nothing (the recipe names no label files)"
            raise MissingError(
                f"{place}: the images lie in one folder, so their labels must come from a file. "
                f"Looked in {self.folder} for: {looked}. Sorting the images into class folders works too."
            )
        if path.suffix.lower() == ".csv":
            return read_solution_csv(path).get
        synsets = self._candidate("synsets")
        if synsets is None:
            raise MissingError(
                f"{path}: holds ILSVRC2012 ids; which class an id is stands in the devkit's meta.mat. "
                f"Looked in {self.folder} for: {', '.join(self.spec.labels.get('synsets', ()))}"
            )
        ground_truth = read_ground_truth(path, read_devkit_synsets(synsets))

        def by_number(stem: str) -> str | None:
            number = re.fullmatch(r".*_(\d+)", stem)
            position = int(number[1]) - 1 if number else -1
            return ground_truth[position] if 0 <= position < len(ground_truth) else None

        return by_number


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]  # noqa: PTH122 (called for every file)
