"""Files that are either whole or absent, locks between processes, paths that stay inside, the cache location.

A file or folder is made in a private folder beside its place (``.<host>-<random>.part``), which its process
keeps locked, and is renamed when it is whole. The lock ends with the process, however that ends: so
:func:`sweep` can tell what a killed process left from what a living one is writing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources import files
from io import BufferedReader
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from platformdirs import user_cache_path

from comit_bench.errors import BenchError, CorruptFileError, UsageError, shown

CACHE_VARIABLE = "COMIT_BENCH_CACHE"
DATA_VARIABLE = "COMIT_BENCH_DATA"
LOCK, NEW, OLD, NAME = "lock", "new", "old", "name"  # what a private folder may hold
FOREIGN_SECONDS = 86_400.0  # a private folder of another machine this old belongs to a killed process
SAY_AFTER = 1.0  # seconds that a process waits for another one before it says so
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors reports an error of the system
_PRIVATE = re.compile(r"\.([0-9a-f]{6})-[a-z0-9_]{8}\.part")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DRIVE = re.compile(r"[A-Za-z]:")
_log = logging.getLogger(__name__)
_swept: set[str] = set()


def cache_root() -> Path:
    """``$COMIT_BENCH_CACHE`` when set, else the platform's user cache directory.

    Raises:
        UsageError: The variable holds no path.
        BenchError: There is no home directory to put it in; says what to set.
    """
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        if not override.isprintable():  # it stands in messages, and in files that are UTF-8
            raise UsageError(f"{CACHE_VARIABLE} {shown(override)}: expected a path in readable letters")
        return user_path(override, CACHE_VARIABLE)
    lost = os.environ.get("HOME") == "" and not os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError, KeyError, OSError):  # its versions differ about users without a home
        root = user_cache_path("comit_bench")
        if root.is_absolute() and not lost:
            return root
    raise BenchError(
        f"no place for the cache: this user has no home directory. Set {CACHE_VARIABLE}=DIR to a folder that "
        "can be written."
    )


def shipped_weights(name: str) -> Path:
    """The directory of trained weights that come with the package."""
    directory = Path(str(files("comit_bench"))) / "weights" / name
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: no weights of this name come with comit_bench")
    return directory


# ----------------------------------------------------------------- what the system says


def explain_write_error(error: OSError, path: Path) -> BenchError:
    """The message for a file that cannot be written: disk full, not allowed, or what the system says."""
    elsewhere = f"Choose another place: --output DIR, or {CACHE_VARIABLE}=DIR for the cache."
    if error.errno in _FULL:
        return BenchError(
            f"{path}: the disk is full. Free some space and run the same command again; everything "
            f"finished so far is kept. The cache can live elsewhere: set {CACHE_VARIABLE}=DIR."
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return BenchError(f"{path}: cannot write here ({error.strerror}). {elsewhere}")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        above = next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), None)
        if above is not None:
            what = "this" if above == path else str(above)
            return BenchError(f"{path}: cannot write here, {what} is not a folder. {elsewhere}")
    if error.errno == errno.EISDIR:
        return BenchError(f"{path}: cannot write here, this is a folder. Give the name of a file.")
    return BenchError(f"{path}: cannot write ({error.strerror or error}). {elsewhere}")


def _system_error(error: Exception) -> OSError | None:
    """The error of the system behind another library's exception, if it is one."""
    if isinstance(error, OSError):
        return error
    found = _OS_ERROR.search(str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def special_file(mode: int) -> str | None:
    """What a file of this mode is in words when it is no ordinary file, else None."""
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (lambda mode: not stat.S_ISREG(mode), "a device"),
    )
    return next((words for test, words in kinds if test(mode)), None)


def why_no_file(path: str | os.PathLike[str]) -> str | None:
    """What stands at a path in words when it is no ordinary file, else None. Links are followed."""
    try:
        return special_file(os.stat(path).st_mode)  # noqa: PTH116 (called for every file)
    except FileNotFoundError:
        return "a link that leads nowhere" if os.path.islink(path) else "nothing"  # noqa: PTH114
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads to itself"
        raise BenchError(f"{os.fspath(path)}: cannot read: {error.strerror or error}") from error


