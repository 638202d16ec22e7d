"""A folder of images -> one token file, and a token file -> a folder of PNGs. Both continue after a kill."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from comit_bench import __version__
from comit_bench.data.digests import file_digests
from comit_bench.data.folders import list_folder
from comit_bench.data.images import upright
from comit_bench.data.split import PathList, Split
from comit_bench.data.tokens.store import TokenStore
from comit_bench.data.tokens.token_file import (
    TokenFile,
    TokenOrigin,
    output_names,
    read_token_file,
    token_file_bytes,
)
from comit_bench.errors import CorruptFileError, UnsupportedOperation, UsageError
from comit_bench.files import (
    AlreadyThere,
    cache_root,
    digest_json,
    inside,
    locked,
    open_plain,
    require_file,
    require_folder,
    sha256_file,
    write_atomic,
)
from comit_bench.pipeline.session import Start, silent
from comit_bench.pipeline.tokenize import (
    list_digest,
    open_store,
    shards_to_do,
    store_key,
    tokenize_split,
)
from comit_bench.seeding import seed_for
from comit_bench.tokenizers.base import Tokenizer, Tokens, looks_at_crops
from comit_bench.tokenizers.contract import check_decoded, check_looked_up
from comit_bench.tokenizers.identity import code_version

_OTHER = "holds something else. Give another name, or --overwrite"
SHARD_SIZE = 256  # messages; a process that dies loses at most so many
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """What :func:`tokenize_folder` did.

    Attributes:
        output: The file.
        messages: Rows in it.
        message_length: Tokens per row.
        broken: Name -> why, for images that could not be read.
        computed: Messages computed now; the others lay in the cache.
    """

    output: Path
    messages: int
    message_length: int
    broken: dict[str, str]
    computed: int


@dataclass(frozen=True, slots=True)
class Detokenized:
    """What :func:`detokenize_file` did: the folder, images written now, and images that were there."""

    output: Path
    written: int
    kept: int


def tokenize_folder(
    tokenizer: Tokenizer,
    folder: Path,
    output: Path,
    *,
    cache: Path,
    policy: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    start: Start = silent,
) -> Tokenized:
    """Tokenize every image below a folder into one file, turned upright as its EXIF orientation says.

    Messages go to the token store of the cache as they are made, so the same call continues after a kill;
    what has changed meanwhile is made anew. No token depends on ``batch_size``,
    ``num_workers`` or ``shard_size``.

    Args:
        tokenizer: What encodes.
        folder: Searched recursively, see :func:`comit_bench.data.folders.list_images`.
        output: The token file (``docs/tokens.md``).
        cache: The cache directory.
        policy: Cropping policy of tokenizers that look at crops; None is their default.
        seed: Of the per-image generators.
        batch_size: Images per call.
        num_workers: Reading processes; 0 reads in a thread.
        shard_size: Messages per part of the store.
        overwrite: Replace a file of other content.
        start: Shows progress.

    Raises:
        MissingError: No folder, or no image in it.
        UsageError: The output exists and holds something else, or the policy is unknown.
        CorruptFileError: None of the images can be read.
        BenchError: The disk is full or not writable.
    """
    if output.is_dir():
        raise UsageError(
            f"{output}: this is a folder; give the name of a file, e.g. {output / 'tokens.safetensors'}"
        )
    require_file(output)
    require_folder(cache)
    names, odd = list_folder(folder)
    canonical = _canonical(tokenizer, policy)
    if output.exists() and not overwrite:
        _refuse_another(output, _origin(tokenizer, canonical, seed), {*names, *odd})
    contents = file_digests(folder, names, cache=cache, title="contents", progress=start is not silent)
    split = Split("folder", names, PathList(folder, names), None, exif=True, contents=tuple(contents))
    key = store_key(
        tokenizer, policy=canonical, fingerprint=list_digest(split), seed=seed, selection="all", exif=True
    )
    rows = range(len(names))
    store = open_store(
        tokenizer,
        cache,
        key,
        count=len(names),
        data=folder.resolve().name,
        shard_size=shard_size,
        split=split,
        rows=rows,
    )
    missing = shards_to_do(store, split, rows, split.preprocessing(tokenizer.info.preprocessing))
    total = sum(len(store.shard_range(shard)) for shard in missing)
    if missing:
        advance = start(f"{tokenizer.info.name}: {folder.name}", total, "images")
        sizes: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        tokenize_split(tokenizer, split, store, key=key, rows=rows, shards=missing, advance=advance, **sizes)
    content = _export(tokenizer, names, store, odd=odd, policy=canonical, seed=seed, folder=folder)
    _write(output, token_file_bytes(content), overwrite=overwrite)
    length = tokenizer.info.message_length
    return Tokenized(output, len(content), length, dict(content.broken), total)


def _canonical(tokenizer: Tokenizer, policy: str | None) -> str | None:
    if looks_at_crops(tokenizer):
        name = str(tokenizer.policy(policy))
        if "-shared" in name:
            raise UsageError(
                f"policy {name}: images of a batch share their crops, so tokens would depend on the other "
                f"images of the folder. Use {name.replace('-shared', '')}."
            )
        return name
    if policy is not None:
        _log.warning("%s looks at whole images: --policy is ignored for it", tokenizer.info.name)
    return None


def _origin(tokenizer: Tokenizer, policy: str | None, seed: int) -> TokenOrigin:
    info = tokenizer.info
    return TokenOrigin(
        tokenizer=info.name,
        family=info.family,
        weights=info.weights,
        message_length=info.message_length,
        vocab_size=info.vocab_size,
        code_dim=info.code_dim,
        resolution=info.resolution,
        preprocessing=upright(info.preprocessing),
        policy=policy,
        options=dict(info.options),
        seed=seed,
        comit_bench=__version__,
        configuration=info.configuration,
        version=code_version(tokenizer),
    )


def _export(
    tokenizer: Tokenizer,
    names: Sequence[str],
    store: TokenStore,
    *,
    odd: Mapping[str, str],
    policy: str | None,
    seed: int,
    folder: Path,
) -> TokenFile:
    """The rows of the store whose image could be read; ``odd`` is what is no file at all."""
    whole = store.load_all()
    kept = np.flatnonzero(whole.valid)
    # messages of the readers begin with the path; the name says it already
    broken = {
        names[row]: text.removeprefix(f"{folder / names[row]}: ") for row, text in store.broken().items()
    }
    broken |= {name: f"this is {what}, not a file" for name, what in odd.items()}
    if not len(kept):
        first = next(iter(broken.items()))
        raise CorruptFileError(
            f"{folder}: none of its {len(names)} images can be read, e.g. {first[0]}: {first[1]}"
        )
    return TokenFile(
        origin=_origin(tokenizer, policy, seed),
        names=tuple(names[row] for row in kept.tolist()),
        ids=None if whole.ids is None else whole.ids[kept],
        codes=None if whole.codes is None else whole.codes[kept],
        offsets=None if whole.offsets is None else whole.offsets[kept],
        broken=broken,
    )


def _refuse_another(output: Path, origin: TokenOrigin, names: set[str]) -> None:
    """Before the work: a file that exists must be what this command made, or begins to make again."""
    try:
        there = read_token_file(output)
        same = (
            there.origin == TokenOrigin.from_metadata(origin.metadata())
            and {*there.names, *there.broken} == names
        )
    except (CorruptFileError, UsageError):
        same = False
    if not same:
        raise UsageError(f"{output}: exists and {_OTHER} to replace it.")


def _write(output: Path, content: bytes, *, overwrite: bool) -> None:
    try:
        write_atomic(output, content, replace=overwrite)
    except AlreadyThere as error:  # perhaps only now, by an equal command
        with open_plain(output) as stream:
            if stream.read() != content:
                raise UsageError(
                    f"{output}: exists and {_OTHER} to replace it; the tokens are in the cache, so the next "
                    "run takes no time."
                ) from error


def check_origin(tokenizer: Tokenizer, origin: TokenOrigin, path: Path) -> None:
    """Refuse to decode tokens that another tokenizer made; say so when only its code has changed."""
    info = tokenizer.info
    fields = ["family", "weights", "message_length", "vocab_size", "code_dim", "resolution"]
    fields += ["configuration"] if origin.configuration else []  # older files do not say it
    differ = [f"{name} {getattr(origin, name)}, here {getattr(info, name)}" for name in fields
              if getattr(origin, name) != getattr(info, name)]  # fmt: skip
    if differ:
        raise UsageError(
            f"{path}: tokens made by {origin.tokenizer!r}, and {info.name!r} is not that tokenizer ("
            f"{'; '.join(differ)}). Give the right one with --tokenizer or --weights."
        )
    if origin.version not in ("", version := code_version(tokenizer)):
        _log.warning(
            "%s: tokens of version %s of the code of %s, which is version %s here: they may mean something "
            "else to it",
            *(path, origin.version, info.name, version),
        )


def detokenize_file(
    tokenizer: Tokenizer,
    source: Path,
    output: Path,
    *,
    seed: int = 0,
    batch_size: int = 32,
    overwrite: bool = False,
    start: Start = silent,
    content: TokenFile | None = None,
    cache: Path | None = None,
) -> Detokenized:
    """Decode a token file into PNGs under the images' relative names.

    Every file is written whole or not at all, and those that exist are skipped: the same call continues
    after a kill. A folder with images of other tokens, another tokenizer, seed or decoder is refused: the
    cache remembers what made it. Each image has its own noise, ``seed_for(seed, name)``, so nothing depends
    on batches.

    Args:
        tokenizer: The one that made the tokens.
        source: The token file.
        output: Folder of the PNGs; names see :func:`comit_bench.data.tokens.token_file.output_names`.
        seed: Of the decoding noise.
        batch_size: Messages per call.
        overwrite: Decode also what exists.
        start: Shows progress.
        content: The file's content, when it has been read already.
        cache: The cache directory; None is the package's.

    Raises:
        MissingError, CorruptFileError: The token file is not there or not intact.
        UsageError: Another tokenizer than the one that made the tokens, or the folder holds images that
            something else made.
        UnsupportedOperation: The tokenizer cannot decode.
        BenchError: The disk is full or not writable.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")
    content = content or read_token_file(source)
    check_origin(tokenizer, content.origin, source)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: this is a file; --out is the folder for the images")
    require_folder(output)
    note = (cache or cache_root()) / "decoded" / f"{digest_json(str(output.resolve()))[7:31]}.json"
    maker = _maker_of(tokenizer, source, seed)
    with locked(output / ".lock", f"decoding into {output}"):
        targets = [
            inside(output, name, what="a name in the token file", windows=os.name == "nt")
            for name in output_names(content.names)
        ]
        _claim(output, targets, note, maker, overwrite=overwrite)
        rows = [row for row, target in enumerate(targets) if overwrite or not target.is_file()]
        advance = (start if rows else silent)(f"{tokenizer.info.name}: decoding", len(rows), "images")
        for first in range(0, len(rows), batch_size):
            chosen = rows[first : first + batch_size]
            seeds = [seed_for(seed, content.names[row]) for row in chosen]
            try:
                images = tokenizer.decode(tokens_of(tokenizer, content, chosen), seeds=seeds)
            except NotImplementedError as error:
                raise UnsupportedOperation(f"{tokenizer.info.name} cannot decode its messages") from error
            images = check_decoded(images, tokenizer.info, len(chosen)).cpu()
            for row, image in zip(chosen, images, strict=True):
                write_atomic(targets[row], _png(image), durable=False)  # the tokens are the original
            advance(len(chosen))
        return Detokenized(output, len(rows), len(targets) - len(rows))


