"""Things that fail in ways nobody foresaw, in a module that worker processes can import."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import torch

from comit_bench.probing.fit import FitResult
from comit_bench.tokenizers.pixels import PixelOracleTokenizer


class OwnError(Exception):
    """A library's own type, which cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Broken(PixelOracleTokenizer):
    """A tokenizer whose ``encode`` raises."""

    def __init__(self, error: BaseException, name: str = "broken") -> None:
        super().__init__()
        self.error = error
        self.info = replace(self.info, name=name, kind="learned", weights=f"none {name}")

    def encode(self, *args: Any, **more: Any) -> Any:
        raise self.error


class Sum:
    """A task for probe workers whose fit fails in the ways of ``how``."""

    def __init__(self, how: str) -> None:
        self.how, self.data = how, torch.zeros(2)

    def check(self) -> None: ...

    def held(self) -> Sum:
        return self

    def fit(self, seed: int, **_: Any) -> FitResult:
        if self.how == "error":
            raise ZeroDivisionError("in the worker")
        if self.how == "unpicklable":
            return lambda: None  # type: ignore[return-value]
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
