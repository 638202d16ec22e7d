"""Training images: where they come from, in which order, and what happens to broken ones.

The order is a function of (seed, epoch) and nothing else: position ``p`` of the endless stream of
samples belongs to epoch ``p // n`` and is entry ``p % n`` of that epoch's permutation; optimizer step
``s`` takes positions ``s * global_batch`` and following, and rank ``r`` of ``R`` the r-th of R equal
parts. So a run continues from its step number alone, and the number of ranks changes nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.data.folders import walk_images
from comit_bench.data.images import load_image
from comit_bench.data.readers.common import EXTENSIONS
from comit_bench.data.scenes.digits import Scenes, paint
from comit_bench.data.split import PathList
from comit_bench.data.workers import read_ahead
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import user_path
from comit_bench.nn.teachers import TeacherFeatures
from comit_bench.recipes.specs import GeneratorSpec
from comit_bench.seeding import generator_for
from comit_bench.train.config import TrainConfig
from comit_bench.train.drawings import paint_drawings
from comit_bench.train.sampling import TrainPlan, flips, plan_step
from comit_bench.train.sources import (
    hold_out,
    open_hf,
    open_webdataset,
    recipe_for,
    shuffled,
    split_folders,
)

_log = logging.getLogger(__name__)
PROBE_VAL_SCENES = 1000  # of the recognition recipe; validation here starts after them
PAINTED_AT_ONCE = 1000
TRIES = 1000  # broken images in a row before we give up


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 -> [-1, 1] float32 on the device, as COMiT's adapter does it."""
    return images.to(device, non_blocking=True).float().div(255).sub(0.5).div(0.5)


class Images(Protocol):
    """A list of square images."""

    @property
    def ids(self) -> Sequence[str]:
        """Unique names."""

    def read(self, index: int) -> Tensor:
        """uint8 [3, S, S]. Raises CorruptFileError when the file is broken."""


@dataclass(frozen=True, slots=True, eq=False)
class MemoryImages:
    """Images uint8 [n, 3, S, S] that are held in one tensor, with classes int64 [n] (-1: none) if known."""

    ids: tuple[str, ...]
    images: Tensor
    labels: Tensor | None = None

    def read(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True, slots=True, eq=False)
class FolderImages:
    """Image files below a directory; the id is the path below it."""

    root: Path
    ids: tuple[str, ...]
    recipe: str

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(load_image(PathList(self.root, self.ids)[index], self.recipe))


def paint_scenes(split: str, start: int, count: int, side: int) -> MemoryImages:
    """Single-object scenes of the recognition layout, painted in memory.

    Args:
        split: ``train`` or ``val``: their digits and photographs are disjoint.
        start: First number; images 0 to 3999 of ``train`` are those of the recognition recipe.
        count: How many.
        side: Pixels.
    """
    if split not in ("train", "val"):
        raise UsageError(f"data.split {split!r}: scenes have the splits train and val")
    if not 16 <= side <= 256:
        raise UsageError(f"scenes are 16 to 256 pixels wide, but the model takes images of {side} px")
    parts = list(painted("recognition", split, start, count, side))
    images = channels_first([part.images for part in parts])
    labels = torch.from_numpy(np.concatenate([part.digits[:, 0] for part in parts])).long()
    return MemoryImages(tuple(f"scenes/{split}/{i:06d}" for i in range(start, start + count)), images, labels)


def painted_drawings(split: str, start: int, count: int, side: int) -> MemoryImages:
    """Scenes of drawings, labelled with the concept of their only thing; raises as :func:`paint_drawings`."""
    images, concepts = paint_drawings(split, start, count, side, progress=sys.stderr.isatty())
    names = tuple(f"drawings/{split}/{i:07d}" for i in range(start, start + count))
    return MemoryImages(names, images, concepts)


def painted(layout: Any, split: Any, start: int, count: int, side: int) -> Iterator[Scenes]:
    """Scenes of a layout, some at a time."""
    spec = GeneratorSpec(layout=layout, image_size=side)
    for first in range(start, start + count, PAINTED_AT_ONCE):
        yield paint(spec, split, range(first, min(first + PAINTED_AT_ONCE, start + count)))


def channels_first(parts: Sequence[NDArray[np.uint8]]) -> Tensor:
    """[n, S, S, 3] each -> [all, 3, S, S]."""
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()


def list_images(root: Path) -> tuple[str, ...]:
    """Paths of all image files below ``root``, relative to it and sorted."""
    if not root.is_dir():
        raise MissingError(
            f"data.source {root}: no such directory. Give data.source=DIR with images below it."
        )
    found, odd = walk_images(root, EXTENSIONS, follow=True)
    for name, what in odd.items():
        _log.warning("%s: this is %s, no image; left out", root / name, what)
    if not found:
        raise UsageError(
            f"data.source {root}: no image below it (looked for {', '.join(sorted(EXTENSIONS))})"
        )
    return tuple(sorted(found))


