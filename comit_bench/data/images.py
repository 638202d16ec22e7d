"""Declared image preprocessing, and reading many image files in order.

Preprocessing is declared as a string, hashed and stored with every score: steps joined by ``|``.

==========================  =========================================================================
``center_crop``             the largest centred square
``center_crop(N)``          a centred N x N square; smaller images get a black border
``resize(N,FILTER)``        exactly N x N, the aspect ratio is not kept
``resize_short(N,FILTER)``  the shorter side becomes N, the aspect ratio is kept
``exif``                    first of all: turn the image upright, as its EXIF orientation says
==========================  =========================================================================

``FILTER`` is nearest, box, bilinear, bicubic or lanczos, always antialiased as Pillow does it; crop
offsets and rounding equal torchvision's ``CenterCrop`` and ``Resize``. It must end in a square of
known side.

What every image goes through first:

- without the step ``exif`` the EXIF orientation is *not* applied: ImageNet and its published scores are read
  that way. With it, photographs from phones come out upright (:func:`upright` puts it in front);
- transparency (RGBA, LA, palette or colour key) is composited on white;
- 16-bit grey is scaled to 8 bits by 255/65535, not clipped; CMYK, grey, palette, bilevel -> RGB;
- the file's content decides, not its name: a PNG called ``.JPEG`` is read as a PNG.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL
from functools import lru_cache
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose
from torch import Tensor

from comit_bench.data.masks import Mask, read_levels
from comit_bench.data.workers import read_ahead
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, did_you_mean
from comit_bench.files import special_file

STEPS = ("center_crop", "resize", "resize_short", "exif")
FILTERS = ("nearest", "box", "bilinear", "bicubic", "lanczos")
# Formats that may hide behind an image's name. The others of Pillow stay off: some start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_SIDE = 8192
MAX_PIXELS = 1 << 28  # a resized image larger than this is refused (a 1 x 100,000 strip, say)
MAX_BYTES = 1 << 31  # a larger file is no photograph
ORIENTATION = 0x0112  # EXIF tag

MASK_FILTER = "nearest"

_STEP = re.compile(r"([a-z_]+)(?:\(([^()]*)\))?")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of preprocessing. ``size`` is None for the plain ``center_crop``."""

    name: str
    size: int | None = None
    filter: str | None = None


