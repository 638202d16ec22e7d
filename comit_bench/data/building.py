"""``data build``: make the manifest, read every image once, report what is missing or broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comit_bench.data.datasets import open_dataset
from comit_bench.data.images import load_from, load_image, read_mask
from comit_bench.data.split import OpenData
from comit_bench.data.workers import read_ahead
from comit_bench.errors import BenchError, CorruptFileError
from comit_bench.files import write_atomic
from comit_bench.recipes.specs import DatasetSpec, Recipe

CHUNK = 64  # images per message to a reading process


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

    Args:
        recipe: The data set's recipe.
        data_root: Where real data sets lie.
        cache: Cache directory; the report goes to ``reports/NAME.json`` there.
        workers: Reading processes; 0 reads in this one.
        check_images: Decode the images.
        progress: Show bars.

    Returns:
        The data, the report's file, and id -> message of every broken image.
    """
    data = open_dataset(recipe, data_root=data_root, cache=cache, progress=progress)
    broken: dict[str, str] = {}
    if check_images:
        for split in data.splits.values():
            found = _broken(split.paths, f"reading {split.name}", workers, progress)
            broken |= {split.ids[row]: text for row, text in found}
            if data.kind == "masks":
                title = f"reading masks of {split.name}"
                found = _broken(split.labels, title, workers, progress, check=_check_masks)
                broken |= {split.ids[row]: text for row, text in found}
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


def _decode_all(paths: list[str]) -> list[str | None]:
    """For every file why it cannot be read, or None."""
    messages: list[str | None] = []
    for path in paths:
        try:
            load_image(Path(path), "resize(1,nearest)")
            messages.append(None)
        except CorruptFileError as error:
            messages.append(str(error))
    return messages


def _check_masks(paths: list[str]) -> list[str | None]:
    """For every mask why it is of no use, or None."""
    messages: list[str | None] = []
    for path in paths:
        try:
            problem = read_mask(Path(path)).problem
            messages.append(None if problem is None else f"{path}: {problem}")
        except CorruptFileError as error:
            messages.append(str(error))
    return messages


def _broken(
    paths: Any,
    title: str,
    workers: int,
    progress: bool,
    check: Callable[[list[str]], list[str | None]] = _decode_all,
) -> list[tuple[int, str]]:
    """Row and message of every file in which ``check`` finds something."""
    if hasattr(paths, "read"):  # in an archive: not worth sending to other processes
        return _broken_encoded(paths)
    starts = range(0, len(paths), CHUNK)
    chunks = ([str(path) for path in paths[start : start + CHUNK]] for start in starts)
    found: list[tuple[int, str]] = []
    with tqdm(
        total=len(paths), desc=title, unit=" images", delay=1.0, leave=False, disable=not progress
    ) as bar:
        for start, messages in zip(starts, _map(check, chunks, workers), strict=True):
            found += [(start + i, text) for i, text in enumerate(messages) if text is not None]
            bar.update(len(messages))
    return found


def _broken_encoded(paths: Any) -> list[tuple[int, str]]:
    found = []
    for row in range(len(paths)):
        try:
            load_from(paths, row, "resize(1,nearest)")
        except CorruptFileError as error:
            found.append((row, str(error)))
    return found


@dataclass(frozen=True, slots=True)
class _Checked:
    """What ``check`` says about a list of files; errors come back as values."""

    check: Callable[[list[str]], list[str | None]]

    def __getitem__(self, paths: list[str]) -> list[str | None] | BenchError:
        try:
            return self.check(paths)
        except BenchError as error:
            return error


def _map(
    check: Callable[[list[str]], list[str | None]], chunks: Iterator[list[str]], workers: int
) -> Iterator[list[str | None]]:
    for found in read_ahead(_Checked(check), chunks, workers):
        if isinstance(found, BenchError):
            raise found
        yield found
