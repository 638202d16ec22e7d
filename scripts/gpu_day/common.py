"""What the parts share: where results go, how much time is left, how a call is timed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = "results.jsonl"


def in_one_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@dataclass(frozen=True)
class Day:
    """One part at work.

    Attributes:
        part: Its name.
        out: The folder of results.
        device: Where it computes.
        seconds: How long it may take.
        tiny: Numbers for finding out whether it runs.
    """

    part: str
    out: Path
    device: torch.device
    seconds: float
    tiny: bool
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, part: str, out: Path, device: str, *, seconds: float, tiny: bool) -> Day:
        """``auto`` is CUDA where there is one; on a CPU numbers are tiny in any case."""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        out.mkdir(parents=True, exist_ok=True)
        return cls(part, out, torch.device(name), seconds, tiny or name == "cpu")

    @property
    def left(self) -> float:
        """Seconds that are left, with a margin for the end of Python."""
        return self.seconds - (time.monotonic() - self.started) - 3.0

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on CUDA."""
        return self.device.type == "cuda"

    def write(self, **result: Any) -> None:
        """Add one result; it is on the disk when this returns."""
        line = json.dumps({"part": self.part, **result}, default=str)
        with (self.out / RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def best_of(self, call: Callable[[], object], *, budget: float, rounds: int = 20) -> float:
        """Seconds of the fastest of some calls, after one that does not count; at least one is timed."""
        call()
        best, spent, done = float("inf"), 0.0, 0
        while done == 0 or (spent < budget and done < rounds):
            self.wait()
            before = time.perf_counter()
            call()
            self.wait()
            taken = time.perf_counter() - before
            best, spent, done = min(best, taken), spent + taken, done + 1
        return best

    def attempt(self, what: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        """Write what a call returns, or why it failed: the next one may still work."""
        try:
            self.write(**what, **call())
        except Exception as error:
            self.write(**what, error=in_one_line(error))
        finally:
            if self.on_gpu:
                torch.cuda.empty_cache()
