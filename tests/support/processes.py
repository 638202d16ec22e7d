"""Processes that a test starts as ``torchrun`` would, and those that this process has started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(
    script: str, root: Path, out: Path, rank: int, world: int, port: int, fail: str = ""
) -> subprocess.Popen[str]:
    """One process of ``world``; the script finds ``root``, ``out`` and ``fail`` in its arguments.

    ``fail`` is the rank that shall die in the middle, or empty.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if world > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **address}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(root), str(out), fail],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children() -> list[int]:
    """Processes of this one that it has not waited for."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(place.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(place.parent.name))
    return found
