"""From a recipe to samples: find or make the data set, read its labels, find its images.

``class-folders`` lists the folders themselves. The other readers make a *manifest* from the annotation files
(``comit_bench.data.manifests``): it says which image is in which split with which labels, lies in the cache
as Parquet, and is verified again at every load: its digest, and that its splits are what the recipe promises.
Then the images are looked for. Those that are annotated but not there are left out, counted and listed; above
the share ``max_broken`` of the recipe that is an error.

The fingerprint of a split is over ids, what the files of images and masks hold, and labels; that of a data
set over its splits and vocabularies. So it is equal wherever the same files lie, in folders, shards or hub
copies, and changes with any byte of them (``comit_bench.data.digests`` says how that is known without
reading everything at every start). Embedded scenes are known by their pixels and labels instead, since
encoders differ in bytes. No image is in two splits, see ``comit_bench.data.disjoint``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.data.disjoint import without_shared
from comit_bench.data.manifests import FORMAT, Manifest, Rows, read_manifest, write_manifest
from comit_bench.data.readers.class_folders import read_class_folders
from comit_bench.data.readers.common import few, files_in, find_folder, how_to_get
from comit_bench.data.readers.open import build_manifest, manifest_reader
from comit_bench.data.scenes.generate import generate
from comit_bench.data.split import OpenData, PathList, Split, Triplets
from comit_bench.data.splitting import check_pair_disjoint
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.files import digest_json, locked, sha256_file, write_atomic
from comit_bench.recipes.specs import DatasetSpec, Recipe, check_paths

_log = logging.getLogger(__name__)


def open_dataset(
    recipe: Recipe[DatasetSpec],
    *,
    data_root: Path | None,
    cache: Path,
    progress: bool = True,
    class_list: Path | None = None,
    contents: bool = True,
) -> OpenData:
    """Find a dataset on this machine, or make it when its recipe has a generator, and list its samples.

    Args:
        recipe: The dataset's recipe.
        data_root: Directory that holds the recipe's ``folder``; not used with a generator.
        cache: Cache directory, where generated datasets and manifests go.
        progress: Show progress bars.
        class_list: File with one class name per line that replaces the recipe's own list.
        contents: False for a look at counts: files are listed and not read, so there are no fingerprints and
            nobody has seen whether splits share images.

    Raises:
        MissingError: The folder, a split, a class, an annotation file or too many images are not there.
        CorruptFileError: Files that are not what they should be, or that contradict themselves.
        UsageError: A class list that cannot be used, or a recipe without splits.
    """
    spec = recipe.spec
    check_paths(spec)
    if not spec.splits:
        raise UsageError(f"{recipe.path}: declares no splits, so there is nothing to read")
    if class_list is not None and spec.reader != "class-folders":
        raise UsageError(f"dataset {spec.name}: reader {spec.reader!r} takes no list of classes")
    made: str | None = None
    if spec.generator is not None:
        folder = spec.made_in(cache)
        made = generate(spec.generator, folder, progress=progress)
    else:
        folder = find_folder(spec, data_root)
    if spec.reader == "class-folders":
        data = _read_class_folders(recipe, folder, class_list, cache, progress)
        report = cache / "reports" / f"{spec.name}-missing.json"
        identity: str | dict[str, Any] = made or {"classes": list(data.classes)}
    else:
        data, digest, path = _read_annotated(recipe, folder, cache, progress)
        report = path.parent / "missing.json"
        identity = {"made": made, "manifest": digest}
    notes = data.notes | _compare_counts(spec, data.expected, data.found, folder, say=contents)
    count = sum(map(len, data.splits.values())) + len(data.missing)
    _report_missing(spec, folder, data.missing, count, report if contents else None)
    splits = {name: replace(split, exif=spec.upright) for name, split in data.splits.items()}
    shared: dict[str, int] = {}
    if contents:
        splits = {name: split.with_contents(cache, progress=progress) for name, split in splits.items()}
        if made is None:  # scenes are painted apart
            listed = cache / "reports" / f"{spec.name}-shared.json"
            splits, shared = without_shared(splits, where=folder, report=listed)
            notes |= {"images_in_two_splits": shared} if shared else {}
    if spec.reader == "coco" and spec.pairs.policy == "pair-disjoint" and (data.missing or shared):
        _recheck(splits, data.classes, folder)
    prints, whole = {}, ""
    if contents:
        prints = {name: _fingerprint_of(split, made) for name, split in splits.items()}
        whole = identity if isinstance(identity, str) else digest_json(identity | {"splits": prints})
        _compare_checksum(spec, made or whole, folder)
    return replace(data, splits=splits, notes=notes, fingerprint=whole, fingerprints=prints)


def _fingerprint_of(split: Split, made: str | None) -> str:
    """``sha256:<hex>`` over ids, contents and labels; ``made``, a generator's digest, stands for contents."""
    state = hashlib.sha256((made or "").encode() + b"\n")
    contents = split.contents if made is None else (b"",) * len(split)
    for name, content in zip(split.ids, contents, strict=True):
        state.update(f"{name}\t{content.hex()}\n".encode("utf-8", "surrogateescape"))
    if isinstance(split.labels, Triplets):
        for table in (split.labels.table, split.labels.known):
            state.update(f"{len(table)}\n".encode() + np.ascontiguousarray(table, dtype="<i8").tobytes())
    elif isinstance(split.labels, np.ndarray):
        state.update(f"{split.labels.shape}\n".encode())
        state.update(np.ascontiguousarray(split.labels, dtype="<i8").tobytes())
    elif made is None:
        state.update(b"".join(split.mask_contents))
    return "sha256:" + state.hexdigest()


