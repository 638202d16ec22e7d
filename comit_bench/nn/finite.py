"""Whether what a network computes is finite: remembered on the device, asked once per call.

A NaN no longer looks like one when it has become an id or a byte. So quantizers and the last step to bytes
:func:`observe` what they are given; whoever encodes or decodes opens :func:`watching` and asks at the end.
Nothing waits for the device in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Watch:
    """What was observed, in order."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor]] = []

    def add(self, what: str, finite: Tensor) -> None:
        self._seen.append((what, finite))

    def broken(self) -> list[str]:
        """Names of what held NaN or infinity, each once. Waits for the device, one time."""
        if not self._seen:
            return []
        flags = [flag.to(self._seen[0][1].device) for _, flag in self._seen]
        fine = torch.stack(flags).tolist()
        return list(dict.fromkeys(what for (what, _), ok in zip(self._seen, fine, strict=True) if not ok))


_open: ContextVar[Watch | None] = ContextVar("finite", default=None)


@contextmanager
def watching() -> Iterator[Watch | None]:
    """Remember what is observed inside; None when an outer watch is open, which then sees it all."""
    if _open.get() is not None:
        yield None
        return
    watch = Watch()
    token = _open.set(watch)
    try:
        yield watch
    finally:
        _open.reset(token)


def observe(what: str, values: Tensor) -> Tensor:
    """Note whether ``values`` are all finite, and return them; outside of a watch nothing happens.

    Args:
        what: Plural, e.g. ``latents``; stands in the message.
        values: Any shape. On the meta device there is nothing to see.
    """
    watch = _open.get()
    if watch is not None and values.is_floating_point() and values.device.type != "meta":
        watch.add(what, values.detach().isfinite().all())
    return values
