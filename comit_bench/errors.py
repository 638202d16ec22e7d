"""Errors a person can act on. Each carries the exit code the command line ends with.

A message says three things: which file or value, what was expected, how to mend it.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

SHOWN = 200  # characters of a value in a message


class BenchError(Exception):
    """Base of all errors that are reported as one message, without a traceback."""

    exit_code = 1


class UsageError(BenchError, ValueError):
    """A wrong argument, option, name or recipe (exit code 2)."""

    exit_code = 2


class MissingError(BenchError, FileNotFoundError):
    """Data or weights that are not on this machine (exit code 3)."""

    exit_code = 3


class CorruptFileError(BenchError, ValueError):
    """A file that exists but cannot be what it claims to be (exit code 1)."""


class UnsupportedOperation(BenchError, RuntimeError):
    """The tokenizer cannot do this, by design (for example decode)."""


@contextmanager
def memory_runs_out(advice: str) -> Iterator[None]:
    """Make one message of "out of memory" inside the block, of a GPU or of the machine.

    Args:
        advice: What to do about it.

    Raises:
        BenchError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip().split("\n")[0]
        ran_out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, BenchError) or not (
            ran_out or "out of memory" in said or "can't allocate memory" in said
        ):
            raise
        first = ". ".join(said.split(". ")[:2]).rstrip(".")  # torch goes on about its allocator
        raise BenchError(f"out of memory ({first or 'of this machine'}). {advice}") from error


def did_you_mean(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or the whole list when nothing is near."""
    names = sorted(set(known))
    lowered = {n.lower(): n for n in names}
    near = [lowered[m] for m in get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)]
    if near:
        return " Did you mean " + " or ".join(repr(n) for n in near) + "?"
    return f" Known: {', '.join(names)}." if names else ""


def shown(value: object) -> str:
    """A value in a message: its ``repr``, cut when it is long, whatever it is."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, containers of themselves
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