def _more_than_one_class(root: Path, names: Sequence[str]) -> None:
    """Class folders must be several; images without any folder are a set without classes, and fine."""
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) == 1 and (only := folders.pop()):
        raise UsageError(
            f"data.source {root}: all images lie in one class folder, {only}/. Are the other classes "
            f"missing? To train on these images all the same, give data.source={root / only}"
        )


def _folders(config: TrainConfig, side: int) -> tuple[Images, Images]:
    """Train and validation images of a directory, with its split folders or held out by a hash."""
    data = config.data
    root = user_path(str(data.source), "data.source")
    recipe = recipe_for(side)
    inner, held = split_folders(data, root)
    if inner.is_dir() and held.is_dir():
        names = shuffled([f"{data.val_split}/{name}" for name in list_images(held)])[: data.val_count]
        inside = list_images(inner)
        _more_than_one_class(inner, inside)
        train = tuple(f"{data.split}/{name}" for name in inside)
    else:
        every = list_images(root)
        _more_than_one_class(root, every)
        train, names = hold_out(every, data.val_count, root)
    return FolderImages(root, train, recipe), FolderImages(root, tuple(names), recipe)


def open_images(config: TrainConfig) -> tuple[Images, Images]:
    """Training and validation images.

    Scenes for validation are ones that no probe uses; drawings have one to three things and, in validation,
    the hands of other vendors. A directory with the split folders
    ``data.split`` and ``data.val_split`` is read that way; from any other tree, ``data.val_count``
    images (at most a tenth), chosen by a hash of their names, are held out. For the kinds ``hf`` and
    ``webdataset`` see ``comit_bench.train.sources``.

    Raises:
        MissingError: No such directory, file, repository or library.
        UsageError: No images, or settings that do not fit them.
        CorruptFileError: A shard or table that cannot be read.
    """
    side = config.model.spec().image_size
    if config.data.kind == "class-folders":
        return _folders(config, side)
    if config.data.kind == "hf":
        return open_hf(config.data, side)
    if config.data.kind == "webdataset":
        return open_webdataset(config.data, side)
    data = config.data
    if config.data.kind == "drawings":
        train = painted_drawings(data.split, 0, data.count, side)
        return train, painted_drawings(
            data.val_split, data.count if data.val_split == data.split else 0, data.val_count, side
        )
    train = paint_scenes(data.split, 0, data.count, side)
    val_start = PROBE_VAL_SCENES if data.val_split == "val" else data.count
    return train, in_other_order(paint_scenes(data.val_split, val_start, data.val_count, side))


