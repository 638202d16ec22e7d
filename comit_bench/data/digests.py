"""What files hold, as sha256 that are computed once: the ground of every fingerprint of data.

A fingerprint must change with any byte of the data and be equal on two machines that hold the same bytes,
so it is made of contents, never of sizes or times. To read ImageNet at every start would take minutes to
hours, so digests are kept: one table per folder in ``<cache>/digests/``, from a file's name and state to
its sha256. The state is size, time of modification, time of change and number of the inode; when any of
them differs the file is read again. They only decide whether to read, and are part of no fingerprint.

A file that changed just before it was read is not kept: it is read again next time, for another change might
leave the clock where it was. What goes unnoticed is a change after which size, both times and
the inode are what they were. Programs can set the time of modification back but not the time of change, so
that takes a clock set back or writing to the disk below the file system; on file systems without a time of
change (FAT, some network mounts, Windows) it takes no more than equal size and a restored time of
modification.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from comit_bench.errors import BenchError, MissingError
from comit_bench.files import special_file, write_atomic

THREADS = 16
AT_ONCE = 64  # files that a thread reads before it reports
RECENT, RECENT_IN_SECONDS = 10**8, 3 * 10**9  # ns, for file systems with finer and with coarser clocks
SAVE_SECONDS = 60.0  # an interrupted run has lost no more than this
EMPTY = hashlib.sha256(b"").digest()

_log = logging.getLogger(__name__)


def _state_of(status: os.stat_result) -> bytes:
    """Size, times and inode of a file, packed."""
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return struct.pack("<4Q", *(number & (2**64 - 1) for number in numbers))


def _is_recent(status: os.stat_result) -> bool:
    now = time.time_ns()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return any(abs(now - at) < (RECENT if at % 10**9 else RECENT_IN_SECONDS) for at in times)


class _Table:
    """sha256 by key, kept in one file; a damaged or unwritable file is like none."""

    def __init__(self, cache: Path, place: str) -> None:
        name = hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
        self.path = cache / "digests" / f"{name}.npz"
        self.known = self._read()
        self._saved = len(self.known)

    def _read(self) -> dict[bytes, bytes]:
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                keys, values = stored["keys"], stored["values"]
            if keys.dtype != np.uint8 or values.dtype != np.uint8 or len(keys) != len(values):
                return {}
            if keys.shape[1:] != (16,) or values.shape[1:] != (32,):
                return {}
        except Exception as error:  # absent, cut short, not a zip: it is made anew
            if not isinstance(error, FileNotFoundError):
                _log.warning("%s: cannot be read (%s); made anew", self.path, error)
            return {}
        a, b = keys.tobytes(), values.tobytes()
        return {a[16 * i : 16 * i + 16]: b[32 * i : 32 * i + 32] for i in range(len(keys))}

    def save(self) -> None:
        """Write what has been added, together with what another process wrote meanwhile."""
        if len(self.known) == self._saved:
            return
        self.known = self._read() | self.known
        stream = BytesIO()
        keys = np.frombuffer(b"".join(self.known), dtype=np.uint8).reshape(-1, 16)
        values = np.frombuffer(b"".join(self.known.values()), dtype=np.uint8).reshape(-1, 32)
        np.savez(stream, keys=keys, values=values)
        try:
            write_atomic(self.path, stream.getvalue())
        except BenchError as error:
            _log.warning("Contents must be read again next time: %s", error)
        self._saved = len(self.known)


def _key_of(name: str, state: bytes) -> bytes:
    """Key of a file, or of a part of one, in its table."""
    return hashlib.blake2b(os.fsencode(name) + b"\0" + state, digest_size=16).digest()


def file_digests(
    root: Path, names: Sequence[str], *, cache: Path, title: str = "reading", progress: bool = False
) -> list[bytes]:
    """sha256 of files below a folder, from the table where the file is as it was, else read now.

    Args:
        root: The folder; a table belongs to where it really lies, whatever links lead there.
        names: Relative paths.
        cache: Cache directory.
        title: Of the progress bar that ``progress`` shows.

    Returns:
        32 bytes per name.

    Raises:
        MissingError: A file is not there.
        BenchError: It is no ordinary file, or cannot be read.
    """
    base = str(root)
    keys = [_key_of(name, _state_of(_status(f"{base}/{name}"))) for name in names]

    def read(i: int) -> tuple[bytes, bytes | None]:
        return _digest_file(f"{base}/{names[i]}", names[i])

    return _known_or_read(_Table(cache, str(root.resolve())), keys, read, title, progress, THREADS)


def _known_or_read(
    table: _Table,
    keys: Sequence[bytes | None],
    read: Callable[[int], tuple[bytes, bytes | None]],
    title: str,
    progress: bool,
    threads: int,
) -> list[bytes]:
    """The digest of every key out of the table, else what ``read`` says, kept under the key that it gives."""
    found = [None if key is None else table.known.get(key) for key in keys]
    unknown = [i for i, digest in enumerate(found) if digest is None]
    for i, (digest, key) in zip(
        unknown, _in_threads(read, unknown, table, title, progress, threads), strict=True
    ):
        found[i] = digest
        if key is not None:
            table.known[key] = digest
    table.save()
    return [digest for digest in found if digest is not None]


def _in_threads(
    read: Callable[[int], tuple[bytes, bytes | None]],
    unknown: Sequence[int],
    table: _Table,
    title: str,
    progress: bool,
    threads: int,
) -> Iterator[tuple[bytes, bytes | None]]:
    """Results for ``unknown`` in order; what is finished is saved now and then, and when something fails."""
    parts = [unknown[start : start + AT_ONCE] for start in range(0, len(unknown), AT_ONCE)]
    saved = time.monotonic()
    bar = tqdm(total=len(unknown), desc=title, unit=" files", delay=1.0, leave=False, disable=not progress)
    with bar, ThreadPoolExecutor(threads if len(parts) > 1 else 1) as pool:
        jobs = [pool.submit(lambda part: [read(i) for i in part], part) for part in parts]
        try:
            for job in jobs:
                done = job.result()
                yield from done
                bar.update(len(done))
                if time.monotonic() - saved > SAVE_SECONDS:
                    table.save()
                    saved = time.monotonic()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            table.save()


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 (called for every file)
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file. The data changed after they were listed.") from error
    except OSError as error:
        raise BenchError(f"{path}: cannot read: {error.strerror or error}") from error


def _digest_file(path: str, name: str) -> tuple[bytes, bytes | None]:
    """sha256 of a file, and its key when it may be kept."""
    before = _status(path)
    if (what := special_file(before.st_mode)) is not None:
        raise BenchError(f"{path}: cannot read: this is {what}, not a file")
    try:
        with open(path, "rb") as stream:  # noqa: PTH123 (called for every file)
            digest = hashlib.file_digest(stream, "sha256").digest()
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise BenchError(f"{path}: cannot read: {error.strerror or error}") from error
    settled = _state_of(before) == _state_of(after) and not _is_recent(after)
    return digest, _key_of(name, _state_of(after)) if settled else None


def part_digests(
    place: str,
    state: bytes | None,
    parts: Sequence[str],
    read: Callable[[int], bytes],
    *,
    cache: Path,
    title: str = "reading",
    progress: bool = False,
    threads: int = THREADS,
) -> list[bytes]:
    """sha256 of the parts of an archive, from its table where the archive is as it was, else read now.

    Args:
        place: Path of the archive.
        state: Of all of its files; None: nothing is kept.
        parts: Name of every part, unique.
        read: Number of a part -> its bytes.
        cache: Cache directory.
        title: Of the progress bar that ``progress`` shows.
        threads: How many may call ``read``.
    """
    keys = [None if state is None else _key_of(part, state) for part in parts]

    def digest(i: int) -> tuple[bytes, bytes | None]:
        return hashlib.sha256(read(i)).digest(), keys[i]

    return _known_or_read(_Table(cache, place), keys, digest, title, progress, threads)


def state_of_files(paths: Sequence[Path]) -> bytes | None:
    """State of several files together; None when one of them changed only just now."""
    states = [_status(str(path)) for path in paths]
    if any(map(_is_recent, states)):
        return None
    return hashlib.sha256(b"".join(map(_state_of, states))).digest()
