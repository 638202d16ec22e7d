"""Options that several commands share, and how their values are read. Nothing heavy is imported here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from comit_bench.errors import UsageError
from comit_bench.files import user_path


def as_path(param: typer.CallbackParam, value: Any) -> Any:
    """The value of an option or argument of paths (one, several or None), with ``~`` for the home directory.

    Raises:
        UsageError: Something that can be no path.
    """
    name = max(param.opts, key=len) if param.opts else str(param.name)
    if isinstance(value, list | tuple):
        return [user_path(path, name) for path in value]
    return value if value is None else user_path(value, name)


DataRoot = Annotated[
    Path | None, typer.Option(callback=as_path, help="Where real data sets lie. [env: COMIT_BENCH_DATA]")
]
Include = Annotated[
    list[Path] | None,
    typer.Option(callback=as_path, help="Directory with more recipes; may be repeated."),
]


def data_root_from(option: Path | None) -> Path | None:
    """``--data-root``, else the environment.

    Raises:
        UsageError: The environment names the home of a user whom nobody knows.
    """
    from comit_bench.files import DATA_VARIABLE

    value = os.environ.get(DATA_VARIABLE)
    return option or (user_path(value, DATA_VARIABLE) if value else None)


def comma_separated(text: str | None) -> list[str] | None:
    """Comma-separated names; None stays None."""
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UsageError("an empty list of names: give names separated by commas, see `comit-bench ls`")
    return names
