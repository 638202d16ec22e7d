"""What a person sees while the bench works: messages and progress bars, all on stderr."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from comit_bench.errors import BenchError, UsageError
from comit_bench.files import cache_root
from comit_bench.pipeline.failures import unexpected

INTERRUPTED = 130  # exit code after Ctrl-C
DEFAULT_TOKENIZER = "comit-nano"  # of commands that need one


def say(text: str) -> None:
    """Write a message to stderr, if there is one."""
    if sys.stderr is not None:
        sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()


class _Stream(io.TextIOBase):
    """A standard stream that never ends the work: letters it does not have are replaced, readers may leave.

    There is no ``buffer``, so that nobody writes past it.

    Args:
        stream: What was ``sys.stdout`` or ``sys.stderr``.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        if self.lost is None:
            try:
                self.stream.write(text if text.isascii() else self._readable(text))
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._lose(error)

    def _readable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            from comit_bench.results.render.terminal import in_encoding

            return in_encoding(text, self.encoding)
        return text

    def _lose(self, error: OSError) -> None:
        """From now on everything goes nowhere, also what Python writes when it ends."""
        self.lost = error
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except OSError:
            pass  # no file behind it


def _open_closed() -> None:
    """Give the numbers of closed standard streams to the null device.

    Else the next file that is opened gets one, and receives what libraries write to stderr.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free


def guarded(command: Callable[[], object]) -> NoReturn:
    """Run a command of the command line, whatever is behind stdout and stderr, and exit.

    An error of ours is one message and its exit code; one that is not is one message too, and its traceback
    goes into a log file. Letters that an encoding does not have are replaced.
    A stream that is closed (``2>&-``), or whose reader has gone (``| head -1``), swallows what is written,
    and the work goes on; only output that a full disk swallowed is an error at the end.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        out, err = (_Stream(stream or nowhere) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            code = _exit_code(command)
            out.flush()
            if code == 0 and out.lost is not None and out.lost.errno != errno.EPIPE:
                say(f"error: the output could not be written: {out.lost.strerror}")
                code = BenchError.exit_code
            err.flush()
        finally:
            sys.stdout, sys.stderr = before
    raise SystemExit(code)


def _exit_code(command: Callable[[], object]) -> int | str:
    try:
        _check_arguments()
        command()
    except BenchError as error:
        say(f"error: {error}")
        return error.exit_code
    except SystemExit as stop:
        return stop.code or 0
    except Exception as error:  # the last net
        say(f"error: {_unforeseen(error)}")
        return BenchError.exit_code
    return 0


def say_default(names: Sequence[str]) -> None:
    """Say that images of the user's own meet networks that nobody named."""
    several = len(names) > 1
    say(
        f"note: no --tokenizer is given, so {', '.join(names)} {'are' if several else 'is'} used: small, and "
        "trained on 32 px embedded scenes, not on photographs. Name another, see `comit-bench ls tokenizers`."
    )


def stoppable(command: Callable[[], int]) -> int:
    """The command's exit code; Ctrl-C is one message and a code of its own."""
    try:
        return command()
    except KeyboardInterrupt:
        say("\nstopped. Everything finished is kept; the same command continues from here.")
        return INTERRUPTED


def _check_arguments() -> None:
    """Refuse an argument that is no text (records keep the command line) or empty (an unset variable)."""
    for before, argument in pairwise(["", *sys.argv[1:]]):
        name, sign, value = argument.partition("=")
        option = argument.startswith("--") and sign
        if not (value if option else argument).strip():
            where = f" for {name}" if option else f" after {before}" if before.startswith("-") else ""
            raise UsageError(f"an empty value{where}: give one, or leave the option out")
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(
                f"the argument {argument!a} is not valid UTF-8: rename the file or folder that it names"
            ) from None


def _unforeseen(error: Exception) -> BenchError:
    try:
        folders = [cache_root()]
    except (BenchError, OSError, RuntimeError):
        folders = []
    return unexpected(error, "comit-bench", *folders)


class _Handler(logging.Handler):
    """Log lines that do not tear progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        with tqdm.external_write_mode(file=sys.stderr):
            say(prefix + self.format(record))


def set_up_logging(*, verbose: bool = False) -> None:
    """Warnings (or everything of ours, when verbose) go to stderr as plain lines."""
    logger = logging.getLogger("comit_bench")
    logger.handlers = [_Handler()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


class Interrupts:
    """Remembers Ctrl-C, because Python prints and forgets one that arrives inside a callback of its own."""

    def __init__(self) -> None:
        self.heard = False
        self._before: Any = None
        self._hook: Any = sys.unraisablehook

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        raise KeyboardInterrupt

    def _unraisable(self, problem: Any) -> None:
        if problem.exc_type is not KeyboardInterrupt:  # that one comes back at the next check
            self._hook(problem)

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one; to be called now and then."""
        if self.heard:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._hear)
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            sys.unraisablehook = self._hook


class Bars:
    """One progress bar at a time. Use as a context manager, so that none is left on the screen.

    Args:
        enabled: Whether bars are shown at all.
        check: Called at every step; may raise to stop.
    """

    def __init__(self, *, enabled: bool, check: Callable[[], None] = lambda: None) -> None:
        self.enabled = enabled
        self.check = check
        self.bar: Any = None

    def start(self, what: str, total: int, unit: str) -> Callable[[int], None]:
        """Show a bar; returns the function that advances it."""
        from tqdm import tqdm

        self.stop()
        self.bar = tqdm(
            total=total,
            desc=what,
            unit=f" {unit}",
            file=sys.stderr,
            disable=not self.enabled or sys.stderr is None,
            leave=False,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        bar = self.bar

        def advance(done: int) -> None:
            bar.update(done)
            self.check()

        return advance

    def stop(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
