"""Images of one split -> token store. Only shards that are missing are computed.

Shards are cut by index, images are read in order, nothing is padded or repeated, and every image has a
generator of its own, so the store's bytes do not depend on batch size, workers or where a run stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from comit_bench.data.images import iterate_images, load_from, upright
from comit_bench.data.split import Split
from comit_bench.data.tokens.shards import SharedWork
from comit_bench.data.tokens.store import TokenStore
from comit_bench.errors import BenchError
from comit_bench.files import write_atomic
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.base import Tokenizer, Tokens, tile_rows
from comit_bench.tokenizers.contract import check_tokens, check_values
from comit_bench.tokenizers.identity import code_version

SHARD_SIZE = 1024  # messages; a process that dies loses at most one shard of its own
Advance = Callable[[int], None]
T = TypeVar("T")


def store_key(
    tokenizer: Tokenizer,
    *,
    policy: str | None,
    fingerprint: str,
    seed: int,
    selection: str,
    exif: bool = False,
) -> dict[str, Any]:
    """Everything that can change a token.

    Args:
        tokenizer: Its weights, configuration, options and preprocessing, the version of its code, and where
            it computes. Random weights belong to the name that they were drawn for.
        policy: Cropping policy as it runs, None for tokenizers without crops.
        fingerprint: Of the list of images, by ids; what they hold is in the marks of :func:`open_store`.
        seed: Of the per-image generators.
        selection: Which images of the split, ``all`` or ``limit:N``.
        exif: Whether images are turned upright first.
    """
    info = tokenizer.info
    key: dict[str, Any] = {
        "family": info.family,
        "weights": info.weights,
        "configuration": info.configuration,
        "version": code_version(tokenizer),
        "options": dict(info.options),
        "preprocessing": upright(info.preprocessing) if exif else info.preprocessing,
        "policy": policy,
        "data": fingerprint,
        "selection": selection,
        "seed": seed,
        "tile": tile_rows.get(),
        "device": str(getattr(tokenizer, "device", "cpu")).partition(":")[0],  # they round differently
    }
    if info.weights.startswith("random:"):
        key["name"] = info.name
    return key


def open_store(
    tokenizer: Tokenizer,
    cache: Path,
    key: Mapping[str, Any],
    *,
    count: int,
    data: str = "",
    shard_size: int | None = None,
    split: Split | None = None,
    rows: Sequence[int] = (),
) -> TokenStore:
    """Find or begin the store of ``count`` messages of a tokenizer under a key of :func:`store_key`.

    Tokenizer and ``data`` are named in ``about.json`` beside the shards, for people only. With a split whose
    contents are known, a shard belongs to the contents of its images: when some images were replaced, only
    their shards are made again.

    Args:
        tokenizer: Says the layout.
        cache: The cache directory.
        key: Of the store.
        count: Number of messages.
        data: Name of the data.
        shard_size: Messages per shard.
        split: Where the images are from.
        rows: Images of the split; row i of the store is ``rows[i]``.
    """
    info = tokenizer.info
    known = split if split is not None and split.contents else None
    store = TokenStore.open(
        cache,
        key,
        count=count,
        message_length=info.message_length,
        vocab_size=info.vocab_size,
        code_dim=info.code_dim,
        shard_size=shard_size or SHARD_SIZE,  # looked up when called: a test makes it small
        mark=None if known is None else partial(_mark, known, rows),
    )
    about = store.directory / "about.json"
    if not about.exists():
        write_atomic(about, json.dumps({"tokenizer": info.name, "data": data}) + "\n")
    return store


def _mark(split: Split, rows: Sequence[int], row: int) -> str:
    """What the tokens of a row depend on beside the key."""
    return f"{split.ids[rows[row]]}\t{split.contents[rows[row]].hex()}"


def list_digest(split: Split) -> str:
    """``sha256:<hex>`` of the ids of a split: which list of images a store is for."""
    state = hashlib.sha256("\n".join(split.ids).encode("utf-8", "surrogateescape"))
    return f"ids-sha256:{state.hexdigest()}"


def shards_to_do(store: TokenStore, split: Split, rows: Sequence[int], preprocessing: str) -> list[int]:
    """Shards that are missing, once those with a broken image that can be read now have been removed.

    A file that changed has other contents, so its shard is missing; but another version of a decoder, or more
    memory, may read what could not be read before.
    """
    store.missing_shards()  # looks at all of them, and removes what is damaged
    for row in store.broken():
        if _readable(split.paths, rows[row], preprocessing):
            store.forget(row // store.layout.shard_size)
    return store.missing_shards()


def _readable(paths: Sequence[Path], index: int, preprocessing: str) -> bool:
    try:
        load_from(paths, index, preprocessing)
    except BenchError:
        return False
    return True


def tokenize_split(
    tokenizer: Tokenizer,
    split: Split,
    store: TokenStore,
    *,
    key: Mapping[str, Any],
    rows: Sequence[int],
    shards: Sequence[int],
    batch_size: int = 64,
    num_workers: int = 0,
    advance: Advance | None = None,
    profile: dict[str, float] | None = None,
) -> None:
    """Compute some shards of a store. Images are decoded while the tokenizer computes.

    What another process is just computing is left to it and waited for, whoever started it; if it is killed,
    this one takes over.

    Args:
        tokenizer: Encodes uint8 batches.
        split: Images in index order.
        store: From :func:`open_store`, with as many rows as ``rows``.
        key: From :func:`store_key`.
        rows: Images of the split; row i of the store is ``rows[i]``.
        shards: Which shards, in order.
        batch_size: Images per call; no token depends on it.
        num_workers: Reading processes; 0 reads in a thread of this one.
        advance: Called with the number of images just finished.
        profile: Seconds are added here: ``images`` (waiting for decoded images), ``encode``, ``write``.

    Raises:
        BenchError: A file vanished, or the disk is full.
        UsageError: What the tokenizer returns is not what the contract says.
    """
    store.require_room(shards)
    spent = profile if profile is not None else {}
    work = SharedWork(shards, store.shard_path, f"the tokens of {tokenizer.info.name}", store.has)
    total, made = sum(len(store.shard_range(shard)) for shard in shards), 0
    while work.left:
        work.wait()
        with work:
            pending = _Pending(store, work, tokenizer)
            images = iterate_images(
                split.paths,
                split.preprocessing(tokenizer.info.preprocessing),
                batch_size=batch_size,
                num_workers=min(num_workers, -(-total // batch_size)),
                indices=(rows[row] for row in pending.rows()),
            )
            source: Any = ahead(images) if num_workers == 0 else images
            with closing(source) as batches:
                while True:
                    with _clock(spent, "images"):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    with _clock(spent, "encode"):
                        generators = [
                            generator_for(int(key["seed"]), split.ids[index]) for index in batch.indices
                        ]
                        tokens = tokenizer.encode(batch.images, policy=key["policy"], generators=generators)
                    with _clock(spent, "write"):
                        pending.add(tokens, batch.broken, batch.indices)
                    made += len(batch.indices)
                    if advance is not None:
                        advance(len(batch.indices))
            pending.finish()
    if advance is not None and made < total:
        advance(total - made)  # by others


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T]:
    """The same items in order, the next ``depth`` of them made by a thread while one is used.

    Decoding and resizing release Python's lock, so they run beside the network. Errors come where the
    item would have come; closing the generator ends the thread.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="images")
    try:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


