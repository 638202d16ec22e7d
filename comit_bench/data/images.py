"""Declared image preprocessing, and reading many image files in order.

A preprocessing recipe is a string, hashed and stored with every score: steps joined by ``|``.

==========================  =========================================================================
``center_crop``             the largest centred square
``center_crop(N)``          a centred N x N square; smaller images get a black border
``resize(N,FILTER)``        exactly N x N, the aspect ratio is not kept
``resize_short(N,FILTER)``  the shorter side becomes N, the aspect ratio is kept
==========================  =========================================================================

``FILTER`` is nearest, box, bilinear, bicubic or lanczos, always antialiased as Pillow does it; crop
offsets and rounding equal torchvision's ``CenterCrop`` and ``Resize``. A recipe must end in a square of
known side.

What every image goes through first:

- the EXIF orientation is *not* applied: ImageNet and its published scores are read that way;
- transparency (RGBA, LA, palette or colour key) is composited on white;
- 16-bit grey is scaled to 8 bits by 255/65535, not clipped; CMYK, grey, palette, bilevel -> RGB;
- the file's content decides, not its name: a PNG called ``.JPEG`` is read as a PNG.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

STEPS = ("center_crop", "resize", "resize_short")
FILTERS = ("nearest", "box", "bilinear", "bicubic", "lanczos")
# Formats that may hide behind an image's name. The others of Pillow stay off: some start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_SIDE = 8192
MAX_PIXELS = 1 << 28  # a resized image larger than this is refused (a 1 x 100,000 strip, say)

MASK_FILTER = "nearest"

_STEP = re.compile(r"([a-z_]+)(?:\(([^()]*)\))?")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recipe. ``size`` is None for the plain ``center_crop``."""

    name: str
    size: int | None = None
    filter: str | None = None


def _parse_step(text: str, recipe: str) -> Step:
    where = f"preprocessing {recipe!r}: step {text!r}"
    match = _STEP.fullmatch(text)
    if match is None or match[1] not in STEPS:
        name = text.partition("(")[0]
        raise UsageError(f"{where} is not known.{did_you_mean(name, STEPS)}")
    name = match[1]
    arguments = [] if match[2] is None else [part.strip() for part in match[2].split(",")]
    if name == "center_crop" and match[2] is None:
        return Step(name)
    wanted = 1 if name == "center_crop" else 2
    form = f"{name}(N)" if wanted == 1 else f"{name}(N,FILTER) with FILTER one of {', '.join(FILTERS)}"
    if len(arguments) != wanted:
        raise UsageError(f"{where}: expected {form}")
    if not re.fullmatch(r"[0-9]{1,5}", arguments[0]) or not 1 <= int(arguments[0]) <= MAX_SIDE:
        raise UsageError(f"{where}: N must be a whole number of pixels from 1 to {MAX_SIDE}")
    if wanted == 2 and arguments[1] not in FILTERS:
        raise UsageError(f"{where}: unknown filter {arguments[1]!r}.{did_you_mean(arguments[1], FILTERS)}")
    return Step(name, int(arguments[0]), arguments[1] if wanted == 2 else None)


@lru_cache(maxsize=128)
def parse_preprocessing(recipe: str) -> tuple[Step, ...]:
    """Parse a recipe and check that it ends in a square of known side.

    Raises:
        UsageError: Unknown step or filter (the nearest is named), wrong arguments, not a square.
    """
    steps = tuple(_parse_step(part.strip(), recipe) for part in recipe.split("|"))
    if _output_side(steps) is None:
        raise UsageError(
            f"preprocessing {recipe!r}: the result has no fixed square size. "
            "End with resize(N,FILTER) or center_crop(N)."
        )
    return steps


def _output_side(steps: Sequence[Step]) -> int | None:
    short: int | None = None
    square = False
    for step in steps:
        if step.name == "resize_short":
            short = step.size
        elif step.name == "center_crop" and step.size is None:
            square = True
        else:
            short, square = step.size, True
    return short if square else None


def output_side(recipe: str) -> int:
    """Side of the square that ``recipe`` makes, in pixels."""
    side = _output_side(parse_preprocessing(recipe))
    assert side is not None
    return side


