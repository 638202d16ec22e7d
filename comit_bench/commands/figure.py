"""``comit-bench figure NAME``: figures of messages, each as PDF and PNG. Paths go to stdout.

One short function per figure, in alphabetical order; what is computed and drawn is in
``comit_bench/figures/``. Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comit_bench.commands.console import (
    DEFAULT_TOKENIZER,
    INTERRUPTED,
    Bars,
    Interrupts,
    say,
    say_default,
    set_up_logging,
)
from comit_bench.commands.options import Device, Policy, Quiet, Weights, as_path, command_group
from comit_bench.errors import UsageError, did_you_mean
from comit_bench.files import require_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from comit_bench.tokenizers.base import Tokenizer

app = command_group("Draw figures of messages (PDF and PNG).")

# What ``comit-bench figure ls`` says each needs.
DECODE, ATTENTION, COMIT, TOKENS = "decode", "attention", "COMiT only", "any tokenizer"
CROPS = "crop by crop"
VOCABULARY, RECORDS = "a vocabulary", "records"
NEEDS = {
    "attention": ATTENTION,
    "bottleneck": RECORDS,
    "codebook": VOCABULARY,
    "counterfactual": TOKENS,
    "edit": DECODE,
    "evolution": COMIT,
    "gather": CROPS,
    "maps": ATTENTION,
    "neighbours": TOKENS,
    "policies": COMIT,
    "reconstruction": DECODE,
    "sweeps": RECORDS,
}


def _writable(param: typer.CallbackParam, folder: Path) -> Any:
    """A path where files can be written: known before the work, not after it."""
    path = as_path(param, folder)
    require_folder(path)
    return path


One = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        "-t",
        help="Name, hub id or checkpoint directory of the tokenizer. [default: comit-nano]",
    ),
]
Source = Annotated[
    str,
    typer.Option(
        help="'scenes' (embedded), a folder of images, searched recursively, or a data set below "
        "COMIT_BENCH_DATA, e.g. cssd."
    ),
]
Output = Annotated[Path, typer.Option(callback=_writable, help="The PDF and the PNG go here.")]
Results = Annotated[
    Path, typer.Option(callback=as_path, help="Where `comit-bench run` or `sweep` left its records.")
]
Count = Annotated[int, typer.Option(min=1, help="How many images.")]
Seed = Annotated[int, typer.Option(help="Which images, and all noise.")]
Layer = Annotated[float, typer.Option(help="Relative depth below 1, or a block (0, -1, ...).")]
Time = Annotated[float, typer.Option(help="Flow time in [0, 1) at which maps are read.")]
FIGURES_FOLDER = Path("figures")


@contextmanager
def at_work(quiet: bool) -> Iterator[None]:
    """What is computed inside has a progress bar on stderr; Ctrl-C is one message and a code of its own."""
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


@dataclass(frozen=True, slots=True)
class Subject:
    """The tokenizer that a figure is about, its images, and where the figure goes.

    Attributes:
        tokenizer: Loaded.
        title: Its name in files: random weights and the reader's own have one of their own.
        images: As the command line names them.
        policy: Cropping policy; None is the tokenizer's.
        seed: Of the choice of images and all noise.
        output: Folder of the figure.
    """

    tokenizer: Tokenizer
    title: str
    images: str
    policy: str | None
    seed: int
    output: Path

    def read(self, count: int | None, dataset: str | None = None) -> Any:
        """Its images, see :func:`comit_bench.figures.inputs.load_inputs`."""
        from comit_bench.figures.inputs import SCENES_DATASET, load_inputs

        info = self.tokenizer.info
        return load_inputs(self.images, info, count, self.seed, dataset=dataset or SCENES_DATASET)

    def put(self, figure: Figure, data: Any, *name: str) -> None:
        """Save a figure of ``data``, named by what it is, the tokenizer and its settings."""
        put(figure, self.output, *name, self.title, *data.about.file_parts)


def load(
    *,
    tokenizer: str | None,
    images: str,
    output: Path,
    seed: int,
    weights: str | None,
    device: str,
    policy: str | None = None,
) -> Subject:
    """Load the tokenizer a figure is about; says so when the small default meets images of the reader."""
    from comit_bench.figures.inputs import embedded
    from comit_bench.tokenizers.load import load_tokenizer, resolve_device

    if tokenizer is None and not embedded(images):
        say_default([DEFAULT_TOKENIZER])
    place = str(resolve_device(device))
    loaded = load_tokenizer(tokenizer or DEFAULT_TOKENIZER, weights=weights, device=place)
    info = loaded.info
    title = info.name
    if not info.trained and "untrained" not in title:
        title += "-untrained"
    elif info.trained and (weights is not None or (tokenizer is not None and Path(tokenizer).is_dir())):
        title += f"-{info.weights.partition(':')[2][:8]}"
    return Subject(loaded, title, images, policy, seed, output)


def put(figure: Figure, output: Path, *parts: str) -> None:
    """Save a figure under a name made of ``parts`` and print where."""
    from comit_bench.figures.style import file_stem, save

    for path in save(figure, output / file_stem(*parts)):
        typer.echo(path)


def of_tokenizer(make: Callable[..., None]) -> Callable[..., None]:
    """Register a figure of one tokenizer: its command has the options below and those of ``make``."""

    def shared(
        tokenizer: One = None,
        images: Source = "scenes",
        output: Output = FIGURES_FOLDER,
        policy: Policy = None,
        seed: Seed = 0,
        weights: Weights = None,
        device: Device = "auto",
        quiet: Quiet = False,
    ) -> None: ...

    _, *own = inspect.signature(make, eval_str=True).parameters.values()  # the first is the subject

    @wraps(make)
    def command(*, quiet: bool, **given: Any) -> None:
        options = {parameter.name: given.pop(parameter.name) for parameter in own}
        with at_work(quiet):
            make(load(**given), **options)

    parameters = {**inspect.signature(shared, eval_str=True).parameters, **{p.name: p for p in own}}
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    app.command(name=make.__name__)(command)
    return make


def _block(layer: float) -> int | float:
    """``--layer`` as a block (a whole number) or a relative depth between 0 and 1."""
    if 0 < layer < 1:
        return layer
    if not abs(layer) < 10_000 or layer != int(layer):
        raise UsageError(f"--layer {layer}: expected a block (0, 1, -1, ...) or a depth between 0 and 1")
    return int(layer)


@of_tokenizer
def attention(
    one: Subject,
    count: Count = 5,
    sweep_count: Annotated[int, typer.Option(min=0, help="Images behind the heat map; 0 draws none.")] = 32,
    layer: Layer = 0.857,
    time: Time = 0.5,
) -> None:
    """Where tokens look: the best maps beside the object's mask, and their overlap by layer and time."""
    from comit_bench.figures.attention import compute, compute_sweep, draw, draw_sweep

    how: dict[str, Any] = {"policy": one.policy, "seed": one.seed}
    data = compute(one.tokenizer, one.read(count), layer=_block(layer), time=time, **how)
    one.put(draw(data), data, "attention")
    if sweep_count:
        sweep = compute_sweep(one.tokenizer, one.read(sweep_count), **how)
        one.put(draw_sweep(sweep), sweep, "attention", "sweep")


