"""Images of one split -> token store. Only shards that are missing are computed.

Shards are cut by index, images are read in order, nothing is padded or repeated, and every image has a
generator of its own, so the store's bytes do not depend on batch size, workers or where a run stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.data.datasets import Split
from comit_bench.data.images import iterate_images
from comit_bench.data.store import TokenStore
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.base import Tokenizer, Tokens

Advance = Callable[[int], None]


def store_key(
    tokenizer: Tokenizer,
    *,
    policy: str | None,
    fingerprint: str,
    seed: int,
    selection: str,
) -> dict[str, Any]:
    """Everything that can change a token.

    Args:
        tokenizer: Its weights, options and preprocessing.
        policy: Cropping policy as it runs, None for tokenizers without crops.
        fingerprint: Of the split's images.
        seed: Of the per-image generators.
        selection: Which images of the split, ``all`` or ``limit:N``.
    """
    info = tokenizer.info
    return {
        "family": info.family,
        "weights": info.weights,
        "options": dict(info.options),
        "preprocessing": info.preprocessing,
        "policy": policy,
        "data": fingerprint,
        "selection": selection,
        "seed": seed,
    }


def tokenize_split(
    tokenizer: Tokenizer,
    split: Split,
    *,
    cache: Path,
    key: Mapping[str, Any],
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    advance: Advance | None = None,
) -> TokenStore:
    """Fill the store of one split and return it complete.

    Args:
        tokenizer: Encodes uint8 batches.
        split: Images in index order.
        cache: Cache directory.
        key: From :func:`store_key`.
        rows: Images of the split to use, None for all; row i of the store is ``rows[i]``.
        batch_size: Images per call; no token depends on it.
        num_workers: Reading processes.
        advance: Called with the number of images just finished (or found finished).

    Raises:
        BenchError: A file vanished, the disk is full.
    """
    chosen = list(range(len(split))) if rows is None else list(rows)
    info = tokenizer.info
    store = TokenStore.open(
        cache,
        key,
        count=len(chosen),
        message_length=info.message_length,
        vocab_size=info.vocab_size,
        code_dim=info.code_dim,
    )
    missing = store.missing_shards()
    wanted = [row for shard in missing for row in store.shard_range(shard)]
    if advance is not None and len(wanted) < len(chosen):
        advance(len(chosen) - len(wanted))
    images = iterate_images(
        split.paths,
        info.preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        indices=[chosen[row] for row in wanted],
    )
    pending = _Pending(store, missing)
    for batch in images:
        generators = [generator_for(int(key["seed"]), split.ids[index]) for index in batch.indices]
        tokens = tokenizer.encode(batch.images, policy=key["policy"], generators=generators)
        pending.add(tokens, batch.broken, batch.indices)
        if advance is not None:
            advance(len(batch.indices))
    pending.finish()
    return store


class _Pending:
    """Tokens that wait until their shard is full."""

    def __init__(self, store: TokenStore, shards: Sequence[int]) -> None:
        self.store = store
        self.shards = list(shards)
        self.columns: dict[str, list[Tensor]] = {}
        self.notes: list[str | None] = []  # per row, why its image is broken

    def add(self, tokens: Tokens, broken: Mapping[int, str], indices: Sequence[int]) -> None:
        finite = self.store.layout.vocab_size is not None
        payload = tokens.ids if finite else tokens.codes
        assert payload is not None and payload.shape[0] == len(indices)
        self.columns.setdefault("ids" if finite else "codes", []).append(payload.cpu())
        if tokens.offsets is not None:
            self.columns.setdefault("offsets", []).append(tokens.offsets.float().cpu())
        self.notes += [broken.get(index) for index in indices]
        while self.shards and len(self.notes) >= len(self.store.shard_range(self.shards[0])):
            self._write(self.shards.pop(0))

    def _write(self, shard: int) -> None:
        rows = self.store.shard_range(shard)
        joined = {name: torch.cat(parts) for name, parts in self.columns.items()}
        broken = {row: note for row, note in zip(rows, self.notes, strict=False) if note is not None}
        full = {name: value[: len(rows)] for name, value in joined.items()}
        self.store.write_shard(shard, broken=broken, **full)
        self.columns = {name: [value[len(rows) :]] for name, value in joined.items()}
        self.notes = self.notes[len(rows) :]

    def finish(self) -> None:
        assert not self.shards and not self.notes, "the images seen are not the images expected"
