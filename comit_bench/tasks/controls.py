"""Controls: runs that take something away and show what the score was made of.

``permute-labels``
    The labels of the training and early-stop images are shuffled together, for every seed in another
    way. All scores must fall to chance; if they do not, the report set leaks.
``shuffle-tokens``
    The tokens of every message are permuted along the positions, for every image in another way
    (training and report alike). Which tokens occur stays, where they stand goes.
``bag-of-tokens``
    The probe gets no positions, so that it reads a message as an unordered bag. Unlike
    ``shuffle-tokens`` nothing about the messages changes: a probe that knows no order sees no order.

The last two need not fall to chance: what they lose is what the positions were worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.probing.fit import MessageSource
from comit_bench.recipes.specs import CONTROLS
from comit_bench.seeding import generator_for

SHUFFLE_SEED = 0


def check_control(control: str | None) -> None:
    """Refuse a control that does not exist."""
    if control is not None and control not in CONTROLS:
        raise UsageError(f"unknown control {control!r}.{did_you_mean(control, CONTROLS)}")


def token_orders(ids: Sequence[str], length: int) -> Tensor:
    """One permutation of the positions per image, decided by its id alone: int64 [N, K]."""
    orders = [
        torch.randperm(length, generator=generator_for(SHUFFLE_SEED, f"shuffle-tokens/{name}"))
        for name in ids
    ]
    return torch.stack(orders) if orders else torch.empty(0, length, dtype=torch.int64)


def controlled_messages(
    source: MessageSource, control: str | None, ids: Callable[[], Sequence[str]]
) -> MessageSource:
    """The messages as a control hands them to the probe.

    Args:
        source: N messages.
        control: Name of the control, or None.
        ids: Gives the N image ids; called only when they are needed.
    """
    if control != "shuffle-tokens" or len(source) == 0:
        return source
    length = int(source.take(torch.zeros(1, dtype=torch.int64)).shape[1])
    return replace(source, orders=token_orders(ids(), length))
