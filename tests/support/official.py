"""What tests of official formats share: a built-in data set below a folder, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comit_bench.data.datasets import open_dataset
from comit_bench.data.split import OpenData
from comit_bench.recipes.specs import Recipe, find_datasets


def opened(name: str, root: Path, **changes: Any) -> OpenData:
    """A built-in data set below ``root``, with changes of its recipe."""
    recipe = find_datasets()[name]
    spec = recipe.spec.model_copy(update=changes)
    return open_dataset(
        Recipe(spec, recipe.path, recipe.origin), data_root=root, cache=root / "cache", progress=False
    )


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "JPEG") -> None:
    """An image file; two of other names hold other pixels, or they would be one photograph in two splits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(f"{path.parent.name}/{path.name}".encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)


def pairs_of(data: OpenData, split: str) -> list[tuple[str, ...]]:
    """The names of the classes of every image."""
    return [tuple(data.classes[c] for c in np.flatnonzero(row)) for row in data.splits[split].labels]


# (annotation file, number, categories): six pairs of four categories, three images each
COCO = [("train", n, pair) for n, pair in enumerate([[1, 2], [2, 3], [3, 4], [1, 4], [1, 3], [2, 4]] * 3, 1)]


def write_small_coco(root: Path, more: list[dict[str, Any]] = [], **files: list[Any]) -> Path:  # noqa: B006
    """MSCOCO with the images of ``COCO`` in train2017; ``more`` goes into the same annotation file."""
    base = root / "coco"
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for _, n, _ in COCO]
    regions = [(n, c) for _, n, pair in COCO for c in pair]
    for one in more:
        images.append({"id": one["id"], "file_name": one["file_name"]})
        regions += [(one["id"], c) for c in one["categories"]]
    held = {"train": (images, regions), "val": files.get("val", ([], []))}
    for split, (listed, found) in held.items():
        content = {
            "images": [{"width": 8, "height": 8, **one} for one in listed],
            "annotations": [
                {"id": i, "image_id": n, "category_id": c, "iscrowd": 0, "area": 1.0, "bbox": [0, 0, 1, 1]}
                for i, (n, c) in enumerate(found, 1)
            ],
            "categories": [{"id": i, "name": f"thing {i}"} for i in range(1, 5)],
        }
        path = base / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        (base / f"{split}2017").mkdir(exist_ok=True)
        for one in listed:
            if not (base / f"{split}2017" / one["file_name"]).exists():
                picture(base / f"{split}2017" / one["file_name"])
    return base


def write_small_vg(root: Path, count: int = 40) -> Path:
    """Visual Genome with one relation per image."""
    base = root / "visual-genome"
    end = {"x": 0, "y": 0, "w": 50, "h": 50}
    images, relationships = [], []
    for n in range(1, count + 1):
        place = "VG_100K" if n % 2 else "VG_100K_2"
        picture(base / place / f"{n}.jpg")
        images.append({"image_id": n, "width": 100, "height": 100, "url": f"https://x/{place}/{n}.jpg"})
        relation = {"predicate": "on", "subject": {**end, "name": "a"}, "object": {**end, "name": "b"}}
        relationships.append({"image_id": n, "relationships": [relation]})
    (base / "image_data.json").write_text(json.dumps(images))
    (base / "relationships.json").write_text(json.dumps(relationships))
    return base
