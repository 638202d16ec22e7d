"""Images beside their messages in shards: batches, noise, and work that goes on after a kill.

The report split is cut into shards of ``SHARD`` images, whatever the batch size and however many
processes there are. A finished shard is a file in ``Inputs.work``, so a killed run goes on where it
was, and the numbers of a shard are the same bits wherever it was computed. Sums over shards are taken
in their order by the first process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.data.images import iterate_images
from comit_bench.errors import BenchError
from comit_bench.files import write_atomic
from comit_bench.seeding import seed_for
from comit_bench.tasks.base import Inputs, Role, Rows
from comit_bench.tokenizers.base import Tokens

SHARD = 64
Columns = dict[str, NDArray[np.generic]]


def noise_seeds(seed: int, ids: Sequence[str]) -> list[int]:
    """One seed of decoding noise per image; nothing but the seed and the image's id enters."""
    return [seed_for(seed, "decode/" + name) for name in ids]


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Some images of a role with their messages.

    Attributes:
        positions: int64 [b], positions in the role.
        ids: Their ids.
        images: uint8 [b, 3, S, S] as the tokenizer sees them.
        tokens: Their messages.
    """

    positions: Rows
    ids: list[str]
    images: Tensor
    tokens: Tokens


def batches(inputs: Inputs, role: Role, positions: Rows) -> Iterator[Batch]:
    """Images of a role beside their messages, ``inputs.batch_size`` at a time, in the order asked for.

    Args:
        inputs: Of a row that sees images.
        role: Whose images.
        positions: int64 [n], positions in the role.
    """
    tokenizer = inputs.the_tokenizer()
    images = role.images
    for start in range(0, len(positions), inputs.batch_size):
        part = positions[start : start + inputs.batch_size]
        read = iterate_images(
            role.split.paths,
            role.split.preprocessing(tokenizer.info.preprocessing),
            batch_size=len(part),
            num_workers=0,
            indices=images[part].tolist(),
        )
        for batch in read:
            if batch.broken:
                raise BenchError(
                    f"{next(iter(batch.broken.values()))}: it could be read when tokens were made. Run again."
                )
            names = [role.split.ids[index] for index in images[part]]
            yield Batch(part, names, batch.images, role.tokens(tokenizer, part))


def in_shards(
    inputs: Inputs, role: Role, what: str, compute: Callable[[Rows], Mapping[str, NDArray[np.generic]]]
) -> list[Columns] | None:
    """As :func:`shard_by_shard`, all in memory together."""
    shards = shard_by_shard(inputs, role, what, compute)
    return None if shards is None else list(shards)


def shard_by_shard(
    inputs: Inputs, role: Role, what: str, compute: Callable[[Rows], Mapping[str, NDArray[np.generic]]]
) -> Iterator[Columns] | None:
    """Compute every shard that is not there yet, all processes their part; then read them one at a time.

    Args:
        inputs: ``work`` is where shards are kept (None: in memory only, then all are computed here).
        role: Whose images are cut into shards.
        what: Word for the progress bar and for the files, e.g. ``decoding``; letters, digits and dashes.
        compute: Positions in the role int64 [<= SHARD] -> arrays by name. It must not depend on
            ``inputs.batch_size``.

    Returns:
        The arrays of all shards in order, on the first process; None on the others. Everything is
        computed when this returns.
    """
    count = len(role)
    shards = [np.arange(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
    if inputs.work is None:
        return iter([dict(compute(shard)) for shard in shards])
    paths = [inputs.work / f"{what}-{number:06d}.npz" for number in range(len(shards))]
    ranks = inputs.ranks
    missing = ranks.share([n for n, path in enumerate(paths) if load_columns(path) is None])
    mine = missing[ranks.rank :: ranks.world]
    advance = inputs.start(what, sum(len(shards[number]) for number in mine), "images")

    def work() -> None:
        for number in mine:
            save_columns(paths[number], compute(shards[number]))
            advance(len(shards[number]))

    ranks.together(work)
    return _in_order(paths) if ranks.first else None


def _in_order(paths: Sequence[Path]) -> Iterator[Columns]:
    for path in paths:
        columns = load_columns(path)
        if columns is None:
            raise BenchError(f"{path}: vanished or damaged while the others were computed. Run again.")
        yield columns


def joined(shards: Sequence[Columns], name: str) -> NDArray[np.generic]:
    """One column over all shards, along the first axis."""
    return np.concatenate([shard[name] for shard in shards])


def save_columns(path: Path, columns: Mapping[str, NDArray[np.generic]]) -> None:
    """Write arrays by name, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    np.savez(buffer, **{name: np.asarray(value) for name, value in columns.items()})  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def load_columns(path: Path) -> Columns | None:
    """What :func:`save_columns` wrote; None when it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (FileNotFoundError, ValueError, BadZipFile, EOFError, KeyError):
        return None


def as_tensor(values: NDArray[np.generic]) -> Tensor:
    """The same numbers as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(values))
