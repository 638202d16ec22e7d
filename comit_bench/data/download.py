"""Downloads of data sets that may be downloaded freely: resumable, checked, unpacked safely.

A file arrives under ``.downloads/`` of the data set's folder as ``NAME.arrived.part``; a broken one continues
there (HTTP ranges, and only when the server says that the file is still the same). Then its size and its
checksum (where the recipe has one) are compared, it is unpacked, which checks the CRC of every member, and
``NAME.json`` notes url, size and sha256. A file with such a note and its content in place is done. What turns
out to be no archive is removed, so that it does not stand in the way of the right one.

Only files and folders are unpacked, only below the data set's folder, and never more than ``MAX_RATIO`` times
the archive's size.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation
from comit_bench.files import (
    atomic_path,
    check_relative,
    check_url,
    explain_write_error,
    inside,
    locked,
    open_plain,
    refuse_special,
    require_folder,
    write_atomic,
)
from comit_bench.recipes.download import download as download_file
from comit_bench.recipes.specs import DatasetSpec, DownloadSpec, check_paths

NOTES = ".downloads"
BLOCK = 1 << 20
MAX_RATIO = 200  # annotations in JSON shrink to a twentieth; a bomb to a thousandth
MAX_MEMBERS = 5_000_000
SMALL = 1 << 26  # bytes that any archive may become
_DAMAGES = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)


def is_done(item: DownloadSpec, folder: Path) -> bool:
    """Whether the content of a download is in place. Content that came another way counts too."""
    if (folder / NOTES / f"{item.file}.unpacking").exists():
        return False
    place = folder / item.creates
    return place.is_file() or (place.is_dir() and next(place.iterdir(), None) is not None)


def download(
    spec: DatasetSpec,
    folder: Path,
    *,
    keep: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fetch and unpack everything of a data set that is not in place yet.

    Args:
        spec: The data set's recipe.
        folder: Where its content goes.
        keep: Whether archives stay after unpacking.
        progress: Show a bar.
        say: Told about every step.

    Raises:
        UnsupportedOperation: Nothing of it can be downloaded; the message has the steps.
        MissingError: The server does not have the file, or cannot be reached.
        CorruptFileError: What arrived is not what was announced.
        BenchError: Disk full or not writable.
    """
    check_paths(spec)
    if not spec.downloads:
        raise UnsupportedOperation(
            f"{spec.name} cannot be downloaded by a program. {(spec.obtain or spec.homepage or '').strip()} "
            f"Put the files into DIR/{spec.folder} and pass --data-root DIR."
        )
    require_folder(folder)
    with locked(folder / ".download.lock", f"downloading {spec.name}"):
        for item in spec.downloads:
            _download_one(item, folder, keep=keep, progress=progress, say=say)


def _download_one(
    item: DownloadSpec, folder: Path, *, keep: bool, progress: bool, say: Callable[[str], None]
) -> None:
    what = f"download {item.url}"
    inside(folder, item.creates, what=f"{what}: creates")
    if is_done(item, folder):
        say(f"{item.creates}: there")
        return
    archive = inside(folder if item.unpack is None else folder / NOTES, item.file, what=f"{what}: file")
    if not archive.is_file():
        say(f"{item.url} -> {archive}")
        fetch(item, archive, progress=progress)
    if item.unpack is None:
        return
    say(f"unpacking {archive.name}")
    place = inside(folder, item.unpack, what=f"{what}: unpack", here=True)
    try:
        unpack(archive, place, item.creates)
        if not is_done(item, folder):
            raise CorruptFileError(f"{archive}: has been unpacked but holds no {item.creates}")
    except CorruptFileError:
        if _fetched(archive):
            archive.unlink()  # the next attempt must not find it again
        raise
    if not keep:
        archive.unlink()


def _fetched(archive: Path) -> bool:
    """Whether a file came from a server, not from a person."""
    try:
        note = json.loads((archive.parent / f"{archive.name}.json").read_text(encoding="utf-8"))
        return bool(note["size"] == archive.stat().st_size)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def fetch(item: DownloadSpec, target: Path, *, progress: bool = True) -> str:
    """Download one file, whole or not at all, continuing an earlier attempt; returns ``sha256:<hex>``."""
    check_url(item.url, checked=item.checksum is not None)
    arrived = target.with_name(f"{target.name}.arrived")
    refuse_special(target)
    with tqdm(desc=target.name, unit="B", unit_scale=True, disable=not progress) as bar:

        def advance(done: int, total: int | None) -> None:
            bar.total = total or item.size
            bar.update(done - bar.n)

        checked = item.checksum is not None
        try:
            download_file(item.url, arrived, advance=advance, checked=checked, size=item.size)
        except MissingError as error:
            raise MissingError(f"{error} Or get the file another way and put it at {target}.") from error
    sha256, found = _digests(arrived, item.checksum)
    size = arrived.stat().st_size
    if (item.size is not None and size != item.size) or item.checksum not in (None, found):
        arrived.unlink()
        raise CorruptFileError(
            f"{item.url}: what arrived has {size} bytes and {found}, expected {item.size or 'any'} bytes and "
            f"{item.checksum or 'any checksum'}. It was removed; the file on the server may have changed."
        )
    arrived.replace(target)
    note = {"url": item.url, "size": size, "sha256": sha256, "checked": item.checksum}
    notes = target.parent if target.parent.name == NOTES else target.parent / NOTES
    write_atomic(notes / f"{target.name}.json", json.dumps(note, indent=1) + "\n")
    return sha256


