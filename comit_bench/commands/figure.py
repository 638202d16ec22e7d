"""``comit-bench figure NAME``: figures of messages, each as PDF and PNG. Paths go to stdout.

One short function per figure, in alphabetical order; what is computed and drawn is in
``comit_bench/figures/``. Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comit_bench.commands.options import as_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from comit_bench.tokenizers.base import Tokenizer

app = typer.Typer(
    help="Draw figures of messages (PDF and PNG).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass(frozen=True, slots=True)
class FigureEntry:
    """One line of ``comit-bench figure ls``: what a figure shows and what a tokenizer must be able to do."""

    name: str
    shows: str
    needs: str


DECODE, ATTENTION, COMIT, TOKENS = "decode", "attention", "COMiT only", "any tokenizer"
VOCABULARY, RECORDS = "a vocabulary", "records"
FIGURES: tuple[FigureEntry, ...] = (
    FigureEntry("attention", "maps of the tokens that cover the object best, overlap by layer", ATTENTION),
    FigureEntry("bottleneck", "probe accuracy and PSNR by size of the message", RECORDS),
    FigureEntry("codebook", "entropy per position, use of ids, what positions share", VOCABULARY),
    FigureEntry("counterfactual", "scenes with one thing changed, and the tokens that change", TOKENS),
    FigureEntry("edit", "tokens swapped between two images, decoded", DECODE),
    FigureEntry("evolution", "what a message knows after each crop, and its error by region", COMIT),
    FigureEntry("maps", "where single tokens look, without masks", ATTENTION),
    FigureEntry("neighbours", "images and those with the nearest messages", TOKENS),
    FigureEntry("policies", "reconstructions by cropping policy, and PSNR by number of crops", COMIT),
    FigureEntry("reconstruction", "originals beside the reconstructions of several tokenizers", DECODE),
    FigureEntry("sweeps", "Fréchet distance and PSNR by steps, guidance, policy and message size", RECORDS),
)

One = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        "-t",
        help="Name, hub id or checkpoint directory of the tokenizer. [default: comit-nano]",
    ),
]
Several = Annotated[
    list[str] | None,
    typer.Option("--tokenizer", "-t", help="May be repeated, a row each. [default: comit-nano]"),
]
Images = Annotated[
    str,
    typer.Option(
        help="'scenes' (embedded), a folder of images, searched recursively, or a data set below "
        "COMIT_BENCH_DATA, e.g. cssd."
    ),
]


def _writable(param: typer.CallbackParam, folder: Path) -> Any:
    """A path where files can be written: known before the work, not after it."""
    from comit_bench.files import require_folder

    path = as_path(param, folder)
    require_folder(path)
    return path


Output = Annotated[Path, typer.Option(callback=_writable, help="The PDF and the PNG go here.")]
Policy = Annotated[str | None, typer.Option(help="Cropping policy: global, raster:9, global+adaptive:3, ...")]
Count = Annotated[int, typer.Option(min=1, help="How many images.")]
Seed = Annotated[int, typer.Option(help="Which images, and all noise.")]
Weights = Annotated[str | None, typer.Option(help="Directory of weights, or 'random' (untrained).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
FIGURES_FOLDER = Path("figures")


@contextmanager
def at_work(quiet: bool) -> Iterator[None]:
    """What is computed inside has a progress bar on stderr; Ctrl-C is one message and a code of its own."""
    from comit_bench.commands.console import INTERRUPTED, Bars, Interrupts, say, set_up_logging
    from comit_bench.figures.inputs import progress

    set_up_logging()
    try:
        with Interrupts() as interrupts, Bars(enabled=not quiet, check=interrupts.check) as bars:
            token = progress.set(progress.get() if quiet else bars.start)
            try:
                yield
            finally:
                progress.reset(token)
    except KeyboardInterrupt:
        say("\nstopped. Figures that were printed above are whole, the others are not there.")
        raise typer.Exit(INTERRUPTED) from None


def load(name: str | None, images: str, weights: str | None, device: str) -> Tokenizer:
    """The tokenizer a figure is about; says so when the small default meets images of the reader."""
    from comit_bench.commands.console import DEFAULT_TOKENIZER, say_default
    from comit_bench.figures.inputs import embedded
    from comit_bench.tokenizers.load import load_tokenizer, resolve_device

    if name is None and not embedded(images):
        say_default([DEFAULT_TOKENIZER])
    place = str(resolve_device(device))
    return load_tokenizer(name or DEFAULT_TOKENIZER, weights=weights, device=place)


def read(source: str, tokenizer: Tokenizer, count: int | None, seed: int, dataset: str | None = None) -> Any:
    """Its images, see :func:`comit_bench.figures.inputs.load_inputs`."""
    from comit_bench.figures.inputs import SCENES_DATASET, load_inputs

    return load_inputs(source, tokenizer.info, count, seed, dataset=dataset or SCENES_DATASET)


def title(tokenizer: Tokenizer, name: str | None, weights: str | None) -> str:
    """A tokenizer's name for a file: random weights and the reader's own have one of their own."""
    info = tokenizer.info
    if not info.trained:
        return info.name if "untrained" in info.name else f"{info.name}-untrained"
    own = weights is not None or (name is not None and Path(name).is_dir())
    return f"{info.name}-{info.weights.partition(':')[2][:8]}" if own else info.name


def _block(layer: float) -> int | float:
    """``--layer`` as a block (a whole number) or a relative depth between 0 and 1."""
    from comit_bench.errors import UsageError

    if 0 < layer < 1:
        return layer
    if not abs(layer) < 10_000 or layer != int(layer):
        raise UsageError(f"--layer {layer}: expected a block (0, 1, -1, ...) or a depth between 0 and 1")
    return int(layer)


def put(figure: Figure, output: Path, *parts: str) -> None:
    """Save a figure under a name made of ``parts`` and print where."""
    from comit_bench.figures.style import file_stem, save

    for path in save(figure, output / file_stem(*parts)):
        typer.echo(path)


@app.command(name="attention")
def attention(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Count = 5,
    sweep_count: Annotated[int, typer.Option(min=0, help="Images behind the heat map; 0 draws none.")] = 32,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
    layer: Annotated[float, typer.Option(help="Relative depth below 1, or a block (0, -1, ...).")] = 0.857,
    time: Annotated[float, typer.Option(help="Flow time in [0, 1) at which maps are read.")] = 0.5,
) -> None:
    """Where tokens look: the best maps beside the object's mask, and their overlap by layer and time."""
    from comit_bench.figures.attention import compute, compute_sweep, draw, draw_sweep

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        chosen = _block(layer)
        data = compute(
            loaded, read(images, loaded, count, seed), layer=chosen, time=time, policy=policy, seed=seed
        )
        put(draw(data), output, "attention", name, *data.about.file_parts)
        if sweep_count:
            sweep = compute_sweep(loaded, read(images, loaded, sweep_count, seed), policy=policy, seed=seed)
            put(draw_sweep(sweep), output, "attention", "sweep", name, *sweep.about.file_parts)


