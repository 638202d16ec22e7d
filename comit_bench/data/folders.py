"""Any folder of images: which files count as images, in which order, under which names."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from comit_bench.data.readers.common import EXTENSIONS, few
from comit_bench.errors import BenchError, MissingError, UsageError
from comit_bench.files import special_file, why_no_file

SUFFIXES = EXTENSIONS | {".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_log = logging.getLogger(__name__)


def list_images(folder: Path) -> tuple[str, ...]:
    """Relative names (``sub/a.png``) of all image files below a folder, sorted by code point.

    A file counts when its suffix says so (``SUFFIXES``, case does not matter); what it holds is read later.
    Hidden files and folders (a leading dot) are left out, links to folders are not followed. What has an
    image's name and is no file is named in the log and left out.

    Raises:
        MissingError: No such folder, or no image below it.
        UsageError: A file, not a folder; or a name that is not valid Unicode, for which no seed exists.
        BenchError: A folder below it cannot be listed.
    """
    names, odd = list_folder(folder)
    if odd:
        named = few(f"{name} ({what})" for name, what in odd.items())
        _log.warning("%s: %d entries are called like images but are no files: %s", folder, len(odd), named)
    return names


def list_folder(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """As :func:`list_images`, with what is no file beside: name -> what it is, e.g. a named pipe."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: this is a file; give the folder that holds the images")
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder of images")
    names, odd = walk_images(folder, SUFFIXES, follow=False)
    for name in (*names, *odd):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{folder}: the file name {name!r} is not valid UTF-8: rename it") from None
    if not names:
        named = f"; {few(f'{name} is {what}' for name, what in odd.items())}" if odd else ""
        raise MissingError(f"{folder}: no image below it (looked for {', '.join(sorted(SUFFIXES))}{named})")
    return tuple(sorted(names)), dict(sorted(odd.items()))


def walk_images(root: Path, suffixes: Collection[str], *, follow: bool) -> tuple[list[str], dict[str, str]]:
    """Names below ``root`` of files with one of ``suffixes``; and of what is no file, with what it is.

    Args:
        root: Where to begin.
        suffixes: In lower case, with their dots.
        follow: Whether links to folders are followed; one that leads back above itself is not.
    """
    names: list[str] = []
    odd: dict[str, str] = {}
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        place = root / prefix
        try:
            status = place.stat()
            with os.scandir(place) as entries:
                found = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda e: e.name)
        except OSError as error:
            raise BenchError(f"{place}: cannot list this folder: {error.strerror}") from error
        inside = above | {(status.st_dev, status.st_ino)}
        for entry in found:
            name = prefix + entry.name
            image = os.path.splitext(entry.name)[1].lower() in suffixes  # noqa: PTH122
            what = _kind(entry, image)
            if what == "a folder" and (follow or not entry.is_symlink()):
                below = entry.stat()
                if (below.st_dev, below.st_ino) in inside:
                    odd[name] = "a link to a folder above it"
                    continue
                waiting.append((f"{name}/", inside))
            if image and what is None:
                names.append(name)
            elif image and what is not None:
                odd[name] = what
    return names, odd


def _kind(entry: os.DirEntry[str], image: bool) -> str | None:
    """What an entry is when it is no ordinary file; of files without an image's name only folders matter."""
    if entry.is_file(follow_symlinks=False):
        return None
    if entry.is_dir(follow_symlinks=False):
        return "a folder"
    if image or entry.is_symlink():
        return why_no_file(entry.path)
    return special_file(entry.stat(follow_symlinks=False).st_mode)
