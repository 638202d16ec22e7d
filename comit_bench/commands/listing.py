"""``ls``, ``doctor``, ``validate`` and ``table``: looking at what there is. Results go to stdout."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import echo

from comit_bench.errors import BenchError, MissingError, UsageError, did_you_mean, shown
from comit_bench.files import cache_root, require_folder, write_atomic
from comit_bench.recipes.specs import (
    DatasetSpec,
    Recipe,
    TaskSpec,
    dataset_of,
    find_datasets,
    find_tasks,
    parse_recipe,
)
from comit_bench.tokenizers.family import Part, Shipped
from comit_bench.tokenizers.registry import downloads, tokenizers

if TYPE_CHECKING:
    from comit_bench.results.schema import Record

PIPE_WIDTH = 160
LEAST_COLUMN = 16  # of the last column of a listing
EXTRAS = {  # optional parts of the installation, and what each is for
    "hf": "training from Hugging Face data sets",
    "metrics": "rFID and LPIPS",
    "teacher": "training of drawings-teacher",
    "track": "training curves in TensorBoard",
}
ALL = "all"
THINGS = ("tokenizers", "tasks", "datasets")


def print_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose last column gives way; where there is no room for it, a paragraph per row."""
    from rich import box
    from rich.table import Table

    from comit_bench.results.render.terminal import stdout_console

    console = stdout_console(PIPE_WIDTH)
    widest = [max([len(title), *(len(row[n]) for row in rows)]) for n, title in enumerate(head)]
    if sum(widest[:-1]) + 3 * len(head) + min(widest[-1], LEAST_COLUMN) > console.width:
        for row in rows:
            echo(row[0])
            echo("\n".join(f"  {name}: {text}" for name, text in zip(head[1:], row[1:], strict=True)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        last = number == len(head) - 1
        least = None if last else widest[number]
        table.add_column(name, no_wrap=not last, min_width=least, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def list_things(what: str, *, names_only: bool = False, include: tuple[Path, ...] = ()) -> None:
    """Print tokenizers, tasks or datasets."""
    if what not in THINGS:
        raise UsageError(
            f"cannot list {shown(what)}: one of {', '.join(THINGS)}.{did_you_mean(what, THINGS)}"
        )
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if what == "tokenizers":
        from comit_bench.tokenizers.presence import shown_source, weights_state

        presets = [(entry.preset, entry.family.origin) for entry in tokenizers().values()]
        head = ("name", "params", "tokens", "vocab", "origin", "here", "weights")
        rows = [
            (
                preset.name,
                "-" if preset.parameters is None else f"{preset.parameters:g} M",
                str(preset.message_length or "-"),
                str(preset.vocab_size or "-"),
                origin,
                weights_state(preset),
                shown_source(preset),
            )
            for preset, origin in presets
        ]
    elif what == "tasks":
        head = ("name", "kind", "suite", "dataset", "title")
        rows = [_task_row(recipe) for recipe in find_tasks(include).values()]
    else:
        head = ("name", "reader", "where", "title")
        rows = [_dataset_row(recipe) for recipe in find_datasets(include).values()]
    if names_only:
        echo("\n".join(row[0].split()[0] for row in rows))
    else:
        print_rows(head, rows)


def _task_row(recipe: Recipe[TaskSpec]) -> tuple[str, ...]:
    spec = recipe.spec
    return (f"{spec.name} v{spec.version}", spec.kind, spec.suite, spec.dataset, spec.title)


def _dataset_row(recipe: Recipe[DatasetSpec]) -> tuple[str, ...]:
    spec = recipe.spec
    where = "made on first use" if spec.generator else f"DATA_ROOT/{spec.folder}"
    return (f"{spec.name} v{spec.version}", spec.reader, where, spec.title)


def _packages() -> list[str]:
    lines = []
    try:
        requirements = requires("comit-bench") or []
    except PackageNotFoundError:
        return ["  MISSING  comit-bench itself is not installed here: pip install -e ."]
    for requirement in requirements:
        name = re.split(r"[<>=!~ ;\[]", requirement)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if extra is not None and extra[1] not in EXTRAS:
            continue
        try:
            lines.append(f"  ok       {name} {version(name)}")
        except PackageNotFoundError:
            if extra is None:
                lines.append(f"  MISSING  {name}: pip install '{requirement}'")
            else:
                what = f"{EXTRAS[extra[1]]}: pip install 'comit-bench[{extra[1]}]'"
                lines.append(f"  missing  {name}, needed for {what}")
    return lines


def _suites(data_root: Path | None) -> tuple[list[str], bool]:
    """What each suite waits for, and whether the one that ``run`` would choose can be done.

    These are the words of ``comit-bench run``: both ask the same plan.
    """
    from comit_bench.pipeline.evaluate import plan_of_suite
    from comit_bench.pipeline.jobs import Settings
    from comit_bench.pipeline.suite import SUITES, choose_suite, suite_tasks

    chosen, why = choose_suite(None, data_root)
    lines, ready = [], True
    settings = Settings(data_root=data_root, offline=True, progress=False)
    for suite in SUITES:
        if not suite_tasks(suite, settings):
            continue
        plan = plan_of_suite(suite, settings)
        own = f" (what `comit-bench run` does here, {why})" if suite == chosen else ""
        state = "MISSING" if plan.missing else "ok"
        lines.append(f"  {suite}: {state}{own}")
        lines += [
            f"    {part.job.task.spec.name}: {part.job.label} waits for {' and '.join(part.waits)}"
            for part in plan.jobs
            if part.waits
        ]
        texts = [str(e).replace("--offline forbids a download", "were not fetched") for e in plan.missing]
        lines += [f"    missing: {text}" for text in texts]
        ready = ready and not (suite == chosen and plan.missing)
    return lines, ready


def _weights_lines() -> list[str]:
    """One line per checkpoint, further file and VAE, with the command that fetches it when it is not here."""
    from comit_bench.tokenizers.presence import command, weights_state

    lines = []
    for item in downloads():
        state, source = weights_state(item), str(item.source)
        name = f"{item.name} ({item.note})" if isinstance(item, Part) and item.note else item.name
        if state == "yes":
            where = source if isinstance(item.source, Shipped) else f"in the cache, from {source}"
            lines.append(f"  {name}: ok       {where}")
        elif state != "-":
            word = "begun  " if state == "part" else "missing"
            lines.append(f"  {name}: {word}  {command(item)}  (from {source.partition('?')[0]})")
    return lines


def _data_state(recipe: Recipe[DatasetSpec], data_root: Path | None) -> list[str]:
    """One line for a data set that is there, else one per missing piece with the command that gets it."""
    from comit_bench.data.pieces import missing_pieces

    spec = recipe.spec
    if spec.generator is not None:
        there = (spec.made_in(cache_root()) / "scenes.json").is_file()
        return [f"  {spec.name}: {'ok       made before' if there else 'ok       made on first use'}"]
    missing = missing_pieces(spec, data_root)
    if missing:
        return [f"  {spec.name}: missing  {piece.what}\n      {piece.command}" for piece in missing]
    root = f" --data-root {data_root}"
    return [
        f"  {spec.name}: ok       all files are there; `comit-bench data build {spec.name}{root}` checks them"
    ]


def _judges() -> list[str]:
    """The networks that judge reconstructions: where they are, or how to get them."""
    from comit_bench.metrics.perceptual import LPIPS_BACKBONES, find_inception, why_no_lpips

    try:
        lines = [f"inception (rFID): ok       {find_inception()}"]
    except MissingError as error:
        lines = [f"inception (rFID): missing  {error}"]
    for name in LPIPS_BACKBONES:
        lines.append(f"lpips {name}: {why_no_lpips(name) or 'ok'}")
    return lines


def examine(data_root: Path | None) -> int:
    """Print the state of the installation.

    Returns:
        0, or 3 when a required package is missing, or something that ``comit-bench run`` with the same data
        root would wait for.
    """
    import torch

    packages = _packages()
    echo("packages")
    echo("\n".join(packages))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: runs on the CPU"
    echo(f"device\n  {device}; {torch.get_num_threads()} CPU threads")
    echo(f"cache\n  {cache_root()} ({'exists' if cache_root().exists() else 'made on first use'})")
    echo("weights")
    echo("\n".join(_weights_lines()))
    echo("\n".join(f"  {line}" for line in _judges()))
    echo(f"data (data root: {data_root or 'not given: --data-root DIR or COMIT_BENCH_DATA'})")
    for recipe in find_datasets().values():
        echo("\n".join(_data_state(recipe, data_root)))
    lines, ready = _suites(data_root)
    echo("suites")
    echo("\n".join(lines))
    if data_root is not None and not data_root.is_dir():
        raise MissingError(
            f"the data root {data_root} is no folder: give --data-root DIR, where data sets lie"
        )
    if any("MISSING" in line for line in packages) or not ready:
        return MissingError.exit_code
    return 0


def _validate(path: Path) -> str:
    if path.suffix in (".yaml", ".yml"):
        kinds: dict[str, Any] = {"task.yaml": TaskSpec, "dataset.yaml": DatasetSpec}
        if path.name not in kinds:
            raise UsageError(
                f"{path}: recipes are called task.yaml or dataset.yaml, in a folder of their name"
            )
        spec = parse_recipe(path, kinds[path.name])
        if spec.name != path.resolve().parent.name:
            raise UsageError(
                f"{path}: name is {shown(spec.name)} but its folder is {path.resolve().parent.name!r}"
            )
        if isinstance(spec, TaskSpec):
            root = path.resolve().parents[2]  # of ROOT/probes/NAME/task.yaml; its own data sets count too
            beside = (root,) if (root / "datasets").is_dir() else ()
            dataset_of(Recipe(spec, path, "validated"), find_datasets(beside, allow_override=True))
        return f"{type(spec).__name__} {spec.name} version {spec.version}"
    if path.suffix == ".json":
        from comit_bench.results.records import validate_record_file

        record = validate_record_file(path)
        return f"record of {record.tokenizer.name} on {record.task.name}"
    raise UsageError(f"{path}: expected a recipe (task.yaml, dataset.yaml) or a record (.json)")


def validate_files(paths: Sequence[Path]) -> int:
    """Check files one by one; returns 0 or the exit code of the worst."""
    worst = 0
    for path in paths:
        try:
            echo(f"ok  {path}: {_validate(path)}")
        except BenchError as error:
            echo(f"BAD {error}")
            worst = UsageError.exit_code
    return worst


def rebuild_table(
    directories: Sequence[Path],
    *,
    output: Path | None,
    suite: str | None,
    tasks: Sequence[str] | None,
    metrics: Sequence[str] | None,
    published: bool = True,
    layouts: Sequence[str] | None = None,
    marks: str = "significance",
    trainings: str = "each",
) -> None:
    """Print the table of all records below ``directories``, and write it when ``output`` is given.

    With ``published``, the published numbers of the same tasks (of the whole suite, when one is named)
    stand in it too. ``layouts`` names tables of the paper to print instead, ``all`` for every one; with the
    suite ``paper`` and no other filter they all follow the plain table. ``marks`` and ``trainings`` are those
    of ``build_table``.
    """
    from comit_bench.results.outcomes import OutcomeFiles
    from comit_bench.results.records import load_records, published_records
    from comit_bench.results.render.paper import find_layouts
    from comit_bench.results.render.terminal import print_terminal
    from comit_bench.results.render.write import write_tables
    from comit_bench.results.table import build_table

    if output is not None:
        require_folder(output)
    shown: dict[str, Any] = {"marks": _one_of("--marks", marks, ("significance", "rank"))}
    joined: Any = _one_of("--trainings", trainings, ("each", "mean"))
    names = None if layouts is None or ALL in layouts else list(layouts)
    find_layouts(names)  # a wrong name is told before records are read
    suite = suite or ("paper" if layouts is not None else None)
    records = [record for directory in directories for record in load_records(directory)]
    if published:
        records += published_records(records, suite=suite)
    if not records:
        raise MissingError(
            f"no records under {', '.join(str(d) for d in directories)}. `comit-bench run` makes them; "
            "name their directory if they lie elsewhere."
        )
    shown["outcomes"] = OutcomeFiles(*directories)
    if layouts is None:
        table = build_table(records, metrics=metrics, suite=suite, tasks=tasks, trainings=joined, **shown)
        print_terminal(table)
        if output is not None:
            for path in write_tables(table, output, records, **shown):
                sys.stderr.write(f"{path}\n")
    if layouts is not None or (suite == "paper" and tasks is None and metrics is None):
        own = None if layouts is None else output  # the plain table's files have it already
        print_paper_tables(records, suite=suite or "paper", names=names, output=own, **shown)


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UsageError(f"{option} {value!r}: not one of {', '.join(known)}.{did_you_mean(value, known)}")
    return value


def print_paper_tables(
    records: Sequence[Record],
    *,
    suite: str,
    names: Sequence[str] | None = None,
    output: Path | None = None,
    **marks: Any,
) -> None:
    """Print the paper's tables, and write them when ``output`` is given, see ``results/render/paper.py``."""
    from comit_bench.results.render.paper import PAPER_FILE, paper_tables, to_paper_latex
    from comit_bench.results.render.terminal import print_terminal

    tables = paper_tables(records, suite=suite, names=names, **marks)
    if not tables:
        what = ", ".join(names) if names else "the paper's tables"
        raise MissingError(f"no record belongs to {what}. `comit-bench paper --suite {suite}` makes them.")
    for table in tables:
        echo("")
        print_terminal(table)
    latex = to_paper_latex(records, suite=suite, names=names, **marks)
    if output is not None and latex is not None:
        write_atomic(output / PAPER_FILE, latex)
        sys.stderr.write(f"{output / PAPER_FILE}\n")
