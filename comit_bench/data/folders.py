"""Any folder of images: which files count as images, in which order, under which names."""

from __future__ import annotations

import os
from pathlib import Path

from comit_bench.data.readers.common import EXTENSIONS
from comit_bench.errors import BenchError, MissingError, UsageError

SUFFIXES = EXTENSIONS | {".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def list_images(folder: Path) -> tuple[str, ...]:
    """Relative names (``sub/a.png``) of all image files below a folder, sorted by code point.

    A file counts when its suffix says so (``SUFFIXES``, case does not matter); what it holds is read later.
    Hidden files and folders (a leading dot) are left out, links to folders are not followed.

    Raises:
        MissingError: No such folder, or no image below it.
        UsageError: A file, not a folder; or a name that is not valid Unicode, for which no seed exists.
        BenchError: A folder below it cannot be listed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: this is a file; give the folder that holds the images")
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder of images")
    names: list[str] = []
    for place, below, files in os.walk(folder, onerror=_refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        names += [
            Path(place, name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{folder}: the file name {name!r} is not valid UTF-8: rename it") from None
    if not names:
        raise MissingError(f"{folder}: no image below it (looked for {', '.join(sorted(SUFFIXES))})")
    return tuple(sorted(names))


def _refuse(error: OSError) -> None:
    raise BenchError(f"{error.filename}: cannot list this folder: {error.strerror}") from error
