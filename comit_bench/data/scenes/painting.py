"""Painting of the embedded scenes: drawings of things on crops of photographs.

What goes in is the atlas that ships with the package (:mod:`comit_bench.data.scenes.atlas`). What comes
out is decided by :class:`~comit_bench.recipes.specs.GeneratorSpec` alone, to the last bit:

* Each image has its own random numbers, keyed by (seed, layout, split, index): raw PCG64 words, whose
  streams NumPy guarantees, so chunk size, order and processes do not matter.
* A drawing is scaled by areas: a target pixel is the mean of what it covers. In units of 1/T of an atlas
  pixel all overlaps are whole numbers and all sums stay below 2^24, so matrix products in float32
  are exact, in whatever order a machine adds.
* All other arithmetic on pixels is one IEEE 754 operation at a time; means are taken of whole numbers.

Vendors of drawings and photographs belong to one split each, so train and val share neither. Objects lie
whole in the image, and far enough from each other that the halo of one ends before that of the next.

Shapes: ``n`` images, ``o`` objects per image, ``S`` image side, ``T`` side of an object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comit_bench.data.scenes.atlas import Drawings, load_drawings
from comit_bench.data.scenes.sources import uniforms
from comit_bench.errors import UsageError
from comit_bench.recipes.specs import GeneratorSpec

Floats = NDArray[np.float32]
Floats64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
SplitName = Literal["train", "val"]

SIDES = (32, 96)  # image sides that can be painted: photographs are 115 pixels wide or more
CELL = 64  # side of a drawing in the atlas
# Turns of the hue in degrees, and the first row of the matrix of each, in 256ths; the others are its cycles.
HUES: dict[int, tuple[int, int, int]] = {
    -20: (245, 56, -45),
    -10: (253, 27, -24),
    0: (256, 0, 0),
    10: (253, -24, 27),
    20: (245, -45, 56),
}
HUE_NAMES = tuple(f"{turn:+d}" if turn else "0" for turn in HUES)
PLACES = tuple(
    f"{row} {column}" for row in ("top", "middle", "low") for column in ("left", "centre", "right")
)
_BORDERS = (11 / 32, 21 / 32)  # between the places: the middles of where the nine local crops overlap

# Longer side of an object, and distances, in 64ths of the image side.
_BIG, _CROP, _SALIENT = (50, 60), (20, 28), (24, 52)
_DIFFERENT = ((26, 30), (18, 21))  # two objects of clearly different size
_MARGIN, _GAP = 2, 4  # to the image's border, between two objects; both in whole pixels at least
_REACH = 2  # pixels that a halo reaches
_DIM = (0.45, 0.8)  # range of the factor on the photograph's brightness
_ZOOMS = 4  # a background shows every pixel, or means of 2 x 2, 3 x 3, 4 x 4
_LOW, _ENOUGH, _HALO = 20.0, 60.0, 0.85  # contrast of luminance: full halo below, none above; its strength
MOST = 4  # objects in one image

# Counterfactual: every scene is painted once per entry; "unchanged" is the original under another name.
OBJECTS = ("large", "small")
ATTRIBUTES = ("moved", "recoloured", "replaced", "redrawn", "removed")
ORIGINAL, UNCHANGED, BACKGROUND = "original", "unchanged", "background"
EDITS = (ORIGINAL, UNCHANGED, *(f"{a}_{o}" for a in ATTRIBUTES for o in OBJECTS), BACKGROUND)
_LEAP = (0.35, 0.65)  # a moved object moves by this share of its range
_CHROMA = 40  # mean difference of the largest and smallest channel from which a turned hue is plain to see

_LAYOUTS = ("recognition", "pairs", "relations", "objectness", "counterfactual", "mixture")
_SPLITS = ("train", "val")
_WORDS = 64  # random numbers per image
_WORLD = 1  # part of the key, so that the numbers are not those of other worlds
_VAL_PAIRS = 0.2  # share of the pairs of concepts that only val shows


@dataclass(frozen=True)
class Scenes:
    """Painted images with all that is known about them. What is not there is -1.

    Attributes:
        images: [n, S, S, 3] uint8.
        masks: [n, o, S, S] bool, pixels at least half covered by the object; objects never overlap.
        boxes: [n, o, 4] x, y, width, height of each mask in whole pixels; 0 without an object.
        concepts: [n, o] indices into the atlas' concepts; -1 also for drawings without a label.
        vendors: [n, o] indices into the atlas' vendors.
        drawings: [n, o] numbers of the drawings in the atlas.
        hues: [n, o] indices into ``HUE_NAMES``.
        places: [n, o] indices into ``PLACES``: where in the 3 x 3 grid of local crops a box has its centre.
        photos: [n, 4] photograph, left column, top row, side of the background crop.
    """

    images: NDArray[np.uint8]
    masks: Bools
    boxes: Ints
    concepts: Ints
    vendors: Ints
    drawings: Ints
    hues: Ints
    places: Ints
    photos: Ints

    def name(self, image: int, thing: int) -> str:
        """What is drawn, for example ``cat``; without a label what its vendor calls it."""
        known, concept = load_drawings(), int(self.concepts[image, thing])
        return known.concepts[concept] if concept >= 0 else known.names[int(self.drawings[image, thing])]


@dataclass
class _Plan:
    """What is painted where: [n, o] each, size 0 where there is no object; x and y are left and top."""

    drawing: Ints
    hue: Ints
    flip: Bools
    size: Ints
    x: Ints
    y: Ints


class _Draws:
    """Hands out one column of random numbers after the other."""

    def __init__(self, table: Floats64) -> None:
        self.rows = len(table)
        self._columns = iter(table.T)

    def below(self, count: int | Ints) -> Ints:
        number: Ints = np.floor(next(self._columns) * count).astype(np.int64)
        return number

    def within(self, span: tuple[int, int]) -> Ints:
        """Whole numbers, both ends included."""
        return span[0] + self.below(span[1] - span[0] + 1)

    def between(self, span: tuple[float, float]) -> Floats64:
        value: Floats64 = span[0] + next(self._columns) * (span[1] - span[0])
        return value

    def rest(self) -> Floats64:
        """The columns that nobody took."""
        return np.stack(list(self._columns), axis=1)


@dataclass(frozen=True)
class _World:
    """The atlas, made ready for painting one split.

    Attributes:
        drawings: As loaded.
        cells: [d, 64, 4, 64] uint8: row, channel, column.
        every: [k] all drawings of the split's vendors, labelled or not.
        pools: per concept its drawings.
        hands: [c, v] one drawing per concept and vendor, those in colour by all of the split's vendors only.
        photos: per photograph and zoom [3, h, w] uint8, means of zoom x zoom pixels.
    """

    drawings: Drawings
    cells: NDArray[np.uint8]
    every: Ints
    pools: tuple[Ints, ...]
    hands: Ints
    photos: tuple[tuple[NDArray[np.uint8], ...], ...]


@lru_cache(maxsize=1)
def _cells() -> NDArray[np.uint8]:
    return np.ascontiguousarray(load_drawings().pixels.transpose(0, 1, 3, 2))


@lru_cache(maxsize=2)
def _world(split: str) -> _World:
    drawings = load_drawings()
    vendors = [v for v, vendor in enumerate(drawings.vendors) if vendor.split == split]
    pools = tuple(drawings.pool(split, concept) for concept in range(len(drawings.concepts)))
    coloured = [pool[_chroma(drawings.pixels[pool]) >= _CHROMA] for pool in pools]
    hands = []
    for pool in coloured:
        own = [pool[drawings.vendor[pool] == vendor] for vendor in vendors]
        if all(map(len, own)):
            hands.append([one[0] for one in own])
    return _World(
        drawings,
        _cells(),
        np.flatnonzero(np.isin(drawings.vendor, vendors)),
        pools,
        np.array(hands, np.int64).reshape(-1, len(vendors)),
        tuple(_zooms(photo) for photo in drawings.photos[split]),
    )


def _chroma(pixels: NDArray[np.uint8]) -> Ints:
    """Mean over the covered area of largest minus smallest channel: [k, h, w, 4] premultiplied -> [k]."""
    colours = pixels[..., :3].astype(np.int64)
    spread = (colours.max(axis=-1) - colours.min(axis=-1)).sum(axis=(1, 2)) * 255
    return np.asarray(spread // np.maximum(pixels[..., 3].astype(np.int64).sum(axis=(1, 2)), 1), np.int64)


def _zooms(photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
    """Means of 1, 2 x 2, ... pixels, rounded, channels first."""
    found = []
    for zoom in range(1, _ZOOMS + 1):
        h, w = photo.shape[0] // zoom, photo.shape[1] // zoom
        cells = photo[: h * zoom, : w * zoom].astype(np.int64).reshape(h, zoom, w, zoom, 3).sum(axis=(1, 3))
        means = (2 * cells + zoom * zoom) // (2 * zoom * zoom)
        found.append(np.ascontiguousarray(means.astype(np.uint8).transpose(2, 0, 1)))
    return tuple(found)


def categories() -> tuple[str, ...]:
    """Names of the concepts, sorted."""
    return load_drawings().concepts


def class_name(scenes: Scenes, row: int) -> str:
    """Class folder of an image with one object."""
    return scenes.name(row, 0)


def attribute_values() -> dict[str, tuple[str, ...]]:
    """Attribute of an object -> the values that it can have."""
    return {
        "vendor": tuple(vendor.name for vendor in load_drawings().vendors),
        "place": PLACES,
        "hue": HUE_NAMES,
    }


def attributes_of(scenes: Scenes, row: int) -> list[int]:
    """Numbers of the values that an image with one object has, in the order of :func:`attribute_values`."""
    return [int(values[row, 0]) for values in (scenes.vendors, scenes.places, scenes.hues)]


def _scaled(span: tuple[int, int], side: int) -> tuple[int, int]:
    return span[0] * side // 64, span[1] * side // 64


def _distances(side: int) -> tuple[int, int]:
    """Pixels to the border and between objects: never less than halos need."""
    return max(_REACH, _MARGIN * side // 64), max(2 * _REACH, _GAP * side // 64)


def check_spec(spec: GeneratorSpec) -> None:
    """Refuse settings that cannot be painted."""
    if not SIDES[0] <= spec.image_size <= SIDES[1]:
        raise UsageError(
            f"generator.image_size = {spec.image_size}: expected {SIDES[0]} to {SIDES[1]} pixels"
        )
    if spec.variant != "default":
        raise UsageError(f"generator.variant = {spec.variant!r}: drawings have the variant 'default' only")
    if spec.seed < 0:
        raise UsageError(f"generator.seed = {spec.seed}: expected 0 or more")
    if spec.layout in ("objectness", "counterfactual") and spec.train:
        raise UsageError(
            f"generator.train = {spec.train}: the {spec.layout} set has one split only, set train to 0"
        )
    if spec.layout == "counterfactual" and spec.val % len(EDITS):
        raise UsageError(
            f"generator.val = {spec.val}: every scene is painted {len(EDITS)} times, so the set "
            f"needs a multiple of {len(EDITS)}"
        )
    if spec.objects is not None and spec.layout != "mixture":
        raise UsageError(
            f"generator.objects = {spec.objects}: only the layout 'mixture' can choose, remove it for "
            f"{spec.layout!r}"
        )
    _check_fit(spec)


def _check_fit(spec: GeneratorSpec) -> None:
    """Refuse more objects than fit: two beside each other need most of the image's side."""
    count = {"recognition": 1, "objectness": 1, "mixture": 3}.get(spec.layout, 2)
    count = count if spec.objects is None else spec.objects
    (margin, gap), widest = _distances(spec.image_size), _scaled(_CROP, spec.image_size)[1]
    if not 1 <= count <= MOST or (count > 1 and 2 * (margin + widest) + gap > spec.image_size):
        raise UsageError(
            f"generator.image_size = {spec.image_size}: {count} objects of up to {widest} px do not fit. "
            f"Take 1 to {MOST} objects, and for two and more 64 px."
        )


