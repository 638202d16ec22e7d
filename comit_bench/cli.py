"""The command line: ``comit-bench run | sweep | paper | figure | train | ls | doctor | data | ...``.

Only argument parsing happens here, and only typer is imported at the top: ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from comit_bench import __version__, cache_command, data_command, figure_command, token_command
from comit_bench.console import guarded
from comit_bench.errors import UsageError, did_you_mean
from comit_bench.options import DataRoot, Include, as_path
from comit_bench.paper_command import paper
from comit_bench.reading import shown
from comit_bench.sweep_command import sweep
from comit_bench.token_command import key_values
from comit_bench.train.command import train
from comit_bench.weights_command import app as weights_app

app = typer.Typer(
    name="comit-bench",
    help="What do the tokens of 1D discrete image tokenizers mean? From images to a table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Tokenizers = Annotated[
    list[str] | None,
    typer.Option("--tokenizer", "-t", help="Name, hub id or checkpoint directory; may be repeated."),
]
Suite = Annotated[
    str | None,
    typer.Option(help="scenes (embedded) or paper. [default: paper with a data root, else scenes]"),
]
Tasks = Annotated[
    str | None, typer.Option(help="Comma-separated task names, or all. [default: the probes of the suite]")
]
Policy = Annotated[
    list[str] | None,
    typer.Option(
        help="Cropping policy: global, raster:9, global+adaptive:3 (the number counts the global crop), ...; "
        "may be repeated, a row each. [default: global]"
    ),
]
Weights = Annotated[str | None, typer.Option(help="Directory of weights, or 'random' (untrained).")]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="KEY=VALUE for the tokenizers that know it, e.g. posterior=sample, or FAMILY.KEY=VALUE for one "
        "family; may be repeated.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Images per split; records are marked incomplete.")]
Seeds = Annotated[int | None, typer.Option(help="Probe seeds. [default: the recipe's]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, or bfloat16 autocast on CUDA.")]
BatchSize = Annotated[str, typer.Option(help="Images per encoding call, or auto; no score depends on it.")]
NumWorkers = Annotated[str, typer.Option(help="Image-reading processes, or auto.")]
Output = Annotated[Path, typer.Option(callback=as_path, help="Records and tables go here.")]
Overwrite = Annotated[
    str,
    typer.Option(
        help="Finished records: only-missing keeps them, always replaces them and makes tokens anew, never "
        "stops there."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue; the same as --overwrite only-missing.")]
Control = Annotated[
    str | None,
    typer.Option(
        help="permute-labels: scores must fall to chance; shuffle-tokens, bag-of-tokens: without positions."
    ),
]
References = Annotated[bool, typer.Option(help="Also measure the rows that bracket every score.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask a model hub.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
AllowOverride = Annotated[
    bool, typer.Option("--allow-override", help="Let included recipes replace built-in ones.")
]
Profile = Annotated[bool, typer.Option("--profile", help="Say where the time of tokenization went.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what is kept and skipped.")]
OVERWRITE = ("always", "never", "only-missing")


def run(
    tokenizer: Tokenizers = None,
    suite: Suite = None,
    tasks: Tasks = None,
    policy: Policy = None,
    weights: Weights = None,
    option: Option = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    seeds: Seeds = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = "auto",
    num_workers: NumWorkers = "auto",
    output: Output = Path("results"),
    overwrite: Overwrite = "only-missing",
    resume: Resume = False,
    control: Control = None,
    references: References = True,
    offline: Offline = False,
    dry_run: DryRun = False,
    include_path: Include = None,
    allow_override: AllowOverride = False,
    profile: Profile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tokenize, probe, print a table. Without arguments: the embedded suite, a few minutes on two cores."""
    from comit_bench.console import set_up_logging, stoppable
    from comit_bench.jobs import Settings
    from comit_bench.run import data_root_from, run_command

    set_up_logging(verbose=verbose)
    settings = Settings(
        output=output,
        data_root=data_root_from(data_root),
        policy=policy or None,
        weights=weights,
        options=key_values(option or []),
        limit=limit,
        seeds=seeds,
        device=device,
        dtype=dtype,
        batch_size=_number_or_auto(batch_size, 64, "--batch-size"),
        num_workers=_number_or_auto(num_workers, _auto_workers(), "--num-workers"),
        overwrite=_checked_overwrite(overwrite, resume),
        control=control,
        offline=offline,
        include=tuple(include_path or ()),
        allow_override=allow_override,
        progress=not quiet,
    )
    names = _names(tasks)
    plan: dict[str, Any] = {"suite": suite, "dry_run": dry_run, "references": references, "profile": profile}
    raise typer.Exit(stoppable(lambda: run_command(tokenizer or [], names, settings=settings, **plan)))


def _names(text: str | None) -> list[str] | None:
    """Comma-separated names; None stays None."""
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UsageError("an empty list of names: give names separated by commas, see `comit-bench ls`")
    return names


