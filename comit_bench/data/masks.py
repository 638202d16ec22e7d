"""Which pixels of a mask's file are the object, in every form masks come in.

White is the object, black is not. What counts as white depends on how the file holds it:

- **two values, one of them 0** (0/1, 0/255, 0/65535, one label): whatever is not 0 is the object;
- **levels** (anti-aliased edges, JPEG noise, soft masks): from the middle of the range up, which is 128 of
  8 bits and 32,768 of 16 bits. JPEG and lossy WEBP hold levels only: their 1 is noise, not an object;
- **palette**: of grey colours, those levels; of other colours, black is not the object and all others are;
- **transparency** that differs between pixels is the mask, and opaque is the object. A file whose colours
  show another mask than its transparency is refused, for nobody can say which is meant;
- **three channels**: equal ones are levels, of others the brightest channel counts (red on black).

An image most of whose pixels are neither dark nor bright is a photograph, not a mask, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from comit_bench.errors import CorruptFileError

Levels = NDArray[Any]
GREY = 16  # channels that differ by less are equal but for the noise of JPEG
DARK, BRIGHT = 1 / 8, 7 / 8  # of the range; what lies between is an edge
MOST = 0.5  # share of the pixels that may be edge
AGREE = 0.02  # share of the pixels in which colours and transparency may differ


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The object of one mask.

    Attributes:
        pixels: bool [H, W], True where the object is.
        form: How the file was read, e.g. ``0/255``, ``0/1``, ``levels``, ``palette``, ``transparency``.
        values: Smallest and largest value in the file, for messages.
    """

    pixels: NDArray[np.bool_]
    form: str
    values: tuple[float, float]

    @property
    def share(self) -> float:
        """Share of the pixels that are object, 0 to 1."""
        return float(self.pixels.mean())

    @property
    def problem(self) -> str | None:
        """What is odd about a mask that is all object or has none, in words; None for any other."""
        if 0 < self.share < 1:
            return None
        what = "the whole image is object" if self.share == 1 else "there is no object"
        return f"{what} (read as {self.form}, values {self.values[0]:g} to {self.values[1]:g})"


def read_levels(image: Image, *, lossy: bool, name: str) -> Mask:
    """Read the object off a decoded image.

    Args:
        image: Of any mode.
        lossy: Whether its format changes values a little (JPEG).
        name: What messages call it.
    """
    alpha = _alpha(image)
    levels, form = _colours(image)
    if alpha is None or alpha.min() == alpha.max():
        return _cut(levels, form, lossy=lossy, name=name)
    by_alpha = _cut(alpha, "transparency", lossy=lossy, name=name)
    try:
        by_colour = _cut(levels, form, lossy=lossy, name=name)
    except CorruptFileError:  # the cut-out of a photograph
        return by_alpha
    differ = float((by_alpha.pixels != by_colour.pixels).mean())
    if differ > AGREE and form != "colours" and by_colour.problem is None and _is_plain(levels, alpha):
        raise CorruptFileError(
            f"{name}: its transparency and its black and white are two different masks ({differ:.0%} of the "
            "pixels differ). Save the right one without transparency."
        )
    return by_alpha


def _is_plain(levels: Levels, alpha: Levels) -> bool:
    """Whether the visible pixels are black and white, both of them."""
    seen = levels[alpha > alpha.max() / 2]
    middle = seen.max() / 2 if seen.size else 0
    dark, bright = seen <= DARK * 2 * middle, seen >= BRIGHT * 2 * middle
    return bool(seen.size) and bool((dark | bright).mean() > 1 - MOST) and bool(dark.any() and bright.any())


def _alpha(image: Image) -> Levels | None:
    """Opacity 0 to 255 of every pixel [H, W]; None for images without transparency."""
    if image.mode.startswith("I"):  # 16 bit grey with one transparent value
        clear = image.info.get("transparency")
        return None if not isinstance(clear, int) else np.where(np.asarray(image) == clear, 0, 255)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        converted = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        return np.asarray(converted)[..., 3]
    return None


def _colours(image: Image) -> tuple[Levels, str]:
    """One number per pixel [H, W], and the form."""
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * np.uint8(255), "1 bit"
    if image.mode in ("P", "PA"):
        return _palette(image)
    if image.mode == "L" or image.mode.startswith(("I", "F")):
        return np.asarray(image), "levels"
    if image.mode in ("LA", "La"):
        return np.asarray(image.convert("LA"))[..., 0], "levels"
    plain = image.convert("RGBA") if image.mode == "RGBa" else image
    pixels = np.asarray(plain.convert("RGB")).astype(np.int16)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    if spread.max() < GREY:
        return np.rint(pixels.mean(axis=2)).astype(np.int16), "levels"
    return pixels.max(axis=2), "colours"


def _palette(image: Image) -> tuple[Levels, str]:
    """Grey levels of a grey palette; 0 and 1 for one of other colours, where only black is no object."""
    index = np.asarray(image if image.mode == "P" else image.getchannel(0))
    colours = np.zeros((256, 3), dtype=np.int16)
    listed = np.array(image.getpalette("RGB") or [], dtype=np.int16).reshape(-1, 3)[:256]
    colours[: len(listed)] = listed
    used = np.unique(index)
    several = colours[used]
    if len(used) > 1 and (several == several[0]).all():  # numbers without colours
        return (index != 0).astype(np.uint8), "palette"
    if (several.max(axis=1) - several.min(axis=1) < GREY).all():
        return colours.max(axis=1)[index], "palette"
    return (colours.max(axis=1) >= GREY)[index].astype(np.uint8), "palette"


def _cut(levels: Levels, form: str, *, lossy: bool, name: str) -> Mask:
    """Divide levels into object and the rest."""
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise CorruptFileError(f"{name}: holds values that are not finite, so it is no mask")
    low, high = float(levels.min()), float(levels.max())
    if low < 0:
        raise CorruptFileError(f"{name}: holds negative values, so it is no mask")
    values = (low, high)
    top = 255 if high <= 255 else 65535
    if levels.dtype.kind == "f" and high <= 1 and form == "levels":
        top = 1
    if not lossy and ((low == 0 and _two_values(levels, high)) or (low == high == 1)):
        return Mask(levels > 0, form if form != "levels" else f"0/{high:g}", values)
    edge = (levels > DARK * top) & (levels < BRIGHT * top)
    if low < high and edge.mean() > MOST:
        raise CorruptFileError(
            f"{name}: not a mask: {edge.mean():.0%} of its pixels are neither dark nor bright. Is it a "
            "photograph? Replace it by the mask of its image."
        )
    middle = (top + 1) / 2 if top > 1 else 0.5
    return Mask(levels >= middle, "16 bit levels" if top == 65535 and form == "levels" else form, values)


def _two_values(levels: Levels, high: float) -> bool:
    return high > 0 and bool(((levels == 0) | (levels == high)).all())
