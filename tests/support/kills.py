"""Processes that die at a chosen moment: before the n-th change that they make to the file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from comit_bench import files

RENAMES = ("rename", "replace", "link")
CHANGES = (*RENAMES, "mkdir", "rmdir", "unlink", "remove", "fsync")


def _die_at(moment: int, changes: Sequence[str]) -> None:
    """From here on this process kills itself before its ``moment``-th change (0 is the first)."""
    left = [moment]

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return change(*args, **kwargs)

        return call

    for name in changes:
        setattr(os, name, dying(getattr(os, name)))


def run_and_die(work: Callable[[], object], moment: int | None, changes: Sequence[str] = CHANGES) -> bool:
    """Do ``work`` in a process of its own that dies before its ``moment``-th change (None: never).

    Returns:
        Whether it came to its end.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            files._swept.clear()  # a new process knows nothing
            if moment is not None:
                _die_at(moment, changes)
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the work failed, it was not killed"
    return True


def die_everywhere(
    begin: Callable[[Path], object],
    work: Callable[[Path], object],
    look: Callable[[Path], object],
    root: Path,
    *,
    changes: Sequence[str] = CHANGES,
    least: int = 3,
) -> None:
    """Kill ``work`` at every change it makes, do it again, and compare with work that was not disturbed.

    Args:
        begin: Prepares a folder.
        work: What is killed, and what the person then starts again; in processes of their own.
        look: What must come out the same, read from the folder.
        root: Folders are made here.
        changes: Which functions of ``os`` count as one.
        least: Fewer moments than this mean that the test tests nothing.
    """
    calm = root / "calm"
    calm.mkdir()
    begin(calm)
    assert run_and_die(lambda: work(calm), None)
    expected = look(calm)
    assert not leftovers(calm)
    moment = 0
    while True:
        folder = root / f"killed-{moment}"
        folder.mkdir()
        begin(folder)
        survived = run_and_die(lambda: work(folder), moment, changes)  # noqa: B023
        assert run_and_die(lambda: work(folder), None)  # noqa: B023
        assert look(folder) == expected, f"killed before change {moment}"
        assert not leftovers(folder), f"killed before change {moment}"
        if survived:
            break
        moment += 1
    assert moment >= least


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that nobody has removed."""
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]