def pairs_of(split: str, seed: int) -> Ints:
    """The pairs of concepts that a split may show: [p, 2], concepts equally often, none shared by the splits.

    Concepts stand in a circle, in an order that the seed decides. All pairs of one distance belong together:
    each concept is in two of them. A fifth of the distances goes to val.
    """
    count = len(load_drawings().concepts)
    order = np.argsort(uniforms((seed, _WORLD, 1), range(count), 1)[:, 0], kind="stable")
    distances = np.arange(1, (count - 1) // 2 + 1)
    chosen = np.argsort(uniforms((seed, _WORLD, 2), range(len(distances)), 1)[:, 0], kind="stable")
    held = max(1, round(_VAL_PAIRS * len(distances)))
    own = distances[chosen[:held] if split == "val" else chosen[held:]]
    starts = np.arange(count)
    pairs = [np.stack([order, order[(starts + step) % count]], axis=1) for step in own.tolist()]
    if split == "train" and count % 2 == 0:  # opposite concepts: each is in one pair
        pairs.append(np.stack([order[: count // 2], order[count // 2 :]], axis=1))
    return np.concatenate(pairs)


def paint(spec: GeneratorSpec, split: SplitName, indices: Sequence[int]) -> Scenes:
    """Paint the images with these numbers; each depends on its own number only.

    Raises:
        UsageError: The settings cannot be painted.
        MissingError, CorruptFileError: The atlas is not there or not what it was.
    """
    check_spec(spec)
    world, numbers = _world(split), np.asarray(indices, np.int64)
    key = (spec.seed, _WORLD, _LAYOUTS.index(spec.layout), _SPLITS.index(split))
    if spec.layout == "counterfactual":
        draw = _Draws(uniforms(key, (numbers // len(EDITS)).tolist(), _WORDS))
        edits = numbers % len(EDITS)
        plain = _backgrounds(draw, world, spec.image_size)
        other = _backgrounds(draw, world, spec.image_size)
        swap = edits == EDITS.index(BACKGROUND)
        canvas = np.where(swap[:, None, None, None], other[0], plain[0])
        photos = np.where(swap[:, None], other[1], plain[1])
        return _render(world, _plan_edits(draw, world, spec, edits), canvas, photos)
    table = uniforms(key, numbers.tolist(), _WORDS)
    draw = _Draws(table)
    canvas, photos = _backgrounds(draw, world, spec.image_size)
    plan: Callable[..., _Plan] = _PLANS[spec.layout]
    return _render(world, plan(draw, world, spec, split, numbers), canvas, photos)


def _backgrounds(draw: _Draws, world: _World, side: int) -> tuple[Floats, Ints]:
    """Crops [n, 3, S, S] (0 to 255) of the split's photographs, darkened, and where they lie."""
    which, zoomed = draw.below(len(world.photos)), draw.between((0.0, 1.0)).tolist()
    down, along = draw.between((0.0, 1.0)).tolist(), draw.between((0.0, 1.0)).tolist()
    mirrored, dim = draw.below(2) == 1, draw.between(_DIM).astype(np.float32)
    crops = np.empty((draw.rows, 3, side, side), np.uint8)
    photos = np.empty((draw.rows, 4), np.int64)
    for row, photo in enumerate(which.tolist()):
        zooms = [z for z, level in enumerate(world.photos[photo]) if min(level.shape[1:]) >= side]
        zoom = zooms[int(zoomed[row] * len(zooms))]
        level = world.photos[photo][zoom]
        top = int(down[row] * (level.shape[1] - side + 1))
        left = int(along[row] * (level.shape[2] - side + 1))
        crops[row] = level[:, top : top + side, left : left + side]
        photos[row] = photo, left * (zoom + 1), top * (zoom + 1), side * (zoom + 1)
    crops[mirrored] = crops[mirrored][..., ::-1]
    return crops * dim[:, None, None, None], photos


def _space(draw: _Draws, side: int, lengths: Sequence[Ints]) -> list[Ints]:
    """Starts of lengths that follow each other in an image's side, what is free spread at random."""
    margin, gap = _distances(side)
    free = side - 2 * margin - gap * (len(lengths) - 1) - sum(lengths)
    before = np.sort(np.stack([draw.below(free + 1) for _ in lengths]), axis=0)
    starts, at = [], np.full(draw.rows, margin, np.int64)
    for length, shift in zip(lengths, before, strict=True):
        starts.append(at + shift)
        at = at + length + gap
    return starts


def _lay_out(draw: _Draws, side: int, sizes: Ints) -> tuple[Ints, Ints, Bools]:
    """Left and top of squares [n, o] anywhere in the image, without overlap, and the direction of the cut.

    One object lies anywhere. Two to four are divided by a straight cut, upright or level, and within each
    part by one across. Then the image is mirrored at random in both directions.
    """
    count = sizes.shape[1]
    parts = [range(count)] if count == 1 else [range(count // 2), range(count // 2, count)]
    widest = [sizes[:, list(part)].max(axis=1) for part in parts]
    along, across = np.empty_like(sizes), np.empty_like(sizes)
    for part, start, width in zip(parts, _space(draw, side, widest), widest, strict=True):
        places = _space(draw, side, [sizes[:, k] for k in part])
        for k, place in zip(part, places, strict=True):
            along[:, k] = start + draw.below(width - sizes[:, k] + 1)
            across[:, k] = place
    ends = [side - sizes - values for values in (along, across)]
    along = np.where((draw.below(2) == 1)[:, None], ends[0], along)
    across = np.where((draw.below(2) == 1)[:, None], ends[1], across)
    upright = draw.below(2) == 1
    x, y = np.where(upright[:, None], along, across), np.where(upright[:, None], across, along)
    return x, y, upright


def _look(draw: _Draws, count: int) -> tuple[Ints, Bools]:
    """Hues and flips [n, o]."""
    hues = np.stack([draw.below(len(HUES)) for _ in range(count)], axis=1)
    return hues, np.stack([draw.below(2) == 1 for _ in range(count)], axis=1)


def _draw_of(draw: _Draws, world: _World, concepts: Ints) -> Ints:
    """A drawing of each concept [n, o] from the split's pool."""
    sizes = np.array([len(pool) for pool in world.pools])
    first = np.concatenate([[0], sizes.cumsum()[:-1]])
    every = np.concatenate(world.pools)
    picks = [draw.below(sizes[concepts[:, k]]) for k in range(concepts.shape[1])]
    return np.asarray(every[first[concepts] + np.stack(picks, axis=1)], np.int64)


def _planned(draw: _Draws, side: int, drawing: Ints, sizes: Ints) -> _Plan:
    hues, flips = _look(draw, sizes.shape[1])
    x, y, _ = _lay_out(draw, side, sizes)
    return _Plan(drawing, hues, flips, sizes, x, y)


def _plan_one(draw: _Draws, world: _World, spec: GeneratorSpec, split: str, numbers: Ints) -> _Plan:
    """Concepts go round by the image's number."""
    span = _BIG if spec.layout == "recognition" else _SALIENT
    sizes = draw.within(_scaled(span, spec.image_size))[:, None]
    drawing = _draw_of(draw, world, numbers[:, None] % len(world.pools))
    return _planned(draw, spec.image_size, drawing, sizes)


def _plan_pairs(draw: _Draws, world: _World, spec: GeneratorSpec, split: str, numbers: Ints) -> _Plan:
    """Pairs go round by the image's number."""
    pairs = pairs_of(split, spec.seed)
    concepts = pairs[numbers % len(pairs)]
    concepts = np.where((draw.below(2) == 1)[:, None], concepts[:, ::-1], concepts)
    span = _scaled(_CROP, spec.image_size)
    sizes = np.stack([draw.within(span), draw.within(span)], axis=1)
    return _planned(draw, spec.image_size, _draw_of(draw, world, concepts), sizes)


def _plan_relations(draw: _Draws, world: _World, spec: GeneratorSpec, split: str, numbers: Ints) -> _Plan:
    """Two concepts; of every two images one has objects of clearly different size."""
    count = len(world.pools)
    first = draw.below(count)
    concepts = np.stack([first, (first + 1 + draw.below(count - 1)) % count], axis=1)
    span = _scaled(_CROP, spec.image_size)
    alike = np.stack([draw.within(span), draw.within(span)], axis=1)
    differ = _two_sizes(draw, spec.image_size)
    differ = np.where((draw.below(2) == 1)[:, None], differ[:, ::-1], differ)
    sizes = np.where((numbers % 2 == 1)[:, None], differ, alike)
    return _planned(draw, spec.image_size, _draw_of(draw, world, concepts), sizes)


def _two_sizes(draw: _Draws, side: int) -> Ints:
    return np.stack([draw.within(_scaled(span, side)) for span in _DIFFERENT], axis=1)


def _plan_mixture(draw: _Draws, world: _World, spec: GeneratorSpec, split: str, numbers: Ints) -> _Plan:
    """One to ``spec.objects`` (3) objects, whatever they are; half of the single ones are big."""
    most, side = spec.objects or 3, spec.image_size
    count = 1 + draw.below(most)
    big = (count == 1) & (draw.below(2) == 1)
    span = _scaled(_CROP, side)
    sizes = np.stack([draw.within(span) for _ in range(most)], axis=1)
    sizes[:, 0] = np.where(big, draw.within(_scaled(_BIG, side)), sizes[:, 0])
    sizes = np.where(np.arange(most) < count[:, None], sizes, 0)
    picks = np.stack([draw.below(len(world.every)) for _ in range(most)], axis=1)
    hues, flips = _look(draw, most)
    x, y = np.zeros_like(sizes), np.zeros_like(sizes)
    rest = draw.rest()
    for k in range(1, most + 1):
        rows = np.flatnonzero(count == k)
        x[rows, :k], y[rows, :k], _ = _lay_out(_Draws(rest[rows]), side, sizes[rows, :k])
    return _Plan(world.every[picks], hues, flips, sizes, x, y)


_PLANS: dict[str, Callable[..., _Plan]] = {
    "recognition": _plan_one,
    "objectness": _plan_one,
    "pairs": _plan_pairs,
    "relations": _plan_relations,
    "mixture": _plan_mixture,
}


def _plan_edits(draw: _Draws, world: _World, spec: GeneratorSpec, edits: Ints) -> _Plan:
    """A large and a small object with one thing changed; all images of a scene draw the same numbers.

    Drawings are colourful ones, so that a turned hue is seen. A cut divides the two objects, and a moved one
    moves along it; a halo ends before the other object's, so nothing else changes, to the last bit.
    """
    side, hands = spec.image_size, world.hands
    margin, _ = _distances(side)

    def edited(name: str) -> Bools:
        """[n, 2], for the large and the small object."""
        return np.stack([edits == EDITS.index(f"{name}_{thing}") for thing in OBJECTS], axis=1)

    first = draw.below(len(hands))
    second = (first + 1 + draw.below(len(hands) - 1)) % len(hands)
    other = draw.below(len(hands) - 2)
    for taken in (np.minimum(first, second), np.maximum(first, second)):
        other = other + (other >= taken)
    concepts = np.where(edited("replaced"), other[:, None], np.stack([first, second], axis=1))
    vendors = np.stack([draw.below(hands.shape[1]) for _ in OBJECTS], axis=1)
    steps = np.stack([1 + draw.below(hands.shape[1] - 1) for _ in OBJECTS], axis=1)
    vendors = np.where(edited("redrawn"), (vendors + steps) % hands.shape[1], vendors)
    hues, flips = _look(draw, len(OBJECTS))
    turns = np.stack([2 + draw.below(2) for _ in OBJECTS], axis=1)  # by 20 degrees or more
    hues = np.where(edited("recoloured"), (hues + turns) % len(HUES), hues)
    sizes = _two_sizes(draw, side)
    x, y, upright = _lay_out(draw, side, sizes)
    room = side - 2 * margin - sizes + 1
    leaps = np.stack([draw.between(_LEAP) for _ in OBJECTS], axis=1)
    leaps = np.floor(leaps * room).astype(np.int64)
    moved_x, moved_y = margin + (x - margin + leaps) % room, margin + (y - margin + leaps) % room
    moved = edited("moved")
    x = np.where(moved & ~upright[:, None], moved_x, x)
    y = np.where(moved & upright[:, None], moved_y, y)
    return _Plan(hands[concepts, vendors], hues, flips, np.where(edited("removed"), 0, sizes), x, y)


@lru_cache(maxsize=128)
def _weights(size: int) -> Floats:
    """[T, 64]: overlap of each target pixel with each atlas pixel, in 1/T atlas pixels; rows sum to 64."""
    target, source = np.arange(size)[:, None], np.arange(CELL)[None]
    end = np.minimum(CELL * (target + 1), size * (source + 1))
    overlap = np.maximum(end - np.maximum(CELL * target, size * source), 0)
    return np.asarray(overlap, np.float32)


def _shrink(cells: NDArray[np.uint8], size: int) -> Floats:
    """[m, 64, 4, 64] -> [m, 4, T, T], premultiplied, 0 to 255, multiples of 1/4096."""
    weights = _weights(size)
    rows = cells.astype(np.float32) @ weights.T  # [m, 64, 4, T]
    both = weights @ rows.reshape(len(cells), CELL, 4 * size)  # [m, T, 4 T]
    scaled: Floats = both.reshape(-1, size, 4, size).transpose(0, 2, 1, 3) * np.float32(2**-12)
    return np.ascontiguousarray(scaled)


def _turn(colours: Floats, alpha: Floats, hues: Ints) -> Floats:
    """Colours [m, 3, T, T] with their hue turned, no channel below 0 or above the cover."""
    rows = np.array(list(HUES.values()), np.float32)[hues] * np.float32(2**-8)  # [m, 3]
    a, b, c = (rows[:, k, None, None] for k in range(3))
    red, green, blue = colours[:, 0], colours[:, 1], colours[:, 2]
    cycles = ((red, green, blue), (green, blue, red), (blue, red, green))
    turned = np.stack([x * a + y * b + z * c for x, y, z in cycles], axis=1)
    clipped: Floats = np.clip(turned, 0, alpha[:, None])
    return clipped


def _grown(mask: Floats) -> Floats:
    """Largest of the 3 x 3 neighbours of [m, P, P]."""
    wide = mask.copy()
    for axis in (1, 2):
        last, first = [slice(None)] * 3, [slice(None)] * 3
        last[axis], first[axis] = slice(1, None), slice(None, -1)
        before = wide.copy()
        wide[tuple(last)] = np.maximum(wide[tuple(last)], before[tuple(first)])
        wide[tuple(first)] = np.maximum(wide[tuple(first)], before[tuple(last)])
    return wide


def _halo(alpha: Floats, colours: Floats, behind: Floats) -> Floats:
    """How white the surroundings become, [m, P, P] from 0 to 1: the more, the less the object stands out.

    Contrast is the difference in mean luminance of the object's rim and of what lies around it.

    Args:
        alpha: [m, P, P], 0 to 1, with ``_REACH`` pixels around the object.
        colours: [m, 3, P, P], premultiplied.
        behind: [m, 3, P, P], the background.
    """
    near = _grown(alpha)
    far = _grown(near)
    rim = alpha + _grown(np.float32(1) - alpha) - np.float32(1)
    around = far - alpha

    def mean(channels: Floats, cover: Floats) -> Floats64:
        """Of channels that are already weighed by the cover."""
        light = (channels[:, 0] + channels[:, 1] + channels[:, 1] + channels[:, 2]) * np.float32(16)
        total = np.floor(light).astype(np.int64).sum(axis=(1, 2))
        area = np.floor(cover * np.float32(64)).astype(np.int64).sum(axis=(1, 2))
        found: Floats64 = total / np.maximum(area, 1)
        return found

    contrast = np.abs(mean(colours * rim[:, None], alpha * rim) - mean(behind * around[:, None], around))
    strength = np.clip((_ENOUGH - contrast) / (_ENOUGH - _LOW), 0, 1) * _HALO
    spread: Floats = (near + far) * (strength.astype(np.float32) * np.float32(0.5))[:, None, None]
    return spread


def _put(world: _World, plan: _Plan, canvas: Floats, masks: Bools, boxes: Ints, size: int) -> None:
    """Paint all objects of one size."""
    rows, things = np.nonzero(plan.size == size)
    x, y = plan.x[rows, things], plan.y[rows, things]
    pixels = _shrink(world.cells[plan.drawing[rows, things]], size)
    flip = plan.flip[rows, things]
    pixels[flip] = pixels[flip][..., ::-1]
    colours = _turn(pixels[:, :3], pixels[:, 3], plan.hue[rows, things])
    alpha = pixels[:, 3] * np.float32(1 / 255)
    inner, around = np.arange(size), np.arange(-_REACH, size + _REACH)
    border = ((0, 0), (_REACH, _REACH), (_REACH, _REACH))
    patch = (
        rows[:, None, None, None],
        np.arange(3)[None, :, None, None],
        (y[:, None] + around)[:, None, :, None],
        (x[:, None] + around)[:, None, None, :],
    )
    behind = canvas[patch]
    cover, painted = np.pad(alpha, border), np.pad(colours, ((0, 0), *border))
    halo = _halo(cover, painted, behind)[:, None]
    one = np.float32(1)
    lit = behind * (one - halo) + np.float32(255) * halo
    canvas[patch] = lit * (one - cover[:, None]) + painted
    solid = alpha >= np.float32(0.5)
    ys, xs = (y[:, None] + inner)[:, :, None], (x[:, None] + inner)[:, None, :]
    masks[rows[:, None, None], things[:, None, None], ys, xs] = solid
    boxes[rows, things] = _boxes(solid, x, y)


def _boxes(masks: Bools, x: Ints, y: Ints) -> Ints:
    """x, y, width, height of the true pixels of [m, T, T] that lie at x and y; 0 where there are none."""
    columns: Bools = np.any(masks, axis=1)
    rows: Bools = np.any(masks, axis=2)
    left, top, size = columns.argmax(axis=1), rows.argmax(axis=1), masks.shape[-1]
    right, bottom = size - columns[:, ::-1].argmax(axis=1), size - rows[:, ::-1].argmax(axis=1)
    found = np.stack([x + left, y + top, right - left, bottom - top], axis=1)
    there: Bools = np.any(columns, axis=1)
    return np.asarray(found * there[:, None], np.int64)


def _render(world: _World, plan: _Plan, canvas: Floats, photos: Ints) -> Scenes:
    """Paint a plan onto backgrounds [n, 3, S, S] and gather what is known."""
    count, side = plan.size.shape, canvas.shape[-1]
    masks, boxes = np.zeros((*count, side, side), np.bool_), np.zeros((*count, 4), np.int64)
    for size in np.unique(plan.size[plan.size > 0]).tolist():
        _put(world, plan, canvas, masks, boxes, size)
    rounded = np.clip(np.floor(canvas + np.float32(0.5)), 0, 255).astype(np.uint8)
    there = plan.size > 0
    drawing = np.where(there, plan.drawing, -1)
    known = world.drawings
    return Scenes(
        np.ascontiguousarray(rounded.transpose(0, 2, 3, 1)),
        masks,
        boxes,
        np.where(there, known.concept[drawing], -1),
        np.where(there, known.vendor[drawing], -1),
        drawing,
        np.where(there, plan.hue, -1),
        np.where(boxes[..., 2] > 0, places_of(boxes, side), -1),
        photos,
    )


def places_of(boxes: Ints, side: int) -> Ints:
    """The cell of the 3 x 3 grid of local crops in which boxes [..., 4] have their centre, 0 to 8."""
    borders = [round(2 * side * share) for share in _BORDERS]
    twice = 2 * boxes[..., :2] + boxes[..., 2:]  # of the centre
    cell = (twice >= borders[0]).astype(np.int64) + (twice >= borders[1])
    return np.asarray(cell[..., 0] + 3 * cell[..., 1], np.int64)