def _parse_step(text: str, preprocessing: str) -> Step:
    where = f"preprocessing {preprocessing!r}: step {text!r}"
    match = _STEP.fullmatch(text)
    if match is None or match[1] not in STEPS:
        name = text.partition("(")[0]
        raise UsageError(f"{where} is not known.{did_you_mean(name, STEPS)}")
    name = match[1]
    if name == "exif":
        if match[2] is not None:
            raise UsageError(f"{where}: expected exif, without arguments")
        return Step(name)
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
def parse_preprocessing(preprocessing: str) -> tuple[Step, ...]:
    """Parse a declaration and check that it ends in a square of known side."""
    steps = tuple(_parse_step(part.strip(), preprocessing) for part in preprocessing.split("|"))
    if any(step.name == "exif" for step in steps[1:]):
        raise UsageError(f"preprocessing {preprocessing!r}: exif can only be the first step")
    if _output_side(steps) is None:
        raise UsageError(
            f"preprocessing {preprocessing!r}: the result has no fixed square size. "
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
        elif step.name != "exif":
            short, square = step.size, True
    return short if square else None


def upright(preprocessing: str) -> str:
    """The same preprocessing of images that are turned upright first, as their EXIF orientation says."""
    return preprocessing if preprocessing.startswith("exif|") else f"exif|{preprocessing}"


def output_side(preprocessing: str) -> int:
    """Side of the square that ``preprocessing`` makes, in pixels."""
    side = _output_side(parse_preprocessing(preprocessing))
    assert side is not None
    return side


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, as the module's docstring says."""
    if image.mode.startswith("I"):  # I;16, I;16B, or I, as which Pillow opens some 16-bit files
        values = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return Image.fromarray(np.rint(values / 257.0).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UsageError("floating-point images have no declared range: convert them to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize(image: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(f"a {image.size[0]} x {image.size[1]} image is too elongated to resize to {size}")
    return image.resize(size, Resampling[name.upper()])


def _center_crop(image: Image.Image, side: int) -> Image.Image:
    def offset(length: int) -> int:  # torchvision rounds one way when cropping, another when padding
        return round((length - side) / 2) if length >= side else -((side - length) // 2)

    left, top = offset(image.size[0]), offset(image.size[1])
    return image.crop((left, top, left + side, top + side))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a loaded image; 1 where there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the decoder's business: the pixels are intact
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """Turn and mirror an image as its orientation says."""
    how = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(how[orientation]) if orientation in how else image


def _apply(image: Image.Image, step: Step) -> Image.Image:
    width, height = image.size
    if step.name == "center_crop":
        return _center_crop(image, step.size or min(width, height))
    assert step.size is not None and step.filter is not None
    if step.name == "resize":
        return _resize(image, (step.size, step.size), step.filter)
    long = int(step.size * max(width, height) / min(width, height))
    size = (step.size, long) if width <= height else (long, step.size)
    return _resize(image, size, step.filter)


def preprocess(image: Image.Image, preprocessing: str) -> NDArray[np.uint8]:
    """Turn one PIL image into uint8 [3, S, S] (RGB) as ``preprocessing`` says.

    Raises:
        UsageError: It cannot be parsed, or an image of a kind that has no defined RGB value.
    """
    steps = parse_preprocessing(preprocessing)
    orientation = _orientation(image) if steps[0].name == "exif" else 1
    return _through(_turn(_to_rgb(image), orientation), steps)


def _through(image: Image.Image, steps: Sequence[Step]) -> NDArray[np.uint8]:
    for step in steps:
        if step.name != "exif":
            image = _apply(image, step)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def load_image(path: Path, preprocessing: str) -> NDArray[np.uint8]:
    """Read one file and preprocess it: uint8 [3, S, S].

    Raises:
        CorruptFileError: Empty, truncated, not an image, or larger than Pillow's safety limit: whatever its
            decoder objects to.
        MissingError: No such file.
        BenchError: The file cannot be read for a reason that is not its content, or is no file (a folder, a
            named pipe); such things are never opened.
        UsageError: The preprocessing cannot be parsed.
    """
    return decode_image(_content(path), preprocessing, name=str(path))


def _content(path: Path) -> bytes:
    """The bytes of a file; raises as :func:`load_image`. Nothing but ordinary files is opened."""
    with _opened(path) as stream:
        return stream.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """An ordinary file, open for reading; errors as in :func:`load_image`."""
    try:
        status = path.stat()
        if (what := special_file(status.st_mode)) is not None:
            raise BenchError(f"{path}: cannot read: this is {what}, not a file")
        if status.st_size > MAX_BYTES:
            raise CorruptFileError(f"{path}: refused: {status.st_size:,} bytes are no image")
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file. The data changed after they were listed.") from error
    except OSError as error:
        raise BenchError(f"{path}: cannot read: {error.strerror or error}") from error


def decode_image(content: bytes, preprocessing: str, *, name: str) -> NDArray[np.uint8]:
    """As :func:`load_image`, for the bytes of a file; messages call it ``name``."""
    parse_preprocessing(preprocessing)
    with _decoder(BytesIO(content), name) as image:
        return preprocess(image, preprocessing)


def load_from(paths: Sequence[Path], index: int, preprocessing: str) -> NDArray[np.uint8]:
    """As :func:`load_image` for ``paths[index]``; paths into an archive have a method ``read``."""
    return decode_image(_content_of(paths, index), preprocessing, name=str(paths[index]))


def _content_of(paths: Sequence[Path], index: int) -> bytes:
    read = getattr(paths, "read", None)
    return _content(paths[index]) if read is None else read(index)


def image_size(paths: Sequence[Path], index: int) -> tuple[int, int] | None:
    """Width and height of ``paths[index]`` by its header; None when it is no image that can be opened."""
    read = getattr(paths, "read", None)
    try:
        if read is None:
            return header_size(paths[index])
        with _decoder(BytesIO(read(index)), str(paths[index]), header=True) as image:
            return image.size
    except (CorruptFileError, MissingError):
        return None


def header_size(path: Path) -> tuple[int, int]:
    """Width and height as the pixels are stored, read off the header; errors as in :func:`load_image`."""
    with _opened(path) as stream, _decoder(stream, str(path), header=True) as image:
        return image.size


def mask_of(photo: Path, path: Path, preprocessing: str) -> tuple[NDArray[np.bool_], Mask]:
    """Read the mask of a photograph through its own crops and resizes: bool [S, S], and the whole mask.

    What its pixels mean is told by :mod:`comit_bench.data.masks`. Every resize takes the nearest pixel, so no
    value is invented. A mask of another size than its photograph is first brought to that size. With the step
    ``exif`` it is turned: as its own orientation says, or, where it has none and its size is not that of the
    upright photograph alone, together with its photograph.

    Args:
        photo: The photograph; only its header is read.
        path: The mask.
        preprocessing: That of the photograph.

    Raises:
        CorruptFileError: Not a mask, or of another shape than its photograph (more than 2 % in the ratio of
            width to height), or the photograph is no image.
        MissingError: No such file. BenchError: No file, or not readable.
    """
    return _mask_through(photo, path, parse_preprocessing(preprocessing))


def whole_image(paths: Sequence[Path], index: int, *, exif: bool) -> NDArray[np.uint8]:
    """``paths[index]`` without any crop, uint8 [H, W, 3]; errors as in :func:`load_image`."""
    with _decoder(BytesIO(_content_of(paths, index)), str(paths[index])) as image:
        return np.asarray(_turn(_to_rgb(image), _orientation(image) if exif else 1))


def whole_mask(photo: Path, path: Path, *, exif: bool) -> NDArray[np.bool_]:
    """A mask in the pixels of its photograph as :func:`whole_image` shows it, bool [H, W]."""
    return _mask_through(photo, path, (Step("exif"),) if exif else ())[0]


def _mask_through(photo: Path, path: Path, steps: Sequence[Step]) -> tuple[NDArray[np.bool_], Mask]:
    """A mask through the steps of its photograph, and the whole mask."""
    mask, own = _read_mask(path)
    with _opened(photo) as stream, _decoder(stream, str(photo), header=True) as image:
        size, orientation = image.size, _orientation(image)
    pixels = Image.fromarray(mask.pixels.astype(np.uint8) * np.uint8(255))
    if any(step.name == "exif" for step in steps):
        upright_size = (size[1], size[0]) if orientation >= 5 else size
        if own > 1:
            pixels = _turn(pixels, own)
        elif _same_shape(pixels.size, size) or not _same_shape(pixels.size, upright_size):
            pixels = _turn(pixels, orientation)
        size = upright_size
    if not _same_shape(pixels.size, size):
        (width, height), (wide, high) = pixels.size, size
        raise CorruptFileError(
            f"{path}: a mask of {width} x {height} pixels does not fit its image of {wide} x {high}. "
            "Replace it by the mask of this image."
        )
    if pixels.size != size:
        pixels = _resize(pixels, size, MASK_FILTER)
    nearest = [step if step.filter is None else Step(step.name, step.size, MASK_FILTER) for step in steps]
    found: NDArray[np.bool_] = _through(pixels.convert("RGB"), nearest)[0] >= 128
    return found, mask


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes agree in their ratio of width to height, up to 2 %."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= 0.02 * one[1] * other[0]


def read_mask(path: Path) -> Mask:
    """The object in a mask's file, as its pixels are stored; errors as in :func:`mask_of`."""
    return _read_mask(path)[0]


def _read_mask(path: Path) -> tuple[Mask, int]:
    """A mask and the EXIF orientation of its file."""
    content = _content(path)
    with _decoder(BytesIO(content), str(path)) as image:
        lossy = image.format == "JPEG" or (image.format == "WEBP" and b"VP8L" not in content[:4096])
        return read_levels(image, lossy=lossy, name=str(path)), _orientation(image)


@contextmanager
def _decoder(source: BinaryIO, name: str, *, header: bool = False) -> Iterator[Image.Image]:
    """An opened (and unless told otherwise decoded) image; what goes wrong with it is the file's fault.

    Decoders raise all kinds of errors for damaged files: SyntaxError, struct.error, MemoryError, whatever a
    plugin comes across.
    """
    advice = "Replace the file by an intact copy."
    try:
        with Image.open(source, formats=FORMATS) as image:
            if not header:
                image.load()
            yield image
    except CorruptFileError:
        raise
    except UnidentifiedImageError as error:
        what = "not an image that can be read" if source.seek(0, SEEK_END) else "the file is empty"
        raise CorruptFileError(f"{name}: {what}. {advice}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CorruptFileError(f"{name}: refused ({error}). {advice}") from error
    except MemoryError as error:
        raise CorruptFileError(f"{name}: refused (its pixels do not fit into memory). {advice}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):
            raise  # the system's: the disk cannot be read
        said = str(error) or type(error).__name__
        raise CorruptFileError(f"{name}: damaged image ({said}). {advice}") from error


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
    """Gives the batch of a list of indices; errors come back as values, see :func:`iterate_images`."""

    paths: Sequence[Path]
    preprocessing: str

    def __getitem__(self, indices: list[int]) -> ImageBatch | BenchError:
        side = output_side(self.preprocessing)
        images = np.zeros((len(indices), 3, side, side), dtype=np.uint8)
        broken: dict[int, str] = {}
        for row, index in enumerate(indices):
            try:
                images[row] = load_from(self.paths, index, self.preprocessing)
            except CorruptFileError as error:
                broken[index] = str(error)
            except BenchError as error:
                return error
        return ImageBatch(indices, torch.from_numpy(images), broken)


def iterate_images(
    paths: Sequence[Path],
    preprocessing: str,
    *,
    batch_size: int,
    num_workers: int,
    indices: Iterable[int] | NDArray[np.integer[Any]] | None = None,
) -> Iterator[ImageBatch]:
    """Read images in batches, in order, each exactly once; the last batch may be smaller.

    Broken files become zero images and are listed in ``broken``. A missing or unreadable file is no
    property of the image and ends the iteration, so that it is never recorded as a broken one.

    Args:
        paths: The files.
        preprocessing: See the module's docstring.
        batch_size: Images per batch, at least 1.
        num_workers: Worker processes; 0 reads in this process. The images do not depend on it.
        indices: Positions in ``paths`` to read, in this order; None reads all. An iterator is asked for the
            next ones as they are needed.

    Raises:
        UsageError: Bad arguments (at the call, not at the first batch).
        MissingError: A file vanished. BenchError: a file cannot be read, or a worker does not answer.
    """
    parse_preprocessing(preprocessing)
    if batch_size < 1 or num_workers < 0:
        raise UsageError(
            f"batch_size {batch_size} must be at least 1 and num_workers {num_workers} at least 0"
        )
    order: Iterable[Any] = range(len(paths)) if indices is None else indices
    if isinstance(order, Sized):
        order = [_checked(int(i), len(paths)) for i in order]
        num_workers = min(num_workers, -(-len(order) // batch_size))
    return _iterate(_Batches(paths, preprocessing), _cut(order, batch_size, len(paths)), num_workers)


def _checked(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise UsageError(f"image index {index} is outside 0..{count - 1}")
    return index


def _cut(order: Iterable[Any], size: int, count: int) -> Iterator[list[int]]:
    """Lists of ``size`` indices; the last may be shorter."""
    part: list[int] = []
    for index in order:
        part.append(_checked(int(index), count))
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _iterate(source: _Batches, batches: Iterator[list[int]], num_workers: int) -> Iterator[ImageBatch]:
    for item in read_ahead(source, batches, num_workers):
        if isinstance(item, BenchError):
            raise item
        yield item
