"""The reader ``coco``: images with exactly two categories, from ``instances_*.json``.

Paper, Appendix B.3: keep images with exactly two categories, split them so that train and validation share no
pair but cover the same categories, predict a 2-hot target over the 90 category ids. The split itself is in
``comit_bench.data.splitting``. A sample's id is ``<annotation file's split>/<file name without suffix>``.
A photograph that an annotation file lists under several ids is one sample with the categories of all of them.
Annotation files are read by pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from comit_bench.data.manifests import Manifest, rows_from
from comit_bench.data.readers.common import (
    check_file,
    few,
    find_directory,
    find_file,
    stem,
    whole_number,
)
from comit_bench.data.splitting import Pair, PairSplit, check_pair_disjoint, pair_disjoint
from comit_bench.errors import CorruptFileError, UsageError, shown
from comit_bench.recipes.reading import read_json
from comit_bench.recipes.specs import DatasetSpec

_log = logging.getLogger(__name__)

KEYS = ("images", "annotations", "categories")
Sample = tuple[str, str, NDArray[np.int32]]
FAR = 0.02  # from the target share of val images: said aloud


def sources(spec: DatasetSpec, folder: Path) -> dict[str, Path]:
    """Annotation file of every split."""
    return {
        name: find_file(spec, folder, f"annotations of {name!r}", files)
        for name, files in spec.splits.items()
    }


def places(spec: DatasetSpec, folder: Path) -> dict[str, Path]:
    """Image directory of every split."""
    return {
        name: find_directory(spec, folder, f"images of {name!r}", spec.images.get(name, (name,)))
        for name in spec.splits
    }


def counted(manifest: Manifest, samples: dict[str, int]) -> dict[str, int]:
    """Images that every annotation file lists."""
    return {name: int(manifest.notes[name]["images"]) for name in samples if name in manifest.notes}


def build(spec: DatasetSpec, found: dict[str, Path], *, progress: bool) -> Manifest:
    """Read the annotations and split the images.

    Raises:
        CorruptFileError: Not a COCO file, or the files contradict each other.
        UsageError: The recipe's ``pairs`` section does not fit the annotations.
    """
    names: dict[int, str] = {}
    pool: dict[str, list[Sample]] = {}
    notes: dict[str, Any] = {}
    for split, path in found.items():
        categories, pool[split], notes[split] = _read_file(spec, split, path)
        clash = [i for i in categories if names.get(i, categories[i]) != categories[i]]
        if clash:
            raise CorruptFileError(
                f"{path}: category {clash[0]} is {categories[clash[0]]!r} here, {names[clash[0]]!r} before"
            )
        names |= categories
    classes = _columns(spec, names)
    if spec.pairs.policy != "pair-disjoint":
        splits = pool
        notes["pairs"] = _given_notes(pool)
    else:
        divided, splits = _divide(spec, pool, classes)
        notes["pairs"] = _pair_notes(divided, splits, pool, classes)
        _say_what_was_lost(spec, notes["pairs"])
    manifest = Manifest(
        "multilabel",
        classes,
        (),
        {name: rows_from(samples, 1) for name, samples in splits.items()},
        notes,
    )
    verify(spec, manifest, str(next(iter(found.values())).parent))
    return manifest


def verify(spec: DatasetSpec, manifest: Manifest, where: str) -> None:
    """Check from the samples alone that the split is what the recipe promises."""
    for name, rows in manifest.splits.items():
        if len(rows.values) and (np.diff(rows.offsets) != 2).any():
            raise CorruptFileError(f"{where}: split {name!r} has a sample without exactly two categories")
    if spec.pairs.policy != "given":
        train, val = (_pairs_of(manifest, name) for name in ("train", "val"))
        check_pair_disjoint(train, val, where)


def _pairs_of(manifest: Manifest, split: str) -> list[Pair]:
    both = np.unique(np.sort(manifest.splits[split].values.reshape(-1, 2), axis=1), axis=0)
    return [(manifest.classes[a], manifest.classes[b]) for a, b in both.tolist()]


def _open_coco(path: Path) -> Any:
    try:
        content = read_json(path, most=sys.maxsize, strict=False)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}: not a COCO instances file. Replace it by the original.") from error
    try:
        if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in KEYS):
            raise ValueError(f"expected lists under the keys {', '.join(KEYS)}")
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
            coco.createIndex()
        return coco
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise CorruptFileError(
            f"{path}: not a COCO instances file ({type(error).__name__}: {error}). "
            "Replace it by the original."
        ) from error


def _read_file(
    spec: DatasetSpec, split: str, path: Path
) -> tuple[dict[int, str], list[Sample], dict[str, Any]]:
    """Category names, the samples with exactly two categories, and counts."""
    coco = _open_coco(path)
    try:
        categories = _categories(coco.dataset["categories"])
        together: dict[str, set[int]] = {}  # file -> its categories under all of its ids
        twice = [number for number, n in Counter(i["id"] for i in coco.dataset["images"]).items() if n > 1]
        if twice:
            raise ValueError(f"image {twice[0]} is listed twice")
        for image in coco.dataset["images"]:
            present = {
                whole_number(a["category_id"])
                for a in coco.imgToAnns.get(image["id"], ())
                if spec.pairs.crowd == "count" or not a.get("iscrowd", 0)
            }
            whole_number(image["id"])
            if unknown := sorted(present - categories.keys()):
                raise ValueError(f"image {image['id']} has category {unknown[0]}, which is not declared")
            file = PurePosixPath(check_file(image["file_name"])).as_posix()
            together.setdefault(file, set()).update(present)
        samples: list[Sample] = []
        sizes: Counter[int] = Counter()
        for file, present in together.items():
            sizes[min(len(present), 3)] += 1
            if len(present) == 2:
                labels = np.array(sorted(present), dtype=np.int32) - 1
                samples.append((f"{split}/{stem(file)}", f"{split}/{file}", labels))
        known = {image["id"] for image in coco.dataset["images"]}
        strays = sum(len(found) for image, found in coco.imgToAnns.items() if image not in known)
        crowds = sum(1 for a in coco.dataset["annotations"] if a.get("iscrowd", 0))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not a COCO instances file ({error})") from error
    if strays:
        _log.warning("%s: %d annotations belong to images that are not listed; passed over", path, strays)
    counts = {"images": sum(sizes.values()), "without_annotations": sizes[0], "one_category": sizes[1],
              "two_categories": sizes[2], "more": sizes[3], "crowd_regions": crowds}  # fmt: skip
    if more := len(coco.dataset["images"]) - len(together):
        _log.warning(
            "%s: %d photographs stand there under several ids; their categories are joined", path, more
        )
        counts["further_ids"] = more
    return categories, samples, counts


def _categories(listed: list[dict[str, Any]]) -> dict[int, str]:
    """Name of every category id. Raises LookupError, TypeError or ValueError for what is no such list."""
    found: dict[int, str] = {}
    for entry in listed:
        number, name = whole_number(entry["id"]), entry["name"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"category {number} has no name")
        if found.setdefault(number, name) != name:
            raise ValueError(f"category {number} is {shown(found[number])} and {shown(name)}")
    return found


def _columns(spec: DatasetSpec, names: dict[int, str]) -> tuple[str, ...]:
    """Name of every column of the target: column = category id - 1; ids that are not used get a stand-in."""
    if not names:
        raise CorruptFileError(f"dataset {spec.name}: the annotation files declare no categories")
    largest = max(names)
    columns = spec.pairs.columns or largest
    if min(names) < 1 or largest > columns:
        raise UsageError(
            f"dataset {spec.name}: category ids reach from {min(names)} to {largest}, but pairs.columns "
            f"asks for 1 to {columns}"
        )
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise CorruptFileError(f"dataset {spec.name}: several categories are called {few(twice)}")
    return tuple(names.get(i, f"(unused {i})") for i in range(1, columns + 1))


def _pair(sample: Sample, classes: Sequence[str]) -> Pair:
    a, b = sorted(classes[c] for c in sample[2].tolist())
    return a, b


def _divide(
    spec: DatasetSpec, pool: dict[str, list[Sample]], classes: Sequence[str]
) -> tuple[PairSplit, dict[str, list[Sample]]]:
    everything = [sample for samples in pool.values() for sample in samples]
    pairs = [_pair(sample, classes) for sample in everything]
    divided = pair_disjoint(Counter(pairs), spec.pairs.val_share, seed=spec.pairs.seed)
    if not divided.val:
        raise CorruptFileError(
            f"dataset {spec.name}: {len(everything)} images have exactly two categories, and their "
            f"{len(set(pairs))} pairs cannot be divided so that a category is on both sides. "
            "More images are needed."
        )
    splits: dict[str, list[Sample]] = {"train": [], "val": []}
    for sample, pair in zip(everything, pairs, strict=True):
        side = "val" if pair in divided.val else "train" if pair in divided.train else None
        if side is not None and (spec.pairs.pool or sample[0].startswith(f"{side}/")):
            splits[side].append(sample)
    return divided, splits


def _say_what_was_lost(spec: DatasetSpec, notes: dict[str, Any]) -> None:
    """Warn when few pairs force a split that is not what the recipe asks for."""
    if abs(notes["val_share"] - notes["target_val_share"]) > FAR and spec.pairs.pool:
        _log.warning(
            "%s: val has %.0f %% of the images (%d of %d pairs) instead of %.0f %%: no split of these pairs "
            "was found that comes nearer and keeps every category on both sides",
            *(spec.name, 100 * notes["val_share"], notes["pairs"]["val"], sum(notes["pairs"].values())),
            100 * notes["target_val_share"],
        )
    if notes["dropped_images"]:
        _log.warning(
            "%s: %d categories cannot be on both sides and are dropped with %d images: %s",
            *(spec.name, len(notes["dropped_categories"]), notes["dropped_images"]),
            few(notes["dropped_categories"]),
        )


def _pair_notes(
    divided: PairSplit,
    splits: dict[str, list[Sample]],
    pool: dict[str, list[Sample]],
    classes: Sequence[str],
) -> dict[str, Any]:
    kept = {classes[c] for samples in splits.values() for sample in samples for c in sample[2].tolist()}
    total = sum(map(len, splits.values()))
    everything = [sample for samples in pool.values() for sample in samples]
    return {
        "policy": "pair-disjoint",
        "images": {name: len(samples) for name, samples in splits.items()},
        "target_val_share": divided.target,
        "val_share": len(splits["val"]) / total if total else 0.0,
        "pairs": {"train": len(divided.train), "val": len(divided.val)},
        "categories": len(kept),
        "dropped_categories": divided.dropped,
        "dropped_images": sum(bool(divided.dropped.keys() & set(_pair(s, classes))) for s in everything),
    }


def _given_notes(pool: dict[str, list[Sample]]) -> dict[str, Any]:
    pairs = {name: {tuple(sample[2].tolist()) for sample in samples} for name, samples in pool.items()}
    shared = set.intersection(*pairs.values()) if pairs else set()
    return {"policy": "given", "pairs": {n: len(p) for n, p in pairs.items()}, "shared_pairs": len(shared)}
