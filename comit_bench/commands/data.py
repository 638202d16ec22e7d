"""``comit-bench data build | show | download``. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comit_bench.commands.console import say, set_up_logging
from comit_bench.commands.options import DataRoot, Include, Quiet, as_path, command_group
from comit_bench.errors import UsageError, did_you_mean
from comit_bench.files import cache_root, require_folder

if TYPE_CHECKING:
    from comit_bench.recipes.specs import DatasetSpec, Recipe

app = command_group("Build, look at and download data sets.")

Name = Annotated[str, typer.Argument(help="A data set; `comit-bench ls datasets` lists them.")]


def _recipe(name: str, include: list[Path] | None) -> Recipe[DatasetSpec]:
    from comit_bench.recipes.specs import find_datasets, pick

    set_up_logging()
    return pick(name, find_datasets(tuple(include or ())), "data set")


def _steps(recipe: Recipe[DatasetSpec]) -> str:
    """How to get a data set by hand: its source, and the layout its README shows."""
    spec = recipe.spec
    lines = [f"1. {' '.join((spec.obtain or spec.homepage or 'ask its owners').split())}"]
    readme = recipe.sibling("README.md")
    layout = re.search(r"```\n(.*?)```", readme.read_text(encoding="utf-8") if readme.is_file() else "", re.S)
    lines.append(f"2. Put the files into DIR/{spec.folder}" + (":\n" + layout[1].rstrip() if layout else ""))
    lines.append(f"3. comit-bench data build {spec.name} --data-root DIR")
    return "\n".join(lines)


@app.command(name="build")
def build(
    name: Name,
    data_root: DataRoot = None,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes; 0 reads in this one.")] = 0,
    check_images: Annotated[bool, typer.Option(help="Decode every image.")] = True,
    include_path: Include = None,
    quiet: Quiet = False,
) -> None:
    """Make the manifest of a data set, verify it, decode every image; report what is missing or broken."""
    from comit_bench.data.building import build_dataset

    recipe = _recipe(name, include_path)
    require_folder(cache_root())
    data, report, broken = build_dataset(
        recipe,
        data_root=data_root,
        cache=cache_root(),
        workers=workers,
        check_images=check_images,
        progress=not quiet,
    )
    content = {
        "dataset": data.name,
        "version": data.version,
        "splits": {key: len(split) for key, split in data.splits.items()},
        "fingerprint": data.fingerprint,
        "missing": len(data.missing),
        "broken": len(broken),
        "notes": data.notes,
        "report": str(report),
    }
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


@app.command(name="show")
def show(
    name: Name,
    data_root: DataRoot = None,
    output: Annotated[Path, typer.Option(callback=as_path, help="Pictures go here.")] = Path("results/data"),
    split: Annotated[str | None, typer.Option(help="Split of the contact sheet. [default: the last]")] = None,
    seed: Annotated[int, typer.Option(help="Which random samples.")] = 0,
    include_path: Include = None,
    quiet: Quiet = False,
) -> None:
    """Print counts, draw histograms, and put ten random samples with their labels and boxes on one sheet."""
    from comit_bench.data.datasets import open_dataset
    from comit_bench.data.pictures import relations_shown, summary, write_histograms, write_samples

    recipe = _recipe(name, include_path)
    for folder in (output, cache_root()):
        require_folder(folder)
    data = open_dataset(recipe, data_root=data_root, cache=cache_root(), progress=not quiet)
    if split is not None and split not in data.splits:
        raise UsageError(f"{name} has no split {split!r}.{did_you_mean(split, data.splits)}")
    shown = data.splits[split if split is not None else list(data.splits)[-1]]
    regions = None
    if data.kind == "relations":
        from comit_bench.data.readers import visual_genome

        regions = visual_genome.regions(recipe.spec, data.folder, relations_shown(data, shown, seed=seed))
    rows = summary(data)
    width = max(len(title) for title, _ in rows)
    sys.stdout.write("".join(f"{title:<{width}}  {text}\n" for title, text in rows))
    for path in (
        write_histograms(data, output / f"{name}-histograms.png"),
        write_samples(data, output / f"{name}-samples.png", split=split, seed=seed, regions=regions),
    ):
        sys.stdout.write(f"{path}\n")


@app.command(name="download")
def download(
    name: Name,
    data_root: DataRoot = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep archives after unpacking.")] = False,
    include_path: Include = None,
    quiet: Quiet = False,
) -> None:
    """Fetch what may be downloaded freely (resumable, checked), or print the steps for the rest."""
    from comit_bench.data.download import download as fetch

    recipe = _recipe(name, include_path)
    if recipe.spec.generator is not None:
        sys.stdout.write(f"{name} is made on this machine at first use; nothing is downloaded\n")
        return
    if not recipe.spec.downloads:
        say(f"{name} cannot be downloaded by a program:")
        sys.stdout.write(_steps(recipe) + "\n")
        return
    if data_root is None:
        raise UsageError("where to? Pass --data-root DIR, or set COMIT_BENCH_DATA=DIR")
    folder = data_root / recipe.spec.folder
    fetch(recipe.spec, folder, keep=keep, progress=not quiet, say=say)
    sys.stdout.write(f"{folder}\n")
