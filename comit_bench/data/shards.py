"""The file format of the token store and of the feature cache: a safetensors file per shard, mapped.

The metadata carry a sha256 over themselves and every tensor, so that any changed byte is noticed. How
shards make a store, and what the tensors mean: ``comit_bench.data.store``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comit_bench.errors import UsageError

Array = NDArray[Any]
_TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "F16": np.float16, "F32": np.float32}


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds ids 0 .. vocab_size - 1.

    Raises:
        UsageError: ``vocab_size`` is not in 1 .. 2**32.
    """
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
    from safetensors.numpy import save

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
    import torch

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
