"""The token store: messages on disk, memory-mapped, sharded, atomic, content-addressed, resumable.

``<cache>/tokens/<digest[:2]>/<digest>/`` holds one data set's messages under one protocol. The digest is
that of a payload (weights, options, preprocessing, policy, data fingerprint, layout ...) which lies
beside the shards as ``key.json``. Shard i is one safetensors file with rows
``[i * shard_size, min(count, (i + 1) * shard_size))``; its name ends in a digest of the *marks* of these
rows, where a store has marks (id and content of an image): after an image was replaced its shard alone is
missing.

- ``ids`` [rows, K], the smallest unsigned integer type that holds the vocabulary, or
  ``codes`` float32 [rows, K, d] when there is no finite vocabulary;
- ``offsets`` float32 [rows, 2], only for tokenizers that have a decoding offset;
- ``valid`` uint8 [rows], 0 where the image file was broken.

Its metadata hold the store's digest, the shard's number, the messages of the broken rows and a sha256
over all of this and the tensors (``comit_bench.data.tokens.shards``). No file is shared between writers: any
number of processes may write different shards, and a shard that is killed half-way does not exist. Processes
that want the same shards at the same time divide them (``SharedWork`` there).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.data.tokens.shards import Array, ShardStore, id_dtype
from comit_bench.errors import CorruptFileError, UnsupportedOperation, UsageError
from comit_bench.files import private_folder, require_room

Index = Sequence[int] | NDArray[np.integer[Any]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Messages:
    """A whole store in memory.

    Attributes:
        ids: [n, K] in the stored unsigned type, or None for continuous codes.
        codes: float32 [n, K, d], or None for a finite vocabulary.
        offsets: float32 [n, 2], or None.
        valid: bool [n].
    """

    ids: Array | None
    codes: NDArray[np.float32] | None
    offsets: NDArray[np.float32] | None
    valid: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
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
        """As :class:`ShardLayout`: the main tensor, ``offsets`` and ``valid``."""
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


class TokenStore(ShardStore[TokenLayout]):
    """Messages of one tokenizer on one split under one protocol; make it with :meth:`open`.

    Every shard's checksum is verified once per open, at its first use; :meth:`missing_shards` verifies
    all that exist and removes corrupt ones, so that exactly these are computed again.
    """

    what = "token store"
    absent = (
        "this part of the token store has not been computed. "
        "Run the same command again; only missing parts are computed."
    )

    def __init__(
        self,
        root: Path,
        key: Mapping[str, object],
        layout: TokenLayout,
        *,
        check: bool,
        mark: Callable[[int], str] | None,
    ) -> None:
        super().__init__(root / "tokens", key, layout, check=check)
        self.mark = mark
        self._tags: dict[int, str] = {}
        self._swept = False
        self._since = 0

    @classmethod
    def open(
        cls,
        root: Path,
        key: Mapping[str, object],
        *,
        count: int,
        message_length: int,
        vocab_size: int | None,
        code_dim: int,
        shard_size: int = 1024,
        verify: bool = True,
        mark: Callable[[int], str] | None = None,
    ) -> TokenStore:
        """Find or begin the store for ``key`` under the cache directory ``root``. Reads no shard.

        Args:
            root: The cache directory; the store goes into ``tokens/`` there.
            key: Everything that can change a token, as plain JSON values. The layout is added to it.
            count: Number of messages, n.
            message_length: Tokens per message, K.
            vocab_size: Number of distinct ids, or None to store float32 codes.
            code_dim: Length of a code vector, d.
            shard_size: Rows per shard.
            verify: False skips all checksums.
            mark: Row -> a text of what its tokens depend on beside the key; None: nothing.

        Raises:
            CorruptFileError: ``key.json`` holds something else than ``key``.
            UsageError: Impossible sizes.
        """
        layout = TokenLayout(
            count=count,
            message_length=message_length,
            vocab_size=vocab_size,
            code_dim=code_dim,
            shard_size=shard_size,
        )
        return cls(root, key, layout, check=verify, mark=mark)

    @property
    def count(self) -> int:
        """Number of messages, n."""
        return self.layout.count

    def _tag(self, shard: int) -> str:
        """What the marks of a shard's rows add to its name."""
        if self.mark is None:
            return ""
        if shard not in self._tags:
            text = "\n".join(map(self.mark, self.shard_range(shard)))
            self._tags[shard] = f"-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
        return self._tags[shard]

    def missing_shards(self) -> list[int]:
        """Numbers of the shards still to be written.

        The first call removes what killed processes left behind and every corrupt shard (with a warning
        in the log; a store opened with ``verify=False`` looks at headers and sizes only).
        """
        if not self._swept:
            self._swept = True
            self.remove_stale()
            self.verify(checksums=self.check)
        present = {entry.name for entry in os.scandir(self.directory)}
        return [
            shard
            for shard in range(self.num_shards)
            if self.shard_path(shard).name not in present or (self._since and not self.has(shard))
        ]

    @property
    def complete(self) -> bool:
        """True when every shard exists (see :meth:`missing_shards`)."""
        return not self.missing_shards()

    def require_room(self, shards: Sequence[int]) -> None:
        """Refuse to begin when the messages of these shards will not fit on the disk."""
        rows = sum(len(self.shard_range(shard)) for shard in shards)
        if rows:
            need = self.layout.nbytes * rows // self.layout.count
            require_room(self.directory, need, f"the tokens of {rows:,} images need")

    def verify(self, *, checksums: bool = True) -> dict[int, str]:
        """Check header, size and (unless told not to) checksum of every shard; remove the corrupt ones.

        Returns:
            Shard -> what was wrong with it, for those removed.
        """
        corrupt: dict[int, str] = {}
        for shard in range(self.num_shards):
            path = self.shard_path(shard)
            try:
                before = path.stat()
                self._shards.pop(shard, None)
                self._load(shard, check=checksums)
            except FileNotFoundError:
                continue
            except CorruptFileError as error:
                if _same_file(path, before):  # else another process has just rebuilt it
                    self._remove(path)
                corrupt[shard] = str(error)
                rows = len(self.shard_range(shard))
                _log.warning("%s It was removed; only its %d images are tokenized again.", error, rows)
        return corrupt

    def renew(self) -> None:
        """From now on every shard that was there counts as missing, so that all messages are made anew.

        Each one stays until its successor takes its place: other processes may be reading them. What another
        process has made since this call does not count as missing.
        """
        with private_folder(self.directory) as place:
            (place / "now").touch()
            self._since = (place / "now").stat().st_mtime_ns  # by the clock of the disk
        self._shards.clear()

    def has(self, shard: int) -> bool:
        """Whether a shard is there (and no older than the last :meth:`renew`); it is not opened."""
        try:
            return self.shard_path(shard).stat().st_mtime_ns >= self._since
        except FileNotFoundError:
            return False

    def write_shard(
        self,
        shard: int,
        *,
        ids: object = None,
        codes: object = None,
        offsets: object = None,
        broken: Mapping[int, str] | None = None,
    ) -> None:
        """Write one shard, whole or not at all. Arrays or CPU tensors.

        Args:
            shard: Its number; an existing shard is replaced.
            ids: Integers [rows, K] in 0 .. vocab_size - 1; exactly when the vocabulary is finite.
            codes: Finite floats [rows, K, d]; exactly when it is not.
            offsets: Floats [rows, 2], for every shard of the store or for none.
            broken: Row (counted over the whole store) -> why its image could not be read.

        Raises:
            UsageError: Shapes, types or values do not fit the store.
            BenchError: The disk is full or not writable.
        """
        rows = self.shard_range(shard)
        values = {"ids": ids, "codes": codes, "offsets": offsets}
        given = {name: value for name, value in values.items() if value is not None}
        if {"ids", "codes"} & set(given) != {self.layout.payload}:
            raise UsageError(
                f"token store: with vocab_size {self.layout.vocab_size} a shard takes "
                f"{self.layout.payload}, got {' and '.join(sorted(given)) or 'nothing'}"
            )
        tensors = {name: self._checked(name, np.asarray(v), len(rows)) for name, v in given.items()}
        broken = dict(broken or {})
        for row in broken:
            if row not in rows:
                raise UsageError(f"token store: broken row {row} is not in shard {shard} ({rows})")
        valid = np.ones(len(rows), dtype=np.uint8)
        valid[[row - rows.start for row in broken]] = 0
        tensors["valid"] = valid
        self._write(shard, tensors, broken)

    def ids(self, index: Index) -> NDArray[np.int64]:
        """Ids of some messages, in the order asked for: int64 [len(index), K].

        Raises:
            UnsupportedOperation: The store holds continuous codes.
            MissingError: A shard that is needed has not been written.
            CorruptFileError: A shard that is needed is damaged.
        """
        if self.layout.vocab_size is None:
            raise UnsupportedOperation(f"{self.directory}: holds continuous codes, which have no ids")
        return self._gather("ids", index).astype(np.int64)

    def codes(self, index: Index) -> NDArray[np.float32]:
        """Codes of some messages: float32 [len(index), K, d]. Errors as for :meth:`ids`."""
        if self.layout.vocab_size is not None:
            raise UnsupportedOperation(
                f"{self.directory}: holds ids; look codes up with the tokenizer's codes_from_ids(ids)"
            )
        return self._gather("codes", index)

    def offsets(self, index: Index) -> NDArray[np.float32] | None:
        """Decoding offsets: float32 [len(index), 2], or None when the tokenizer has none."""
        if not self.has_offsets:
            return None
        return self._gather("offsets", index)

    @property
    def has_offsets(self) -> bool:
        """Whether the first shard holds decoding offsets; all others must agree."""
        return self.num_shards > 0 and "offsets" in self._shard(0).tensors

    def valid(self) -> NDArray[np.bool_]:
        """One bool per row [n], False where the image was broken. Needs the complete store (MissingError)."""
        return self._whole("valid").astype(np.bool_)

    def broken(self) -> dict[int, str]:
        """Row -> message of all broken images in the shards written so far."""
        found: dict[int, str] = {}
        for shard in range(self.num_shards):
            if self.shard_path(shard).exists():
                found.update(self._shard(shard).broken)
        return found

    def load_all(self) -> Messages:
        """Copy the complete store into memory (ids keep their stored type)."""
        whole = self._whole(self.layout.payload)
        finite = self.layout.vocab_size is not None
        offsets = self._whole("offsets") if self.has_offsets else None
        return Messages(whole if finite else None, None if finite else whole, offsets, self.valid())

    def _checked(self, name: str, value: Array, rows: int) -> Array:
        dtype, shape = self.layout.shapes(rows)[name]
        if value.shape != shape:
            raise UsageError(f"token store: {name} has shape {list(value.shape)}, expected {list(shape)}")
        if name == "ids":
            if value.dtype.kind not in "iu":
                raise UsageError(f"token store: ids are {value.dtype}, expected integers")
            low, high = int(value.min()), int(value.max())
            assert self.layout.vocab_size is not None
            if low < 0 or high >= self.layout.vocab_size:
                raise UsageError(
                    f"token store: ids reach from {low} to {high}, outside 0..{self.layout.vocab_size - 1}"
                )
            return np.ascontiguousarray(value, dtype=dtype)
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            converted = np.ascontiguousarray(value, dtype=dtype)
        if value.dtype.kind != "f" or not np.isfinite(converted).all():
            raise UsageError(f"token store: {name} must be finite floating-point numbers")
        return converted

    def forget(self, shard: int) -> None:
        """Remove a shard, so that it is missing."""
        self._shards.pop(shard, None)
        self._remove(self.shard_path(shard))

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CorruptFileError(
                f"{path}: this file must go and cannot be removed ({error.strerror}). "
                "Remove it and run the same command again."
            ) from error

    def _tensor(self, shard: int, name: str) -> Array:
        try:
            return self._shard(shard).tensors[name]
        except KeyError:
            raise CorruptFileError(
                f"{self.shard_path(shard)}: has no {name}, unlike the first shard. "
                "Remove the file and run the same command again to rebuild it."
            ) from None

    def _gather(self, name: str, wanted: Index) -> Array:
        index = np.asarray(wanted)
        if index.size == 0:
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise UsageError(
                f"token store: rows must be a flat list of integers, got {index.dtype} {index.shape}"
            )
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.count:
            raise IndexError(f"rows {index.min()}..{index.max()} are outside 0..{self.count - 1}")
        dtype, shape = self.layout.shapes(index.size)[name]
        out = np.empty(shape, dtype)
        shards, local = np.divmod(index, self.layout.shard_size)
        views = {int(shard): self._tensor(int(shard), name) for shard in np.unique(shards)}
        if len(views) * 4 > index.size:  # a few rows from each of many shards
            for row, (shard, position) in enumerate(zip(shards.tolist(), local.tolist(), strict=True)):
                out[row] = views[shard][position]
            return out
        for shard, view in views.items():
            where = np.flatnonzero(shards == shard)
            out[where] = view[local[where]]
        return out

    def _whole(self, name: str) -> Array:
        dtype, shape = self.layout.shapes(self.count)[name]
        out = np.empty(shape, dtype)
        for shard in range(self.num_shards):
            rows = self.shard_range(shard)
            out[rows.start : rows.stop] = self._tensor(shard, name)
        return out


def _same_file(path: Path, before: os.stat_result) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (now.st_ino, now.st_mtime_ns, now.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