def _compare_counts(
    spec: DatasetSpec, expected: dict[str, int], found: dict[str, int], folder: Path, *, say: bool
) -> dict[str, Any]:
    """What to note, and say, when the data do not have the official number of images."""
    differ = {n: [found.get(n, 0), wanted] for n, wanted in expected.items() if found.get(n, 0) != wanted}
    for name, (here, wanted) in differ.items() if say else ():
        _log.warning(
            "%s: %s has %s samples of split %r, the official one has %s. Scores cannot be compared with "
            "published ones%s.",
            *(spec.name, folder, f"{here:,}", name, f"{wanted:,}"),
            ", and records are marked incomplete" if abs(here - wanted) > spec.max_broken * wanted else "",
        )
    return {"counts_and_official": differ} if differ else {}


def _compare_checksum(spec: DatasetSpec, found: str, folder: Path) -> None:
    if spec.checksum is not None and found != spec.checksum:
        _log.warning(
            "%s: the data in %s have the fingerprint %s, the recipe expects %s. "
            "Scores on them cannot be compared with published ones.",
            *(spec.name, folder, found, spec.checksum),
        )


def _read_class_folders(
    recipe: Recipe[DatasetSpec], folder: Path, class_list: Path | None, cache: Path, progress: bool
) -> OpenData:
    """What class folders hold; nobody has looked into the files yet."""
    spec = recipe.spec
    classes, splits, missing = read_class_folders(
        recipe, folder, class_list=class_list, cache=cache, progress=progress
    )
    return OpenData(
        spec.name,
        spec.version,
        classes,
        splits,
        fingerprint="",
        fingerprints={},
        folder=folder,
        missing=missing,
        notes={"missing_images": len(missing)} if missing else {},
        max_broken=spec.max_broken,
        expected=spec.expected if class_list is None else {},  # else the official counts say nothing
        found={name: len(split) for name, split in splits.items()},
    )


def _manifest_for(spec: DatasetSpec, folder: Path, cache: Path, progress: bool) -> tuple[Manifest, str, Path]:
    """The manifest of a data set, its digest and its file: from the cache, verified, or made now."""
    if spec.reader not in ("coco", "visual-genome"):  # their folders are listed each time
        manifest = build_manifest(spec, folder)
        key: dict[str, Any] = {"format": FORMAT, "folder": str(folder)}
        path = _manifest_path(spec, cache, key)
        return manifest, write_manifest(path, manifest, key), path
    reader = manifest_reader(spec.reader)
    found = reader.sources(spec, folder)
    fields = {"reader", "splits", "pairs" if spec.reader == "coco" else "relations"}
    key = {
        "format": FORMAT,
        "recipe": spec.model_dump(mode="json", include=fields),
        "sources": {what: sha256_file(path) for what, path in found.items()},
    }
    path = _manifest_path(spec, cache, key)

    def stored() -> tuple[Manifest, str, Path]:
        manifest, digest = read_manifest(path, key)
        reader.verify(spec, manifest, str(path))
        return manifest, digest, path

    with suppress(MissingError, CorruptFileError):
        return stored()
    with locked(path.with_name(".lock"), f"making the manifest of {spec.name}"):
        try:
            return stored()
        except MissingError:
            pass
        except CorruptFileError as error:
            _log.warning("%s It is made again.", error)
        manifest = reader.build(spec, found, progress=progress)
        return manifest, write_manifest(path, manifest, key), path


def _manifest_path(spec: DatasetSpec, cache: Path, key: dict[str, Any]) -> Path:
    short = digest_json(key).removeprefix("sha256:")[:16]
    return cache / "manifests" / spec.name / short / "manifest.parquet"


