"""Runs many command lines at the price of one import: a process that forks a child for each.

``Commands`` starts this file as a program of its own (so that it has one thread when it forks) and talks to
it in lines of JSON. Every command line gets its own folder, environment, output files and time limit; none
of them reaches a network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
ENTRIES = {
    "comit-bench": ("comit_bench.commands.app", "main"),
    "run": ("comit_bench.commands.app", "main_run"),
    "train": ("comit_bench.commands.train", "main"),
    "weights": ("comit_bench.commands.weights", "main"),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended; ``code`` is None when it ran out of time."""

    code: int | None
    out: str
    err: str
    seconds: float


class Commands:
    """Starts the server; use it as a context manager.

    Args:
        environment: Of the server, and of every command that does not say otherwise.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **fixed, **environment},
            text=True,
        )

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        *,
        entry: str = "comit-bench",
        environment: Mapping[str, str | None] | None = None,
        timeout: float = 60.0,
    ) -> Ended:
        """One command line, in ``folder``; a variable that is None is taken out of the environment."""
        assert self._server.stdin is not None and self._server.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        request = {
            "argv": [os.fsencode(a).hex() for a in argv],
            "folder": str(folder),
            "entry": entry,
            "environment": dict(environment or {}),
            "timeout": timeout,
        }
        started = time.perf_counter()
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the server of commands is gone"
        out, err = ((folder / name).read_text("utf-8", "backslashreplace") for name in (".out", ".err"))
        return Ended(json.loads(line)["code"], out, err, time.perf_counter() - started)

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.kill()  # it holds nothing that must be written
        self._server.wait()


def _offline() -> None:
    import socket

    def refuse(self: socket.socket, address: Any) -> None:
        raise ConnectionRefusedError(111, f"no network in tests: {address!r}")

    socket.socket.connect = refuse  # type: ignore[method-assign]


def _child(request: dict[str, Any]) -> int:
    """The command, in a process of its own; returns its exit code."""
    from importlib import import_module

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    for number, name in ((0, os.devnull), (1, ".out"), (2, ".err")):
        how = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, how, 0o644), number)
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.argv = ["comit-bench", *(os.fsdecode(bytes.fromhex(a)) for a in request["argv"])]
    module, function = ENTRIES[request["entry"]]
    try:
        getattr(import_module(module), function)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _wait(child: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    """Serve until the pipe closes."""
    import comit_bench.commands.app
    import comit_bench.pipeline.evaluate
    import comit_bench.results.table
    import comit_bench.tasks.base
    import comit_bench.tokenizers.comit.adapter
    import comit_bench.train.loop  # noqa: F401

    sys.stdout.flush()
    _offline()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            try:
                code = _child(request)
            except BaseException:
                traceback.print_exc()
                code = 99
            os._exit(code)
        sys.stdout.write(json.dumps({"code": _wait(child, request["timeout"])}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
