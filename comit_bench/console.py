"""What a person sees while the bench works: messages and progress bars, all on stderr."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # exit code after Ctrl-C
DEFAULT_TOKENIZER = "comit-nano"  # of commands that need one


def say(text: str) -> None:
    """Write a message to stderr."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            disable=not self.enabled,
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
