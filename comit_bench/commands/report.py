"""``comit-bench report``: one HTML file about the records of a run. Nothing heavy is imported at the top."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from comit_bench.commands.console import say, set_up_logging
from comit_bench.commands.options import DataRoot, Quiet, as_path
from comit_bench.files import require_folder

REPORT_FILE = "report.html"


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(callback=as_path, help="Folders of a run, or of records. [default: results]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(callback=as_path, help="The file. [default: report.html in the first folder]"),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Sample images per task at most; 0 leaves the viewer out.")
    ] = 100,
    max_mb: Annotated[float, typer.Option(help="Size of the file at most, in megabytes.")] = 15.0,
    images: Annotated[
        bool, typer.Option(help="Show images, from the data sets on this machine; embedded ones are made.")
    ] = True,
    published: Annotated[
        bool, typer.Option(help="Also show published numbers of the same tasks, apart.")
    ] = True,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Benchmark report",
    data_root: DataRoot = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the file in a browser.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a page to browse: who is better and how sure that is, tables, samples, protocols, citations."""
    set_up_logging()
    folders = results or [Path("results")]
    path = output or folders[0] / REPORT_FILE
    make_report(
        folders,
        path,
        samples=samples,
        megabytes=max_mb,
        images=images,
        published=published,
        title=title,
        data_root=data_root,
        progress=not quiet,
    )
    typer.echo(path)
    if open_it:
        webbrowser.open(path.resolve().as_uri())


def make_report(
    folders: Sequence[Path],
    path: Path,
    *,
    samples: int = 100,
    megabytes: float = 15.0,
    images: bool = True,
    published: bool = True,
    title: str = "",
    data_root: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> None:
    """Write the page and say what was left out of it; arguments as for ``results.render.report.page``."""
    from comit_bench.results.render.report.page import write_report
    from comit_bench.results.render.report.pictures import NoPictures, Pictures

    require_folder(path.parent)
    kind = Pictures if images else NoPictures
    found = write_report(
        [folder / "records" if (folder / "records").is_dir() else folder for folder in folders],
        path,
        published=published,
        samples=samples,
        megabytes=megabytes,
        pictures=kind(data_root=data_root, cache=cache, progress=progress),
        title=title,
    )
    if found.left_out:
        say("\n".join(found.left_out))
