"""Painting of the embedded scenes: handwritten digits on crops of two photographs.

What goes in ships with scikit-learn: 1,797 handwritten digits of 8x8 pixels and two photographs.
What comes out is decided by :class:`~comit_bench.recipes.specs.GeneratorSpec` alone, to the last bit:

* Each image has its own random numbers, keyed by (seed, layout, variant, split, index). They are
  raw PCG64 words, whose streams NumPy guarantees, so chunk size, order and processes do not matter.
* The arithmetic on pixels is additions, multiplications, divisions and floors, one NumPy operation
  at a time: IEEE 754 fixes every result. Rotations (``hard`` only) use the tangent of the half angle.
* Photographs are averaged over whole pixels with integer sums.

Nothing crosses from train to val: digit exemplars are divided (see ``sources``), and
backgrounds come from the left 60 % or the right 40 % of the photographs' columns.

Shapes: ``n`` images, ``o`` objects per image, ``S`` image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comit_bench.data.scenes.sources import EDGE, FINE, Floats, Ints, Sources, load_sources, uniforms
from comit_bench.errors import UsageError
from comit_bench.recipes.specs import GeneratorSpec

SplitName = Literal["train", "val"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 60, 60),
    "orange": (255, 150, 30),
    "yellow": (255, 240, 80),
    "green": (70, 220, 80),
    "cyan": (70, 230, 245),
    "blue": (80, 125, 255),
    "purple": (180, 90, 255),
    "pink": (255, 165, 220),
    "brown": (180, 115, 60),
    "white": (252, 252, 252),
}
COLOUR_NAMES = tuple(COLOURS)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAIRS = tuple(combinations(range(10), 2))
MAX_SIDE = 256

_MARGIN = 1.25 / 32  # empty border, and
_GAP = 1.5 / 32  # least distance of two objects, as shares of the image side

# Counterfactual: every scene is painted once per entry. Objects are the one in the left and the one in the
# right half; "unchanged" is the original once more, under another name.
OBJECTS = ("left", "right")
ATTRIBUTES = ("moved", "recoloured", "replaced", "removed")
ORIGINAL, UNCHANGED, BACKGROUND = "original", "unchanged", "background"
EDITS = (ORIGINAL, UNCHANGED, *(f"{a}_{o}" for a in ATTRIBUTES for o in OBJECTS), BACKGROUND)

_LAYOUTS = ("recognition", "pairs", "relations", "objectness", "counterfactual")
_VARIANTS = ("default", "hard")
_SPLITS = ("train", "val")
_WORDS = 32  # random numbers per image
_TRAIN_COLUMNS = 0.6
_SOFT = 2.2  # width of the outline in pixels, at most
_CRISP = 1.2  # least steepness of the outline: nothing is left where the field is 0
# Pairs: greatest width, height and range of the centre, as shares of the side.
_SLOT = (12.5 / 32, 24 / 32, 1 / 32)
# Counterfactual: greatest width and height, least distance from the middle of the image, as shares of the
# side; a moved object moves by this share of its vertical range, or by what is left of it.
_BOX, _MIDDLE, _LEAP = (10 / 32, 14 / 32), 2.5 / 32, (0.35, 0.65)
_EDIT_WORDS = 48  # random numbers per scene
_SLENDER = 0.5  # two-object scenes leave out digits narrower than this share of their height


@dataclass(frozen=True, kw_only=True)
class Look:
    """What separates the easy from the busy scenes. Sizes are shares of the image side.

    Attributes:
        dim: range of the factor on the photograph's brightness.
        lift: range of the brightness added to it.
        size: range of the longer side of a single object.
        salient_size: the same in the objectness set.
        pair_scale: factor on the sizes of two objects.
        jitter: share of the free range over which a single object's centre moves.
        tilt: largest tangent of half the rotation angle.
        halo: how much the background darkens next to a digit, 0 to 1.
    """

    dim: tuple[float, float]
    lift: tuple[float, float]
    size: tuple[float, float]
    salient_size: tuple[float, float]
    pair_scale: float
    jitter: float
    tilt: float
    halo: float


LOOKS: dict[str, Look] = {
    "default": Look(
        dim=(0.14, 0.28),
        lift=(0.0, 0.0),
        size=(0.77, 0.86),
        salient_size=(0.5, 0.75),
        pair_scale=1.0,
        jitter=0.25,
        tilt=0.0,
        halo=0.7,
    ),
    "hard": Look(
        dim=(0.5, 0.8),
        lift=(0.0, 60.0),
        size=(0.4, 0.7),
        salient_size=(0.4, 0.7),
        pair_scale=0.96,
        jitter=1.0,
        tilt=0.1,
        halo=0.5,
    ),
}


@dataclass(frozen=True)
class Scenes:
    """Painted images with all that is known about them.

    Attributes:
        images: [n, S, S, 3] uint8.
        masks: [n, o, S, S] bool, pixels at least half covered by the object; objects never overlap.
        boxes: [n, o, 4] x, y, width, height of each mask in whole pixels.
        digits: [n, o] 0 to 9.
        colours: [n, o] indices into ``COLOUR_NAMES``.
        exemplars: [n, o] numbers of the handwritten digits used.
        photos: [n, 4] photograph, left column, top row, side of the background crop.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: Ints
    digits: Ints
    colours: Ints
    exemplars: Ints
    photos: Ints

    def name(self, image: int, thing: int) -> str:
        """For example ``red three``."""
        colour = COLOUR_NAMES[int(self.colours[image, thing])]
        return f"{colour} {DIGIT_NAMES[int(self.digits[image, thing])]}"

    @property
    def concepts(self) -> Ints:
        """[n, o] categories: the digits."""
        return self.digits


