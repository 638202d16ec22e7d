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

from torch import distributed
from torch.distributed.rendezvous import rendezvous

from comit_bench.errors import BenchError, UsageError, shown

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait as long as the first one's probes take
RENDEZVOUS = timedelta(minutes=10)  # until all processes have started
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_STARTED_BY = "torchrun and accelerate launch set these variables; unset them to run one process"


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launcher says about this process: its number, how many there are, its number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def launched() -> Launched:
    """Read the variables of a launcher: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Variables of SLURM alone mean nothing: each task of ``srun`` is a run of its own (several may run at the
    same time, and share their work).
    """
    world, rank, local = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if world is None or world == 1:
        if rank:
            raise UsageError(f"RANK={rank}, but WORLD_SIZE is {world or 'not set'}: {_STARTED_BY}")
        return Launched()
    wanted = {"RANK": rank, "LOCAL_RANK": local, "MASTER_ADDR": os.environ.get("MASTER_ADDR") or None}
    wanted["MASTER_PORT"] = _number("MASTER_PORT")
    if missing := [name for name, value in wanted.items() if value is None]:
        raise UsageError(f"WORLD_SIZE={world}, but {' and '.join(missing)} not set: {_STARTED_BY}")
    assert rank is not None and local is not None
    if not (world > 1 and rank < world and local < world):
        raise UsageError(f"WORLD_SIZE={world}, RANK={rank}, LOCAL_RANK={local} contradict: {_STARTED_BY}")
    return Launched(rank, world, local)


def _number(name: str) -> int | None:
    """A whole number from 0 in the environment; None when it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{name}={shown(text)}: expected a whole number from 0: {_STARTED_BY}")
    return int(text)


@contextmanager
def meeting(place: Launched) -> Iterator[None]:
    """A block in which the processes find each other: first all must come, for ``RENDEZVOUS`` at most.

    What then sets up its own group waits with its own patience, for processes that are there.
    """
    if place.world < 2:
        yield
        return
    try:
        store: Any = next(rendezvous("env://", place.rank, place.world, timeout=RENDEZVOUS))
        yield
        del store  # held until now: it keeps the address open
    except (RuntimeError, OSError, ValueError) as error:  # torch's own errors are RuntimeErrors
        if isinstance(error, BenchError):
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BenchError(
            f"process {place.rank} of {place.world} cannot find the others at {address} ({reason}). Have all "
            "of them been started, and can they reach this address?"
        ) from error


@contextmanager
def without_launcher() -> Iterator[None]:
    """A block in which nobody sees a launcher's variables: half of them would make a library wait."""
    held = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


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
        """Find the siblings the launcher has started, by its environment variables.

        Raises:
            UsageError: See :func:`launched`.
            BenchError: The others do not come.
        """
        place = launched()
        if place.world < 2:
            return cls()
        with meeting(place):
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
        held: list[Any] = [value]
        distributed.broadcast_object_list(held, src=0, group=self.group)
        shared: T = held[0]
        return shared

    def agree(self, error: Exception | None) -> None:
        """Go on when no process has failed; else all of them raise."""
        if self.world > 1:
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
            distributed.destroy_process_group()
