"""What tests of official formats share: a built-in data set below a folder, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comit_bench.data.datasets import OpenData, open_dataset
from comit_bench.recipes import Recipe, find_datasets


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
