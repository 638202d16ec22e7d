"""``data build``: make the manifest, read every image once, report what is missing or broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comit_bench.data.datasets import open_dataset
from comit_bench.data.images import iterate_images, read_mask
from comit_bench.data.split import OpenData, PathList, Split
from comit_bench.errors import BenchError, CorruptFileError
from comit_bench.files import write_atomic
from comit_bench.recipes.specs import DatasetSpec, Recipe

CHUNK = 64  # images per message of a reading process


def build_dataset(
    recipe: Recipe[DatasetSpec],
    *,
    data_root: Path | None,
    cache: Path,
    workers: int = 0,
    check_images: bool = True,
    progress: bool = True,
) -> tuple[OpenData, Path, dict[str, str]]:
    """Open a data set (which makes its manifest), then decode all of its images and masks.

    Returns:
        The data, the report's file (``reports/NAME.json`` of the cache), and id -> message of every broken
        image.
    """
    data = open_dataset(recipe, data_root=data_root, cache=cache, progress=progress)
    broken: dict[str, str] = {}
    if check_images:
        for split in data.splits.values():
            broken |= _broken_images(split, workers, progress)
            if data.kind == "masks":
                broken |= _broken_masks(split, progress)
    count = sum(map(len, data.splits.values())) + len(data.missing)
    report = cache / "reports" / f"{recipe.spec.name}.json"
    content = {
        "dataset": data.name,
        "version": data.version,
        "fingerprint": data.fingerprint,
        "folder": str(data.folder),
        "images": count,
        "decoded": check_images,
        "missing": data.missing,
        "broken": broken,
        "notes": data.notes,
    }
    write_atomic(report, json.dumps(content, indent=1) + "\n")
    bad = len(broken) + len(data.missing)
    if bad > recipe.spec.max_broken * count:
        raise BenchError(
            f"dataset {data.name}: {bad} of {count} images are missing or broken, more than the "
            f"{recipe.spec.max_broken:.1%} that the recipe allows (max_broken). {report} lists them."
        )
    return data, report, broken


def _broken_images(split: Split, workers: int, progress: bool) -> dict[str, str]:
    """Id and message of every image that cannot be decoded."""
    in_archive = not isinstance(split.paths, PathList)  # not worth sending to other processes
    batches = iterate_images(
        split.paths, "resize(1,nearest)", batch_size=CHUNK, num_workers=0 if in_archive else workers
    )
    found: dict[str, str] = {}
    with _bar(f"reading {split.name}", len(split), progress) as bar:
        for batch in batches:
            found |= {split.ids[index]: text for index, text in batch.broken.items()}
            bar.update(len(batch.indices))
    return found


def _broken_masks(split: Split, progress: bool) -> dict[str, str]:
    """Id and message of every mask that cannot be read or says nothing."""
    found: dict[str, str] = {}
    with _bar(f"reading masks of {split.name}", len(split), progress) as bar:
        for name, path in zip(split.ids, split.labels, strict=True):
            try:
                if (problem := read_mask(path).problem) is not None:
                    found[name] = f"{path}: {problem}"
            except CorruptFileError as error:
                found[name] = str(error)
            bar.update()
    return found


def _bar(title: str, total: int, progress: bool) -> tqdm[Any]:
    return tqdm(total=total, desc=title, unit=" images", delay=1.0, leave=False, disable=not progress)
