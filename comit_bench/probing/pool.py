"""Fits of several seeds, side by side in processes that are started once and used for many tasks.

A worker (:mod:`comit_bench.probing.worker`) is a Python process of its own, in a session of its own: it
runs nothing of the caller's script and does not hear Ctrl-C. Whoever started it ends it, also when this
process is killed: the pipe breaks, and the worker leaves.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch

from comit_bench.errors import BenchError
from comit_bench.files import private_folder
from comit_bench.probing.fit import FitProgress, FitResult, ProgressCallback
from comit_bench.probing.worker import pack

_PATIENCE = 5.0  # seconds a worker gets to end before it is killed
T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Fittable(Protocol):
    """A task that a worker can fit: it can be pickled (tensors and arrays travel beside it)."""

    def check(self) -> None: ...

    def held(self) -> Self | None: ...

    def prepared(self) -> Self: ...

    def fit(
        self, seed: int, *, device: str | torch.device = "cpu", progress: ProgressCallback | None = None
    ) -> FitResult: ...


@contextmanager
def _exchange() -> Iterator[Path]:
    """A folder for data on their way to workers; if this process is killed, the next one removes it."""
    with ExitStack() as stack:
        try:
            place = stack.enter_context(private_folder(Path(tempfile.gettempdir())))
        except OSError as error:
            raise BenchError(
                f"no place for temporary files ({error.strerror or error}): set TMPDIR to a folder with room"
            ) from error
        yield place


def _worker_error(text: str, trace: str) -> RuntimeError:
    """An error of a worker that is none of ours, with the worker's own traceback as a note."""
    error = RuntimeError(f"in a probe worker: {text}")
    error.add_note(trace)
    return error


class _Worker:
    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        places = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
        with ExitStack() as broken, theirs:
            broken.callback(self.pipe.close)  # a process that Ctrl-C left half-started sees it and leaves
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "comit_bench.probing.worker", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": places},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
            broken.pop_all()
        self.job: int | None = None

    def talk(self, exchange: Callable[[], T]) -> T:
        """Send or receive."""
        try:
            return exchange()
        except (EOFError, OSError) as error:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
            raise BenchError(
                f"a probe worker process ended before its fit was done (exit code {self.process.returncode}; "
                "-9 usually means that memory ran out). Finished tasks are kept: run the same command again, "
                "with fewer workers if it happens twice."
            ) from error

    def give(self, number: int, job: bytes) -> None:
        self.job = number
        self.talk(lambda: self.pipe.send_bytes(job))

    def hear(self) -> tuple[str, Any]:
        kind, value = pickle.loads(self.talk(self.pipe.recv_bytes))
        return kind, value

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.pipe.close()


class ProbePool:
    """Worker processes for probe fits on the CPU. Use it as a context manager, for many tasks.

    Args:
        workers: Number of processes; None is one more than usable cores, so that three seeds share two
            cores evenly. With 1, and on Windows, fits run in this process.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers if workers is not None else usable_cores() + 1
        if os.name != "posix":
            self.workers = 1
        self._running: list[_Worker] = []

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; the next use starts new ones."""
        while self._running:  # a Ctrl-C in between loses none of them
            self._running[-1].end()
            self._running.pop()

    def start(self, count: int | None = None) -> None:
        """Start workers without waiting for them: importing torch takes seconds, best beside other work.

        Args:
            count: How many are wanted; never more than ``workers``, which is the default.
        """
        wanted = self.workers if count is None else min(count, self.workers)
        while self.workers > 1 and len(self._running) < wanted:
            self._running.append(_Worker())

    def fit(
        self, task: Fittable, seeds: Sequence[int], *, progress: ProgressCallback | None = None
    ) -> list[FitResult]:
        """Fit every seed of a task whose splits are in memory; results come in the order of ``seeds``.

        Raises:
            UsageError: A split is empty.
            BenchError: A loss is not finite, or a worker was killed. All workers have ended by then.
        """
        task.check()
        with _exchange() as folder:
            path = folder / "data.safetensors"
            rest = pack(task, path)
            jobs = [pickle.dumps((path, rest, seed)) for seed in seeds]
            try:
                self.start(len(jobs))
                return self._work(jobs, progress)
            except BaseException:
                self.close()
                raise

    def _work(self, jobs: Sequence[bytes], progress: ProgressCallback | None) -> list[FitResult]:
        results: dict[int, FitResult] = {}
        todo = list(range(len(jobs)))
        while len(results) < len(jobs):
            for worker in self._running:
                if worker.job is None and todo:
                    worker.give(todo[0], jobs[todo.pop(0)])
            busy = {worker.pipe: worker for worker in self._running if worker.job is not None}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                kind, value = worker.hear()
                if kind == "epoch":
                    assert isinstance(value, FitProgress)
                    if progress is not None:
                        progress(value)
                elif kind == "done":
                    assert isinstance(value, FitResult) and worker.job is not None
                    results[worker.job], worker.job = value, None
                elif kind == "refused":
                    raise value
                else:
                    raise _worker_error(*value)
        return [results[number] for number in range(len(jobs))]


def fit_seeds(
    task: Fittable,
    seeds: Sequence[int],
    *,
    device: str | torch.device = "cpu",
    pool: ProbePool | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> list[FitResult]:
    """Fit one probe per seed; the numbers are the same with any number of workers.

    Seeds run side by side on the CPU when there are several seeds, several workers and enough memory
    to hold the codes; otherwise one after the other in this process.

    Args:
        task: What to fit.
        seeds: Probe seeds; results come in this order.
        device: Where to compute.
        pool: Workers to use; None starts some for this call only.
        workers: Without ``pool``: number of processes, None is one per usable core.
        progress: Called in this process after every epoch of every seed.

    Raises:
        UsageError: A split is empty.
        BenchError: A loss is not finite, or a worker was killed.
    """
    if not seeds:
        raise ValueError("fit_seeds needs at least one seed")
    task = task.prepared()
    held = task.held()
    with ExitStack() as stack:
        count = min(len(seeds), workers or usable_cores())
        used = pool if pool is not None else stack.enter_context(ProbePool(count))
        if torch.device(device).type != "cpu" or min(len(seeds), used.workers) == 1 or held is None:
            return [(held or task).fit(seed, device=device, progress=progress) for seed in seeds]
        return used.fit(held, seeds, progress=progress)
