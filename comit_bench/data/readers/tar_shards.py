"""WebDataset shards (``.tar`` files of images) with random access.

**Why not the webdataset library.** It streams: shards one after another, with a buffer that shuffles only
nearby samples. Then the order depends on the number of ranks, workers and the size of the buffer, and a
run that continues in the middle of an epoch must read everything again up to there, or gives up being
exact. Here every tar is listed once (name, offset and size of each member, from its headers alone) and
members are read by offset. So shards behave like a folder of files: one global order from (seed, epoch),
the same for any number of ranks and workers, and a resumed run starts with the very next sample.

**What it costs.** The listing reads one header per member of every shard, once; it is kept below the cache
root under the path of the tar and is valid as long as its size and time of change stay. After that an image
is one ``open``, one seek and one read, like a file in a folder. On a local disk that is nothing next to
decoding; on a network disk each image is a round trip, where streaming would read large pieces in sequence.
More reading processes hide that delay.

The format: files that share their directory and their name up to its first dot are one sample; the rest of
the name says what they are (``n01440764/10026.jpg``, ``n01440764/10026.cls``). Only uncompressed tars can be
read by offset. Links and sparse members are not followed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from comit_bench.data.digests import part_digests, state_of_files
from comit_bench.data.readers.common import EXTENSIONS
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import locked, require_folder, user_path, write_atomic
from comit_bench.recipes.reading import read_json

FORMAT = 1
SUFFIX = ".tar"
MAX_SHARDS = 100_000
TAIL = 1 << 20  # bytes after the end marker that are looked at
THREADS = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_URL = re.compile(r"(pipe:|[a-z][a-z0-9+.-]+:/)", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # sample, and what the member is

_log = logging.getLogger(__name__)


def _alternatives(group: str, pattern: str) -> list[str]:
    if found := _RANGE.fullmatch(group):
        first, last = int(found[1]), int(found[2])
        if abs(last - first) >= MAX_SHARDS:
            raise UsageError(f"{pattern}: {{{group}}} stands for more than {MAX_SHARDS} shards")
        width = len(found[1]) if found[1].startswith("0") or found[2].startswith("0") else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    if "," in group:
        return group.split(",")
    raise UsageError(f"{pattern}: {{{group}}} is neither a range like {{000..146}} nor a list like {{a,b}}")


def expand_braces(pattern: str) -> list[str]:
    """All names a pattern with ``{000..146}`` and ``{a,b}`` stands for, in the order of a shell."""
    done: list[str] = []
    waiting = [pattern]
    while waiting:
        text = waiting.pop()
        group = _BRACES.search(text)
        if group is None:
            done.append(text)
            continue
        before, after = text[: group.start()], text[group.end() :]
        waiting += [f"{before}{part}{after}" for part in reversed(_alternatives(group[1], pattern))]
        if len(waiting) + len(done) > MAX_SHARDS:
            raise UsageError(f"{pattern}: stands for more than {MAX_SHARDS} shards")
    return list(dict.fromkeys(done))


def find_shards(source: str) -> tuple[Path, ...]:
    """Shards named by a directory, a file, a glob, a brace pattern, or several joined by ``::``.

    Args:
        source: E.g. ``/data/imagenet/train-{000000..000146}.tar`` or ``/data/shards/*.tar``.

    Returns:
        Sorted paths, each once.
    """
    shards: set[Path] = set()
    for part in source.split("::"):
        if _URL.match(part):
            raise UsageError(
                f"{part}: shards are read by offset from a local or mounted disk, not from an address. "
                "Download them first and name the files."
            )
        found = _find(os.path.expanduser(part))  # noqa: PTH111 (a pattern is no path)
        if not found:
            raise MissingError(f"{part}: no {SUFFIX} files there{_hint(part)}")
        shards |= set(found)
    return tuple(sorted(shards))


def _find(pattern: str) -> list[Path]:
    if Path(pattern).exists():  # before braces and stars: a name may contain them
        return sorted(Path(pattern).glob(f"*{SUFFIX}")) if Path(pattern).is_dir() else [Path(pattern)]
    names = expand_braces(pattern)
    # glob, since Path.glob wants a folder to start from and the pattern may be absolute
    globbed = [sorted(map(Path, glob(name))) if has_magic(name) else [Path(name)] for name in names]  # noqa: PTH207
    found = [path for paths in globbed for path in paths]
    absent = [str(path) for path in found if not path.is_file()]
    if absent:
        raise MissingError(
            f"{absent[0]}: no such shard" + (f", and {len(absent) - 1} more are missing" * (len(absent) > 1))
        )
    return found


def _hint(part: str) -> str:
    folder = user_path(part, "source")
    if folder.is_dir() and any(folder.glob("*.tar.*")):
        return ", only compressed ones: decompress them, they cannot be read by offset"
    return (
        f". Give a directory, a glob like DIR/*{SUFFIX}, or a range like DIR/train-{{000000..000146}}{SUFFIX}"
    )


@dataclass(frozen=True, slots=True)
class TarIndex:
    """All regular members of one tar.

    Attributes:
        size: Bytes of the tar, and
        changed: its time of change in nanoseconds, when it was listed.
        names: Member names as stored, without a leading ``./``.
        offsets: Where their contents begin, and
        sizes: how long they are, in bytes.
    """

    size: int
    changed: int
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def _printable(name: str) -> str:
    """Names that are not UTF-8 stay distinct and can be encoded."""
    plain = name.removeprefix("./")
    return plain.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _members(path: Path) -> tuple[list[tuple[str, int, int]], int, int]:
    """Name, offset and size of regular members; the number of others; where the end marker should be."""
    found, others = [], 0
    with tarfile.open(path, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or a tar of a million members would be held in memory twice
            if member.isreg() and not member.issparse():
                found.append((_printable(member.name), member.offset_data, member.size))
            elif not member.isdir():
                others += 1
        return found, others, archive.offset


def _check_end(path: Path, end: int) -> None:
    """A tar ends in a block of zeros and nothing but zeros; tarfile itself stops silently at damage."""
    with path.open("rb") as stream:
        stream.seek(end)
        tail = stream.read(TAIL)
    advice = "Replace the file by an intact copy."
    if len(tail) < tarfile.BLOCKSIZE:
        raise CorruptFileError(f"{path}: truncated, the tar has no end marker at byte {end}. {advice}")
    if tail[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise CorruptFileError(f"{path}: damaged, no tar header at byte {end}. {advice}")
    if tail.strip(b"\0"):
        raise CorruptFileError(
            f"{path}: data after the end marker at byte {end}, as if tars had been concatenated. Split them "
            "into shards of their own (cat makes no valid tar of two)."
        )


def scan_tar(path: Path) -> TarIndex:
    """List a tar by reading its headers."""
    try:
        before = path.stat()
        with path.open("rb") as stream:
            start = stream.read(8)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise CorruptFileError(
                    f"{path}: compressed with {name}; only plain tars can be read by offset. Decompress it."
                )
        members, others, end = _members(path)
        _check_end(path, end)
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such shard") from error
    except OSError as error:
        raise BenchError(f"{path}: cannot read: {error.strerror or error}") from error
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, BenchError):
            raise
        raise CorruptFileError(
            f"{path}: truncated or no tar ({error}). Replace it by an intact copy."
        ) from error
    if others:
        _log.warning("%s: %d members that are links or no plain files are left out", path, others)
    names, offsets, sizes = zip(*members, strict=True) if members else ((), (), ())
    return TarIndex(before.st_size, before.st_mtime_ns, names, offsets, sizes)


def _place(path: Path, cache: Path) -> Path:
    key = sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache / "tar-index" / f"{key}.json"


def _cached(path: Path, cache: Path) -> TarIndex | None:
    """A stored listing that still fits the file; a damaged one is like none."""
    try:
        now = path.stat()
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such shard") from error
    try:
        content = read_json(_place(path, cache), most=sys.maxsize, strict=False)
        if content.pop("format") != FORMAT or content.pop("path") != _printable(str(path.resolve())):
            return None
        lists = (tuple(content[key]) for key in ("names", "offsets", "sizes"))
        index = TarIndex(content["size"], content["changed"], *lists)
        lengths = {len(index.names), len(index.offsets), len(index.sizes)}
        fits = (index.size, index.changed) == (now.st_size, now.st_mtime_ns) and len(lengths) == 1
        return index if fits else None
    except (BenchError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _list_one(path: Path, cache: Path, keep: bool) -> TarIndex:
    known = _cached(path, cache)  # another process may have finished it meanwhile
    if known is not None:
        return known
    index = scan_tar(path)
    if keep:
        content = {"format": FORMAT, "path": _printable(str(path.resolve())), **asdict(index)}
        write_atomic(_place(path, cache), json.dumps(content, separators=(",", ":")))
    return index


def _can_keep(folder: Path) -> bool:
    try:
        require_folder(folder)
    except BenchError as error:
        _log.warning("the listing of the shards cannot be kept, it is made anew next time: %s", error)
        return False
    return True


def index_shards(shards: Sequence[Path], cache: Path) -> list[TarIndex]:
    """Listings of all shards, from the cache where they fit, in the order of ``shards``.

    Args:
        shards: Paths of tars.
        cache: Cache root; the listings go below ``tar-index/`` there.

    Raises:
        MissingError: A shard is not there.
        CorruptFileError: A shard is truncated or no tar.
        BenchError: A shard cannot be read, or the disk of the cache is full.
    """
    known = [_cached(path, cache) for path in shards]
    stale = [path for path, index in zip(shards, known, strict=True) if index is None]
    if stale:
        folder = cache / "tar-index"
        key = sha256("\0".join(map(str, stale)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        keep = _can_keep(folder)
        lock = locked(folder / f".{key}.lock", "listing these shards") if keep else nullcontext()
        with lock, ThreadPoolExecutor(THREADS) as pool:
            jobs = [pool.submit(_list_one, path, cache, keep) for path in stale]
            try:
                bar = tqdm(jobs, "listing shards", delay=1.0, leave=False, disable=None)
                fresh = iter([job.result() for job in bar])
            finally:
                pool.shutdown(wait=True, cancel_futures=True)  # after an error, not the remaining ones too
    return [index if index is not None else next(fresh) for index in known]


def _wanted(image_key: str | None) -> frozenset[str]:
    """Suffixes from ``jpg;png``, lower case and without a dot in front."""
    if image_key is None:
        return frozenset(suffix[1:] for suffix in EXTENSIONS)
    return frozenset(key.strip().lstrip(".").lower() for key in image_key.split(";")) - {""}


class _Image(NamedTuple):
    id: str
    shard: int
    offset: int
    size: int


class TarImages:
    """The images in a list of shards, read by offset, as bytes.

    An image's id is its member name; if two shards hold the same name, every id of the set starts with its
    shard's path below the folder that all shards share. Images are sorted by id.

    Args:
        shards: Paths of tars.
        cache: Cache root, for the listings.
        image_key: Which members are the images, as in webdataset: ``jpg``, ``jpg;png``, ``input.png``.
            None: every member with an image's suffix, one per sample.

    Raises:
        MissingError: A shard is not there.
        CorruptFileError: A shard is truncated, no tar, or holds a name twice.
        UsageError: No image, or more than one in a sample.
    """

    def __init__(self, shards: Sequence[Path], *, cache: Path, image_key: str | None = None) -> None:
        self.shards = tuple(shards)
        listed = index_shards(shards, cache)
        self._states = [(index.size, index.changed) for index in listed]
        found: list[_Image] = []
        without = 0
        for number, (path, index) in enumerate(zip(shards, listed, strict=True)):
            chosen, imageless = _choose(path, index, image_key)
            found += [_Image(index.names[i], number, index.offsets[i], index.sizes[i]) for i in chosen]
            without += imageless
        if not found:
            raise UsageError(self._nothing(listed, image_key))
        if without:
            _log.warning("%d samples of %d shards hold no image and are left out", without, len(shards))
        if len({image.id for image in found}) < len(found):
            prefixes = _prefixes(shards)
            found = [image._replace(id=f"{prefixes[image.shard]}/{image.id}") for image in found]
        found.sort()
        self.ids = tuple(image.id for image in found)
        self._shard = np.array([image.shard for image in found], dtype=np.int32)
        self._offset = np.array([image.offset for image in found], dtype=np.int64)
        self._size = np.array([image.size for image in found], dtype=np.int64)

    @staticmethod
    def _nothing(listed: Iterable[TarIndex], image_key: str | None) -> str:
        kinds = {
            match[2].lower() for index in listed for name in index.names if (match := _NAME.fullmatch(name))
        }
        looked = ", ".join(sorted(_wanted(image_key)))
        here = ", ".join(sorted(kinds)[:10]) or "nothing"
        return f"the shards hold no image: looked for members that end in {looked}; there are: {here}"

    def where(self, index: int) -> str:
        """Shard and id of an image, for messages."""
        return f"{self.shards[int(self._shard[index])]}: {self.ids[index]}"

    def digests(self, index: Sequence[int], *, cache: Path, title: str, progress: bool) -> list[bytes]:
        """sha256 of some images, read once as long as their shard stays as it is."""
        found: dict[int, bytes] = {}
        by_shard: dict[int, list[int]] = defaultdict(list)
        for i in index:
            by_shard[int(self._shard[i])].append(i)
        for number, inside in by_shard.items():
            path = self.shards[number]
            values = part_digests(
                str(path.resolve()),
                state_of_files([path]),
                [f"{self._offset[i]}+{self._size[i]}" for i in inside],
                lambda part, inside=inside: self.read(inside[part]),  # type: ignore[misc]
                cache=cache,
                title=title,
                progress=progress,
            )
            found |= dict(zip(inside, values, strict=True))
        return [found[i] for i in index]

    def read(self, index: int) -> bytes:
        """The encoded image."""
        number = int(self._shard[index])
        path, size = self.shards[number], int(self._size[index])
        try:
            with path.open("rb") as stream:
                now = os.fstat(stream.fileno())
                if (now.st_size, now.st_mtime_ns) != self._states[number]:
                    raise BenchError(f"{path}: was changed while it was in use. Start the command again.")
                stream.seek(int(self._offset[index]))
                content = stream.read(size)
        except FileNotFoundError as error:
            raise MissingError(f"{path}: no such shard. The data changed after they were listed.") from error
        except OSError as error:
            raise BenchError(f"{path}: cannot read: {error.strerror or error}") from error
        if len(content) < size:
            raise BenchError(f"{path}: ends too early. Replace it by an intact copy.")
        return content


def _choose(path: Path, index: TarIndex, image_key: str | None) -> tuple[list[int], int]:
    """Positions of the images of one shard, and how many samples have none."""
    wanted = _wanted(image_key)
    samples: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(index.names):
        match = _NAME.fullmatch(name)
        if match is None:  # a hidden file, or one without a suffix: no part of a sample
            continue
        kind = match[2].lower()
        image = kind in wanted or (image_key is None and kind.rpartition(".")[2] in wanted)
        samples[match[1]] += [i] if image else []
    for sample, images in samples.items():
        if len(images) > 1:
            names = [index.names[i] for i in images]
            if len(set(names)) < len(names):
                raise CorruptFileError(f"{path}: holds {names[0]} more than once. Replace the shard.")
            raise UsageError(
                f"{path}: sample {sample} has several images ({', '.join(names)}). Say which with "
                "image_key=SUFFIX (all of the name after its first dot)."
            )
    return [images[0] for images in samples.values() if images], sum(not v for v in samples.values())


def _prefixes(shards: Sequence[Path]) -> list[str]:
    """Paths of shards below the folder that they share, without the suffix: distinct."""
    base = os.path.commonpath([str(path.parent.absolute()) for path in shards])
    prefixes = [path.absolute().relative_to(base).with_suffix("").as_posix() for path in shards]
    for one, other in pairwise(sorted(prefixes)):
        if one == other:
            raise UsageError(f"two shards are called {one}: rename one of them")
    return prefixes
