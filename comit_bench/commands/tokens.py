"""``comit-bench tokenize | detokenize``: tokens of any folder of images, and back. Paths go to stdout.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comit_bench.commands.console import (
    DEFAULT_TOKENIZER,
    Bars,
    Interrupts,
    say,
    say_default,
    set_up_logging,
    stoppable,
)
from comit_bench.commands.options import Device, Dtype, Offline, Policy, Quiet, Weights, as_path
from comit_bench.errors import MissingError, UsageError, shown
from comit_bench.files import cache_root

if TYPE_CHECKING:
    from comit_bench.commands.console import Bars
    from comit_bench.data.tokens.token_file import TokenOrigin
    from comit_bench.tokenizers.base import Tokenizer

OWN_OPTIONS = ("device", "dtype", "offline", "weights")  # of the command line, never --option
LISTED = 20  # broken images that are named on the screen; the file names all
Option = Annotated[
    list[str] | None,
    typer.Option("--option", help="KEY=VALUE for the tokenizer, e.g. steps=20; may be repeated."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per call; no token and no image depends on it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]


def key_values(pairs: list[str]) -> dict[str, str | int | float]:
    """KEY=VALUE texts as a mapping; values that are written as numbers are become numbers."""
    options: dict[str, str | int | float] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        whose, dot, name = key.rpartition(".")  # comit.posterior=sample is for one family
        whole = whose.lower() + dot + name.replace("-", "_")
        if not sign or not name.strip() or not value.strip() or bool(dot) != bool(whose.strip()):
            raise UsageError(
                f"--option {shown(pair)}: expected KEY=VALUE or FAMILY.KEY=VALUE, e.g. posterior=sample"
            )
        if name.replace("-", "_") in OWN_OPTIONS:
            raise UsageError(f"--option {shown(pair)}: there is --{name.replace('_', '-')} for that")
        if whole in options:
            raise UsageError(f"--option {shown(whole)} is given twice: give it once")
        numbers = (_number(value, kind) for kind in (int, float))
        read = next((n for n in numbers if n is not None and str(n) == value), value)  # 007 is no number
        options[whole] = read
    return options


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    try:
        return kind(text)
    except ValueError:
        return None


def tokenize(
    folder: Annotated[
        Path, typer.Argument(callback=as_path, metavar="DIR", help="Images, searched recursively.")
    ],
    out: Annotated[Path, typer.Option(callback=as_path, help="The token file (safetensors).")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", help="Name, hub id or checkpoint directory. [default: comit-nano]"),
    ] = None,
    policy: Policy = None,
    weights: Weights = None,
    option: Option = None,
    seed: Annotated[int, typer.Option(help="Of everything random about encoding.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
    num_workers: Annotated[int, typer.Option(min=0, help="Image-reading processes.")] = 0,
    offline: Offline = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Tokens of a folder of images, in one file; continues after a kill. Format: docs/tokens.md."""
    set_up_logging()

    def work() -> int:
        from comit_bench.pipeline.folders import tokenize_folder
        from comit_bench.tokenizers.load import load_tokenizer, resolve_device

        place = str(resolve_device(device))
        settings: dict[str, Any] = {"device": place, "dtype": dtype, "offline": offline}
        settings |= key_values(option or [])
        if tokenizer is None:
            say_default([DEFAULT_TOKENIZER])
        loaded = load_tokenizer(tokenizer or DEFAULT_TOKENIZER, weights=weights, **settings)
        with _bars(quiet) as bars:
            done = tokenize_folder(
                loaded,
                folder,
                out,
                cache=cache_root(),
                policy=policy,
                seed=seed,
                batch_size=batch_size,
                num_workers=num_workers,
                overwrite=overwrite,
                start=bars.start,
            )
        _name_broken(done.broken)
        found = done.messages + len(done.broken) - done.computed
        say(
            f"messages: {done.messages}, of {done.message_length} tokens"
            + (f"; {found} of {found + done.computed} images lay in the cache" if found else "")
        )
        typer.echo(done.output)
        return 0

    raise typer.Exit(stoppable(work))


def _name_broken(broken: Mapping[str, str]) -> None:

    for name, why in list(broken.items())[:LISTED]:
        say(f"warning: {name}: {why}")
    if broken:
        rest = len(broken) - LISTED
        named = f", {rest} more than named here" if rest > 0 else ""
        say(f"unreadable images: {len(broken)}{named}; they have no row, the file lists them")


def detokenize(
    tokens: Annotated[Path, typer.Argument(callback=as_path, help="The token file.")],
    out: Annotated[Path, typer.Option(callback=as_path, help="Folder for the PNGs.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", help="Name or directory. [default: the one the file names]"),
    ] = None,
    weights: Weights = None,
    option: Option = None,
    seed: Annotated[int, typer.Option(help="Of the decoding noise.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 32,
    offline: Offline = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Images of a token file, as PNGs under their relative names; continues after a kill."""
    set_up_logging()

    def work() -> int:
        from comit_bench.data.tokens.token_file import read_token_file
        from comit_bench.pipeline.folders import detokenize_file
        from comit_bench.tokenizers.load import resolve_device

        content = read_token_file(tokens)
        place = str(resolve_device(device))
        settings: dict[str, Any] = {"device": place, "dtype": dtype, "offline": offline}
        settings |= key_values(option or [])
        loaded = _maker(tokens, content.origin, tokenizer, weights, settings)
        with _bars(quiet) as bars:
            done = detokenize_file(
                loaded,
                tokens,
                out,
                seed=seed,
                batch_size=batch_size,
                overwrite=overwrite,
                start=bars.start,
                content=content,
            )
        say(
            f"{done.written} images written" + (f", {done.kept} were there and are kept" if done.kept else "")
        )
        typer.echo(done.output)
        return 0

    raise typer.Exit(stoppable(work))


def _maker(
    path: Path, origin: TokenOrigin, tokenizer: str | None, weights: str | None, settings: dict[str, Any]
) -> Tokenizer:
    """The tokenizer that the command line names, else the one that the file names."""
    from comit_bench.tokenizers.load import load_tokenizer

    if tokenizer is None and weights is None and origin.weights.startswith("random:"):
        weights = "random"
    try:
        return load_tokenizer(tokenizer or origin.tokenizer, weights=weights, **settings)
    except (UsageError, MissingError) as error:
        if tokenizer is not None:
            raise
        raise type(error)(
            f"{path}: made by {origin.tokenizer!r} (family {origin.family}), which cannot be loaded by that "
            f"name: {error} Give its name or its checkpoint directory with --tokenizer."
        ) from error


@contextmanager
def _bars(quiet: bool) -> Iterator[Bars]:

    with Interrupts() as interrupts, Bars(enabled=not quiet, check=interrupts.check) as bars:
        yield bars
