"""Scenes of drawings to train on: one to three things anywhere, painted once and then read from a file.

``<cache>/training-scenes/<digest>/`` holds ``images.npy``, uint8 [n, 3, S, S], which is mapped into memory
and not read, and ``concepts.npy``, int64 [n]: what a scene with one thing shows, -1 for any other. The digest
is that of ``key.json`` beside them: the settings, the atlas and the first scenes as the painter paints them
now, so that other drawings or another painter never meet an old file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from comit_bench.data.scenes.atlas import load_drawings
from comit_bench.data.scenes.painting import Scenes, paint
from comit_bench.data.workers import read_ahead
from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.files import atomic_path, cache_root, digest_json, locked, require_room
from comit_bench.recipes.specs import GeneratorSpec

AT_ONCE = 500
PROOF = 8  # scenes in the key


def paint_drawings(
    split: str, start: int, count: int, side: int, *, seed: int = 0, progress: bool = False, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, 3, S, S] and concepts int64 [count], from the file where there is one.

    Args:
        split: ``train`` or ``val``: their vendors and photographs are disjoint.
        start: First number.
        count: How many.
        side: Pixels, as the painter allows.
        seed: Of the world, not of a training: all trainings see the same scenes.
        progress: Show a bar while painting.
        workers: Processes that paint; 0 is this one.

    Raises:
        UsageError: Another split, or a side that cannot be painted.
        BenchError: No room.
        CorruptFileError: The file is not whole.
    """
    if split not in ("train", "val"):
        raise UsageError(f"data.split {split!r}: drawings have the splits train and val")
    spec = GeneratorSpec(name="drawings", layout="mixture", image_size=side, seed=seed)
    first = _paint(spec, split, range(start, start + PROOF)).images
    key = {
        "generator": spec.model_dump(mode="json", exclude={"train", "val"}),
        "split": split,
        "start": start,
        "count": count,
        "atlas": load_drawings().digest,
        "first": hashlib.sha256(first.tobytes()).hexdigest(),
    }
    folder = cache_root() / "training-scenes" / digest_json(key).removeprefix("sha256:")
    with locked(folder.with_suffix(".lock"), "painting these scenes"):
        if not folder.is_dir():
            _make(folder, spec, key, progress, workers)
    try:
        images, concepts = (np.load(folder / name, mmap_mode="c") for name in ("images.npy", "concepts.npy"))
        if images.shape != (count, 3, side, side) or concepts.shape != (count,):
            raise ValueError(f"it holds {images.shape} and {concepts.shape}")
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{folder}: not the painted scenes ({error}). Remove this folder.") from error
    return torch.from_numpy(images), torch.from_numpy(concepts)


def _paint(spec: GeneratorSpec, split: Any, rows: range) -> Scenes:
    return paint(spec, split, rows)


class _Parts:
    """Parts of ``AT_ONCE`` scenes by their first number."""

    def __init__(self, spec: GeneratorSpec, key: dict[str, Any]) -> None:
        self.spec, self.key = spec, key

    def __getitem__(self, first: int) -> tuple[int, Tensor, Tensor]:
        start, last = self.key["start"], min(first + AT_ONCE, self.key["count"])
        scenes = _paint(self.spec, self.key["split"], range(start + first, start + last))
        alone = (scenes.boxes[..., 2] > 0).sum(axis=1) == 1
        concepts = np.where(alone, scenes.concepts[:, 0], -1)
        return first, torch.from_numpy(scenes.images.transpose(0, 3, 1, 2)), torch.from_numpy(concepts)


def _make(folder: Path, spec: GeneratorSpec, key: dict[str, Any], progress: bool, workers: int) -> None:
    """Paint everything into the folder, which appears when it is whole."""
    count, side = key["count"], spec.image_size
    require_room(folder.parent, count * 3 * side**2, f"data.count={count}: the painted scenes need")
    with (
        atomic_path(folder, durable=False) as temporary,
        tqdm(total=count, desc="painting", unit="img", disable=not progress) as bar,
    ):
        temporary.mkdir()
        shape = (count, 3, side, side)
        images = np.lib.format.open_memmap(temporary / "images.npy", "w+", np.uint8, shape)
        concepts = np.full(count, -1, np.int64)
        for first, pixels, shown in read_ahead(_Parts(spec, key), range(0, count, AT_ONCE), workers):
            rows = slice(first, first + len(shown))
            images[rows], concepts[rows] = pixels.numpy(), shown.numpy()
            bar.update(len(shown))
        images.flush()
        np.save(temporary / "concepts.npy", concepts)
        (temporary / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
