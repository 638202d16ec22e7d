"""The drawings of the embedded scenes: 60 things, each by seven hands, and photographs to put them on.

A vendor is one hand. Five vendors belong to train, two to val, and no vendor to both: a reader that knows
the things of train has never seen the drawings of val. Train vendors also give drawings without a label.
The files lie in ``atlas/``; ``scripts/drawings/render.py`` made them and THIRD_PARTY_LICENSES.md says
whose they are.

Photographs are scikit-learn's two, read from the installed package, and regions of six pictures of
scikit-image. Train and val see different columns of the same photographs: china from 0 to 400 and from 400
on, flower from 0 to 448 and from 448 on (the whole blossom is train's); of scikit-image's pictures coffee
and hubble from 0 to 360 and from 360 to 600, brick, grass and gravel from 0 to 307 and from 307 on, rocket
from 0 to 290 and from 372 on (the rocket between them is one of the things). The regions of scikit-image's
pictures are shrunk to 192 rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comit_bench.errors import CorruptFileError, MissingError, UsageError, did_you_mean

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

CELL = 64  # pixels of a side
SPLITS = ("train", "val")
FOLDER = Path(__file__).parent / "atlas"
_INSTALLED = {"china.jpg": 400, "flower.jpg": 448}  # scikit-learn's photographs: first column of val


@dataclass(frozen=True)
class Vendor:
    """One hand.

    Attributes:
        split: ``train`` or ``val``.
        licence: SPDX identifier of the artwork's licence.
        version: Of the npm package that it was rendered from.
    """

    name: str
    title: str
    split: str
    licence: str
    version: str
    author: str
    homepage: str


@dataclass(frozen=True)
class Drawings:
    """All drawings and photographs; the arrays cannot be written to.

    Attributes:
        pixels: uint8 [n, 64, 64, 4] premultiplied RGBA; the longer side of a drawing is 64, it is centred.
        names: [n] what its vendor calls a drawing.
        concept: int64 [n] index into ``concepts``, -1 for drawings without a label.
        vendor: int64 [n] index into ``vendors``.
        concepts: The 60 things, sorted.
        vendors: The hands, those of train first.
        photos: split -> photographs, uint8 [h, w, 3].
        digest: ``sha256:`` of the index, which holds the digests of all files.
    """

    pixels: Bytes
    names: tuple[str, ...]
    concept: Ints
    vendor: Ints
    concepts: tuple[str, ...]
    vendors: tuple[Vendor, ...]
    photos: dict[str, tuple[Bytes, ...]]
    digest: str

    def concept_index(self, name: str) -> int:
        """Index of a concept.

        Raises:
            UsageError: Unknown.
        """
        return _index(name, self.concepts, "concept")

    def vendor_index(self, name: str) -> int:
        """Index of a vendor.

        Raises:
            UsageError: Unknown.
        """
        return _index(name, [vendor.name for vendor in self.vendors], "vendor")

    def of_split(self, split: str) -> NDArray[np.bool_]:
        """[n] True for the drawings of a split's vendors.

        Raises:
            UsageError: Neither train nor val.
        """
        _index(split, SPLITS, "split")
        mine = np.array([vendor.split == split for vendor in self.vendors])
        return np.asarray(mine[self.vendor])

    def pool(self, split: str, concept: str | int) -> Ints:
        """Drawing numbers of a concept in a split, ascending; -1 asks for those without a label.

        Raises:
            UsageError: Unknown split or concept.
        """
        number = self.concept_index(concept) if isinstance(concept, str) else concept
        if not -1 <= number < len(self.concepts):
            raise UsageError(f"concept {number}: expected 0 to {len(self.concepts) - 1}, or -1 for no label")
        return np.flatnonzero(self.of_split(split) & (self.concept == number))


def _index(name: str, known: Sequence[str], what: str) -> int:
    if name not in known:
        raise UsageError(f"unknown {what} {name!r} of the drawings.{did_you_mean(name, known)}")
    return known.index(name)


@lru_cache(maxsize=1)
def load_drawings() -> Drawings:
    """Read the drawings that come with the package.

    Raises:
        CorruptFileError: A file is missing or is not the one that was shipped.
        MissingError: scikit-learn's photographs are not there.
    """
    return read_drawings(FOLDER)


def read_drawings(folder: Path) -> Drawings:
    """Read drawings from a folder with an index; see :func:`load_drawings`."""
    raw = _read(folder / "index.json")
    try:
        index = json.loads(raw)
        vendors, entries = _vendors(index["vendors"], folder)
        concepts = tuple(sorted({drawing["concept"] for drawing in entries if drawing["concept"]}))
        place = {concept: number for number, concept in enumerate(concepts)} | {None: -1}
        contents = {  # all of them, before any is decoded
            entry["file"]: _read(folder / entry["file"], entry["sha256"])
            for entry in (*index["vendors"], *index["photos"])
        }
        cells = [_cells(contents, vendor, index["columns"]) for vendor in index["vendors"]]
        counts = [len(vendor["drawings"]) for vendor in index["vendors"]]
        photos = _photos(contents, index["photos"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(_damaged(folder / "index.json", f"no index of drawings ({error})")) from error
    drawings = Drawings(
        pixels=np.concatenate(cells),
        names=tuple(drawing["name"] for drawing in entries),
        concept=np.array([place[drawing["concept"]] for drawing in entries], np.int64),
        vendor=np.repeat(np.arange(len(vendors)), counts),
        concepts=concepts,
        vendors=vendors,
        photos=photos,
        digest=f"sha256:{sha256(raw).hexdigest()}",
    )
    for array in (drawings.pixels, drawings.concept, drawings.vendor):
        array.setflags(write=False)
    return drawings


def _damaged(path: Path, reason: str) -> str:
    return f"{path}: {reason}. The drawings come with the package: reinstall comit_bench."


def _read(path: Path, digest: str | None = None) -> bytes:
    """Content of a shipped file, which must have this sha256."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptFileError(_damaged(path, f"cannot be read ({error.strerror})")) from error
    if digest is not None and sha256(content).hexdigest() != digest:
        raise CorruptFileError(_damaged(path, "not the file that was shipped (its sha256 differs)"))
    return content


