"""The reader ``saliency``: images with one mask each (CSSD, ECSSD).

Found layouts: ``images/0001.jpg`` with ``ground_truth_mask/0001.png`` (or ``ground_truth/``), and one folder
that holds ``0001.jpg`` and ``0001.png``. A sample's id is the file name without its suffix. A mask's white
part is the salient object; the masks of the original archives may be anti-aliased or have three channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from comit_bench.data.folders import SUFFIXES
from comit_bench.data.manifests import Manifest, rows_from
from comit_bench.data.readers.common import (
    EXTENSIONS,
    few,
    find_directory,
    images,
    look_for_images,
    stem,
    suffix,
)
from comit_bench.errors import CorruptFileError, MissingError
from comit_bench.recipes.specs import DatasetSpec

MASKS = ("ground_truth_mask", "ground_truth")
PHOTOS = frozenset({".jpg", ".jpeg"})


def places(spec: DatasetSpec, folder: Path) -> dict[str, Path]:
    """Directories of images (``<split>``) and of masks (``<split> masks``)."""
    found = {
        name: find_directory(spec, folder, f"images of {name!r}", candidates)
        for name, candidates in spec.splits.items()
    }
    for name in spec.splits:
        candidates = spec.labels.get(name, MASKS)
        together = [] if any((folder / c).is_dir() for c in candidates) else _if_together(found[name])
        found[f"{name} masks"] = (
            found[name] if together else find_directory(spec, folder, f"masks of {name!r}", candidates)
        )
    return found


def counted(manifest: Manifest, samples: dict[str, int]) -> dict[str, int]:
    """Samples of every split."""
    return samples


def build(spec: DatasetSpec, folder: Path) -> Manifest:
    """Pair every image with its mask."""
    where = places(spec, folder)
    splits, unmasked, no_files = {}, {}, {}
    for name in spec.splits:
        directory = where[f"{name} masks"]
        listed, odd = look_for_images(where[name])
        photos = _by_stem(listed, where[name], directory, True)
        listed, odd_masks = look_for_images(directory, EXTENSIONS if directory == where[name] else SUFFIXES)
        masks = _by_stem(listed, directory, where[name], False)
        no_files[name] = {stem(file): what for file, what in sorted((odd | odd_masks).items())}
        photos = {i: file for i, file in photos.items() if i not in no_files[name]}
        masks = {i: file for i, file in masks.items() if i not in no_files[name]}
        if not photos:
            raise MissingError(f"{where[name]}: holds no images")
        if alone := sorted(masks.keys() - photos.keys()):
            raise CorruptFileError(
                f"{directory}: {len(alone)} masks have no image of the same name in {where[name]}: "
                f"{few(alone)}"
            )
        both = sorted(photos.keys() & masks.keys())
        unmasked[name] = sorted(photos.keys() - masks.keys())
        nothing = np.empty((0, 0), dtype=np.int32)
        splits[name] = rows_from(
            [(i, f"{name}/{photos[i]}", nothing) for i in both], 0, [f"{name} masks/{masks[i]}" for i in both]
        )
    notes: dict[str, Any] = {"images_without_mask": unmasked}
    if any(no_files.values()):
        notes["not_files"] = no_files
    return Manifest("masks", ("salient",), (), splits, notes)


def _if_together(directory: Path) -> list[str]:
    """Stems that occur both as a photograph and as a PNG in one folder."""
    names = images(directory)
    photos = {stem(n) for n in names if suffix(n).lower() in PHOTOS}
    return sorted(photos & {stem(n) for n in names if suffix(n).lower() == ".png"})


def _by_stem(files: list[str], directory: Path, other: Path, photos: bool) -> dict[str, str]:
    """Stem -> file; in a folder that holds both, photographs are .jpg and masks .png."""
    if directory == other:
        files = [f for f in files if (suffix(f).lower() in PHOTOS) == photos]
    found: dict[str, str] = {}
    for file in sorted(files):
        if stem(file) in found:
            raise CorruptFileError(
                f"{directory / file}: differs from {found[stem(file)]} only in its suffix. "
                "Remove one of them."
            )
        found[stem(file)] = file
    return found