def in_other_order(held: MemoryImages) -> MemoryImages:
    """The same images in an order without classes."""
    places = {name: i for i, name in enumerate(held.ids)}
    rows = torch.tensor([places[name] for name in shuffled(held.ids)])
    labels = None if held.labels is None else held.labels[rows]
    return MemoryImages(tuple(held.ids[row] for row in rows.tolist()), held.images[rows], labels)


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Images [B, 3, S, S], those that are chosen [B, on the CPU] left to right."""
    if not bool(chosen.any()):
        return images
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


def read_all(source: Images) -> MemoryImages:
    """Read every image; broken ones are named in the log and left out."""
    if isinstance(source, MemoryImages):
        return source
    images, ids = [], []
    for index, name in enumerate(source.ids):
        try:
            images.append(source.read(index))
            ids.append(name)
        except CorruptFileError as error:
            _log.warning("validation image left out: %s", error)
    if not images:
        raise BenchError("none of the validation images can be read")
    return MemoryImages(tuple(ids), torch.stack(images))


class Order:
    """Which image stands where in the endless stream (see the module's docstring)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._kept: dict[int, Tensor] = {}  # permutations of the last two epochs

    def places(self, step: int, batch: int) -> Tensor:
        """Places of a step's global batch in the stream, int64 [batch]."""
        return torch.arange(step * batch, (step + 1) * batch)

    def numbers(self, places: Tensor, shift: int = 0) -> Tensor:
        """The images at some places, or ``shift`` places later in the same epoch (going round)."""
        epochs, positions = places // self.count, (places + shift) % self.count
        numbers = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            numbers[here] = self._permutation(epoch)[positions[here]]
        return numbers

    def samples(self, places: Tensor) -> Tensor:
        """What stands at some places, as numbers of their own: ``epoch * images + number``."""
        return places // self.count * self.count + self.numbers(places)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._kept:
            if len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            generator = generator_for(self.seed, f"order/{epoch}")
            self._kept[epoch] = torch.randperm(self.count, generator=generator)
        return self._kept[epoch]


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """One rank's part of a step.

    Attributes:
        step: Zero-based.
        ids: One per sample, ``<image id>@<epoch>``: unique, also when the data are fewer than a batch.
        images: uint8 [B, 3, S, S]; a broken image is replaced by the next one of the epoch.
        plan: Crops, times and noise, one entry per sample.
        broken: Image id -> message.
        features: Of the teacher, from the cache; None without one.
    """

    step: int
    ids: tuple[str, ...]
    images: Tensor
    plan: TrainPlan
    broken: dict[str, str]
    features: TeacherFeatures | None = None

    def pin_memory(self) -> TrainBatch:
        """Called by the loader for a GPU."""
        features = self.features
        if features is not None:
            features = TeacherFeatures(features.cls.pin_memory(), features.patches.pin_memory())
        return replace(self, images=self.images.pin_memory(), features=features)


class Steps:
    """Map-style data set whose item ``step`` is this rank's :class:`TrainBatch`; errors come as values.

    Images are read as they are or mirrored (``data.flip``), so what only depends on an image can be kept:
    ``features``, when set, gives the teacher's features, float32 on the CPU, of images by their numbers, and
    of mirrored images by the numbers after these. With ``device`` images in memory are moved there once, and
    noise is drawn there.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: Images,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.config, self.source, self.device = config, source, device
        self.pixels: Tensor | None = None
        if isinstance(source, MemoryImages):
            self.pixels = source.images if device is None else source.images.to(device)
        self.features: Callable[[Tensor], TeacherFeatures] | None = None
        self.order = Order(len(source.ids), config.seed)
        part = config.global_batch // ranks
        self.part = slice(rank * part, (rank + 1) * part)

    def __len__(self) -> int:
        return self.config.steps

    def samples(self, step: int) -> Tensor:
        """Samples (an image in an epoch each) of the whole global batch, all ranks: int64 [global_batch]."""
        return self.order.samples(self.order.places(step, self.config.global_batch))

    def global_ids(self, step: int) -> list[str]:
        """Ids of the samples of the whole global batch."""
        return self._ids(self.samples(step))

    def _ids(self, samples: Tensor) -> list[str]:
        count, names = self.order.count, self.source.ids
        return [f"{names[sample % count]}@{sample // count}" for sample in samples.tolist()]

    def _read(self, places: Tensor, broken: dict[str, str]) -> tuple[Tensor, Tensor]:
        """Numbers [B] and pixels [B, 3, S, S] of the images at some places, or of those after broken ones."""
        numbers = self.order.numbers(places)
        if self.pixels is not None:
            return numbers, self.pixels[numbers.to(self.pixels.device)]
        images = []
        for row, place in enumerate(places):
            numbers[row], image = self._read_one(place[None], broken)
            images.append(image)
        return numbers, torch.stack(images)

    def _read_one(self, place: Tensor, broken: dict[str, str]) -> tuple[int, Tensor]:
        for shift in range(min(TRIES, self.order.count)):
            index = int(self.order.numbers(place, shift))
            try:
                return index, self.source.read(index)
            except CorruptFileError as error:
                broken[self.source.ids[index]] = str(error)
        raise BenchError(f"{len(broken)} broken images in a row, the last: {list(broken.values())[-1]}")

    def __getitem__(self, step: int) -> TrainBatch | BenchError:
        places = self.order.places(step, self.config.global_batch)[self.part]
        samples = self.samples(step)[self.part]
        broken: dict[str, str] = {}
        try:
            numbers, images = self._read(places, broken)
            mirrored = flips(self.config.seed, samples, self.config.data.flip)
            images = mirror(images, mirrored)
            features = None if self.features is None else self.features(numbers + mirrored * self.order.count)
            plan = plan_step(self.config, step=step, samples=samples, device=self.device)
            return TrainBatch(step, tuple(self._ids(samples)), images, plan, broken, features)
        except BenchError as error:
            return error


class StepSource(Protocol):
    """A map-style data set whose item ``step`` is a batch, with its number and its broken images."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Any: ...

    def global_ids(self, step: int) -> Sequence[str]: ...


def iterate_steps(steps: StepSource, start: int, *, workers: int, pin: bool) -> Iterator[Any]:
    """Batches from step ``start`` to the last one; with workers they are made ahead of time.

    Raises:
        BenchError: A file vanished or cannot be read, or a worker does not answer.
    """
    for item in read_ahead(steps, range(start, len(steps)), workers, pin=pin):
        if isinstance(item, BenchError):
            raise item
        yield item


class Broken:
    """Counts distinct broken images and stops when they are too many."""

    def __init__(self, total: int, share: float) -> None:
        self.total, self.share = total, share
        self.seen: set[str] = set()

    def add(self, broken: dict[str, str]) -> None:
        """Name new ones in the log."""
        for name in broken.keys() - self.seen:
            _log.warning("broken image, replaced by the next: %s", broken[name])
        self.seen |= broken.keys()
        if len(self.seen) > self.share * self.total:
            some = ", ".join(sorted(self.seen)[:5])
            raise BenchError(
                f"{len(self.seen)} of {self.total} training images are broken ({some}, …), more than "
                f"data.max_broken = {self.share}. Mend or remove them, or raise data.max_broken."
            )
