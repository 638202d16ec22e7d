"""What all readers need: finding folders and files below a data root, and listing images."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from comit_bench.errors import MissingError, shown
from comit_bench.files import DATA_VARIABLE, check_relative, why_no_file
from comit_bench.recipes.specs import DatasetSpec

EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp"})
LONGEST_PART = 255  # bytes of the name of a file


def few(names: Iterable[str], count: int = 5) -> str:
    """The first names of a list, for a message."""
    listed = list(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")


def how_to_get(spec: DatasetSpec) -> str:
    """Where the data come from, as the end of a message."""
    source = spec.obtain or spec.homepage
    command = f" `comit-bench data download {spec.name}` fetches it." if spec.downloads else ""
    return (f" Where it comes from: {source.strip()}" if source else "") + command


def _how_to_point(spec: DatasetSpec) -> str:
    """How to say where the data lie, as the end of a message."""
    return (
        f" Pass --data-root DIR, or set {DATA_VARIABLE}=DIR, where DIR is the folder that "
        f"contains {spec.folder}/."
    )


def find_folder(spec: DatasetSpec, data_root: Path | None) -> Path:
    """The data set's folder: ``folder`` of the recipe under the data root.

    A tree that can only be this data set, because it holds a place of several folders
    (``ILSVRC/Data/CLS-LOC/train``), is read as well where the data root, or the folder in it, is the tree
    itself or lies on the way to that place.
    """
    if data_root is None:
        raise MissingError(
            f"dataset {spec.name}: no data root is set.{_how_to_point(spec)}{how_to_get(spec)}"
        )
    folder = data_root / spec.folder
    if folder.is_dir():
        return _tree_around(spec, folder) or folder
    if (tree := _tree_around(spec, data_root)) is not None:
        return tree
    raise MissingError(
        f"dataset {spec.name}: {folder} is not there.{_hint(spec, data_root)}{_how_to_point(spec)}"
        f"{how_to_get(spec)}"
    )


def _tree_around(spec: DatasetSpec, place: Path) -> Path | None:
    """The folder itself or one of the three above it, when it holds a place of several folders below it."""
    names = [c for candidates in (*spec.splits.values(), *spec.images.values()) for c in candidates]
    real = place.resolve()
    for tree in (place, *real.parents[:3]):
        found = (tree.resolve() / name for name in names if "/" in name)
        if any(path.is_relative_to(real) and path.exists() for path in found):
            return tree
    return None


def _hint(spec: DatasetSpec, data_root: Path) -> str:
    """What to do when a folder that looks like the data set is near, but is not called like it."""
    marks = [*spec.splits.values(), *spec.images.values(), *spec.labels.values()]
    names = [place for places in marks for place in places if place != "."]
    if any((data_root / name).exists() for name in names):
        real = data_root.resolve()
        if real.name == spec.folder:
            return f" {data_root} itself looks like the dataset: its parent {real.parent} is wanted."
        return (
            f" {data_root} itself looks like the dataset, but is not called {spec.folder}: "
            f"`mkdir DIR && ln -s {real} DIR/{spec.folder}` makes a data root DIR."
        )
    below = [data_root / name for name in folders(data_root)] if data_root.is_dir() else []
    near = next((place for place in below if _tree_around(spec, place) == place), None)
    return f" {near} looks like the dataset: pass --data-root {near}." if near is not None else ""


def find_file(spec: DatasetSpec, folder: Path, what: str, candidates: Sequence[str]) -> Path:
    """The first of ``candidates`` that is a file."""
    if found := next((folder / name for name in candidates if (folder / name).is_file()), None):
        return found
    raise _not_found(spec, folder, what, candidates)


def find_directory(spec: DatasetSpec, folder: Path, what: str, candidates: Sequence[str]) -> Path:
    """The first of ``candidates`` that is a directory."""
    if found := next((folder / name for name in candidates if (folder / name).is_dir()), None):
        return found
    raise _not_found(spec, folder, what, [f"{name}/" for name in candidates])


def _not_found(spec: DatasetSpec, folder: Path, what: str, looked: Sequence[str]) -> MissingError:
    return MissingError(
        f"dataset {spec.name}: {folder} has no {what}: looked for {' or '.join(looked)} there."
        f"{_how_to_point(spec)}{how_to_get(spec)}"
    )


def whole_number(value: object) -> int:
    """A whole number of an annotation file: 5, 5.0 or "5"."""
    number = int(value) if isinstance(value, str) and value.isascii() else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) < 2**62:
        raise ValueError(f"{shown(value)} is no whole number")
    if number != int(number):
        raise ValueError(f"{shown(value)} is no whole number")
    return int(number)


def check_file(name: object) -> str:
    """The name of an image file in an annotation file, as it is."""
    check_relative(name)
    parts = str(name).encode("utf-8").split(b"/")  # raises for half of a surrogate pair
    if max(map(len, parts)) > LONGEST_PART:
        raise ValueError(f"{shown(name)} is longer than the name of a file can be")
    return str(name)


def folders(directory: Path) -> list[str]:
    """Names of the folders directly in ``directory``, sorted."""
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and _is_folder(e))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def images(directory: Path) -> list[str]:
    """Names of the image files directly in ``directory``, see :func:`look_for_images`."""
    return look_for_images(directory)[0]


def look_for_images(
    directory: Path, suffixes: Collection[str] = EXTENSIONS
) -> tuple[list[str], dict[str, str]]:
    """Names of the image files directly in ``directory``; and of what is called like one but is no file.

    Returns:
        The names; and name -> what it is, e.g. a named pipe. Nothing is opened.
    """
    names: list[str] = []
    odd: dict[str, str] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(".") or suffix(entry.name).lower() not in suffixes:
                continue
            what = None if entry.is_file(follow_symlinks=False) else why_no_file(entry.path)
            if what is None:
                names.append(entry.name)
            elif what.startswith("a link"):
                raise MissingError(f"{entry.path}: {what}; restore its target")
            else:
                odd[entry.name] = what
    return names, odd


def files_in(directory: Path) -> frozenset[str]:
    """Names of the files directly in ``directory``; what is no file, or a link to none, is left out."""
    found = set()
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                if entry.is_file():
                    found.add(entry.name)
            except OSError:
                continue
    return frozenset(found)


def stem(file: str) -> str:
    """A file name without its suffix."""
    return os.path.splitext(file)[0]  # noqa: PTH122 (called for every file)


def suffix(file: str) -> str:
    """The suffix of a file name, with its dot."""
    return os.path.splitext(file)[1]  # noqa: PTH122 (called for every file)
