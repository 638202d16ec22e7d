"""Fits of several seeds, side by side in processes that are started once and used for many tasks.

A worker is a spawned process with one torch thread. Data travel in a safetensors file, small messages
through a pipe. Workers neither run the caller's script again nor hear Ctrl-C: whoever started them
ends them, also when this process is killed (the pipe breaks, and the worker leaves).
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from comit_bench.errors import BenchError
from comit_bench.files import atomic_path, private_folder
from comit_bench.probing.fit import FitProgress, FitResult, ProgressCallback

_PATIENCE = 5.0  # seconds a worker gets to end before it is killed


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Fittable(Protocol):
    """A task that a worker can fit: its data travel as arrays, the rest as plain values."""

    def check(self) -> None: ...

    def held(self) -> Self | None: ...

    def arrays(self) -> dict[str, NDArray[Any]]: ...

    def settings(self) -> dict[str, Any]: ...

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Self: ...

    def fit(
        self, seed: int, *, device: str | torch.device = "cpu", progress: ProgressCallback | None = None
    ) -> FitResult: ...


@dataclass(frozen=True, slots=True)
class _Job:
    """One seed of one task; the data of the task lie in ``path``."""

    path: Path
    kind: type[Any]
    settings: dict[str, Any]
    seed: int


def _save(task: Fittable, path: Path) -> None:
    """Write the data of a task that is in memory."""
    with atomic_path(
        path, durable=False
    ) as temporary:  # as NumPy arrays: they may share memory, which tensors must not
        save_file(task.arrays(), temporary)


@contextmanager
def _exchange() -> Iterator[Path]:
    """A folder for data on their way to workers; if this process is killed, the next one removes it.

    Raises:
        BenchError: There is no place for temporary files.
    """
    with ExitStack() as stack:
        try:
            place = stack.enter_context(private_folder(Path(tempfile.gettempdir())))
        except OSError as error:
            raise BenchError(
                f"no place for temporary files ({error.strerror or error}): set TMPDIR to a folder with room"
            ) from error
        yield place


def _load(job: _Job) -> Any:
    return job.kind.restore(load_file(job.path), job.settings)


def _serve(pipe: Connection) -> None:
    """Life of a worker: take a job, report epochs, answer; leave when the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def send(kind: str, value: object) -> None:
        # Plain pickle copies tensors; Connection.send would hand over file descriptors instead.
        pipe.send_bytes(pickle.dumps((kind, value)))

    while True:
        try:
            message = pipe.recv_bytes()
            try:
                job = pickle.loads(message)
                send("done", _load(job).fit(job.seed, progress=lambda event: send("epoch", event)))
            except BenchError as error:
                send("refused", error)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                send("failed", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        except (EOFError, OSError):
            return


@contextmanager
def _apart() -> Iterator[None]:
    """Processes started inside the block do not import the caller's script and do not get SIGINT.

    A Ctrl-C of the caller waits until the block ends: a process that is left half-started complains.
    Blocking the signal is not enough, since it may reach Python through another thread.
    """
    script = sys.modules["__main__"]
    held: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number)) if ours else None
    block = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if block else set()
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        if block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _worker_error(text: str, trace: str) -> RuntimeError:
    """An error of a worker that is none of ours, with the worker's own traceback as a note."""
    error = RuntimeError(f"in a probe worker: {text}")
    error.add_note(trace)
    return error


class _Worker:
    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _apart():
            self.process.start()
        theirs.close()
        self.job: int | None = None

    def give(self, number: int, job: _Job) -> None:
        self.job = number
        self.pipe.send_bytes(pickle.dumps(job))

    def hear(self) -> tuple[str, Any]:
        kind, value = pickle.loads(self.pipe.recv_bytes())
        return kind, value

    def end(self) -> None:
        self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


class ProbePool:
    """Worker processes for probe fits on the CPU. Use it as a context manager, for many tasks.

    Args:
        workers: Number of processes; None is one more than usable cores, so that three seeds share two
            cores evenly. With 1, fits run in this process.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers if workers is not None else usable_cores() + 1
        self._running: list[_Worker] = []

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; the next use starts new ones."""
        running, self._running = self._running, []
        for worker in running:
            worker.end()

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
            _save(task, path)
            jobs = [_Job(path, type(task), task.settings(), seed) for seed in seeds]
            try:
                self.start(len(jobs))
                return self._work(jobs, progress)
            except BaseException:
                self.close()
                raise

    def _work(self, jobs: Sequence[_Job], progress: ProgressCallback | None) -> list[FitResult]:
        results: dict[int, FitResult] = {}
        todo = list(range(len(jobs)))
        while len(results) < len(jobs):
            for worker in self._running:
                if worker.job is None and todo:
                    number = todo.pop(0)
                    self._guard(worker, lambda w=worker, n=number: w.give(n, jobs[n]))
            busy = {worker.pipe: worker for worker in self._running if worker.job is not None}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                kind, value = self._guard(worker, worker.hear)
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

    @staticmethod
    def _guard(worker: _Worker, talk: Any) -> Any:
        """Talk to a worker.

        Raises:
            BenchError: It is gone; says how it ended and what to do.
        """
        try:
            return talk()
        except (EOFError, OSError) as error:
            worker.process.join(_PATIENCE)
            raise BenchError(
                f"a probe worker process ended before its fit was done (exit code {worker.process.exitcode}; "
                "-9 usually means that memory ran out). Finished tasks are kept: run the same command again, "
                "with fewer workers if it happens twice."
            ) from error


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
        UsageError: A split is empty, or there are no seeds.
        BenchError: A loss is not finite, or a worker was killed.
    """
    if not seeds:
        raise ValueError("fit_seeds needs at least one seed")
    task.check()
    held = task.held()
    count = min(len(seeds), pool.workers if pool else (workers or usable_cores()))
    if torch.device(device).type != "cpu" or count == 1 or held is None:
        return [(held or task).fit(seed, device=device, progress=progress) for seed in seeds]
    if pool is not None:
        return pool.fit(held, seeds, progress=progress)
    with ProbePool(count) as own:
        return own.fit(held, seeds, progress=progress)
