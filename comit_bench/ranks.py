"""Several processes at one job, started by ``torchrun`` or ``accelerate launch``; alone it costs nothing.

Tokens are made by all of them, everything else by the first. They talk through files in the token store
(each shard is written by one process) and a few small messages (gloo, on the CPU), which all processes
must ask for in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from comit_bench.errors import BenchError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait as long as the first one's probes take


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its siblings.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        group: The process group they talk through; None when alone.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Ranks:
        """Find the siblings the launcher has started, by its environment variables."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world < 2:
            return cls()
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=PATIENCE)
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        return cls(distributed.get_rank(), distributed.get_world_size(), group)

    @property
    def first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The first process's value, for all."""
        if self.world == 1:
            return value
        from torch import distributed

        held: list[Any] = [value]
        distributed.broadcast_object_list(held, src=0, group=self.group)
        shared: T = held[0]
        return shared

    def agree(self, error: Exception | None) -> None:
        """Go on when no process has failed; else all of them raise.

        Raises:
            BenchError: The first error among the others; a process's own error is raised as it is.
        """
        if self.world > 1:
            from torch import distributed

            known = error is None or isinstance(error, BenchError)
            text = None if error is None else str(error) if known else f"{type(error).__name__}: {error}"
            texts: list[Any] = [None] * self.world
            distributed.all_gather_object(texts, text, group=self.group)
            failed = [f"process {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
            if error is None and failed:
                raise BenchError(failed[0])
        if error is not None:
            raise error

    def together(self, step: Callable[[], T]) -> T:
        """Let all processes take a step, and go on when none has failed in it (see :meth:`agree`)."""
        try:
            value = step()
        except Exception as error:  # of any kind: the others must not wait for a process that has given up
            self.agree(error)
            raise
        self.agree(None)
        return value

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does the block alone, then the others do it and find its files made."""
        if self.world == 1:
            yield
            return
        from torch import distributed

        if not self.first:
            distributed.barrier(group=self.group)
        try:
            yield
        finally:
            if self.first:
                distributed.barrier(group=self.group)

    def leave(self) -> None:
        """Say goodbye, so that the launcher sees a clean end."""
        if self.world > 1:
            from torch import distributed

            distributed.destroy_process_group()
