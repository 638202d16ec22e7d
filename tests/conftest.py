"""What every test may rely on: no network, a cache of its own, no settings of the person's machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: workers must not fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job; tests send Ctrl-C to children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the cache at a temporary folder; forget the person's data root and the size of the terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMIT_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("COMIT_BENCH_DATA", "COLUMNS", "LINES", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections, unless the test is marked ``network``."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        local = isinstance(address, str | bytes) or address[0] in ("localhost", "127.0.0.1", "::1")
        if not local:
            raise OSError(f"tests are offline: a connection to {address!r} was attempted")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command that a test runs sets up our logger; the next test finds it as it was."""
    logger = logging.getLogger("comit_bench")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before
