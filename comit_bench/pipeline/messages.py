"""The messages that a job reads: tokens are looked up in the cache, and what is missing is made."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from comit_bench.data.split import Split
from comit_bench.data.tokens.store import TokenStore
from comit_bench.errors import BenchError
from comit_bench.pipeline.jobs import Job, Settings
from comit_bench.pipeline.session import Session
from comit_bench.pipeline.tokenize import list_digest, open_store, shards_to_do, store_key, tokenize_split
from comit_bench.probing.fit import MessageSource, one_thread
from comit_bench.results.schema import Record
from comit_bench.tasks.base import Inputs
from comit_bench.tasks.controls import controlled_messages
from comit_bench.tokenizers.base import Tokenizer, looks_at_crops
from comit_bench.tokenizers.contract import check_looked_up, check_values

SMALL = 10_000_000  # weights of a network
ENCODE_SEED = 0  # of the per-image generators; part of the protocol
_log = logging.getLogger(__name__)


def with_messages(
    job: Job, tokenizer: Tokenizer | None, inputs: Inputs, session: Session
) -> tuple[Inputs, int]:
    """The same inputs with tokenizer and messages, broken images out of their roles.

    Returns:
        Them, and how many images this process has encoded. A row that sees no image stays as it is.
    """
    if tokenizer is None:
        return inputs, 0
    stores, encoded = {}, 0
    for split in {role.split.name: role.split for role in inputs.roles.values()}.values():
        stores[split.name], made = make_tokens(job, tokenizer, split, session)
        encoded += made
    sources = {name: message_source(store, tokenizer) for name, store in stores.items()}
    roles = {}
    for name, role in inputs.roles.items():
        store = stores[role.split.name]
        messages = controlled_messages(sources[role.split.name], inputs.control, role.all_ids)
        roles[name] = replace(role, rows=role.rows[store.valid()[role.rows]], messages=messages, store=store)
    return replace(inputs, roles=roles, whole_roles=inputs.roles, tokenizer=tokenizer), encoded


def make_tokens(job: Job, tokenizer: Tokenizer, split: Split, session: Session) -> tuple[TokenStore, int]:
    """The complete token store of one split; all processes make their part of what is missing.

    With ``overwrite="always"`` nothing of an earlier run is used: a store is made anew, once per run.

    Returns:
        The store, and how many images this process has encoded.
    """
    settings, ranks = session.settings, session.ranks
    rows = settings.images_of(split)

    def begin() -> tuple[TokenStore, dict[str, Any]]:
        store, key = open_tokens(job, tokenizer, split, settings)
        if settings.overwrite == "always" and store.digest not in session.renewed:
            session.renewed.add(store.digest)
            store.renew()
        return store, key

    store, key = ranks.together(begin)
    recipe = split.preprocessing(tokenizer.info.preprocessing)
    missing = ranks.share(shards_to_do(store, split, rows, recipe) if ranks.first else [])
    mine = missing[ranks.rank :: ranks.world]
    total = sum(len(store.shard_range(shard)) for shard in mine)
    place = f"{job.dataset.spec.name}/{split.name}"
    advance = session.reporter.start(f"{job.label}: {place}", total, "images")

    def work() -> None:
        with threads_for(tokenizer, session.device):
            tokenize_split(
                tokenizer,
                split,
                store,
                key=key,
                rows=rows,
                shards=mine,
                batch_size=settings.batch_size,
                num_workers=settings.num_workers,
                advance=advance,
                profile=session.profile,
            )

    try:
        ranks.together(work)
    finally:
        session.reporter.stop()
    _check_broken(store, place, job.dataset.spec.max_broken)
    return store, total


def open_tokens(
    job: Job, tokenizer: Tokenizer, split: Split, settings: Settings
) -> tuple[TokenStore, dict[str, Any]]:
    """The token store of the used images of a split, as far as it is there, and its key."""
    rows = settings.images_of(split)
    key = store_key(
        tokenizer,
        policy=policy_of(job, tokenizer),
        fingerprint=list_digest(split),
        seed=ENCODE_SEED,
        selection=settings.selection,
        exif=split.exif,
    )
    data = f"{job.dataset.spec.name}/{split.name}"
    cache = settings.cache_dir
    return open_store(tokenizer, cache, key, count=len(rows), data=data, split=split, rows=rows), key


def policy_of(job: Job, tokenizer: Tokenizer) -> str | None:
    """The cropping policy a tokenizer runs under, in canonical form; None if it has none."""
    if looks_at_crops(tokenizer):
        return str(tokenizer.policy(job.policy))
    if job.policy is not None:
        _log.info("%s looks at whole images: --policy is ignored for it", tokenizer.info.name)
    return None


def message_source(store: TokenStore, tokenizer: Tokenizer) -> MessageSource:
    """Messages that stay in their memory-mapped store until they are asked for.

    Probes hold the codes of a split in memory when they fit and else read them batch by batch; the numbers
    are the same.
    """
    count = store.layout.count
    if store.layout.vocab_size is None:
        return MessageSource(read=lambda rows: torch.from_numpy(store.codes(rows.numpy())), count=count)

    def read(rows: Tensor) -> Tensor:
        ids = torch.from_numpy(store.ids(rows.numpy()))
        return check_looked_up(tokenizer, tokenizer.codes_from_ids(ids), ids)

    if count:
        check_values(tokenizer, "codes", read(torch.zeros(1, dtype=torch.int64)))
    return MessageSource(read=read, count=count)


def threads_for(tokenizer: Tokenizer, device: torch.device) -> AbstractContextManager[None]:
    """One thread for small networks on the CPU.

    Their products are too small to share: the threads wait for each other, for milliseconds a
    product as soon as anything else runs on the machine. Tokens are the same bits either way.
    """
    small = tokenizer.info.parameters < SMALL
    return one_thread() if small and device.type == "cpu" else nullcontext()


def broken_images(inputs: Inputs) -> dict[str, int]:
    """Split -> images that cannot be read, for every split that is used; a reference row reads none."""
    stores = {role.split.name: role.store for role in inputs.roles.values()}
    return {name: len(store.broken()) if store else 0 for name, store in sorted(stores.items())}


def _check_broken(store: TokenStore, place: str, limit: float) -> None:
    broken = store.broken()
    if not broken:
        return
    first = "; ".join(list(broken.values())[:3])
    text = f"{len(broken)} of {store.count} images of {place} cannot be read: {first}"
    if len(broken) / store.count > limit:
        raise BenchError(
            f"{text}. That is more than the {limit:.1%} the dataset recipe allows (max_broken): replace "
            "the files and run again; tokens of the others are kept."
        )
    _log.warning("%s. They are left out and counted in the record.", text)


def were_mended(
    job: Job, tokenizer: Tokenizer | None, inputs: Inputs, found: Record, session: Session
) -> bool:
    """Whether images that were broken when a record was made can be read now.

    Only the first process looks. Without the messages of that time nobody can say: the record is kept.
    """
    settings, counts = session.settings, found.counts
    if tokenizer is None or counts is None or not counts.broken or not session.ranks.first:
        return False
    broken = 0
    for split in {role.split.name: role.split for role in inputs.roles.values()}.values():
        store, _ = open_tokens(job, tokenizer, split, settings)
        if store.missing_shards():
            return False
        recipe = split.preprocessing(tokenizer.info.preprocessing)
        if shards_to_do(store, split, settings.images_of(split), recipe):
            broken = -1
            break
        broken += len(store.broken())
    if broken == counts.broken:
        return False
    _log.warning(
        "%s on %s: images that could not be read can be read now; it is measured again",
        *(job.label, job.task.spec.name),
    )
    return True
