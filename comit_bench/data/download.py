"""Downloads of data sets that may be downloaded freely: resumable, checked, unpacked safely.

A file arrives under ``.downloads/`` of the data set's folder as ``NAME.part``; a broken connection continues
there (HTTP ranges, and only when the server says that the file is still the same). Then its size and its
checksum (where the recipe has one) are compared, it is unpacked, which checks the CRC of every member, and
``NAME.json`` notes url, size and sha256. A file with such a note and its content in place is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import atomic_path, write_atomic
from comit_bench.recipes import DatasetSpec, DownloadSpec

NOTES = ".downloads"
BLOCK = 1 << 20
ATTEMPTS = 5
TIMEOUT = 60  # seconds without a byte


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
        keep: Keep archives after unpacking.
        progress: Show a bar.
        say: Told about every step.

    Raises:
        UnsupportedOperation: Nothing of it can be downloaded; the message has the steps.
        MissingError: The server does not have the file, or cannot be reached.
        CorruptFileError: What arrived is not what was announced.
        BenchError: Disk full or not writable.
    """
    from comit_bench.errors import UnsupportedOperation

    if not spec.downloads:
        raise UnsupportedOperation(
            f"{spec.name} cannot be downloaded by a program. {(spec.obtain or spec.homepage or '').strip()} "
            f"Put the files into DIR/{spec.folder} and pass --data-root DIR."
        )
    for item in spec.downloads:
        if is_done(item, folder):
            say(f"{item.creates}: there")
            continue
        archive = folder / NOTES / item.file if item.unpack is not None else folder / item.file
        if not archive.is_file():
            say(f"{item.url} -> {archive}")
            fetch(item, archive, progress=progress)
        if item.unpack is not None:
            say(f"unpacking {archive.name}")
            unpack(archive, folder / item.unpack, item.creates)
            if not is_done(item, folder):
                raise CorruptFileError(f"{archive}: has been unpacked but holds no {item.creates}")
            if not keep:
                archive.unlink()


def fetch(item: DownloadSpec, target: Path, *, progress: bool = True) -> str:
    """Download one file, whole or not at all, continuing an earlier attempt; returns ``sha256:<hex>``.

    Raises:
        MissingError, CorruptFileError, BenchError: As for :func:`download`.
    """
    if not item.url.startswith(("http://", "https://")):
        raise UsageError(f"{item.url}: only http and https addresses are downloaded")
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(item, part, progress)
            break
        except HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise MissingError(
                    f"{item.url}: the server says {error.code} {error.reason}. Get the file another way "
                    f"and put it at {target}."
                ) from error
        except (URLError, TimeoutError, ConnectionError, _Short) as error:
            if attempt == ATTEMPTS:
                raise MissingError(
                    f"{item.url}: cannot be downloaded ({error}). What has arrived is kept: the same command "
                    "continues."
                ) from error
        time.sleep(min(2.0 ** (attempt - 1), 10.0) if ATTEMPTS > 1 else 0)
    sha256, found = _digests(part, item.checksum)
    size = part.stat().st_size
    if (item.size is not None and size != item.size) or item.checksum not in (None, found):
        part.unlink()
        raise CorruptFileError(
            f"{item.url}: what arrived has {size} bytes and {found}, expected {item.size or 'any'} bytes and "
            f"{item.checksum or 'any checksum'}. It was removed; the file on the server may have changed."
        )
    part.replace(target)
    part.with_name(f"{target.name}.validator").unlink(missing_ok=True)
    note = {"url": item.url, "size": size, "sha256": sha256, "checked": item.checksum}
    notes = target.parent if target.parent.name == NOTES else target.parent / NOTES
    write_atomic(notes / f"{target.name}.json", json.dumps(note, indent=1) + "\n")
    return sha256


class _Short(Exception):
    """The connection ended before the whole file had arrived."""


def _continue(item: DownloadSpec, part: Path, progress: bool) -> None:
    """Append what is missing of ``part``; raises when the connection breaks."""
    from tqdm import tqdm

    mark = part.with_name(f"{part.name.removesuffix('.part')}.validator")
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "comit_bench"}
    if have and mark.is_file():  # without a validator the rest might be of another file
        headers |= {"Range": f"bytes={have}-", "If-Range": mark.read_text(encoding="ascii")}
    try:
        answer = urlopen(Request(item.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # nothing is left to send, or the file is shorter now: begin again
            part.unlink(missing_ok=True)
            raise _Short("the part on this disk does not fit the file; it is fetched again") from error
        raise
    with answer:
        again = answer.status == 206
        have = have if again else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        if item.size is not None and total is not None and total != item.size:
            raise MissingError(f"{item.url}: the server offers {total} bytes, the recipe expects {item.size}")
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if validator and not validator.startswith("W/"):
            write_atomic(mark, validator)
        _copy(answer, part, have, total, tqdm if progress else None)
    if total is not None and part.stat().st_size < total:
        raise _Short(f"{part.stat().st_size} of {total} bytes have arrived")


def _copy(answer: Any, part: Path, have: int, total: int | None, bars: Any) -> None:
    bar = None if bars is None else bars(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
    try:
        with part.open("ab" if have else "wb") as stream:
            while block := answer.read(BLOCK):
                stream.write(block)
                if bar is not None:
                    bar.update(len(block))
    except OSError as error:
        if isinstance(error, TimeoutError | ConnectionError):
            raise
        raise BenchError(f"{part}: cannot write: {error.strerror or error}. Free some space.") from error
    finally:
        if bar is not None:
            bar.close()


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

    Raises:
        CorruptFileError: Damaged, or a member that would leave the folder.
        BenchError: Disk full or not writable.
    """
    begun = archive.with_name(f"{archive.name}.unpacking")
    unpacked = archive.with_name(f"{archive.name}.content")
    with atomic_path(unpacked) as temporary:
        try:
            _extract(archive, temporary)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
            raise CorruptFileError(
                f"{archive}: damaged archive ({error}). Remove it and run the same command again."
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
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


def _extract(archive: Path, folder: Path) -> None:
    folder.mkdir()
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                _check_name(member.filename, archive)
            file.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def _check_name(name: str, archive: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise CorruptFileError(f"{archive}: the member {name!r} would leave the folder; nothing was unpacked")