def categories() -> tuple[str, ...]:
    """Names of the categories."""
    return tuple(map(str, range(10)))


def class_name(scenes: Scenes, row: int) -> str:
    """Class folder of an image with one object, for example ``red_3``."""
    return f"{COLOUR_NAMES[int(scenes.colours[row, 0])]}_{int(scenes.digits[row, 0])}"


class _Draws:
    """Hands out one column of random numbers after the other."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        self._columns = iter(table.T)

    def unit(self) -> Floats:
        value: Floats = (next(self._columns) * 0.999999).astype(np.float32)
        return value

    def between(self, span: tuple[float, float]) -> Floats:
        low, high = np.float32(span[0]), np.float32(span[1])
        value: Floats = low + self.unit() * (high - low)
        return value

    def below(self, count: int | Ints) -> Ints:
        number: Ints = np.floor(next(self._columns) * count).astype(np.int64)
        return number


def check_spec(spec: GeneratorSpec) -> None:
    """Refuse settings that cannot be painted."""
    if spec.layout == "mixture" or spec.objects is not None:
        raise UsageError("generator: only drawings have the layout 'mixture', and 'objects'")
    if spec.image_size > MAX_SIDE:
        raise UsageError(f"generator.image_size = {spec.image_size}: scenes go up to {MAX_SIDE} pixels")
    if spec.layout in ("pairs", "relations", "counterfactual") and spec.image_size < 32:
        raise UsageError(
            f"generator.image_size = {spec.image_size}: two objects need 32 pixels or more to be readable"
        )
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


def _backgrounds(draw: _Draws, sources: Sources, split: str, side: int, look: Look) -> tuple[Floats, Ints]:
    """Crops [n, S, S, 3] (0 to 255) of the split's part of the photographs, and where they lie."""
    which = draw.below(len(sources.sums))
    zoom = max(1, 64 // side) + draw.below(max(1, 192 // side) - max(1, 64 // side) + 1)
    reach = zoom * side
    rows, columns = sources.sums[0].shape[0] - 1, sources.sums[0].shape[1] - 1
    border = int(columns * _TRAIN_COLUMNS)
    low, high = (0, border) if split == "train" else (border, columns)
    left = low + draw.below(high - low - reach + 1)
    top = draw.below(rows - reach + 1)
    mirrored = draw.below(2) == 1
    steps = np.arange(side + 1)
    x = left[:, None] + zoom[:, None] * steps  # [n, S + 1]
    y = top[:, None] + zoom[:, None] * steps
    table = np.stack(sources.sums)
    corner = table[which[:, None, None], y[:, :, None], x[:, None, :]]  # [n, S + 1, S + 1, 3]
    cells = corner[:, 1:, 1:] - corner[:, :-1, 1:] - corner[:, 1:, :-1] + corner[:, :-1, :-1]
    crops = cells.astype(np.float32) / (zoom * zoom).astype(np.float32)[:, None, None, None]
    crops = np.where(mirrored[:, None, None, None], crops[:, :, ::-1], crops)
    dim, lift = draw.between(look.dim), draw.between(look.lift)
    crops = crops * dim[:, None, None, None] + lift[:, None, None, None]
    return crops.astype(np.float32), np.stack([which, left, top, reach], axis=1)


@dataclass
class _Placed:
    """One object per image: its digit's exemplar, extent in pixels, centre and rotation."""

    exemplar: Ints
    width: Floats
    height: Floats
    tangent: Floats
    x: Floats
    y: Floats


def _rotation(tangent: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine from the tangent of half the angle."""
    one = np.float32(1)
    square = tangent * tangent
    return (one - square) / (one + square), (tangent + tangent) / (one + square)


def _choose(draw: _Draws, sources: Sources, split: str, digit: Ints, slender: bool) -> Ints:
    """An exemplar of each digit from the split's pool."""
    aspect = sources.ink[:, 2] / sources.ink[:, 3]
    pools = [p if slender else p[aspect[p] >= _SLENDER] for p in sources.pools[split]]
    sizes = np.array([len(p) for p in pools])
    number = draw.below(sizes[digit])
    return np.array([pools[d][k] for d, k in zip(digit, number, strict=True)], np.int64)


def _extents(sources: Sources, exemplar: Ints, size: Floats, tangent: Floats) -> tuple[Floats, Floats]:
    """Width and height in pixels of the rotated digits whose longer upright side is ``size``."""
    cosine, sine = _rotation(tangent)
    sine = np.abs(sine)
    ink_w, ink_h = sources.ink[exemplar, 2], sources.ink[exemplar, 3]
    scale = size / np.maximum(ink_w, ink_h)
    w, h = ink_w * scale, ink_h * scale
    return w * cosine + h * sine, h * cosine + w * sine


def _place_one(draw: _Draws, sources: Sources, spec: GeneratorSpec, split: str, digit: Ints) -> _Placed:
    look, side = LOOKS[spec.variant], np.float32(spec.image_size)
    salient = spec.layout == "objectness"
    exemplar = _choose(draw, sources, split, digit, slender=True)
    size = draw.between(look.salient_size if salient else look.size) * side
    tangent = draw.between((-look.tilt, look.tilt))
    w, h = _extents(sources, exemplar, size, tangent)
    jitter = np.float32(1.0 if salient else look.jitter)
    room = side * np.float32(1 - 2 * _MARGIN)
    half = np.float32(0.5)
    x = side * half + (draw.unit() - half) * jitter * np.maximum(room - w, 0)
    y = side * half + (draw.unit() - half) * jitter * np.maximum(room - h, 0)
    return _Placed(exemplar, w, h, tangent, x, y)


def _line_up(draw: _Draws, side: int, first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Centres of two lengths that follow each other with a gap, free space spread at random."""
    margin, gap = np.float32(side * _MARGIN), np.float32(side * _GAP)
    slack = np.maximum(np.float32(side) - margin - margin - gap - first - second, 0)
    half = np.float32(0.5)
    before = slack * draw.unit()
    between = (slack - before) * draw.unit()
    one = margin + before + first * half
    return one, one + first * half + gap + between + second * half


def _side_by_side(draw: _Draws, side: int, first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Centres of two lengths that nearly share their middle."""
    half = np.float32(0.5)
    room = np.maximum(np.float32(side * (1 - 2 * _MARGIN)) - np.maximum(first, second), 0)
    middle = np.float32(side) * half + (draw.unit() - half) * room
    shift = (draw.unit() - half) * np.float32(side / 16)
    limit = (np.float32(side * (1 - 2 * _MARGIN)) - second) * half
    other = np.clip(middle + shift, np.float32(side) * half - limit, np.float32(side) * half + limit)
    return middle, other.astype(np.float32)


def _pair_sizes(
    draw: _Draws, sources: Sources, look: Look, differ: NDArray[np.bool_], who: list[Ints]
) -> list[Floats]:
    """Longer sides (shares of the image side): alike, or one 1.5 times the other where ``differ``.

    The digit that would have the smaller area although it is taller changes places with the other.
    """
    alike = draw.between((0.38, 0.42))
    small, ratio = draw.between((0.353, 0.36)), draw.between((1.45, 1.5))
    first = draw.below(2) == 0
    shape = [
        (sources.ink[e, 2] * sources.ink[e, 3]) / np.maximum(sources.ink[e, 2], sources.ink[e, 3]) ** 2
        for e in who
    ]
    large = ratio * ratio * np.float32(0.7)
    first = np.where(first, large * shape[0] >= shape[1], large * shape[1] < shape[0])
    scale = np.float32(look.pair_scale)
    one = np.where(differ, np.where(first, small * ratio, small), alike) * scale
    two = np.where(differ, np.where(first, small, small * ratio), alike) * scale
    return [one.astype(np.float32), two.astype(np.float32)]


def _in_slots(draw: _Draws, sources: Sources, spec: GeneratorSpec, split: str, digits: Ints) -> list[_Placed]:
    """One object in the middle of each half, nearly as high as the image lets it be, moved a little.

    Anywhere and smaller, two digits at once are hard to read from thousands of images even from pixels,
    and a benchmark that nothing can pass tells tokenizers apart by noise.
    """
    side, half = np.float32(spec.image_size), np.float32(0.5)
    things = []
    for position in (0, 1):
        exemplar = _choose(draw, sources, split, digits[:, position], slender=False)
        upright = np.zeros(len(exemplar), np.float32)
        tall = np.full(len(exemplar), side * np.float32(_SLOT[1]), np.float32)
        w, h = _extents(sources, exemplar, tall, upright)
        fit = np.minimum(side * np.float32(_SLOT[0]) / w, 1).astype(np.float32)
        x = side * (np.float32(0.25 + 0.5 * position) + (draw.unit() - half) * np.float32(_SLOT[2]))
        y = side * (half + (draw.unit() - half) * np.float32(_SLOT[2]))
        things.append(_Placed(exemplar, w * fit, h * fit, upright, x, y))
    return things


def _place_two(
    draw: _Draws, sources: Sources, spec: GeneratorSpec, split: str, digits: Ints, indices: Ints
) -> list[_Placed]:
    """Beside, above or diagonal to each other, alike or different in size, never overlapping."""
    if spec.layout == "pairs" and spec.variant == "default":
        return _in_slots(draw, sources, spec, split, digits)
    look, side = LOOKS[spec.variant], spec.image_size
    who = [_choose(draw, sources, split, digits[:, k], slender=False) for k in (0, 1)]
    axis = indices % 3 if spec.layout == "relations" else draw.below(3)
    differ = (indices // 3) % 2 == 1 if spec.layout == "relations" else draw.below(2) == 1
    tilt = 0.0 if spec.layout == "relations" else look.tilt  # upright: heights stay comparable
    tangents = [draw.between((-tilt, tilt)) for _ in who]
    sizes = _pair_sizes(draw, sources, look, differ, who)
    spans = [
        _extents(sources, e, s * np.float32(side), t) for e, s, t in zip(who, sizes, tangents, strict=True)
    ]
    room = np.float32(side * (1 - 2 * _MARGIN - _GAP))
    wide = np.where(axis != 1, spans[0][0] + spans[1][0], 0)
    tall = np.where(axis != 0, spans[0][1] + spans[1][1], 0)
    shrink = np.minimum(room / np.maximum(np.maximum(wide, tall), room), 1).astype(np.float32)
    spans = [(w * shrink, h * shrink) for w, h in spans]
    (w0, h0), (w1, h1) = spans
    follow_x, level_x = _line_up(draw, side, w0, w1), _side_by_side(draw, side, w0, w1)
    follow_y, level_y = _line_up(draw, side, h0, h1), _side_by_side(draw, side, h0, h1)
    flipped = [draw.below(2) == 1 for _ in "xy"]  # which of the two comes first
    xs = [np.where(axis != 1, follow_x[k], level_x[k]) for k in (0, 1)]
    ys = [np.where(axis != 0, follow_y[k], level_y[k]) for k in (0, 1)]
    xs = [np.where(flipped[0], np.float32(side) - x, x) for x in xs]
    ys = [np.where(flipped[1], np.float32(side) - y, y) for y in ys]
    return [
        _Placed(e, w, h, t, x.astype(np.float32), y.astype(np.float32))
        for e, (w, h), t, x, y in zip(who, spans, tangents, xs, ys, strict=True)
    ]


def _sample(sources: Sources, thing: _Placed, side: int) -> tuple[Floats, Floats]:
    """The digit's field [n, S, S] at every pixel centre (bilinear), and its pixels per field sample."""
    cosine, sine = _rotation(thing.tangent)
    x0, y0, ink_w, ink_h = (sources.ink[thing.exemplar, k] for k in range(4))
    scale = thing.width / (ink_w * cosine + ink_h * np.abs(sine))  # [n]
    pixel = np.arange(side, dtype=np.float32) + np.float32(0.5)
    dx = ((pixel - thing.x[:, None]) / scale[:, None])[:, None, :]  # [n, 1, S]
    dy = ((pixel - thing.y[:, None]) / scale[:, None])[:, :, None]  # [n, S, 1]
    cosine, sine = cosine[:, None, None], sine[:, None, None]
    half = np.float32(0.5)
    u = dx * cosine + dy * sine + (x0 + ink_w * half - half)[:, None, None]
    v = dy * cosine - dx * sine + (y0 + ink_h * half - half)[:, None, None]
    last = np.float32(sources.fields.shape[-1] - 1)
    u, v = np.clip(u, 0, last - np.float32(0.001)), np.clip(v, 0, last - np.float32(0.001))
    i, j = np.floor(v).astype(np.int64), np.floor(u).astype(np.int64)
    fv, fu = v - np.floor(v), u - np.floor(u)
    one, e, f = np.float32(1), thing.exemplar[:, None, None], sources.fields
    upper = f[e, i, j] * (one - fu) + f[e, i, j + 1] * fu
    lower = f[e, i + 1, j] * (one - fu) + f[e, i + 1, j + 1] * fu
    return upper * (one - fv) + lower * fv, scale


def _labels(spec: GeneratorSpec, draw: _Draws, indices: Ints) -> tuple[Ints, Ints]:
    """Digits and colours [n, o]; classes, pairs and digits go round by the image's index."""
    if spec.layout == "recognition":
        return indices[:, None] % 10, (indices[:, None] // 10) % 10
    if spec.layout == "objectness":
        return indices[:, None] % 10, draw.below(10)[:, None]
    if spec.layout == "pairs":
        digits = np.array(PAIRS, np.int64)[indices % len(PAIRS)]
        digits = np.where((draw.below(2) == 1)[:, None], digits[:, ::-1], digits)
    else:
        first = draw.below(10)
        digits = np.stack([first, (first + 1 + draw.below(9)) % 10], axis=1)
    colour = draw.below(10)
    return digits, np.stack([colour, (colour + 1 + draw.below(9)) % 10], axis=1)


def _boxes(masks: NDArray[np.bool_]) -> Ints:
    """x, y, width, height of the true pixels of [n, o, S, S]."""
    columns: NDArray[np.bool_] = np.any(masks, axis=2)
    rows: NDArray[np.bool_] = np.any(masks, axis=3)
    side = masks.shape[-1]
    x, y = columns.argmax(axis=2), rows.argmax(axis=2)
    right, bottom = side - columns[..., ::-1].argmax(axis=2), side - rows[..., ::-1].argmax(axis=2)
    return np.stack([x, y, right - x, bottom - y], axis=-1).astype(np.int64)


def paint(spec: GeneratorSpec, split: SplitName, indices: Sequence[int]) -> Scenes:
    """Paint the images with these numbers; each depends on its own number only.

    Raises:
        UsageError: The settings cannot be painted.
    """
    check_spec(spec)
    sources, look, side = load_sources(), LOOKS[spec.variant], spec.image_size
    key = (spec.seed, _LAYOUTS.index(spec.layout), _VARIANTS.index(spec.variant), _SPLITS.index(split))
    numbers = np.asarray(indices, np.int64)
    if spec.layout == "counterfactual":
        draw = _Draws(uniforms(key, (numbers // len(EDITS)).tolist(), _EDIT_WORDS))
        return _paint_edits(draw, sources, spec, split, numbers % len(EDITS))
    draw = _Draws(uniforms(key, indices, _WORDS))
    digits, colours = _labels(spec, draw, numbers)
    canvas, photos = _backgrounds(draw, sources, split, side, look)
    if digits.shape[1] == 1:
        things = [_place_one(draw, sources, spec, split, digits[:, 0])]
    else:
        things = _place_two(draw, sources, spec, split, digits, numbers)
    masks = []
    for position, thing in enumerate(things):
        cover, shade = _layers(sources, thing, side, look)
        canvas = _put(canvas, cover, shade, colours[:, position], draw.between((0.92, 1.0)))
        masks.append(cover >= np.float32(0.5))
    return _finish(canvas, masks, digits, colours, [t.exemplar for t in things], photos)


def _layers(sources: Sources, thing: _Placed, side: int, look: Look) -> tuple[Floats, Floats]:
    """How much the object covers each pixel, and how much it darkens what is behind: [n, S, S], 0 to 1."""
    field, scale = _sample(sources, thing, side)
    gain = np.maximum(scale * np.float32(FINE / _SOFT), np.float32(_CRISP))[:, None, None]
    cover = np.clip((field - np.float32(EDGE)) * gain + np.float32(0.5), 0, 1)
    shade = np.clip(field * np.float32(4), 0, 1) * np.float32(look.halo)
    return cover.astype(np.float32), shade.astype(np.float32)


def _put(canvas: Floats, cover: Floats, shade: Floats, colour: Ints, brightness: Floats) -> Floats:
    """Paint an object onto [n, S, S, 3]."""
    one = np.float32(1)
    palette = np.array(list(COLOURS.values()), np.float32)
    paint_rgb = palette[colour] * brightness[:, None]
    canvas = canvas * (one - shade)[..., None]
    painted: Floats = canvas * (one - cover)[..., None] + paint_rgb[:, None, None, :] * cover[..., None]
    return painted


def _finish(
    canvas: Floats,
    masks: Sequence[NDArray[np.bool_]],
    digits: Ints,
    colours: Ints,
    exemplars: Sequence[Ints],
    photos: Ints,
) -> Scenes:
    """Round to bytes and gather what is known."""
    images = np.clip(np.floor(canvas + np.float32(0.5)), 0, 255).astype(np.uint8)
    stacked = np.stack(masks, axis=1)
    there: NDArray[np.bool_] = np.any(stacked, axis=(2, 3))
    boxes = _boxes(stacked) * there[..., None]  # an object that was removed has none
    return Scenes(images, stacked, boxes, digits, colours, np.stack(exemplars, axis=1), photos)


def _another(draw: _Draws, one: Ints, two: Ints) -> Ints:
    """A number below 10 that is neither of two different ones."""
    number = draw.below(8)
    for taken in (np.minimum(one, two), np.maximum(one, two)):
        number = number + (number >= taken)
    return number


def _paint_edits(draw: _Draws, sources: Sources, spec: GeneratorSpec, split: str, edits: Ints) -> Scenes:
    """Two objects, one in each half, with one thing changed; all images of a scene draw the same numbers.

    An object and the shadow around it stay in its half, so the other half is the same to the last bit.

    Args:
        draw: One row of numbers per image.
        sources, spec, split: As elsewhere.
        edits: int64 [n], positions in ``EDITS``.
    """
    look, side, half = LOOKS[spec.variant], np.float32(spec.image_size), np.float32(0.5)

    def edited(name: str) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = edits == EDITS.index(name)
        return chosen

    plain = _backgrounds(draw, sources, split, spec.image_size, look)
    other = _backgrounds(draw, sources, split, spec.image_size, look)
    swap = edited(BACKGROUND)
    canvas = np.where(swap[:, None, None, None], other[0], plain[0])
    photos = np.where(swap[:, None], other[1], plain[1])
    first = [draw.below(10), draw.below(10)]  # digit and colour of the left object
    second = [(name + 1 + draw.below(9)) % 10 for name in first]  # and of the right one
    owned = list(zip(first, second, strict=True))
    masks, digits, colours, exemplars = [], [], [], []
    columns = np.arange(spec.image_size) < spec.image_size // 2
    free = (np.float32(0.5 - _MARGIN - _MIDDLE - _BOX[0]), np.float32(1 - 2 * _MARGIN - _BOX[1]))
    for number, place in enumerate(OBJECTS):
        digit, colour = owned[0][number], owned[1][number]
        replaced, recoloured = edited(f"replaced_{place}"), edited(f"recoloured_{place}")
        digit = np.where(replaced, _another(draw, *owned[0]), digit)
        colour = np.where(recoloured, _another(draw, *owned[1]), colour)
        words = [draw.unit() for _ in range(4)]
        leap, moved = draw.between(_LEAP), edited(f"moved_{place}")
        lower = words[1] + leap
        u = np.where(moved, words[2], words[0])
        v = np.where(moved, lower - np.floor(lower), words[1])
        x = np.float32(_MARGIN + _BOX[0] / 2) + u * free[0]
        x = np.where(np.full(len(x), place == OBJECTS[0]), x, np.float32(1) - x)
        y = np.float32(_MARGIN + _BOX[1] / 2) + v * free[1]
        exemplar = _choose(draw, sources, split, digit, slender=False)
        upright = np.zeros(len(exemplar), np.float32)
        w, h = _extents(sources, exemplar, np.full(len(exemplar), side, np.float32), upright)
        fit = np.minimum(side * np.float32(_BOX[0]) / w, side * np.float32(_BOX[1]) / h).astype(np.float32)
        thing = _Placed(exemplar, w * fit, h * fit, upright, (x * side).astype(np.float32), y * side)
        there = (columns == (place == OBJECTS[0]))[None, None] & ~edited(f"removed_{place}")[:, None, None]
        cover, shade = (layer * there for layer in _layers(sources, thing, spec.image_size, look))
        canvas = _put(canvas, cover, shade, colour, draw.between((0.92, 1.0)))
        masks.append(cover >= half)
        digits.append(digit)
        colours.append(colour)
        exemplars.append(exemplar)
    return _finish(canvas, masks, np.stack(digits, 1), np.stack(colours, 1), exemplars, photos)