def refuse_special(path: Path) -> None:
    """Devices, named pipes and sockets are never replaced."""
    with suppress(OSError):
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode) and (what := special_file(mode)) is not None:
            raise UsageError(f"{path}: is {what}, not a file. Choose another name.")


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file for reading. A named pipe would block for ever, a device may never end.

    Raises:
        CorruptFileError: It is something else than a file.
        OSError: Absent, or the system cannot read it.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if (what := special_file(os.fstat(handle).st_mode)) is not None:
        os.close(handle)
        raise CorruptFileError(f"{path}: is {what}, not a file. Replace it by a file.")
    return os.fdopen(handle, "rb")


# ----------------------------------------------------------------- paths that stay inside


def check_relative(name: object, *, windows: bool = True, here: bool = False) -> None:
    """Refuse a name that is no path below a folder, by its letters alone.

    Args:
        name: With forward slashes.
        windows: Whether backslashes and drive letters count as they do there, on every system.
        here: Whether ``.``, the folder itself, will do.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file or folder")
    path = PurePosixPath(name.replace("\\", "/") if windows else name)
    nowhere = not path.name and not here
    if path.is_absolute() or ".." in path.parts or nowhere or (windows and _DRIVE.match(name)):
        raise ValueError(f"{name!r} does not lie inside the folder")


def inside(
    root: Path,
    name: str,
    *,
    what: str,
    kind: type[BenchError] = UsageError,
    links: bool = False,
    windows: bool = True,
    here: bool = False,
) -> Path:
    """``root / name``, for a name out of a recipe, archive, annotation file, table or option.

    Args:
        root: The folder; may itself be a link.
        name: Relative, with forward slashes.
        what: Where the name comes from, begins the message.
        kind: Error to raise.
        links: Whether links below ``root`` may lead elsewhere: to read what a person has laid out so, yes;
            to write, no.
        windows: See :func:`check_relative`,
        here: and this too.

    Raises:
        BenchError: Of type ``kind``; the name leads out of ``root``.
    """
    try:
        check_relative(name, windows=windows, here=here)
    except ValueError as error:
        raise kind(f"{what}: {error}. Expected a path below {root}.") from error
    path = root / name
    if not links:
        try:
            real, base = path.resolve(), root.resolve()
        except (OSError, RuntimeError) as error:
            raise kind(f"{what}: {path} cannot be followed ({error})") from error
        if not real.is_relative_to(base):
            raise kind(f"{what}: {path} is a link that leads out of {root}, to {real}. Remove the link.")
    return path


# ----------------------------------------------------------------- addresses


def check_url(url: str, *, checked: bool = False) -> None:
    """Refuse an address from which anybody on the way could hand over something else.

    Only ``https`` will do; ``http`` from this machine, or for content that is ``checked`` with a checksum.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise UsageError(f"{url}: not an address ({error})") from error
    plain = parts.scheme == "http" and (checked or host in _LOOPBACK)
    if not host or not (parts.scheme == "https" or plain):
        raise UsageError(
            f"{url}: only https addresses are downloaded (http where a checksum says what must arrive)"
        )


# ----------------------------------------------------------------- locks


class Lock:
    """A lock file that this process holds, from :func:`try_lock`."""

    def __init__(self, path: Path, give_back: Callable[[], None]) -> None:
        self.path, self._give_back = path, give_back

    def release(self) -> None:
        """Let others have it; the file goes first, so that none is left behind."""
        with suppress(OSError):  # where open files cannot be removed, or somebody has removed it
            self.path.unlink()
        self._give_back()


def try_lock(path: Path) -> Lock | None:
    """Take a lock file, or None when another process (or thread) holds it.

    The system gives the lock back when the process ends, so a killed one blocks nobody.

    Raises:
        OSError: The file cannot be made, or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _try_lock_elsewhere(path)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here = os.path.samestat(os.fstat(handle), path.stat())
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            here = False
        except BaseException:
            os.close(handle)
            raise
        if here:
            break
        os.close(handle)  # its holder has removed it after we opened it: that lock means nothing any more

    def give_back() -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)  # also for children that have inherited it
        os.close(handle)

    return Lock(path, give_back)


def _try_lock_elsewhere(path: Path) -> Lock | None:
    """The same on Windows."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return Lock(path, lock.release)


