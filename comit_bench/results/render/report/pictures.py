"""Thumbnails of the images behind outcomes: from the data set on this machine, as a tokenizer sees them."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from comit_bench.data.datasets import open_dataset
from comit_bench.data.images import load_from, mask_of
from comit_bench.data.split import OpenData, Split
from comit_bench.errors import BenchError
from comit_bench.files import cache_root
from comit_bench.recipes.specs import Recipe, TaskSpec, find_datasets, find_tasks
from comit_bench.results.notation import one_line
from comit_bench.results.schema import Record

SIDE = 160  # pixels of a thumbnail at most
QUALITY = 82
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Images of one split, by the ids of outcomes.

    Attributes:
        data: The opened data set.
        split: The one that was reported on.
        places: Id -> position in the split.
    """

    data: OpenData
    split: Split
    places: dict[str, int]

    def find(self, name: str) -> int | None:
        """Position of the image that an outcome is of; several outcomes of one image end in ``#number``."""
        plain = self.places.get(name, self.places.get(name.rpartition("#")[0]))
        return plain if plain is not None else self.places.get(f"original/{name}")

    def thumbnail(self, place: int, preprocessing: str) -> str:
        """A ``data:`` URI, at most ``SIDE`` pixels wide; empty when the file cannot be read."""
        try:
            pixels = load_from(self.split.paths, place, preprocessing)
        except BenchError as error:
            _log.warning("%s It is left out of the report.", error)
            return ""
        return _encoded(pixels.transpose(1, 2, 0))

    def mask(self, place: int, preprocessing: str) -> str:
        """The same of the mask of the salient object; empty where there is none."""
        if self.data.kind != "masks":
            return ""
        try:
            found, _ = mask_of(self.split.paths[place], self.split.labels[place], preprocessing)
        except BenchError:
            return ""
        return _encoded(found.astype(np.uint8) * np.uint8(255))

    def truth(self, name: str, place: int) -> str:
        """The labels of an image in words; empty where they are no words, or are not asked for."""
        labels = self.split.labels
        if not isinstance(labels, np.ndarray) or name not in self.places:
            return ""
        if labels.ndim == 1:
            return self.data.classes[int(labels[place])]
        return ", ".join(self.data.classes[i] for i in np.flatnonzero(labels[place]).tolist())


def _encoded(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.size[0] > SIDE:
        image = image.resize((SIDE, SIDE), Resampling.LANCZOS)
    out = BytesIO()
    image.save(out, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


class Pictures:
    """Data sets of records, each opened once, when its first image is asked for.

    Args:
        data_root: Where real data sets lie.
        cache: Where embedded ones are made; None: the cache directory.
        progress: Show progress bars.
    """

    def __init__(
        self, *, data_root: Path | None = None, cache: Path | None = None, progress: bool = False
    ) -> None:
        self.data_root, self.cache, self.progress = data_root, cache, progress
        self._opened: dict[str, OpenData | str] = {}

    @cached_property
    def _recipes(self) -> dict[str, Recipe[TaskSpec]]:
        return find_tasks()

    def source(self, record: Record) -> Source | str:
        """The images that a record was reported on, or why they cannot be shown."""
        told = record.task.dataset
        name = one_line(told.name)
        if name not in self._opened:
            self._opened[name] = self._open(name)
        data = self._opened[name]
        if isinstance(data, str):
            return data
        if told.fingerprint != data.fingerprint:
            return f"the images of {name} on this machine are not those that were measured"
        recipe = self._recipes.get(record.task.name)
        split = data.splits.get(recipe.spec.split.report if recipe else "val")
        if split is None:
            return f"{name} has no split that {one_line(record.task.name)} was reported on"
        return Source(data, split, {one: place for place, one in enumerate(split.ids)})

    def _open(self, name: str) -> OpenData | str:
        recipe = find_datasets().get(name)
        if recipe is None:
            return f"no recipe for the data set {name} is known here"
        try:
            return open_dataset(
                recipe, data_root=self.data_root, cache=self.cache or cache_root(), progress=self.progress
            )
        except BenchError as error:
            return f"the images of {name} are not at hand ({one_line(str(error))[:200]})"


class NoPictures(Pictures):
    """Of a report without images."""

    def source(self, record: Record) -> Source | str:
        """Why there are none."""
        return "images were left out (--no-images)"


def preprocessing_of(records: Sequence[Record]) -> str:
    """The preprocessing that most tokenizers of these records declare; empty when none does."""
    counts: dict[str, int] = {}
    for record in records:
        side: Any = record.tokenizer_protocol.get("preprocessing")
        if isinstance(side, str):
            counts[side] = counts.get(side, 0) + 1 + 1000 * (record.tokenizer.kind == "learned")
    return max(counts, key=lambda text: (counts[text], text)) if counts else ""