@contextmanager
def _clock(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[name] = spent.get(name, 0.0) + time.perf_counter() - started


class _Pending:
    """Tokens that wait until their shard is full."""

    def __init__(self, store: TokenStore, work: SharedWork, tokenizer: Tokenizer) -> None:
        self.store, self.work, self.tokenizer = store, work, tokenizer
        self.shards: deque[int] = deque()
        self.columns: dict[str, list[Tensor]] = {}
        self.notes: list[str | None] = []  # per row, why its image is broken

    def rows(self) -> Iterator[int]:
        """Rows of the store whose images come next: those of every shard that is taken."""
        for shard in self.work.take():
            self.shards.append(shard)
            yield from self.store.shard_range(shard)

    def add(self, tokens: Tokens, broken: Mapping[int, str], indices: Sequence[int]) -> None:
        check_tokens(self.tokenizer, tokens, len(indices))
        if tokens.ids is not None and not self.columns:  # not kept, so they are looked at now and then
            check_values(self.tokenizer, "codes", tokens.codes)
        columns = {"ids": tokens.ids, "codes": tokens.codes if tokens.ids is None else None}
        for name, column in {**columns, "offsets": tokens.offsets}.items():
            if column is not None:
                value = column.cpu()
                check_values(self.tokenizer, name, value)
                self.columns.setdefault(name, []).append(value)
        self.notes += [broken.get(index) for index in indices]
        while self.shards and len(self.notes) >= len(self.store.shard_range(self.shards[0])):
            self._write(self.shards.popleft())

    def _write(self, shard: int) -> None:
        rows = self.store.shard_range(shard)
        joined = {name: torch.cat(parts) for name, parts in self.columns.items()}
        broken = {row: note for row, note in zip(rows, self.notes, strict=False) if note is not None}
        full = {name: value[: len(rows)] for name, value in joined.items()}
        self.store.write_shard(shard, broken=broken, **full)
        self.work.done(shard)
        self.columns = {name: [value[len(rows) :]] for name, value in joined.items()}
        self.notes = self.notes[len(rows) :]

    def finish(self) -> None:
        assert not self.shards and not self.notes, "the images seen are not the images expected"