@app.command(name="bottleneck")
def bottleneck(
    results: Results = Path("results"),
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


@of_tokenizer
def codebook(
    one: Subject,
    count: Annotated[int, typer.Option(min=2, help="How many images are counted.")] = 1000,
) -> None:
    """Entropy per position, use of ids, and what pairs of positions share."""
    from comit_bench.figures.codebook import compute, draw
    from comit_bench.figures.neighbours import DATASET

    data = compute(one.tokenizer, one.read(count, DATASET), policy=one.policy, seed=one.seed)
    one.put(draw(data), data, "codebook")


@of_tokenizer
def counterfactual(
    one: Subject,
    count: Annotated[int, typer.Option(min=1, help="How many scenes are shown; all are measured.")] = 2,
) -> None:
    """Scenes with one thing changed, and the tokens that change. A folder needs one sub-folder per edit."""
    from comit_bench.figures.counterfactual import DATASET, compute, draw

    inputs = one.read(None, DATASET)
    data = compute(one.tokenizer, inputs, count=count, policy=one.policy, seed=one.seed)
    one.put(draw(data), data, "counterfactual")


@of_tokenizer
def edit(
    one: Subject,
    count: Annotated[int, typer.Option(min=2, help="How many images; every two are a pair.")] = 6,
    span: Annotated[
        int | None, typer.Option(min=1, help="Tokens per span. [default: a quarter of the message]")
    ] = None,
) -> None:
    """Swap spans of tokens between two images and decode."""
    from comit_bench.figures.edit import compute, draw

    data = compute(one.tokenizer, one.read(count), span=span, policy=one.policy, seed=one.seed)
    one.put(draw(data), data, "edit")


@of_tokenizer
def evolution(one: Subject, count: Count = 2) -> None:
    """What a message knows after each crop. COMiT only; default policy: adaptive:6."""
    from comit_bench.figures.evolution import DEFAULT_POLICY, compute, draw

    data = compute(one.tokenizer, one.read(count), policy=one.policy or DEFAULT_POLICY, seed=one.seed)
    one.put(draw(data), data, "evolution")


@of_tokenizer
def gather(
    one: Subject,
    count: Annotated[int, typer.Option(min=1, help="How many images are shown.")] = 4,
    curve_count: Annotated[int, typer.Option(min=1, help="How many images are measured.")] = 64,
) -> None:
    """PSNR by number of crops, and what is known after some; crops are its own, not those of --policy."""
    from comit_bench.figures.gather import compute, draw
    from comit_bench.figures.neighbours import DATASET

    if one.policy is not None:
        raise UsageError(f"--policy {one.policy}: figure gather looks at crops of its own. Leave it out.")
    inputs = one.read(max(count, curve_count), DATASET)
    data = compute(one.tokenizer, inputs, count=count, seed=one.seed)
    one.put(draw(data), data, "gather")


@app.command(name="ls")
def ls() -> None:
    """List the figures, what they show and which tokenizers can."""
    helps = {str(command.name): inspect.getdoc(command.callback) or "" for command in app.registered_commands}
    rows = [("figure", "needs", "shows"), *((name, NEEDS[name], helps[name]) for name in NEEDS)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, needs, shows in rows:
        typer.echo(f"{name:<{first}}  {needs:<{second}}  {shows}")


@of_tokenizer
def maps(
    one: Subject,
    count: Count = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each image.")] = 6,
    layer: Layer = 0.857,
    time: Time = 0.5,
) -> None:
    """Where single tokens look, on any images: the tokens with the most compact maps."""
    from comit_bench.figures.maps import compute, draw

    how: dict[str, Any] = {"layer": _block(layer), "time": time, "policy": one.policy, "seed": one.seed}
    data = compute(one.tokenizer, one.read(count), tokens=tokens, **how)
    one.put(draw(data), data, "maps")


@of_tokenizer
def neighbours(
    one: Subject,
    count: Annotated[int, typer.Option(min=1, help="How many queries are shown.")] = 5,
    k: Annotated[int, typer.Option("--neighbours", "-k", min=1, help="Neighbours of each query.")] = 8,
    pool: Annotated[int, typer.Option(min=2, help="How many images are searched.")] = 1000,
) -> None:
    """Images and those with the nearest messages; the folder an image lies in is its class."""
    from comit_bench.figures.neighbours import DATASET, compute, draw

    inputs = one.read(pool, DATASET)
    data = compute(one.tokenizer, inputs, queries=count, k=k, policy=one.policy, seed=one.seed)
    one.put(draw(data), data, "neighbours")


@of_tokenizer
def policies(
    one: Subject,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A row each; may be repeated. [default: global, raster:9, random:9, adaptive:9, "
            "global+raster:10]"
        ),
    ] = None,
    count: Count = 6,
    curve_count: Annotated[int, typer.Option(min=0, help="Images behind the curves; 0 draws none.")] = 32,
) -> None:
    """Reconstructions by cropping policy, and PSNR by number of crops. COMiT only."""
    from comit_bench.figures.policies import DEFAULT_POLICIES, compute, compute_curves, draw, draw_curves

    data = compute(one.tokenizer, one.read(count), policies=policy or DEFAULT_POLICIES, seed=one.seed)
    one.put(draw(data), data, "policies")
    if curve_count:
        curves = compute_curves(one.tokenizer, one.read(curve_count), seed=one.seed)
        one.put(draw_curves(curves), curves, "policies", "curves")


@app.command(name="reconstruction")
def reconstruction(
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", "-t", help="May be repeated, a row each. [default: comit-nano]"),
    ] = None,
    images: Source = "scenes",
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
    from comit_bench.figures.reconstruction import compute, draw, extremes

    ways = ("random", "worst", "best")
    if show not in ways:
        raise UsageError(f"--show {show!r}: one of {', '.join(ways)}.{did_you_mean(show, ways)}")
    settings: dict[str, Any] = {"images": images, "output": output, "seed": seed}
    settings |= {"weights": weights, "device": device}
    with at_work(quiet):
        names: list[str | None] = [*tokenizer] if tokenizer else [None]
        several = [load(tokenizer=name, **settings) for name in names]
        inputs = [one.read(count if show == "random" else max(count, pool)) for one in several]
        data = compute([one.tokenizer for one in several], inputs, policy=policy, seed=seed)
        if show != "random":
            data = extremes(data, count, best=show == "best")
        kind = "reconstruction" if show == "random" else f"reconstruction-{show}"
        put(draw(data), output, kind, "+".join(one.title for one in several), *data.about.file_parts)


@app.command(name="sweeps")
def sweeps(
    results: Results = Path("results"),
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