def _digests(path: Path, wanted: str | None) -> tuple[str, str]:
    """``sha256:<hex>``, and the digest by the algorithm of ``wanted``."""
    algorithm = "sha256" if wanted is None else wanted.partition(":")[0]
    states = {name: hashlib.new(name) for name in {"sha256", algorithm}}
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            for state in states.values():
                state.update(block)
    return f"sha256:{states['sha256'].hexdigest()}", f"{algorithm}:{states[algorithm].hexdigest()}"


def unpack(archive: Path, folder: Path, creates: str) -> None:
    """Unpack a zip or tar into ``folder`` so that ``folder/creates`` appears.

    An archive may hold ``creates`` itself, hold it below other folders, or hold its content. A folder that
    is not there yet appears whole; files that go into an existing one do so one by one, and
    :func:`is_done` says no until all have.
    """
    begun = archive.with_name(f"{archive.name}.unpacking")
    unpacked = archive.with_name(f"{archive.name}.content")
    with atomic_path(unpacked, durable=False) as temporary:
        try:
            _extract(archive, temporary)
        except (*_DAMAGES, ValueError, LookupError, RuntimeError) as error:
            raise CorruptFileError(
                f"{archive}: damaged or dangerous archive ({error}). Nothing of it was put in place. Remove "
                "it, if it is still there, and run the same command again."
            ) from error
    write_atomic(begun, "")
    try:
        wanted = PurePosixPath(creates).parts
        inside = [p for p in unpacked.rglob(wanted[-1]) if p.parts[-len(wanted) :] == wanted]
        if inside:
            shortest = min(inside, key=lambda path: len(path.parts))
            _merge(shortest.parents[len(wanted) - 1], folder)
        else:
            _merge(unpacked, folder / creates)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    begun.unlink()


def _merge(source: Path, target: Path) -> None:
    """Move a file, or a folder with its content, to where other content may be."""
    if source.is_dir() and target.is_dir():
        for path in sorted(source.iterdir()):
            _merge(path, target / path.name)
    else:
        refuse_special(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


def _extract(archive: Path, folder: Path) -> None:
    """Write the files of a zip or tar below a new folder; ValueError for anything else than a plain set."""
    folder.mkdir()
    budget = _Budget(archive, folder)
    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    for name, size, is_folder, stream in members(archive, budget):
        try:
            check_relative(name, here=is_folder)
        except ValueError as error:
            raise ValueError(f"the member {name!r} would leave the folder") from error
        budget.spend(name, size)
        path = folder / name.replace("\\", "/")
        try:
            (path if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
            if not is_folder:
                _write_member(path, name, size, stream)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"the member {name!r} is there twice") from error


def _write_member(path: Path, name: str, size: int, stream: Any) -> None:
    with path.open("xb") as file:
        left = size
        while block := stream.read(min(BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise ValueError(f"the member {name!r} is larger than it says")
            file.write(block)
        if left:
            raise ValueError(f"the member {name!r} is shorter than it says")


class _Budget:
    """How much an archive may become."""

    def __init__(self, archive: Path, folder: Path) -> None:
        packed = archive.stat().st_size
        self.bytes = max(MAX_RATIO * packed, SMALL)
        self.members = MAX_MEMBERS
        self.free = shutil.disk_usage(folder).free
        self.packed = packed

    def spend(self, name: str, size: int) -> None:
        """Raises ValueError, or BenchError where the disk is too small."""
        self.bytes -= size
        self.free -= size
        self.members -= 1
        if self.bytes < 0:
            raise ValueError(f"{name!r}: it becomes more than {MAX_RATIO} times its {self.packed:,} bytes")
        if self.members < 0:
            raise ValueError(f"it has more than {MAX_MEMBERS:,} members")
        if self.free < 0:
            raise explain_write_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Path(name))


_Member = tuple[str, int, bool, Any]  # name, size, whether it is a folder, stream


def _zip_members(archive: Path, budget: _Budget) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        if len(file.infolist()) > MAX_MEMBERS:
            raise ValueError(f"it has more than {MAX_MEMBERS:,} members")
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"the member {member.filename!r} is a link or a special file")
            if member.is_dir():
                yield member.filename, 0, True, None
                continue
            with file.open(member) as stream:
                yield member.filename, member.file_size, False, stream


def _tar_members(archive: Path, budget: _Budget) -> Iterator[_Member]:
    with open_plain(archive) as raw:
        magic = raw.read(6)
    unpackers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    opened = next((unpack for start, unpack in unpackers.items() if magic.startswith(start)), open)
    with opened(archive, "rb") as plain:
        stream: Any = _Bounded(plain, budget.bytes)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or all of them are kept in memory
                if member.isdir():
                    yield member.name, 0, True, None
                elif member.isreg() and not member.issparse():
                    yield member.name, member.size, False, tar.extractfile(member)
                else:
                    raise ValueError(f"the member {member.name!r} is a link or a special file")


class _Bounded:
    """A stream out of which no more than so many bytes are read; a header may claim any length."""

    def __init__(self, stream: Any, most: int) -> None:
        self.stream, self.most = stream, most

    def read(self, size: int = -1) -> bytes:
        if size < 0 or self.stream.tell() + size > self.most + SMALL:
            raise ValueError("it becomes too large")
        content: bytes = self.stream.read(size)
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position > self.most + SMALL:
            raise ValueError("it becomes too large")
        return int(self.stream.seek(position))

    def tell(self) -> int:
        return int(self.stream.tell())
