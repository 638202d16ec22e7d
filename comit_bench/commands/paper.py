"""``comit-bench paper``: everything of the COMiT paper in one plan.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comit_bench.commands.console import INTERRUPTED, say, set_up_logging
from comit_bench.commands.options import (
    DataRoot,
    Device,
    Dtype,
    Offline,
    Output,
    Quiet,
    as_path,
    comma_separated,
)
from comit_bench.errors import BenchError, MissingError, UnsupportedOperation
from comit_bench.files import DATA_VARIABLE
from comit_bench.pipeline.failures import unexpected

if TYPE_CHECKING:
    from comit_bench.commands.paper_parts import PaperPart
    from comit_bench.commands.paper_plan import StepPlan
    from comit_bench.pipeline.jobs import Settings

Invoke = Callable[[Sequence[str]], int]  # runs `comit-bench` with these words; returns its exit code


def paper(
    context: typer.Context,
    only: Annotated[
        str | None,
        typer.Option(help="Parts, comma-separated: table-1, ..., figure-10. [default: all]"),
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", "-t", help="Instead of the paper's tokenizers; may be repeated."),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="paper, or scenes: the same parts on embedded data and shipped tokenizers.")
    ] = "paper",
    data_root: DataRoot = None,
    runs: Annotated[
        Path,
        typer.Option(callback=as_path, help="Where `comit-bench train` left ablations and bottleneck sizes."),
    ] = Path("runs"),
    output: Output = Path("results"),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images per split and figure; records are marked incomplete.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Probe seeds. [default: the recipe's]")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per call; no score depends on it. [default: auto]")
    ] = None,
    offline: Offline = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what is missing, and stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Measure and draw what the paper does: its tables and figures, each by ordinary commands.

    Needs no data or weights to plan. What is missing is listed with the command that gets it and left out;
    finished records are kept, so the same command goes on later. Exit code 3: something was left out.
    """
    from comit_bench.commands.paper_parts import choose_parts, make_cast, make_parts
    from comit_bench.commands.paper_plan import describe, plan_parts
    from comit_bench.pipeline.jobs import Settings
    from comit_bench.pipeline.suite import choose_suite
    from comit_bench.tokenizers.load import resolve_device, resolve_dtype

    set_up_logging()
    choose_suite(suite, None)
    resolve_dtype(dtype, resolve_device(device))
    settings = Settings(
        output=output,
        data_root=data_root,
        limit=limit,
        seeds=seeds,
        device=device,
        dtype=dtype,
        offline=offline,
    )
    parts = choose_parts(make_parts(make_cast(suite, tokenizer or (), runs)), comma_separated(only))
    plans = plan_parts(parts, settings)
    text = "\n".join(describe(plans, settings, suite=suite))
    if dry_run:
        typer.echo(text)
        return
    say(text)
    shared = _shared_options(settings, batch_size, quiet=quiet)
    root = context.find_root().command

    def invoke(words: Sequence[str]) -> int:
        own = [word for option in shared for word in option if option[0] in _takes(words)]
        code = root.main(args=[*words, *own], prog_name="comit-bench", standalone_mode=False)
        return int(code or 0)

    with _data_in(settings.data_root):
        outcome = do_parts(plans, settings, invoke)
    raise typer.Exit(_finish(outcome, settings, suite))


def _shared_options(settings: Settings, batch_size: int | None, *, quiet: bool) -> list[tuple[str, ...]]:
    """What every command gets that takes it: options that were given."""
    given: dict[str, object] = {
        "--device": None if settings.device == "auto" else settings.device,
        "--dtype": None if settings.dtype == "float32" else settings.dtype,
        "--limit": settings.limit,
        "--seeds": settings.seeds,
        "--batch-size": batch_size,
    }
    valued = [(option, str(value)) for option, value in given.items() if value is not None]
    flags = [("--offline",)] * settings.offline + [("--quiet",)] * quiet
    return [*valued, *flags]


