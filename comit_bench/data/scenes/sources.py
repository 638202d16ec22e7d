"""Raw material of the embedded scenes: digits as smooth fields, exemplar pools, photographs.

Both come with scikit-learn. Digits that people misread are left out, 1,594 of 1,797 stay: those that
resemble another digit (one of their eight nearest neighbours is one) and filled blocks. The rest is
divided 70/30 per digit between train and val, in the same way for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_TRAIN_SHARE = 0.7
FINE = 4  # the digit fields are kept at 4 samples per original pixel
_PAD = 2  # empty original pixels around a digit
EDGE = 0.42  # field value at the painted outline
_FILLED = 0.75  # more ink than this in a wide box is a block, not a digit
_FRIENDS = 8  # an exemplar is used only if so many nearest neighbours are all of its digit


@dataclass(frozen=True)
class Sources:
    """The raw material.

    Attributes:
        fields: [1797, 48, 48] digits as smooth fields, 0 to about 1, four samples per pixel.
        ink: [1797, 4] extent of each digit in a field: x, y, width, height.
        digits: [1797] labels.
        pools: split -> digit -> exemplar numbers, ascending; the splits share none.
        sums: per photograph [rows + 1, columns + 1, 3] running sums over rows and columns.
    """

    fields: Floats
    ink: Floats
    digits: Ints
    pools: dict[str, tuple[Ints, ...]]
    sums: tuple[Ints, ...]


def uniforms(key: Sequence[int], indices: Sequence[int], words: int) -> NDArray[np.float64]:
    """[len(indices), words] numbers in [0, 1) from raw generator output."""
    raw = np.empty((len(indices), words), np.uint64)
    for row, index in enumerate(indices):
        raw[row] = np.random.PCG64(np.random.SeedSequence([*key, int(index)])).random_raw(words)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _refine(digits: Floats) -> Floats:
    """Catmull-Rom interpolation to four samples per pixel; all weights are dyadic, so it is exact."""
    padded = np.pad(digits, ((0, 0), (_PAD, _PAD), (_PAD, _PAD)))
    for axis in (1, 2):
        moved = np.moveaxis(padded, axis, -1)
        wide = np.pad(moved, ((0, 0), (0, 0), (2, 2)))
        length = moved.shape[-1]
        fine = np.zeros((*moved.shape[:-1], length * FINE), np.float32)
        for phase in range(FINE):
            offset = (phase + 0.5) / FINE - 0.5
            first, t = (1, offset) if offset >= 0 else (0, offset + 1.0)
            weights = (
                -0.5 * t + t * t - 0.5 * t * t * t,
                1.0 - 2.5 * t * t + 1.5 * t * t * t,
                0.5 * t + 2.0 * t * t - 1.5 * t * t * t,
                -0.5 * t * t + 0.5 * t * t * t,
            )
            for tap, weight in enumerate(weights):
                fine[..., phase::FINE] += np.float32(weight) * wide[..., first + tap : first + tap + length]
        padded = np.moveaxis(fine, -1, axis)
    return np.ascontiguousarray(padded)


def _extent(field: Floats) -> tuple[int, int, int, int]:
    rows = np.flatnonzero((field >= EDGE).any(axis=1))
    columns = np.flatnonzero((field >= EDGE).any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _blocks(fields: Floats, ink: Floats) -> NDArray[np.bool_]:
    """True for exemplars without a shape: wide ones that fill most of the box around them."""
    filled = (fields >= EDGE).sum(axis=(1, 2)) / (ink[:, 2] * ink[:, 3])
    blocks: NDArray[np.bool_] = (filled > _FILLED) & (2 * ink[:, 2] >= ink[:, 3])
    return blocks


def _distinct(images: Ints, digits: Ints) -> NDArray[np.bool_]:
    """False for the exemplars that look like another digit: some near neighbour is one."""
    flat = images.reshape(len(images), -1)
    distinct = np.empty(len(flat), bool)
    for number, image in enumerate(flat):
        distance = ((flat - image) ** 2).sum(axis=1)
        distance[number] = distance.max() + 1
        nearest = np.argsort(distance, kind="stable")[:_FRIENDS]
        distinct[number] = bool((digits[nearest] == digits[number]).all())
    return distinct


def _pools(legible: NDArray[np.bool_], digits: Ints) -> dict[str, tuple[Ints, ...]]:
    """Divide the legible exemplars of each digit 70/30, in an order that no seed changes."""
    order = uniforms((1797,), range(len(digits)), 1)[:, 0]
    train, val = [], []
    for digit in range(10):
        members = np.flatnonzero((digits == digit) & legible)
        members = members[np.argsort(order[members], kind="stable")]
        cut = int(len(members) * _TRAIN_SHARE)
        train.append(np.sort(members[:cut]))
        val.append(np.sort(members[cut:]))
    return {"train": tuple(train), "val": tuple(val)}


@lru_cache(maxsize=1)
def load_sources() -> Sources:
    """Read scikit-learn's digits and photographs and prepare them for painting."""
    from sklearn.datasets import load_digits, load_sample_images

    data = load_digits()
    fields = _refine((data.images / 16.0).astype(np.float32))
    digits = data.target.astype(np.int64)
    sums = []
    for photo in load_sample_images().images:
        total = np.zeros((photo.shape[0] + 1, photo.shape[1] + 1, 3), np.int64)
        total[1:, 1:] = photo.astype(np.int64).cumsum(axis=0).cumsum(axis=1)
        sums.append(total)
    ink = np.array([_extent(field) for field in fields], np.float32)
    legible = _distinct(data.images.astype(np.int64), digits) & ~_blocks(fields, ink)
    return Sources(fields, ink, digits, _pools(legible, digits), tuple(sums))
