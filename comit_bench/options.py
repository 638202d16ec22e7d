"""Options that several commands share, and how their values are read. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from comit_bench.reading import user_path


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
