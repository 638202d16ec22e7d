"""A probe worker: ``python -m comit_bench.probing.worker FD``, started by :mod:`comit_bench.probing.pool`.

It takes tasks off the pipe with the file descriptor FD, fits one seed of each, reports every epoch, and
leaves when the pipe closes. Tensors and arrays of a task travel in a safetensors file, which all workers
map into memory, so that they share it; the rest of it travels in the pipe.
"""

from __future__ import annotations

import io
import pickle
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file

from comit_bench.errors import BenchError
from comit_bench.files import atomic_path


class _Pickler(pickle.Pickler):
    """Leaves tensors and arrays out: (their type, their key in ``arrays``) stands in their place."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.seen: list[object] = []  # alive while we pickle: what is gone leaves its number to another

    def persistent_id(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, torch.Tensor | np.ndarray):
            return None
        kind, array = ("array", value) if isinstance(value, np.ndarray) else ("tensor", value.numpy())
        key = str(id(value))
        if key not in self.arrays:
            self.seen.append(value)
            self.arrays[key] = np.ascontiguousarray(array)
        return kind, key


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(stream)
        self.tensors = tensors

    def persistent_load(self, where: tuple[str, str]) -> Any:
        kind, key = where
        return self.tensors[key] if kind == "tensor" else self.tensors[key].numpy()


def pack(task: Any, path: Path) -> bytes:
    """Write the tensors and arrays of a task to ``path``; returns all the rest of it."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(task)
    with atomic_path(path, durable=False) as temporary:
        save_file(pickler.arrays, temporary)
    return stream.getvalue()


def unpack(path: Path, rest: bytes) -> Any:
    """The task that :func:`pack` was given."""
    return _Unpickler(io.BytesIO(rest), load_file(path)).load()


def serve(pipe: Connection) -> None:
    """Fit what comes, until the pipe closes: ``(path, rest of the task, seed)``.

    Answers are ``("epoch", FitProgress)``, then ``("done", FitResult)``, ``("refused", BenchError)`` or
    ``("failed", (text, traceback))``.
    """

    def send(kind: str, value: object) -> None:
        # Plain pickle copies tensors; Connection.send would hand over file descriptors instead.
        pipe.send_bytes(pickle.dumps((kind, value)))

    while True:
        message = pipe.recv_bytes()
        try:
            path, rest, seed = pickle.loads(message)
            send("done", unpack(path, rest).fit(seed, progress=lambda event: send("epoch", event)))
        except BenchError as error:
            send("refused", error)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            send("failed", (f"{type(error).__name__}: {error}", traceback.format_exc()))


if __name__ == "__main__":
    with suppress(EOFError, OSError):  # nobody is there any more
        serve(Connection(int(sys.argv[1])))
