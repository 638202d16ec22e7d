"""Label files of classification datasets: class lists, and the forms ImageNet's labels come in."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from comit_bench.errors import CorruptFileError, MissingError, UsageError

_WNID = re.compile(r"n\d{8}(?=\s|,|$)")


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names of a list file: one per line, in label order.

    Blank lines and lines that start with ``#`` are skipped; after an ImageNet id (``n01440764``) the rest
    of the line is a remark.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such class list") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as a class list ({error})") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    names = [match[0] if (match := _WNID.match(name)) else name for name in names]
    if not names:
        raise UsageError(f"{path}: the class list is empty; expected one class name per line")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError(f"{path}: class {name!r} is listed twice")
        seen.add(name)
    return tuple(names)


def read_solution_csv(path: Path) -> dict[str, str]:
    """Kaggle's ``LOC_val_solution.csv``: file stem -> class name (the first word of the second column)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or not {"ImageId", "PredictionString"} <= set(rows[0]):
            raise ValueError("expected the columns ImageId,PredictionString")
        return {row["ImageId"].strip(): row["PredictionString"].split()[0] for row in rows}
    except (ValueError, csv.Error, LookupError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not a table of validation labels ({error})") from error


def read_ground_truth(path: Path, synsets: Sequence[str]) -> list[str]:
    """The devkit's ground truth, one 1-based id per line -> class names in image order."""
    names = []
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").split(), start=1):
        if not re.fullmatch(r"[0-9]+", line) or not 1 <= int(line) <= len(synsets):
            raise CorruptFileError(
                f"{path}: line {number} is {line!r}, expected an ILSVRC2012 id from 1 to {len(synsets)}"
            )
        names.append(synsets[int(line) - 1])
    return names


def read_devkit_synsets(path: Path) -> tuple[str, ...]:
    """Class names by ILSVRC2012 id (the first one has id 1), from ``meta.mat`` or a text file."""
    if path.suffix.lower() != ".mat":
        names = read_class_list(path)
        if len(names) > 2 and list(names) == sorted(names):
            raise CorruptFileError(
                f"{path}: is in alphabetical order, but ILSVRC2012 ids follow the devkit's own order, so all "
                "labels would be wrong. Use the devkit's data/meta.mat."
            )
        return names
    try:
        table = loadmat(path, squeeze_me=True)["synsets"]
        by_id = {int(i): str(w) for i, w in zip(table["ILSVRC2012_ID"], table["WNID"], strict=True)}
        leaves = (
            int(np.sum(table["num_children"] == 0)) if "num_children" in table.dtype.names else len(by_id)
        )
        return tuple(by_id[i] for i in range(1, leaves + 1))
    except (MatReadError, ValueError, TypeError, LookupError, NotImplementedError, OSError) as error:
        raise CorruptFileError(f"{path}: not the devkit's meta.mat ({error})") from error