def _maker_of(tokenizer: Tokenizer, source: Path, seed: int) -> dict[str, Any]:
    """Everything that can change a decoded image."""
    info = tokenizer.info
    return {
        "tokens": sha256_file(source),
        "tokenizer": [info.family, info.weights, info.configuration, code_version(tokenizer)],
        "options": dict(info.options),
        "decoder": dict(getattr(tokenizer, "decode_options", {})),
        "seed": seed,
    }


def _claim(
    output: Path, targets: Sequence[Path], note: Path, maker: dict[str, Any], *, overwrite: bool
) -> None:
    """Remember what makes the images of a folder; those that something else made are refused, or removed."""
    text = json.dumps({"folder": str(output.resolve()), **maker}, indent=1, sort_keys=True) + "\n"
    there = [target for target in targets if target.is_file()]
    if there and not overwrite and not note.is_file():
        _log.warning(
            "%s: %d images were there before, e.g. %s. They are kept; --overwrite replaces them.",
            *(output, len(there), there[0].name),
        )
    elif there and note.is_file() and note.read_text(encoding="utf-8") != text:
        if not overwrite:
            raise UsageError(
                f"{output}: holds {len(there)} images, e.g. {there[0].name}, that were made from other "
                "tokens, or with another tokenizer, decoder or seed. Give another folder, or --overwrite to "
                "replace them."
            )
        for target in there:  # a killed run would leave some of them among the new ones
            target.unlink()
    write_atomic(note, text)


def tokens_of(tokenizer: Tokenizer, content: TokenFile, rows: Sequence[int]) -> Tokens:
    """Some messages of a token file, as ``tokenizer.decode`` takes them."""
    index = np.asarray(rows)
    offsets = None if content.offsets is None else torch.from_numpy(content.offsets[index].astype(np.float32))
    if content.ids is not None:
        ids = torch.from_numpy(content.ids[index].astype(np.int64))
        return Tokens(ids, check_looked_up(tokenizer, tokenizer.codes_from_ids(ids), ids), offsets)
    assert content.codes is not None
    return Tokens(None, torch.from_numpy(content.codes[index].astype(np.float32)), offsets)


def _png(image: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    pixels: Any = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