def _checked_overwrite(value: str, resume: bool) -> Any:
    if value not in OVERWRITE:
        raise UsageError(
            f"--overwrite {value!r}: not one of {', '.join(OVERWRITE)}.{did_you_mean(value, OVERWRITE)}"
        )
    if resume and value != "only-missing":
        raise UsageError(f"--resume continues and --overwrite {value} does not: give one of them")
    return value


def _number_or_auto(value: str, automatic: int, option: str) -> int:
    if value == "auto":
        return automatic
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{option} {shown(value)}: expected a whole number or auto") from None


def _auto_workers() -> int:
    """Workers cost a torch import each; they pay where there are cores to spare."""
    import os

    cores = os.cpu_count() or 1
    return 0 if cores <= 4 else min(8, cores // 2)


app.command(name="run")(run)
app.command(name="sweep")(sweep)
app.command(name="train")(train)
app.command(name="paper")(paper)
app.command(name="tokenize")(token_command.tokenize)
app.command(name="detokenize")(token_command.detokenize)
app.add_typer(cache_command.app, name="cache")
app.add_typer(data_command.app, name="data")
app.add_typer(figure_command.app, name="figure")
app.add_typer(weights_app, name="weights")


@app.command(name="ls")
def ls(
    what: Annotated[str, typer.Argument(help="tokenizers, tasks or datasets.")] = "tokenizers",
    names: Annotated[bool, typer.Option("--names", help="Only the names, one per line.")] = False,
    include_path: Include = None,
) -> None:
    """List what can be named on the command line."""
    from comit_bench.listing import list_things

    list_things(what, names_only=names, include=tuple(include_path or ()))


@app.command(name="doctor")
def doctor(
    data_root: DataRoot = None,
) -> None:
    """Say what is installed, found and missing, and how to get what is missing."""
    from comit_bench.listing import examine
    from comit_bench.run import data_root_from

    raise typer.Exit(examine(data_root_from(data_root)))


@app.command(name="validate")
def validate(
    files: Annotated[
        list[Path], typer.Argument(callback=as_path, help="Recipes (.yaml) or records (.json).")
    ],
) -> None:
    """Check recipe and record files; exit code 2 when one is wrong."""
    from comit_bench.listing import validate_files

    raise typer.Exit(validate_files(files))


@app.command(name="table")
def table(
    records: Annotated[
        list[Path] | None,
        typer.Argument(callback=as_path, help="Directories of records. [default: results/records]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(callback=as_path, help="Also write table.csv, table.md, table.tex here.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Only tasks of this suite.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Only these tasks, comma-separated, in this order.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics, comma-separated.")] = None,
    published: Annotated[
        bool, typer.Option(help="Also print published numbers of the same tasks, marked as such.")
    ] = True,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Print tables of the paper instead: table-1, table-2, table-3, table-4, objectness, "
            "comma-separated, or all. With --suite paper all of them follow the plain table."
        ),
    ] = None,
) -> None:
    """Rebuild the table from records alone."""
    from comit_bench.listing import rebuild_table

    rebuild_table(
        records or [Path("results/records")],
        output=output,
        suite=suite,
        tasks=_names(tasks),
        metrics=_names(metrics),
        published=published,
        layouts=_names(layout),
    )


@app.command(name="cost")
def cost(
    names: Annotated[list[str] | None, typer.Argument(help="Presets. [default: all with a network]")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that one image may take.")] = 120.0,
    memory: Annotated[float, typer.Option(help="GB that the weights may take.")] = 24.0,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Also measure processor time.")] = True,
) -> None:
    """Print what one image costs, as Markdown: FLOPs, and processor seconds of one thread."""
    from comit_bench.cost import write

    write(names or [], limit=limit, memory=memory, timed=timed)


@app.command(name="push")
def push(
    folder: Annotated[
        Path,
        typer.Argument(callback=as_path, help="Exported folder: config.json, model.safetensors, README.md."),
    ],
    repo: Annotated[str, typer.Option(help="USER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder, list the files, stop.")
    ] = False,
) -> None:
    """Upload a trained tokenizer with its model card and pictures to the Hugging Face hub."""
    from comit_bench.console import say, set_up_logging
    from comit_bench.tokenizers import push as hub

    set_up_logging()
    upload = hub.prepare(folder, repo)
    if dry_run:
        typer.echo(f"{upload}\ndry run: nothing was uploaded")
        return
    say(str(upload))
    typer.echo(hub.push(upload, private=private).url)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point of the console script."""
    guarded(lambda: app(standalone_mode=True))


def main_run() -> None:
    """Entry point of ``python -m comit_bench.run``."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command()(run)
    guarded(lambda: single(prog_name="python -m comit_bench.run"))


if __name__ == "__main__":
    main()
