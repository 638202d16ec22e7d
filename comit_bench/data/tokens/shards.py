"""The file format of the token store and of the feature cache: a safetensors file per shard, mapped.

The metadata carry a sha256 over themselves and every tensor, so that any changed byte is noticed. How
shards make a store, and what the tensors mean: ``store.py``. Processes that want the same
shards at the same time divide them among themselves (:class:`SharedWork`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import SAY_AFTER, digest_json, sweep, try_lock, write_atomic
from comit_bench.recipes.reading import read_json

FORMAT_VERSION = 1
STALE_SECONDS = 3600.0  # a temporary file this old belongs to a process that was killed
POLL = 0.2  # seconds between two looks at what others are doing
Array = NDArray[Any]
_log = logging.getLogger(__name__)
_TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "F16": np.float16, "F32": np.float32}


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds ids 0 .. vocab_size - 1."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if 1 <= vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    raise UsageError(f"vocab_size {vocab_size}: expected 1 to {2**32}")


class ShardLayout(Protocol):
    """Shape of a store; a dataclass of plain values, a part of the store's key."""

    @property
    def count(self) -> int:
        """Rows of the store."""

    @property
    def shard_size(self) -> int:
        """Rows per shard."""

    @property
    def optional(self) -> frozenset[str]:
        """Tensors that may be absent."""

    def shapes(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every tensor a shard of ``rows`` rows may hold."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A mapped shard: read-only views by name, and row -> message of its broken images."""

    tensors: dict[str, Array]
    broken: dict[int, str]


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> str:
    """sha256 over the metadata (without the checksum itself) and the tensors by name."""
    rest = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def shard_bytes(tensors: dict[str, Array], broken: Mapping[int, str], *, store: str, shard: int) -> bytes:
    """Content of a shard's file.

    Args:
        tensors: What :meth:`ShardLayout.shapes` lists, C-contiguous.
        broken: Row of the store -> why its image could not be read.
        store: Digest of the store it belongs to.
        shard: Its number there.
    """
    metadata = {
        "store": store,
        "shard": str(shard),
        "broken": json.dumps({str(row): broken[row] for row in sorted(broken)}),
    }
    metadata["sha256"] = checksum(metadata, tensors)
    return sorted_header(save(tensors, metadata))


def sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its header keys in order: equal tokens are equal bytes."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file, read-only, without holding a file descriptor as ``np.memmap`` does.

    ImageNet has 1,252 shards, and a process may often open no more than 1,024 files.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError("the file is truncated")
    data: NDArray[np.uint8] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    data.flags.writeable = False
    return data


def _parse(data: NDArray[np.uint8]) -> tuple[dict[str, str], dict[str, Array]]:
    """Split mapped safetensors bytes into metadata and views."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > data.size - 8:
        raise ValueError("the file is truncated, or its header is damaged")
    header = json.loads(data[8 : 8 + length].tobytes().decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("the header is not a mapping")
    metadata = header.pop("__metadata__", {})
    body, tensors, end = data[8 + length :], {}, 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= body.size:
            raise ValueError("the file is truncated")
        tensors[name] = body[start:stop].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        end = max(end, stop)
    if end != body.size:
        raise ValueError("there are bytes after the last tensor")
    return metadata, tensors


def _read_shard(path: Path, layout: ShardLayout, rows: int, *, store: str, shard: int, check: bool) -> Shard:
    """Map one shard and compare it with what it should be, its checksum only with ``check``.

    Raises:
        ValueError: Damaged in any way.
        OSError: Absent, or the system cannot read it.
    """
    data = _map_file(path)
    try:
        metadata, tensors = _parse(data)
        expected = layout.shapes(rows)
        if set(tensors) | layout.optional != set(expected):
            raise ValueError(f"it holds {', '.join(sorted(tensors))}")
        for name, tensor in tensors.items():
            if (tensor.dtype, tensor.shape) != expected[name]:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        if (metadata["store"], metadata["shard"]) != (store, str(shard)):
            raise ValueError("it was written for another place")
        if check and checksum(metadata, tensors) != metadata["sha256"]:
            raise ValueError("its checksum differs")
        broken = {int(row): str(text) for row, text in json.loads(metadata["broken"]).items()}
    except (LookupError, TypeError, AttributeError) as error:  # a header that is JSON of another form
        raise ValueError(f"its header is damaged: {error!r}") from error
    return Shard(tensors, broken)


L = TypeVar("L", bound=ShardLayout)


class ShardStore(Generic[L]):
    """Shards in a directory that is named by the digest of its key; shards that were read stay mapped.

    ``<root>/<digest[:2]>/<digest>/`` holds ``key.json`` and ``shard-NNNNNN.safetensors``.

    Args:
        root: Where all stores of a kind lie.
        key: Everything that can change a number, as plain JSON values; the layout is added to it.
        layout: Shape of the store.
        check: Whether checksums are verified at the first use of a shard.

    Raises:
        CorruptFileError: ``key.json`` is not that of this store.
    """

    what: ClassVar[str]  # completes "damaged part of the ..."
    absent: ClassVar[str]  # what is said of a shard that is not there

    def __init__(self, root: Path, key: Mapping[str, object], layout: L, *, check: bool) -> None:
        values: Any = layout
        payload = {"format": FORMAT_VERSION, "key": dict(key), "layout": asdict(values)}
        self.digest = digest_json(payload).removeprefix("sha256:")
        self.directory = root / self.digest[:2] / self.digest
        self.layout, self.check = layout, check
        self._shards: dict[int, Shard] = {}
        _check_key(self.directory / "key.json", json.loads(json.dumps(payload)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # another process maps the files itself

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.layout.count // self.layout.shard_size)

    def shard_path(self, shard: int) -> Path:
        """File of a shard."""
        return self.directory / f"shard-{shard:06d}{self._tag(shard)}.safetensors"

    def _tag(self, shard: int) -> str:
        """What a shard's name says of its rows."""
        return ""

    def shard_range(self, shard: int) -> range:
        """Rows of a shard."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} is outside 0..{self.num_shards - 1}")
        start = shard * self.layout.shard_size
        return range(start, min(self.layout.count, start + self.layout.shard_size))

    def remove_stale(self) -> None:
        """Remove the temporary files that killed processes left, of any version."""
        sweep(self.directory)
        now = time.time()
        for path in self.directory.glob(".shard-*.part"):
            with suppress(OSError):  # finished or removed by its owner meanwhile, or not ours to remove
                if now - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _write(self, shard: int, tensors: dict[str, Array], broken: Mapping[int, str]) -> None:
        content = shard_bytes(tensors, broken, store=f"{self.digest}{self._tag(shard)}", shard=shard)
        write_atomic(self.shard_path(shard), content)
        self._shards.pop(shard, None)

    def _shard(self, shard: int) -> Shard:
        """A shard; raises MissingError or CorruptFileError."""
        if shard not in self._shards:
            try:
                self._load(shard, check=self.check)
            except FileNotFoundError as error:
                raise MissingError(f"{self.shard_path(shard)}: {self.absent}") from error
        return self._shards[shard]

    def _load(self, shard: int, *, check: bool) -> None:
        path, rows = self.shard_path(shard), len(self.shard_range(shard))
        store = f"{self.digest}{self._tag(shard)}"
        try:
            self._shards[shard] = _read_shard(path, self.layout, rows, store=store, shard=shard, check=check)
        except (ValueError, RuntimeError) as error:  # RuntimeError: torch could not map it
            raise CorruptFileError(
                f"{path}: damaged part of the {self.what} ({error}). "
                "Remove the file, or run the same command again, to rebuild it."
            ) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BenchError(f"{path}: cannot read: {error.strerror}") from error


def _check_key(path: Path, payload: dict[str, Any]) -> None:
    """Write ``key.json``, or compare it when it exists."""
    if not path.exists():
        write_atomic(path, json.dumps(payload, indent=2, sort_keys=True) + "\n")
        return
    try:
        found = read_json(path)
    except BenchError as error:
        raise CorruptFileError(
            f"{path}: cannot be read ({error}). Remove its folder and run the same command again."
        ) from error
    if found != payload:
        raise CorruptFileError(
            f"{path}: describes other content than the folder's name says. "
            "Remove the folder and run the same command again."
        )


class SharedWork:
    """Shards that are to be made, divided among all processes that want them, whoever started them.

    A process claims a shard with a lock file beside it before it makes it. The claim ends with the process,
    so what a killed one was making is made by another. Nobody waits while holding a claim. A shard that two
    processes make all the same (on a disk without locks) is written twice with equal bytes.

    Use it as a context manager around each pass over :meth:`take`, and :meth:`wait` in between::

        while work.left:
            work.wait()
            with work:
                for shard in work.take():
                    ...
                    work.done(shard)

    Args:
        shards: Numbers, in the order in which they are made.
        path: File of a shard.
        what: What the shards hold, for the message of those who wait.
        has: Whether a shard is there; by default whether its file is.
    """

    def __init__(
        self,
        shards: Sequence[int],
        path: Callable[[int], Path],
        what: str,
        has: Callable[[int], bool] | None = None,
    ) -> None:
        self.left, self.path, self.what = list(shards), path, what
        self.has = has or (lambda shard: path(shard).exists())
        self.elsewhere = 0  # shards that others have made
        self._held: dict[int, Callable[[], None]] = {}

    def take(self) -> Iterator[int]:
        """Claim one shard after the other that is not there and that nobody else is making."""
        for shard in list(self.left):
            give_back = None if self._is_there(shard) else self._claim(shard)
            if give_back is None:
                continue
            if self._is_there(shard):  # finished in between
                give_back()
                continue
            self._held[shard] = give_back
            yield shard

    def done(self, shard: int) -> None:
        """A shard that was taken has been written."""
        self.left.remove(shard)
        self._held.pop(shard)()

    def wait(self) -> None:
        """Return as soon as there is a shard to take, or all are there."""
        began, said = time.monotonic(), False
        while self.left:
            for shard in list(self.left):
                if not self._is_there(shard) and (give_back := self._claim(shard)) is not None:
                    give_back()
                    return
            if self.left and not said and time.monotonic() - began > SAY_AFTER:
                said = True
                _log.warning("another process is making the rest of %s: waiting for it", self.what)
            if self.left:
                time.sleep(POLL)

    def _is_there(self, shard: int) -> bool:
        if not self.has(shard):
            return False
        if shard in self.left:
            self.left.remove(shard)
            self.elsewhere += 1
        return True

    def _claim(self, shard: int) -> Callable[[], None] | None:
        file = self.path(shard).with_name(f".{self.path(shard).stem}.lock")
        try:
            lock = try_lock(file)
        except OSError:  # no locks on this disk, or no right to make one
            return lambda: None
        if lock is None:
            return None
        return lock.release

    def __enter__(self) -> SharedWork:
        return self

    def __exit__(self, *_: object) -> None:
        while self._held:
            self._held.popitem()[1]()