def _vendors(
    found: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[tuple[Vendor, ...], list[Mapping[str, Any]]]:
    """The vendors, and the entries of their drawings one after the other."""
    splits: dict[str, str] = {}
    for entry in found:
        for what in (entry["name"], entry["package"], entry["sha256"]):
            if splits.setdefault(what, entry["split"]) != entry["split"] or entry["split"] not in SPLITS:
                raise CorruptFileError(
                    _damaged(folder / "index.json", f"vendor {entry['name']!r} is not in one split only")
                )
    fields = Vendor.__dataclass_fields__
    vendors = tuple(Vendor(**{field: entry[field] for field in fields}) for entry in found)
    return vendors, [drawing for entry in found for drawing in entry["drawings"]]


def _image(content: bytes, mode: str) -> Bytes:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert(mode))


def _cells(contents: Mapping[str, bytes], vendor: Mapping[str, Any], columns: int) -> Bytes:
    """[drawings, 64, 64, 4] of one vendor's atlas."""
    sheet = _image(contents[vendor["file"]], "RGBA")
    rows = sheet.shape[0] // CELL
    cells = sheet.reshape(rows, CELL, columns, CELL, 4).transpose(0, 2, 1, 3, 4).reshape(-1, CELL, CELL, 4)
    return cells[[drawing["cell"] for drawing in vendor["drawings"]]]


def _photos(
    contents: Mapping[str, bytes], entries: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Bytes, ...]]:
    """Photographs of each split: scikit-learn's, then those of the index."""
    photos: dict[str, list[Bytes]] = {split: [] for split in SPLITS}
    for name, column in _INSTALLED.items():
        photo = _image(_installed(name), "RGB")
        photos["train"].append(photo[:, :column])
        photos["val"].append(photo[:, column:])
    for entry in entries:
        photos[entry["split"]].append(_image(contents[entry["file"]], "RGB"))
    for photo in (*photos["train"], *photos["val"]):
        photo.setflags(write=False)
    return {split: tuple(photos[split]) for split in SPLITS}


def _installed(name: str) -> bytes:
    """A photograph of the installed scikit-learn, without importing it, which takes longer than the rest."""
    spec = find_spec("sklearn")
    assert spec is not None and spec.submodule_search_locations, "a dependency of the package"
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "images" / name
    if not path.is_file():
        raise MissingError(f"{path}: this photograph of scikit-learn is missing. Reinstall scikit-learn.")
    return path.read_bytes()
