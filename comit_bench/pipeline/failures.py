"""What an error that nobody foresaw becomes: one message, and a log file with its traceback."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from comit_bench.errors import SHOWN, BenchError, memory_runs_out, shown
from comit_bench.files import CACHE_VARIABLE, write_atomic

MEMORY_ADVICE = "Close other programs that use it, take fewer images at once (--batch-size), or --device cpu."


def _of_memory(error: Exception, advice: str) -> str | None:
    """What to say when memory ran out; None when it did not."""
    try:
        with memory_runs_out(advice):
            raise error
    except BenchError as told:
        return str(told)
    except Exception:
        return None


def _summary(error: BaseException) -> str:
    """The type of an error and one line of its text; of a text that quotes a traceback, the last line."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # a type that cannot say what it is
        lines = []
    line = lines[-1 if any("Traceback" in line for line in lines) else 0] if lines else ""
    line = line if len(line) <= 2 * SHOWN else f"{line[: 2 * SHOWN]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _write_log(error: BaseException, folders: Iterable[Path]) -> str:
    """Write the traceback into the first folder that takes it; a sentence that says where it is."""
    text = "".join(traceback.format_exception(error))
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(map(ascii, sys.argv))}\n"
    content = hashlib.sha256(ascii(text).encode()).hexdigest()[:6]
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{content}.log"
    for folder in folders:
        try:
            write_atomic(folder / "logs" / name, (head + text).encode("utf-8", "backslashreplace"))
        except (BenchError, OSError, ValueError):
            continue
        return f"The traceback is in {folder / 'logs' / name}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    return f"It was raised{place}; no log could be written"


def unexpected(error: Exception, doing: str, *folders: Path, if_memory: str = MEMORY_ADVICE) -> BenchError:
    """The message for an error that is none of ours: a plugin's, a library's, or a defect of this program.

    Its traceback goes into ``logs/`` of the first of ``folders`` that can be written, else of the system's
    folder for temporary files.

    Args:
        error: What was raised.
        doing: What was being done.
        folders: Where the log may lie.
        if_memory: What to do about it when memory ran out.
    """
    where = _write_log(error, (*folders, Path(tempfile.gettempdir()) / "comit-bench"))
    if (memory := _of_memory(error, if_memory)) is not None:
        problem = BenchError(f"{doing}: {memory} {where}")
    elif isinstance(error, OSError) and error.strerror:
        names = " -> ".join(shown(str(n)) for n in (error.filename, error.filename2) if n is not None)
        advice = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f" Free some space, or set {CACHE_VARIABLE}=DIR; everything finished is kept."
        problem = BenchError(f"{doing}: {names + ': ' if names else ''}{error.strerror}.{advice} {where}")
    else:
        problem = BenchError(f"{doing}: unexpected {_summary(error)}. {where}")
    problem.__cause__ = error
    return problem
