"""What of a data set is not on this machine, piece by piece, and what to do about it. Reads no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from comit_bench.data.readers import visual_genome
from comit_bench.data.readers.common import find_directory, find_file, find_folder, folders, images
from comit_bench.data.readers.encoded import find_archive
from comit_bench.data.readers.open import manifest_reader
from comit_bench.errors import BenchError, MissingError
from comit_bench.files import DATA_VARIABLE
from comit_bench.recipes.specs import DatasetSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that is missing.

    Attributes:
        what: Which file or folder, and where it was looked for.
        command: The command that fetches it, or in words how to get it.
    """

    what: str
    command: str


def missing_pieces(spec: DatasetSpec, data_root: Path | None) -> list[Piece]:
    """Everything a data set needs that is not there; empty when it can be opened.

    Only looks whether files and folders exist. Generated data sets need nothing.
    """
    if spec.generator is not None:
        return []
    root = "DIR" if data_root is None else str(data_root)
    command = (
        f"comit-bench data download {spec.name} --data-root {root}"
        if spec.downloads
        else " ".join((spec.obtain or spec.homepage or "ask its owners").split())
    )
    if data_root is None:
        return [Piece(f"a data root: --data-root DIR or {DATA_VARIABLE}=DIR", command)]
    try:
        folder = find_folder(spec, data_root)
    except MissingError:
        return [Piece(f"{data_root / spec.folder}/", command)]
    pieces = []
    for check in _checks(spec, folder):
        try:
            check()
        except BenchError as error:
            pieces.append(Piece(_short(error), command))
    return pieces


def _short(error: BenchError) -> str:
    """The first sentence of a message: what is missing and where."""
    return (
        str(error).split(" Pass --data-root")[0].split(" Where it comes from")[0].split(". `comit-bench")[0]
    )


def _checks(spec: DatasetSpec, folder: Path) -> Sequence[Callable[[], object]]:
    """One check for every file and folder."""
    file, directory = (partial(partial, find, spec, folder) for find in (find_file, find_directory))
    if spec.reader == "coco":
        annotations = [file(f"annotations of {n!r}", files) for n, files in spec.splits.items()]
        return annotations + [directory(f"images of {n!r}", spec.images.get(n, (n,))) for n in spec.splits]
    if spec.reader == "visual-genome":
        wanted = ["relationships", "image_data"]
        wanted += ["object_alias", "relationship_alias"] if spec.relations.aliases else []
        checks = [file(what, spec.labels.get(what, visual_genome.FILES[what])) for what in wanted]
        checks += [file(f"list of ids for {n!r}", files) for n, files in spec.splits.items() if files]
        bases = spec.images.get("bases", visual_genome.BASES)
        for name in visual_genome.folder_names(spec):
            checks.append(directory(f"images {name}", [f"{base}/{name}" for base in bases]))
        return checks
    if spec.reader != "class-folders":
        return [lambda: manifest_reader(spec.reader).places(spec, folder)]
    return [partial(_class_split, spec, folder, n) for n in spec.splits]


def _class_split(spec: DatasetSpec, folder: Path, name: str) -> None:
    """A split of class folders, with labels when its images lie flat, or shards or a hub copy of it."""
    if find_archive(spec, folder, name):
        return
    place = find_directory(spec, folder, f"split {name!r}", spec.splits[name])
    if folders(place) or not spec.labelled or spec.generator is not None:
        return
    if not images(place):
        raise MissingError(f"{place}: is empty")
    truth = find_file(spec, folder, f"labels of the flat split {name!r}", spec.labels.get(name, ()))
    if truth.suffix.lower() != ".csv":
        find_file(spec, folder, "meta.mat", spec.labels.get("synsets", ()))