@app.command(name="bottleneck")
def bottleneck(
    results: Annotated[Path, typer.Option(help="Where `comit-bench run` left its records.")] = Path(
        "results"
    ),
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", "-t", help="Names as in tables; may be repeated. [default: all]"),
    ] = None,
    output: Output = FIGURES_FOLDER,
) -> None:
    """Probe accuracy and PSNR by the size of the message; reads records only."""
    from comit_bench.figures.bottleneck import compute, draw

    data = compute([r for r in _records(results) if not tokenizer or r.tokenizer.name in tokenizer])
    put(draw(data), output, "bottleneck", *data.about.file_parts)


@app.command(name="codebook")
def codebook(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Annotated[int, typer.Option(min=2, help="How many images are counted.")] = 1000,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Entropy per position, use of ids, and what pairs of positions share."""
    from comit_bench.figures.codebook import compute, draw
    from comit_bench.figures.neighbours import DATASET

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        data = compute(loaded, read(images, loaded, count, seed, DATASET), policy=policy, seed=seed)
        put(draw(data), output, "codebook", name, *data.about.file_parts)


@app.command(name="counterfactual")
def counterfactual(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Annotated[int, typer.Option(min=1, help="How many scenes are shown; all are measured.")] = 2,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Scenes with one thing changed, and the tokens that change. A folder needs one sub-folder per edit."""
    from comit_bench.figures.counterfactual import DATASET, compute, draw

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        data = compute(
            loaded, read(images, loaded, None, seed, DATASET), count=count, policy=policy, seed=seed
        )
        put(draw(data), output, "counterfactual", name, *data.about.file_parts)


@app.command(name="edit")
def edit(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Annotated[int, typer.Option(min=2, help="How many images; every two are a pair.")] = 6,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
    span: Annotated[
        int | None, typer.Option(min=1, help="Tokens per span. [default: a quarter of the message]")
    ] = None,
) -> None:
    """Swap spans of tokens between two images and decode."""
    from comit_bench.figures.edit import compute, draw

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        data = compute(loaded, read(images, loaded, count, seed), span=span, policy=policy, seed=seed)
        put(draw(data), output, "edit", name, *data.about.file_parts)


@app.command(name="evolution")
def evolution(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Count = 2,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """What a message knows after each crop. COMiT only; default policy: adaptive:6."""
    from comit_bench.figures.evolution import DEFAULT_POLICY, compute, draw

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        data = compute(loaded, read(images, loaded, count, seed), policy=policy or DEFAULT_POLICY, seed=seed)
        put(draw(data), output, "evolution", name, *data.about.file_parts)


@app.command(name="ls")
def ls() -> None:
    """List the figures, what they show and which tokenizers can."""
    rows = [("figure", "needs", "shows"), *((f.name, f.needs, f.shows) for f in FIGURES)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, needs, shows in rows:
        typer.echo(f"{name:<{first}}  {needs:<{second}}  {shows}")


@app.command(name="maps")
def maps(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Count = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each image.")] = 6,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
    layer: Annotated[float, typer.Option(help="Relative depth below 1, or a block (0, -1, ...).")] = 0.857,
    time: Annotated[float, typer.Option(help="Flow time in [0, 1) at which maps are read.")] = 0.5,
) -> None:
    """Where single tokens look, on any images: the tokens with the most compact maps."""
    from comit_bench.figures.maps import compute, draw

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        chosen = _block(layer)
        inputs = read(images, loaded, count, seed)
        data = compute(loaded, inputs, tokens=tokens, layer=chosen, time=time, policy=policy, seed=seed)
        put(draw(data), output, "maps", title(loaded, tokenizer, weights), *data.about.file_parts)


@app.command(name="neighbours")
def neighbours(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Annotated[int, typer.Option(min=1, help="How many queries are shown.")] = 5,
    k: Annotated[int, typer.Option("--neighbours", "-k", min=1, help="Neighbours of each query.")] = 8,
    pool: Annotated[int, typer.Option(min=2, help="How many images are searched.")] = 1000,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Images and those with the nearest messages; the folder an image lies in is its class."""
    from comit_bench.figures.neighbours import DATASET, compute, draw

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        inputs = read(images, loaded, pool, seed, DATASET)
        data = compute(loaded, inputs, queries=count, k=k, policy=policy, seed=seed)
        put(draw(data), output, "neighbours", name, *data.about.file_parts)


@app.command(name="policies")
def policies(
    tokenizer: One = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A row each; may be repeated. [default: global, raster:9, random:9, adaptive:9, "
            "global+raster:10]"
        ),
    ] = None,
    count: Count = 6,
    curve_count: Annotated[int, typer.Option(min=0, help="Images behind the curves; 0 draws none.")] = 32,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Reconstructions by cropping policy, and PSNR by number of crops. COMiT only."""
    from comit_bench.figures.policies import DEFAULT_POLICIES, compute, compute_curves, draw, draw_curves

    with at_work(quiet):
        loaded = load(tokenizer, images, weights, device)
        name = title(loaded, tokenizer, weights)
        chosen = policy or DEFAULT_POLICIES
        data = compute(loaded, read(images, loaded, count, seed), policies=chosen, seed=seed)
        put(draw(data), output, "policies", name, *data.about.file_parts)
        if curve_count:
            curves = compute_curves(loaded, read(images, loaded, curve_count, seed), seed=seed)
            put(draw_curves(curves), output, "policies", "curves", name, *curves.about.file_parts)


@app.command(name="reconstruction")
def reconstruction(
    tokenizer: Several = None,
    images: Images = "scenes",
    output: Output = FIGURES_FOLDER,
    policy: Policy = None,
    count: Count = 6,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    quiet: Quiet = False,
    show: Annotated[
        str,
        typer.Option(help="random, or the worst or best images of the pool by the first tokenizer's PSNR."),
    ] = "random",
    pool: Annotated[int, typer.Option(min=1, help="Images searched for the worst or best.")] = 200,
) -> None:
    """Originals beside the reconstructions of several tokenizers, PSNR under each."""
    from comit_bench.errors import UsageError, did_you_mean
    from comit_bench.figures.reconstruction import compute, draw, extremes

    ways = ("random", "worst", "best")
    if show not in ways:
        raise UsageError(f"--show {show!r}: one of {', '.join(ways)}.{did_you_mean(show, ways)}")
    names: list[str | None] = [*tokenizer] if tokenizer else [None]
    with at_work(quiet):
        loaded = [load(name, images, weights, device) for name in names]
        inputs = [read(images, one, count if show == "random" else max(count, pool), seed) for one in loaded]
        data = compute(loaded, inputs, policy=policy, seed=seed)
        if show != "random":
            data = extremes(data, count, best=show == "best")
        kind = "reconstruction" if show == "random" else f"reconstruction-{show}"
        called = "+".join(title(one, name, weights) for one, name in zip(loaded, names, strict=True))
        put(draw(data), output, kind, called, *data.about.file_parts)


@app.command(name="sweeps")
def sweeps(
    results: Annotated[
        Path, typer.Option(callback=as_path, help="Where `comit-bench sweep` or `run` left its records.")
    ] = Path("results"),
    task: Annotated[str | None, typer.Option(help="Only this task. [default: all, a figure each]")] = None,
    output: Output = FIGURES_FOLDER,
) -> None:
    """Reconstruction by solver steps, guidance, policy and message size; reads records only."""
    from comit_bench.figures.sweeps import compute, draw

    records = [record for record in _records(results) if task is None or record.task.name == task]
    for data in compute(records):
        put(draw(data), output, "sweeps", data.task, data.column, *data.about.file_parts)


def _records(results: Path) -> Any:
    """All records of a run, whose folder or folder of records is given."""
    from comit_bench.results.records import load_records

    return load_records(results / "records" if (results / "records").is_dir() else results)