def _read_annotated(
    recipe: Recipe[DatasetSpec], folder: Path, cache: Path, progress: bool
) -> tuple[OpenData, str, Path]:
    """The samples of a manifest whose files are there, its digest and its file."""
    spec = recipe.spec
    manifest, digest, path = _manifest_for(spec, folder, cache, progress)
    reader = manifest_reader(spec.reader)
    finder = _Finder(folder, reader.places(spec, folder))
    splits: dict[str, Split] = {}
    missing: dict[str, str] = {}
    for name, rows in manifest.splits.items():
        there = np.array([finder.has(file) for file in rows.files], dtype=np.bool_)
        missing |= {rows.ids[i]: f"no file {rows.files[i]}" for i in np.flatnonzero(~there).tolist()}
        splits[name] = _split(name, rows, there, manifest, finder)
    for names in manifest.notes.get("images_without_mask", {}).values():
        missing |= {name: "no mask" for name in names}
    for odd in manifest.notes.get("not_files", {}).values():
        missing |= {name: f"this is {what}, not a file" for name, what in odd.items()}
    data = OpenData(
        spec.name,
        spec.version,
        manifest.classes,
        splits,
        fingerprint="",
        fingerprints={},
        folder=folder,
        kind=manifest.kind,
        predicates=manifest.predicates,
        missing=missing,
        notes={**manifest.notes, "manifest": digest, "missing_images": len(missing)},
        max_broken=spec.max_broken,
        expected=spec.expected,
        found=reader.counted(manifest, {name: len(split) for name, split in splits.items()}),
    )
    return data, digest, path


class _Finder:
    """Where the files of a manifest lie; every directory is listed once."""

    def __init__(self, folder: Path, places: dict[str, Path]) -> None:
        self.folder, self.places = folder, places
        self._listed: dict[str, frozenset[str]] = {}

    def relative(self, file: str) -> str:
        """``<place>/<name>`` -> path below the data set's folder."""
        place, _, name = file.partition("/")
        return f"{self.places[place].relative_to(self.folder).as_posix()}/{name}"

    def has(self, file: str) -> bool:
        """Whether a file is there."""
        place, _, name = file.partition("/")
        if place not in self.places:
            return False
        if "/" in name:
            return (self.places[place] / name).is_file()
        if place not in self._listed:
            self._listed[place] = files_in(self.places[place])
        return name in self._listed[place]


def _split(name: str, rows: Rows, there: NDArray[np.bool_], manifest: Manifest, finder: _Finder) -> Split:
    """The samples whose image is there."""
    chosen = np.flatnonzero(there).tolist()
    files = tuple(finder.relative(rows.files[i]) for i in chosen)
    labels: Any
    if manifest.kind == "masks":
        labels = PathList(finder.folder, tuple(finder.relative(rows.masks[i]) for i in chosen))
    else:
        lengths = np.diff(rows.offsets)
        row = np.repeat(np.cumsum(there) - 1, lengths)[np.repeat(there, lengths)]
        values = rows.values[np.repeat(there, lengths)].astype(np.int64)
        if manifest.kind == "classes":
            labels = values[:, 0]
        elif manifest.kind == "multilabel":
            labels = np.zeros((len(chosen), len(manifest.classes)), dtype=np.bool_)
            labels[row, values[:, 0]] = True
        else:
            known = np.concatenate([row[:, None], values[:, :3]], axis=1).astype(np.int64)
            known = known[np.lexsort(known.T[::-1])]
            table = np.concatenate([row[:, None], values[:, :3]], axis=1)[values[:, 3] > 0]
            labels = Triplets(np.ascontiguousarray(table[np.lexsort(table.T[::-1])]), known)
    return Split(name, tuple(rows.ids[i] for i in chosen), PathList(finder.folder, files), labels)


def _report_missing(
    spec: DatasetSpec, folder: Path, missing: dict[str, str], count: int, report: Path | None
) -> None:
    """List missing images in a file, if one is given, and say so; too many are an error."""
    if not missing:
        return
    if report is not None:
        write_atomic(report, json.dumps({"folder": str(folder), "missing": missing}, indent=1) + "\n")
    text = (
        f"dataset {spec.name}: {len(missing)} of {count} images (or their masks) are not in {folder}: "
        f"{few(f'{name} ({why})' for name, why in missing.items())}"
        + ("." if report is None else f" (all of them: {report}).")
    )
    if len(missing) > spec.max_broken * count:
        raise MissingError(f"{text} The recipe allows {spec.max_broken:.1%} (max_broken).{how_to_get(spec)}")
    if report is not None:  # else this is only a look
        _log.warning("%s They are left out and counted in the record.", text)


def _recheck(splits: dict[str, Split], classes: tuple[str, ...], folder: Path) -> None:
    """After images were left out: is every category still on both sides?"""
    pairs = []
    for name in ("train", "val"):
        both = {tuple(np.flatnonzero(row).tolist()) for row in splits[name].labels}
        pairs.append([(classes[a], classes[b]) for a, b in sorted(both)])
    check_pair_disjoint(pairs[0], pairs[1], f"{folder} (without the images that are not there)")
