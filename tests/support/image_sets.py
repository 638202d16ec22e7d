"""One small set of image files, written in every form that training reads."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

# suffix -> Pillow's format and mode: what a photo collection holds
KINDS = {
    "png": ("PNG", "RGB"),
    "jpg": ("JPEG", "RGB"),
    "jpeg": ("JPEG", "CMYK"),
    "JPEG": ("JPEG", "L"),
    "webp": ("WEBP", "RGB"),
    "bmp": ("BMP", "RGB"),
}


def encoded(number: int, suffix: str) -> bytes:
    """An image file whose content is a function of its number; no two numbers look alike."""
    kind, mode = KINDS[suffix]
    pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    pixels[8:32, 8:28] = (number * 37 % 256, number * 11 % 256, 255 - number * 5 % 256)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def image_files(count: int, *, below: str = "", start: int = 0) -> dict[str, bytes]:
    """Name -> content, in two class folders and all formats; names sort unlike the numbers."""
    suffixes = list(KINDS)
    files = {}
    for i in range(start, start + count):
        name = f"{below}{'cat' if i % 2 else 'dog'}/{(i * 7) % 100:03d}-{i}.{suffixes[i % len(suffixes)]}"
        files[name] = encoded(i, suffixes[i % len(suffixes)])
    return files


def write_folder(root: Path, files: Mapping[str, bytes]) -> None:
    """A tree of files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_tar(path: Path, files: Mapping[str, bytes], *, form: int = tarfile.GNU_FORMAT) -> None:
    """One tar, with a label beside every image as webdataset has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            stem = name.partition(".")[0]
            for member, body in ((name, content), (f"{stem}.cls", b"3")):
                entry = tarfile.TarInfo(member)
                entry.size = len(body)
                archive.addfile(entry, io.BytesIO(body))


def write_shards(folder: Path, files: Mapping[str, bytes], shards: int) -> None:
    """``shard-000000.tar`` and following, files dealt out in turn."""
    names = list(files)
    for number in range(shards):
        write_tar(folder / f"shard-{number:06d}.tar", {n: files[n] for n in names[number::shards]})
