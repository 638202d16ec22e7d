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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from comit_bench.errors import UsageError
from comit_bench.files import SAY_AFTER, try_lock

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
    """What a store's shards look like."""

    @property
    def optional(self) -> frozenset[str]:
        """Tensors that may be absent."""

    def shapes(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every tensor a shard of ``rows`` rows may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Shape of a store: ``n`` messages of K tokens. A part of its key.

    Attributes:
        count: Number of messages, n.
        message_length: Tokens per message, K.
        vocab_size: Number of distinct ids, or None for continuous codes.
        code_dim: Length of a code vector, d.
        shard_size: Rows per shard.
    """

    count: int
    message_length: int
    vocab_size: int | None
    code_dim: int
    shard_size: int

    def __post_init__(self) -> None:
        for name, least in (("count", 0), ("message_length", 1), ("code_dim", 1), ("shard_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"token store: {name} {getattr(self, name)} must be at least {least}")
        if self.vocab_size is not None:
            id_dtype(self.vocab_size)

    @property
    def optional(self) -> frozenset[str]:
        """Tensors that may be absent."""
        return frozenset({"offsets"})

    @property
    def payload(self) -> str:
        """Name of the main tensor: ``ids`` or ``codes``."""
        return "codes" if self.vocab_size is None else "ids"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored type of the main tensor."""
        return np.dtype(np.float32) if self.vocab_size is None else id_dtype(self.vocab_size)

    def shapes(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every tensor a shard of ``rows`` rows may hold."""
        tail = (self.message_length, self.code_dim) if self.vocab_size is None else (self.message_length,)
        return {
            self.payload: (self.dtype, (rows, *tail)),
            "offsets": (np.dtype(np.float32), (rows, 2)),
            "valid": (np.dtype(np.uint8), (rows,)),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the main tensor over all shards; what a plan prints as the cache size."""
        dtype, shape = self.shapes(self.count)[self.payload]
        return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


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
        tensors: What :meth:`Layout.shapes` lists, C-contiguous; ``offsets`` may be absent.
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


def read_shard(path: Path, layout: ShardLayout, rows: int, *, store: str, shard: int, check: bool) -> Shard:
    """Map one shard and compare it with what it should be.

    Args:
        path: Its file.
        layout: Shape of the store.
        rows: Rows the shard should have.
        store: Digest of the store it should belong to.
        shard: The number it should have.
        check: Whether to compute the checksum.

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
