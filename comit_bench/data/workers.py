"""Items made ahead of time by worker processes, which can fail but never make anybody wait for ever.

torch's ``DataLoader`` hands tensors over through shared memory. Containers often have 64 MB of it: what does
not fit is lost without a word, and the reader waits for it. Here tensors go through the pipe of their worker,
as copies, and a reader that hears nothing for ``PATIENCE`` seconds says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader

from comit_bench.errors import BenchError

PATIENCE = 900.0  # seconds without an item; one may be a whole training step's images off a slow disk
_ADVICE = "Run again without them (--num-workers 0, --workers 0 or data.workers=0): what is done is kept."


def read_ahead(source: Any, keys: Iterable[Any], workers: int, *, pin: bool = False) -> Iterator[Any]:
    """``source[key]`` for every key, in order.

    Args:
        source: Must get into a worker: picklable where processes are spawned. Errors of ours are best
            returned as values.
        keys: Asked for as they are needed, a few ahead of the item that comes out.
        workers: Processes; 0 makes every item in this one, when it is asked for.
        pin: Put tensors into memory that a GPU reads fast; items of other types need a method ``pin_memory``.
    """
    if workers == 0 and not pin:
        yield from (source[key] for key in keys)
        return
    sampler: Any = keys
    try:
        items = iter(
            DataLoader(
                source,
                batch_size=None,
                sampler=sampler,
                num_workers=workers,
                collate_fn=_same,
                pin_memory=pin,
                worker_init_fn=_send_copies if workers else None,
                timeout=PATIENCE if workers else 0,
            )
        )
    except OSError as error:  # no room for a semaphore in /dev/shm, too many processes
        raise BenchError(
            f"{workers} reading processes cannot be started ({error.strerror or error}). {_ADVICE}"
        ) from error
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            raise _explained(error) from error
        yield item


def _same(item: Any) -> Any:
    return item


def _send_copies(worker: int) -> None:
    """In a worker: tensors leave as NumPy arrays."""

    def reduce(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        return torch.from_numpy, (tensor.detach().contiguous().numpy(),)

    ForkingPickler.register(torch.Tensor, reduce)


def _explained(error: RuntimeError) -> Exception:
    """What happened to the workers; any other error as it is."""
    text = str(error)
    if text.startswith("DataLoader timed out"):
        return BenchError(
            f"no reading process has answered for {PATIENCE:.0f} s: a disk that hangs, or too little memory. "
            f"{_ADVICE}"
        )
    if text.startswith("DataLoader worker (pid"):
        end = text.splitlines()[0].partition(") ")[2].rstrip(".") or "ended"
        return BenchError(f"a reading process {end}; most often memory ran out. {_ADVICE}")
    return error
