"""Options that several commands share, and how their values are read. Nothing heavy is imported here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from comit_bench.commands.console import guarded
from comit_bench.errors import UsageError
from comit_bench.files import DATA_VARIABLE, user_path


def command_group(text: str) -> typer.Typer:
    """An app of several commands; its errors are told by :func:`comit_bench.commands.console.guarded`."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def run_alone(command: Callable[..., None], name: str) -> None:
    """Run one command as the program ``name``."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command()(command)
    guarded(lambda: single(prog_name=name))


def as_path(param: typer.CallbackParam, value: Any) -> Any:
    """The value of an option or argument of paths (one, several or None), with ``~`` for the home directory.

    Raises:
        UsageError: Something that can be no path.
    """
    name = max(param.opts, key=len) if param.opts else str(param.name)
    if isinstance(value, list | tuple):
        return [user_path(path, name) for path in value]
    return value if value is None else user_path(value, name)


def _data_root(param: typer.CallbackParam, value: Path | None) -> Any:
    """``--data-root``, else the environment."""
    given = os.environ.get(DATA_VARIABLE)
    return as_path(param, value) or (user_path(given, DATA_VARIABLE) if given else None)


DataRoot = Annotated[
    Path | None, typer.Option(callback=_data_root, help="Where real data sets lie. [env: COMIT_BENCH_DATA]")
]
Include = Annotated[
    list[Path] | None,
    typer.Option(callback=as_path, help="Directory with more recipes; may be repeated."),
]
Policy = Annotated[str | None, typer.Option(help="Cropping policy: global, raster:9, global+adaptive:3, ...")]
Weights = Annotated[str | None, typer.Option(help="Directory of weights, or 'random' (untrained).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, or bfloat16 autocast on CUDA.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask a model hub.")]
Output = Annotated[Path, typer.Option(callback=as_path, help="Records and what is made of them go here.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def comma_separated(text: str | None) -> list[str] | None:
    """Comma-separated names; None stays None."""
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UsageError("an empty list of names: give names separated by commas, see `comit-bench ls`")
    return names