def _to_rgb(image: Image) -> Image:
    """Any mode -> RGB, as the module's docstring says."""
    from PIL import Image as pil

    if image.mode.startswith("I"):  # I;16, I;16B, or I, as which Pillow opens some 16-bit files
        values = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return pil.fromarray(np.rint(values / 257.0).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UsageError("floating-point images have no declared range: convert them to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize(image: Image, size: tuple[int, int], name: str) -> Image:
    from PIL.Image import Resampling

    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(f"a {image.size[0]} x {image.size[1]} image is too elongated to resize to {size}")
    return image.resize(size, Resampling[name.upper()])


def _center_crop(image: Image, side: int) -> Image:
    def offset(length: int) -> int:  # torchvision rounds one way when cropping, another when padding
        return round((length - side) / 2) if length >= side else -((side - length) // 2)

    left, top = offset(image.size[0]), offset(image.size[1])
    return image.crop((left, top, left + side, top + side))


def _apply(image: Image, step: Step) -> Image:
    width, height = image.size
    if step.name == "center_crop":
        return _center_crop(image, step.size or min(width, height))
    assert step.size is not None and step.filter is not None
    if step.name == "resize":
        return _resize(image, (step.size, step.size), step.filter)
    long = int(step.size * max(width, height) / min(width, height))
    size = (step.size, long) if width <= height else (long, step.size)
    return _resize(image, size, step.filter)


def preprocess(image: Image, recipe: str) -> NDArray[np.uint8]:
    """Turn one PIL image into uint8 [3, S, S] (RGB) as ``recipe`` says.

    Raises:
        UsageError: A recipe that cannot be parsed, or an image of a kind that has no defined RGB value.
    """
    steps = parse_preprocessing(recipe)
    image = _to_rgb(image)
    for step in steps:
        image = _apply(image, step)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def load_image(path: Path, recipe: str) -> NDArray[np.uint8]:
    """Read one file and preprocess it: uint8 [3, S, S].

    Raises:
        CorruptFileError: Empty, truncated, not an image, or larger than Pillow's safety limit.
        MissingError: No such file.
        BenchError: The file cannot be read for a reason that is not its content.
        UsageError: The recipe cannot be parsed.
    """
    try:
        return _decode(path, recipe, str(path), size=None)
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file. The data changed after they were listed.") from error
    except OSError as error:  # the system speaks, not the decoder
        raise BenchError(f"{path}: cannot read: {error.strerror}") from error


def decode_image(content: bytes, recipe: str, *, name: str) -> NDArray[np.uint8]:
    """As :func:`load_image`, for a file that is in memory already (from an archive or a table).

    Args:
        content: The bytes of an image file.
        recipe: Preprocessing, see the module's docstring.
        name: What messages call it.

    Returns:
        uint8 [3, S, S].

    Raises:
        CorruptFileError: Empty, truncated, not an image, or larger than Pillow's safety limit.
        UsageError: The recipe cannot be parsed.
    """
    return _decode(BytesIO(content), recipe, name, size=len(content))


def load_from(paths: Sequence[Path], index: int, recipe: str) -> NDArray[np.uint8]:
    """As :func:`load_image` for ``paths[index]``; paths into an archive have a method ``read``."""
    read = getattr(paths, "read", None)
    if read is None:
        return load_image(paths[index], recipe)
    return decode_image(read(index), recipe, name=str(paths[index]))


def image_size(paths: Sequence[Path], index: int) -> tuple[int, int] | None:
    """Width and height of ``paths[index]`` by its header; None when it is no image that can be opened."""
    from PIL import Image

    read = getattr(paths, "read", None)
    try:
        with Image.open(paths[index] if read is None else BytesIO(read(index)), formats=FORMATS) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def header_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file that must be one, read off its header.

    Raises:
        CorruptFileError: Not an image.
        MissingError: No such file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file. The data changed after they were listed.") from error
    except UnidentifiedImageError as error:
        raise CorruptFileError(
            f"{path}: not an image that can be read. Replace it by an intact copy."
        ) from error


def load_mask(path: Path, recipe: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Read the mask of an image through the image's own crops and resizes, bool [S, S].

    Every resize takes the nearest pixel, so no value is invented. White is the object: a pixel counts when
    the mean of its channels is 128 or more (edges may be anti-aliased). A mask of another size than its
    image is first brought to that size.

    Args:
        path: The mask.
        recipe: Preprocessing of the image.
        size: Width and height of the image's file.

    Raises:
        CorruptFileError: Not an image, or of another shape than its image (more than 2 % in the ratio of
            width to height).
        MissingError: No such file.
    """
    steps = [
        s if s.filter is None else Step(s.name, s.size, MASK_FILTER) for s in parse_preprocessing(recipe)
    ]
    nearest = "|".join(
        s.name + (f"({s.size},{s.filter})" if s.filter else f"({s.size})" if s.size else "") for s in steps
    )

    def fit(mask: Image) -> Image:
        if mask.size == size:
            return mask
        (width, height), (wide, high) = mask.size, size
        if abs(width * high - height * wide) > 0.02 * height * wide:
            raise CorruptFileError(
                f"{path}: a mask of {width} x {height} pixels does not fit its image of {wide} x {high}. "
                "Replace it by the mask of this image."
            )
        return _resize(_to_rgb(mask), size, MASK_FILTER)

    try:
        pixels = _decode(path, nearest, str(path), size=None, before=fit)
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file. The data changed after they were listed.") from error
    except OSError as error:  # the system speaks, not the decoder
        raise BenchError(f"{path}: cannot read: {error.strerror}") from error
    white: NDArray[np.bool_] = pixels.sum(axis=0, dtype=np.int64) >= 3 * 128
    return white


def _decode(
    source: Path | BytesIO,
    recipe: str,
    name: str,
    *,
    size: int | None,
    before: Callable[[Image], Image] | None = None,
) -> NDArray[np.uint8]:
    """uint8 [3, S, S] of a file or of ``size`` bytes; an OSError that leaves here is the system's."""
    from PIL import Image, UnidentifiedImageError

    parse_preprocessing(recipe)
    advice = "Replace the file by an intact copy."
    try:
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            return preprocess(image if before is None else before(image), recipe)
    except UnidentifiedImageError as error:
        bytes_read = source.stat().st_size if isinstance(source, Path) else size
        what = "the file is empty" if bytes_read == 0 else "not an image that can be read"
        raise CorruptFileError(f"{name}: {what}. {advice}") from error
    except OSError as error:
        if error.errno is not None and isinstance(source, Path):
            raise
        raise CorruptFileError(f"{name}: damaged image ({error}). {advice}") from error
    except (ValueError, SyntaxError, EOFError, LookupError, OverflowError, struct.error) as error:
        raise CorruptFileError(f"{name}: damaged image ({error}). {advice}") from error
    except Image.DecompressionBombError as error:
        raise CorruptFileError(f"{name}: refused ({error}). {advice}") from error


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Some images in the order asked for.

    Attributes:
        indices: Positions in the list of paths, one per image.
        images: uint8 [B, 3, S, S]; all zero where the file is broken.
        broken: Index -> message, for the broken ones of this batch.
    """

    indices: list[int]
    images: Tensor
    broken: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Batches:
    """Map-style data set whose items are whole batches; errors come back as values, see ``_raise``."""

    paths: Sequence[Path]
    recipe: str
    batches: list[list[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ImageBatch | BenchError:
        import torch

        indices = self.batches[number]
        side = output_side(self.recipe)
        images = np.zeros((len(indices), 3, side, side), dtype=np.uint8)
        broken: dict[int, str] = {}
        for row, index in enumerate(indices):
            try:
                images[row] = load_from(self.paths, index, self.recipe)
            except CorruptFileError as error:
                broken[index] = str(error)
            except BenchError as error:
                return error
        return ImageBatch(indices, torch.from_numpy(images), broken)


def _same(item: Any) -> Any:
    return item


def iterate_images(
    paths: Sequence[Path],
    recipe: str,
    *,
    batch_size: int,
    num_workers: int,
    indices: Sequence[int] | NDArray[np.integer[Any]] | None = None,
) -> Iterator[ImageBatch]:
    """Read images in batches, in order, each exactly once; the last batch may be smaller.

    Broken files become zero images and are listed in ``broken``. A missing or unreadable file is no
    property of the image and ends the iteration, so that it is never recorded as a broken one.

    Args:
        paths: The files.
        recipe: Preprocessing, see the module's docstring.
        batch_size: Images per batch, at least 1.
        num_workers: Worker processes; 0 reads in this process. The images do not depend on it.
        indices: Positions in ``paths`` to read, in this order; None reads all.

    Raises:
        UsageError: Bad arguments (at the call, not at the first batch).
        MissingError: A file vanished. BenchError: a file cannot be read.
    """
    parse_preprocessing(recipe)
    if batch_size < 1 or num_workers < 0:
        raise UsageError(
            f"batch_size {batch_size} must be at least 1 and num_workers {num_workers} at least 0"
        )
    order = list(range(len(paths))) if indices is None else [int(i) for i in indices]
    outside = next((i for i in order if not 0 <= i < len(paths)), None)
    if outside is not None:
        raise UsageError(f"image index {outside} is outside 0..{len(paths) - 1}")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _iterate(_Batches(paths, recipe, batches), min(num_workers, len(batches)))


def _iterate(source: _Batches, num_workers: int) -> Iterator[ImageBatch]:
    items: Any
    if num_workers == 0:
        items = (source[number] for number in range(len(source)))
    else:
        from torch.utils.data import DataLoader

        dataset: Any = source
        items = DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=_same)
    for item in items:
        if isinstance(item, BenchError):
            raise item
        yield item
