"""Files that are either whole or absent: atomic writes, digests, the cache location."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comit_bench.errors import BenchError

CACHE_VARIABLE = "COMIT_BENCH_CACHE"


def cache_root() -> Path:
    """``$COMIT_BENCH_CACHE`` when set, else the platform's user cache directory."""
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(override).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("comit_bench")


def shipped_weights(name: str) -> Path:
    """The directory of trained weights that come with the package.

    Raises:
        FileNotFoundError: No weights of that name come with it.
    """
    from importlib.resources import files

    directory = Path(str(files("comit_bench"))) / "weights" / name
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: no weights of this name come with comit_bench")
    return directory


def explain_write_error(error: OSError, path: Path) -> BenchError:
    """The message for a file that cannot be written: disk full, not allowed, or what the system says."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BenchError(
            f"{path}: the disk is full. Free some space and run the same command again; everything "
            f"finished so far is kept. The cache can live elsewhere: set {CACHE_VARIABLE}=DIR."
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return BenchError(
            f"{path}: cannot write here ({error.strerror}). Choose another place with --output DIR, "
            f"or {CACHE_VARIABLE}=DIR for the cache."
        )
    return BenchError(f"{path}: cannot write: {error.strerror or error}")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``target`` when the block ends without an error.

    Works for files and directories. A reader sees the old content or the new, never a part.

    Raises:
        BenchError: Disk full or not writable, with advice.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.unlink()
        yield temporary
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)
        if temporary.is_file():
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except BenchError:
        raise
    except OSError as error:
        raise explain_write_error(error, target) from error
    finally:
        if temporary is not None and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(target: Path, content: bytes | str) -> None:
    """Write a whole file or nothing (see :func:`atomic_path`)."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


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
    """What stands at a path in words when it is no ordinary file, else None. Links are followed.

    Raises:
        BenchError: The system does not say.
    """
    try:
        return special_file(os.stat(path).st_mode)  # noqa: PTH116 (called for every file)
    except FileNotFoundError:
        return "a link that leads nowhere" if os.path.islink(path) else "nothing"  # noqa: PTH114
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads to itself"
        raise BenchError(f"{os.fspath(path)}: cannot read: {error.strerror or error}") from error


def sha256_file(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def digest_json(value: object) -> str:
    """``sha256:<hex>`` of the canonical JSON of ``value`` (sorted keys)."""
    import json

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()