@contextmanager
def locked(path: Path, what: str, *, wait: bool = True) -> Iterator[bool]:
    """One process at a time does the block; others wait, and say so. Never nest two of the same path.

    Where no lock file can be made (no locks there, or not writable) the block is done without.

    Args:
        path: The lock file; gone afterwards.
        what: What is done, completes "another process is ...".
        wait: False does not wait: the block is told to leave the work to the other.

    Yields:
        True, or False when the lock is held elsewhere and ``wait`` is False.

    Raises:
        BenchError: The disk is full.
    """
    lock, ours = None, True
    began, said = time.monotonic(), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(path)) is None:
            if not wait:
                ours = False
                break
            if not said and time.monotonic() - began > SAY_AFTER:
                said = True
                _log.warning("another process is %s: waiting for it", what)
            time.sleep(0.05)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise explain_write_error(error, path) from error
        _log.debug("%s: no lock there (%s)", path, error)
    try:
        yield ours
    finally:
        if lock is not None:
            lock.release()


# ----------------------------------------------------------------- whole or absent


@cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` that only this process sees into and that is gone after the block.

    If the process is killed, the next one that writes to ``parent`` removes it (:func:`sweep`).

    Raises:
        OSError: It cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    if (known := str(parent.absolute())) not in _swept:
        _swept.add(known)
        sweep(parent)
    lock = None
    while True:
        place = Path(tempfile.mkdtemp(prefix=f".{_host()}-", suffix=".part", dir=parent))
        try:
            lock = try_lock(place / LOCK)
            if lock is not None and (place / LOCK).exists():
                break
        except FileNotFoundError:  # somebody's sweep saw it before it was locked
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                shutil.rmtree(place, ignore_errors=True)
                raise
            break
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            lock.release()
        if os.name == "nt":  # where a file that is open cannot be removed
            shutil.rmtree(place, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Tidy up after killed processes: remove their private folders, finish their replacements of folders.

    What a living process is writing stays; so does what cannot be removed.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(folder / e.name, m[1]) for e in entries if (m := _PRIVATE.fullmatch(e.name))]
    except OSError:
        return
    for place, host in found:
        with suppress(OSError):
            if host != _host() and time.time() - place.stat().st_mtime < FOREIGN_SECONDS:
                continue  # the locks of another machine may not be seen from here
            lock = try_lock(place / LOCK)
            if lock is None:
                continue
            try:
                _finish_replacement(place)
                shutil.rmtree(place, ignore_errors=True)
            finally:
                lock.release()


def remove_folder(folder: Path) -> None:
    """Remove a folder, all of it at once for everyone who looks; one that does not exist is no error.

    Raises:
        BenchError: Not writable.
    """
    if not os.path.lexists(folder):
        return
    try:
        with private_folder(folder.parent) as place, suppress(FileNotFoundError):
            folder.rename(place / OLD)
    except OSError as error:
        raise explain_write_error(error, folder) from error


def _finish_replacement(place: Path) -> None:
    """After a kill between "the old folder aside" and "the new one in its place"."""
    with suppress(FileNotFoundError):
        target = place.parent / os.fsdecode((place / NAME).read_bytes())
        if not os.path.lexists(target) and (place / NEW).is_dir():
            (place / NEW).rename(target)


def _replace_folder(place: Path, target: Path) -> None:
    """Put ``place/new`` where ``target`` is: the old one goes aside first, and is removed last."""
    new = place / NEW
    (place / f"{NAME}.{NEW}").write_bytes(os.fsencode(target.name))
    (place / f"{NAME}.{NEW}").rename(place / NAME)  # whole: from here on sweep() finishes what is begun
    for attempt in range(100):  # another process may put its own there in between
        old = place / f"{OLD}{attempt}"
        if target.is_dir():
            with suppress(FileNotFoundError):
                target.rename(old)
        try:
            new.rename(target)
            return
        except OSError as error:
            if old.is_dir() and not os.path.lexists(target):
                old.rename(target)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _sync(path: Path) -> None:
    """Ask the system to write a file, or a folder with everything in it, to the disk now."""
    if path.is_dir():
        for child in path.iterdir():
            if not child.is_symlink():
                _sync(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    except PermissionError:  # Windows has no handles of folders; a folder need not be readable
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):  # folders of some file systems
            raise
    finally:
        os.close(handle)


def _put_new_file(new: Path, target: Path) -> None:
    """Give a file its name unless something has it already."""
    try:
        os.link(new, target)
    except FileExistsError as error:
        raise AlreadyThere(*error.args) from error
    except OSError as error:  # a file system without hard links
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise AlreadyThere(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        new.rename(target)


class AlreadyThere(FileExistsError):
    """A file that was not to be replaced exists by now."""


@contextmanager
def atomic_path(target: Path, *, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """Yield a path that becomes ``target`` when the block ends without an error.

    Make a file or a folder there. A file that exists is replaced at once: a reader sees the old content
    or the new, never a part. A folder that exists is renamed aside for a moment and removed when the new
    one is in its place; a kill at any point loses neither (:func:`sweep` finishes it). Links are followed.

    Args:
        target: What to make.
        durable: Wait until the content is on the disk, so that not even a power failure loses it; False for
            what can be made again from something else.
        replace: False refuses a file that exists, also one that appeared meanwhile.

    Raises:
        BenchError: Disk full or not writable, with advice.
        UsageError: ``target`` is a device, FIFO or socket.
        AlreadyThere: ``replace`` is False, and there is one.
    """
    refuse_special(target)
    try:
        real = Path(os.path.realpath(target)) if target.is_symlink() else target
        with private_folder(real.parent) as place:
            new = place / NEW
            yield new
            folder = new.is_dir()
            if folder and real.exists() and not real.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if durable:
                _sync(new)
            if folder:
                _replace_folder(place, real)
            elif replace:
                new.replace(real)
            else:
                _put_new_file(new, real)
            if durable:
                _sync_one(real.parent)
    except (BenchError, AlreadyThere):
        raise
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise explain_write_error(cause, target) from error


def write_atomic(target: Path, content: bytes | str, *, durable: bool = True, replace: bool = True) -> None:
    """Write a whole file or nothing (see :func:`atomic_path`)."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_path(target, durable=durable, replace=replace) as temporary:
        temporary.write_bytes(data)


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it where something is."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)


def require_folder(folder: Path) -> None:
    """Make sure, before any work, that files can be written to a folder, or that it can be made.

    Raises:
        BenchError: Not writable, full, or something else is in its place; says which option chooses another.
    """
    try:
        with private_folder(_nearest(folder)) as place:
            (place / NEW).write_bytes(bytes(4096))
            _sync_one(place / NEW)
    except OSError as error:
        raise explain_write_error(error, folder) from error


def check_folder(folder: Path) -> None:
    """The part of :func:`require_folder` that writes nothing."""
    there = _nearest(folder)
    if not there.is_dir():
        raise UsageError(f"{folder}: {there} is not a folder. Choose another name.")


def require_file(path: Path) -> None:
    """The same for one file that is to be written, or replaced."""
    refuse_special(path)
    if path.is_dir():
        raise UsageError(f"{path}: this is a folder; give the name of a file in it")
    require_folder(Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent)


def require_room(folder: Path, need: int, what: str, *, advice: str = "") -> None:
    """Refuse to begin what needs more bytes than are free where ``folder``, which exists, lies.

    ``what`` begins the message, e.g. "the tokens of 1000 images need"; ``advice`` ends it.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise BenchError(
            f"{what} {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free in {folder}. Free some space, or "
            f"set {CACHE_VARIABLE} to another disk{advice}."
        )


def sha256_file(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes, read in blocks.

    Raises:
        FileNotFoundError: Absent.
        BenchError: No file, or the system cannot read it.
    """
    try:
        with open_plain(path) as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {error.strerror}") from error


def digest_json(value: object) -> str:
    """``sha256:<hex>`` of the canonical JSON of ``value`` (sorted keys)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def user_path(text: str | Path, what: str = "path") -> Path:
    """A path as a person writes it, where ``~`` is their home; messages call it ``what``."""
    if not str(text) or "\0" in str(text):
        raise UsageError(f"{what} {shown(str(text))}: {'empty' if not str(text) else 'a NUL in it'}, no path")
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError as error:
        raise UsageError(f"{what} {shown(str(text))}: there is no such home directory ({error})") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise UsageError(f"{what} {shown(str(text))}: cannot be a path ({error.strerror})") from error
        path = Path(text).expanduser()
    except ValueError as error:
        raise UsageError(f"{what} {shown(str(text))}: cannot be a path ({error})") from error
    return path
