"""``comit-bench weights fetch | convert | ls``: released weights that do not come as hub checkpoints.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comit_bench.commands.options import Quiet, as_path, command_group
from comit_bench.errors import UsageError
from comit_bench.tokenizers.family import Hub, Part, Release
from comit_bench.tokenizers.registry import downloads, find_tokenizer

app = command_group("Fetch and convert released weights; they are kept in the cache.")


@app.command(name="fetch")
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="See `comit-bench weights ls`.")],
    keep: Annotated[bool, typer.Option("--keep", help="Keep the downloaded file beside ours.")] = False,
    url: Annotated[str | None, typer.Option(help="A mirror of the same file; one NAME only.")] = None,
    quiet: Quiet = False,
) -> None:
    """Download the weights of tokenizers and convert them to safetensors; continues after a break.

    The checksum of a file is recorded the first time; a file that differs later is refused.
    """
    if url and len(names) > 1:
        raise UsageError("--url names one file: give one NAME with it")
    for name in names:
        typer.echo(_fetch(name, keep=keep, url=url, progress=not quiet))


def _fetch(name: str, *, keep: bool, url: str | None, progress: bool) -> Path:
    from tqdm import tqdm

    from comit_bench.tokenizers.hub import fetch as fetch_hub
    from comit_bench.tokenizers.weights import fetch as fetch_release

    known = {item.name: item for item in downloads()}
    source = (known.get(name.lower()) or find_tokenizer(name).preset).source
    if isinstance(source, Release):
        with tqdm(
            desc=name, unit="B", unit_scale=True, file=sys.stderr, disable=not progress, leave=False
        ) as bar:

            def advance(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return fetch_release(name, keep=keep, url=url, advance=advance)
    if not isinstance(source, Hub):
        raise UsageError(f"{name.lower()} has no released weights to fetch ({str(source) or 'none known'})")
    if url:
        raise UsageError(f"--url: {name} comes from the hub, with the hub's own client")
    return fetch_hub(source.repository, source.files, offline=False, hint="or pass --weights DIR")


@app.command(name="convert")
def convert(
    name: Annotated[str, typer.Argument(help="What the file is, see `comit-bench weights ls`.")],
    file: Annotated[Path, typer.Argument(callback=as_path, help="A released .pth file.")],
    output: Annotated[
        Path | None, typer.Option(callback=as_path, help="Directory. [default: the cache]")
    ] = None,
) -> None:
    """Convert a released pickle to config.json and model.safetensors; nothing in it is run."""
    from comit_bench.tokenizers.weights import convert as convert_file

    typer.echo(convert_file(name, file, output=output))


@app.command(name="ls")
def ls() -> None:
    """List everything that can be fetched, whether it is here, and where it comes from."""
    from comit_bench.tokenizers.presence import weights_state
    from comit_bench.tokenizers.weights import weights_root

    words = {"yes": "here", "part": "downloading", "no": "missing"}
    found = [item for item in downloads() if isinstance(item.source, Hub | Release)]
    width = max(len(item.name) for item in found)
    for item in found:
        note = f"  ({item.note})" if isinstance(item, Part) and item.note else ""
        typer.echo(f"{item.name:<{width}}  {words[weights_state(item)]:<11}  {item.source}{note}")
    sys.stderr.write(f"cache: {weights_root()}\n")