def _takes(words: Sequence[str]) -> tuple[str, ...]:
    """Which of the shared options a command has."""
    if words[0] == "figure":
        return ("--device", "--quiet") if "--images" in words else ()
    common = ("--device", "--dtype", "--limit", "--batch-size", "--offline", "--quiet")
    return (*common, "--seeds") if words[0] == "run" else common


@contextmanager
def _data_in(root: Path | None) -> Iterator[None]:
    """Let the commands find the data root where they look for it by themselves."""
    before = os.environ.get(DATA_VARIABLE)
    if root is not None:
        os.environ[DATA_VARIABLE] = str(root)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(DATA_VARIABLE, None)
        else:
            os.environ[DATA_VARIABLE] = before


@dataclass(slots=True)
class Done:
    """How it went: commands that were done, were left out, and failed, each with its reason."""

    finished: int = 0
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: bool = False


def do_parts(
    plans: Sequence[tuple[PaperPart, Sequence[StepPlan]]], settings: Settings, invoke: Invoke
) -> Done:
    """Run all commands that can be run; one that fails does not stop the others.

    What they print goes to stderr, so that stdout holds the tables alone.

    Args:
        plans: From ``plan_parts``.
        settings: Where to, and how many images.
        invoke: Runs one command; may raise a ``BenchError``.
    """
    done = Done()
    data = "D" if settings.data_root is None else str(settings.data_root)
    for part, steps in plans:
        before = True
        for plan in steps:
            named = [Path(tokenizer).name for tokenizer in plan.step.tokenizers]
            name = f"{part.name}: {' '.join([*plan.step.command, *named])}"
            if plan.now is None or (plan.step.follows and not before):
                done.left_out.append(f"{name}: waits for {plan.waits_for or 'the command before it'}")
                before = False
                continue
            if plan.now != plan.step:
                needs = "; ".join(need.what for need in plan.required)
                done.left_out.append(f"{name}: in part, waits for {needs}")
            words = plan.now.argv(output=str(settings.output), data=data, limit=settings.limit)
            say(f"{part.name}: {shlex.join(['comit-bench', *words])}")
            code = _one_command(invoke, words, name, done, settings.output)
            if code == INTERRUPTED:
                done.stopped = True
                return done
            before = code == 0
    return done


def _one_command(invoke: Invoke, words: Sequence[str], name: str, done: Done, output: Path) -> int:
    """Run a command and note how it went; whatever it raises, the others run on."""
    try:
        with redirect_stdout(sys.stderr):
            code = invoke(words)
    except (MissingError, UnsupportedOperation) as error:
        done.left_out.append(f"{name}: {error}")
        return error.exit_code
    except BenchError as error:
        done.failed.append(f"{name}: {error}")
        return error.exit_code
    except Exception as error:
        done.failed.append(str(unexpected(error, name, output)))
        return 1
    if code == MissingError.exit_code:
        done.left_out.append(f"{name}: something is missing, see above")
    elif code != 0:
        done.failed.append(f"{name}: see above")
    else:
        done.finished += 1
    return code


def _finish(done: Done, settings: Settings, suite: str) -> int:
    """Print the paper's tables, say what is not in them; the exit code."""
    from comit_bench.commands.listing import print_paper_tables
    from comit_bench.results.outcomes import OutcomeFiles
    from comit_bench.results.records import load_records, published_records

    if done.stopped:
        return INTERRUPTED
    records = load_records(settings.records)
    records += published_records(records, suite=suite)
    try:
        outcomes = OutcomeFiles(settings.records)
        print_paper_tables(records, suite=suite, output=settings.output / "tables", outcomes=outcomes)
    except MissingError as error:
        say(str(error))
    say(f"{done.finished} commands done; records in {settings.records}, figures in {settings.output}/figures")
    for line in done.left_out:
        say(f"left out: {line}")
    for line in done.failed:
        say(f"failed: {line}")
    if done.failed:
        return 1
    return MissingError.exit_code if done.left_out else 0
