"""The reader ``class-folders``: ``<split>/<class>/*``, and ImageNet's flat validation folder.

A flat split is the folder of ``ILSVRC2012_val_*.JPEG`` as it comes out of the official archive. It needs
labels; ``labels`` of the recipe lists where they may lie, relative to the dataset's folder:

- ``labels[<split>]``: a ``.csv`` as Kaggle ships it (``ImageId,PredictionString``, class name first), or
  the devkit's ``ILSVRC2012_validation_ground_truth.txt`` (one 1-based ILSVRC2012 id per image);
- ``labels["synsets"]``: what those ids mean, as the devkit's ``meta.mat`` or as a text file with one class
  name per line *in devkit order*. That order is not the alphabetical one of ``LOC_synset_mapping.txt``
  and many ``synsets.txt``; an alphabetical file is refused, because it would permute all labels.

``attributes.json`` in the data set's folder may say more about images of class folders than their class:
``values`` gives the values that each attribute can have, ``images`` the numbers of an image's values, under
``<split>/<id>``.

A sample's id is ``<class>/<file name without suffix>`` in every layout. Ids, their order, all that is
derived from ids, and fingerprints therefore agree between a flat and a foldered copy.

What is called like an image and is no file (a named pipe, a folder) counts as a missing image.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from comit_bench.data.labels import (
    read_class_list,
    read_devkit_synsets,
    read_ground_truth,
    read_solution_csv,
)
from comit_bench.data.readers.common import (
    EXTENSIONS,
    few,
    find_directory,
    folders,
    how_to_get,
    look_for_images,
    stem,
)
from comit_bench.data.readers.encoded import find_encoded, read_encoded
from comit_bench.data.split import PathList, Split
from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation
from comit_bench.recipes.reading import read_json
from comit_bench.recipes.specs import DatasetSpec, Recipe

_log = logging.getLogger(__name__)

ATTRIBUTES = "attributes.json"

Reading = tuple[tuple[str, ...], dict[str, Split], dict[str, str]]
Listing = tuple[list["_Sample"], dict[str, str]]


@dataclass(frozen=True, slots=True, order=True)
class _Sample:
    id: str
    file: str  # relative to the split's directory
    label: int


def read_class_folders(
    recipe: Recipe[DatasetSpec],
    folder: Path,
    *,
    class_list: Path | None,
    cache: Path,
    progress: bool,
) -> Reading:
    """Classes, splits, and id -> what stands where an image should be.

    ``class_list`` replaces the recipe's own list of classes; ``cache`` is for listings of shards.
    """
    spec = recipe.spec
    if class_list is None and spec.class_list is not None:
        class_list = recipe.path.parent / spec.class_list
    wanted = None if class_list is None else read_class_list(class_list)
    encoded = find_encoded(spec, folder, cache)
    places = {
        name: folder if name in encoded else find_directory(spec, folder, f"split {name!r}", candidates)
        for name, candidates in spec.splits.items()
    }
    if encoded and (wanted is None or not spec.labelled):
        raise UnsupportedOperation(
            f"dataset {spec.name}: {few(encoded)} lie in shards or a hub copy, which is read for labelled "
            "sets with a list of classes only. Unpack the images into folders."
        )
    if not spec.labelled:
        listed = _list_unlabelled(places, progress)
        return ("image",), *_as_splits(places, listed)
    classes = wanted if wanted is not None else _classes_from(spec, places)
    reader = _ClassFolders(spec, folder, classes, exact=wanted is not None, progress=progress)
    listed = {name: reader.read(name, place) for name, place in places.items() if name not in encoded}
    splits, missing = _as_splits(places, listed)
    for name, source in encoded.items():
        labels_of_flat = partial(reader.labels_of_flat, name, places[name])
        splits[name] = read_encoded(name, source, classes, labels_of_flat)
    with_more = {n: _with_attributes(splits[n], folder / ATTRIBUTES) for n in spec.splits}
    return classes, with_more, missing


def _with_attributes(split: Split, path: Path) -> Split:
    """The split with what the file says of its images; unchanged without such a file."""
    if not path.is_file():
        return split
    content = read_json(path)
    try:
        rows = [content["images"][f"{split.name}/{one}"] for one in split.ids]
        columns = zip(content["values"].items(), zip(*rows, strict=True), strict=True)
        found = {name: np.array(texts)[list(column)] for (name, texts), column in columns if rows}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path}: does not describe all images of {split.name} ({error!r})") from error
    return replace(split, attributes=found)


def _as_splits(
    places: dict[str, Path], listed: dict[str, Listing]
) -> tuple[dict[str, Split], dict[str, str]]:
    splits = {name: _as_split(name, places[name], samples) for name, (samples, _) in listed.items()}
    missing = {
        f"{name}/{file}": f"this is {what}, not a file"
        for name, (_, odd) in listed.items()
        for file, what in odd.items()
    }
    return splits, missing


def _list_unlabelled(places: dict[str, Path], progress: bool) -> dict[str, Listing]:
    """All images of a split, flat or in class folders; ids are file names, so that both layouts agree."""
    listed: dict[str, Listing] = {}
    for name, place in places.items():
        inner = folders(place)
        files, odd = look_for_images(place)
        odd = {file: what for file, what in odd.items() if file not in inner}
        found = [("", file) for file in files]
        bar = tqdm(inner, f"listing {name}", delay=1.0, leave=False, disable=not progress)
        for directory in bar:
            files, wrong = look_for_images(place / directory)
            found += [(f"{directory}/", file) for file in files]
            odd |= {f"{directory}/{file}": what for file, what in wrong.items()}
        if not found:
            raise MissingError(f"{place}: holds no images")
        listed[name] = sorted(_Sample(stem(file), start + file, 0) for start, file in found), odd
    return listed


def _classes_from(spec: DatasetSpec, places: dict[str, Path]) -> tuple[str, ...]:
    """Without a class list: all folder names, sorted."""
    per_split = {name: set(folders(place)) for name, place in places.items()}
    classes = sorted(set().union(*per_split.values()))
    for name, place in places.items():
        if not per_split[name]:
            raise MissingError(f"{place}: has no class folders, and {spec.name} has no class list")
        if absent := [c for c in classes if c not in per_split[name]]:
            _log.warning("%s: split %s has no folder for %d of %d classes: %s",
                         *(place, name, len(absent), len(classes), few(absent)))  # fmt: skip
    return tuple(classes)


def _as_split(name: str, place: Path, samples: list[_Sample]) -> Split:
    for before, after in pairwise(samples):
        if before.id == after.id:
            raise CorruptFileError(
                f"{place / after.file}: differs from {before.file} only in its suffix or folder, and one id "
                "cannot stand for two images. Rename or remove one of them."
            )
    return Split(
        name,
        tuple(sample.id for sample in samples),
        PathList(place, tuple(sample.file for sample in samples)),
        np.fromiter((sample.label for sample in samples), dtype=np.int64, count=len(samples)),
    )


@dataclass(frozen=True, slots=True)
class _ClassFolders:
    spec: DatasetSpec
    folder: Path
    classes: tuple[str, ...]
    exact: bool  # a class list says which classes must be there
    progress: bool

    def read(self, name: str, place: Path) -> Listing:
        """All samples of a split, sorted by id; and what is called like an image and is no file."""
        present = set(folders(place))
        wanted = [c for c in self.classes if c in present]
        loose, odd = look_for_images(place)
        if loose and wanted:
            raise CorruptFileError(
                f"{place}: has class folders and also {len(loose)} images outside of them "
                f"({few(sorted(loose), 2)}). Sort these into their class folders, "
                "or remove them."
            )
        if loose:
            odd = {file: what for file, what in odd.items() if file not in present}
            return sorted(self._flat(name, place, loose)), odd
        return self._foldered(place, wanted)

    def _foldered(self, place: Path, wanted: list[str]) -> Listing:
        if self.exact and len(wanted) < len(self.classes):
            present = set(wanted)
            absent = [c for c in self.classes if c not in present]
            raise MissingError(
                f"{place}: {len(absent)} of {len(self.classes)} class folders are missing: {few(absent)}."
                f"{how_to_get(self.spec)}"
            )
        labels = {c: label for label, c in enumerate(self.classes)}
        samples: list[_Sample] = []
        odd: dict[str, str] = {}
        with ThreadPoolExecutor(8) as pool:  # listing waits for the disk, above all for a remote one
            listed = pool.map(lambda c: look_for_images(place / c), wanted)
            bar = tqdm(
                listed,
                f"listing {place.name}",
                len(wanted),
                delay=1.0,
                leave=False,
                disable=not self.progress,
            )
            for class_name, (files, wrong) in zip(wanted, bar, strict=True):
                odd |= {f"{class_name}/{file}": what for file, what in wrong.items()}
                if not files:
                    raise CorruptFileError(
                        f"{place / class_name}: a class folder without images "
                        f"({', '.join(sorted(EXTENSIONS))}). Fill or remove it."
                    )
                label = labels[class_name]
                for file in files:
                    relative = f"{class_name}/{file}"
                    samples.append(_Sample(stem(relative), relative, label))
        return sorted(samples), odd

    def _flat(self, name: str, place: Path, files: list[str]) -> list[_Sample]:
        class_of = self.labels_of_flat(name, place)
        labels = {c: label for label, c in enumerate(self.classes)}
        samples, unlabelled, counts = [], [], np.zeros(len(self.classes), dtype=np.int64)
        for file in files:
            class_name = class_of(stem(file))
            if class_name is None:
                unlabelled.append(file)
            elif class_name in labels:
                label = labels[class_name]
                counts[label] += 1
                samples.append(_Sample(f"{class_name}/{stem(file)}", file, label))
        if unlabelled:
            raise CorruptFileError(
                f"{place}: {len(unlabelled)} of {len(files)} images have no label in "
                f"{self._candidate(name)}: {few(sorted(unlabelled))}"
            )
        if absent := [c for c, n in zip(self.classes, counts, strict=True) if n == 0]:
            raise MissingError(
                f"{place}: no image belongs to {len(absent)} of {len(self.classes)} classes: {few(absent)}"
            )
        return samples

    def _candidate(self, key: str) -> Path | None:
        places = (self.folder / candidate for candidate in self.spec.labels.get(key, ()))
        return next((place for place in places if place.is_file()), None)

    def labels_of_flat(self, name: str, place: Path) -> Callable[[str], str | None]:
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
