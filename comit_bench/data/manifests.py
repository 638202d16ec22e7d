"""Manifests: which image is in which split with which labels, as one Parquet file with a digest.

A reader makes a manifest from the annotation files alone; which images lie on this machine does not enter.
One row per sample: ``split``, ``id``, ``file`` (place and file name), ``mask`` for saliency, and list
columns for the labels (``category``; or ``subject``, ``predicate``, ``object``, ``kept``). The digest is over
the content, not over the bytes of the file, so another version of the Parquet writer does not change it. It
is computed again at every load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from comit_bench.data.split import Kind
from comit_bench.errors import CorruptFileError, MissingError
from comit_bench.files import atomic_path, check_relative, digest_json

FORMAT = 2  # raise it when the same annotations would give another manifest
COLUMNS: dict[str, tuple[str, ...]] = {
    "classes": ("class",),
    "multilabel": ("category",),
    "relations": ("subject", "predicate", "object", "kept"),
    "masks": (),
}
META = b"comit_bench"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The samples of one split.

    Attributes:
        ids: Unique and sorted.
        files: ``<place>/<file name>``; a reader knows which directory a place is.
        values: int32 [m, w], the labels of all samples one after another, columns as in ``COLUMNS``.
        offsets: int64 [n + 1]; the labels of sample i are ``values[offsets[i] : offsets[i + 1]]``.
        masks: Mask files like ``files``; empty unless the kind is masks.
    """

    ids: tuple[str, ...]
    files: tuple[str, ...]
    values: NDArray[np.int32]
    offsets: NDArray[np.int64]
    masks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """What the annotations of a data set say.

    Attributes:
        kind: Kind of the labels.
        classes: Category names or words of objects.
        predicates: Words of predicates.
        splits: Split name -> samples.
        notes: Facts about the splits, plain JSON values.
    """

    kind: Kind
    classes: tuple[str, ...]
    predicates: tuple[str, ...]
    splits: dict[str, Rows]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the content."""
        state = hashlib.sha256(digest_json(self.head()).encode())
        for name, rows in self.splits.items():
            for texts in ((name,), rows.ids, rows.files, rows.masks):
                state.update("\n".join(texts).encode("utf-8", "surrogateescape") + b"\0")
            state.update(np.ascontiguousarray(rows.offsets, dtype="<i8").tobytes())
            state.update(np.ascontiguousarray(rows.values, dtype="<i4").tobytes())
        return "sha256:" + state.hexdigest()

    def head(self) -> dict[str, Any]:
        """Everything but the samples."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "classes": list(self.classes),
            "predicates": list(self.predicates),
            "splits": list(self.splits),
            "notes": self.notes,
        }


def rows_from(
    samples: Sequence[tuple[str, str, NDArray[np.int32]]], width: int, masks: Sequence[str] = ()
) -> Rows:
    """Rows from (id, file, labels int32 [k, width]) in any order."""
    for name in (*(sample[1] for sample in samples), *masks):
        try:
            check_relative(name.partition("/")[2], windows=os.name == "nt")
        except ValueError as error:
            raise CorruptFileError(f"the annotations name a file outside of its folder: {error}") from error
    order = sorted(range(len(samples)), key=lambda i: samples[i][0])
    ids = tuple(samples[i][0] for i in order)
    twice = next((a for a, b in pairwise(ids) if a == b), None)
    if twice is not None:
        raise CorruptFileError(f"image {twice!r} is listed twice")
    parts = [samples[i][2].reshape(-1, width) if width else samples[i][2] for i in order]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return Rows(
        ids,
        tuple(samples[i][1] for i in order),
        np.concatenate(parts) if parts else np.empty((0, width), dtype=np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tuple(masks[i] for i in order) if masks else (),
    )


def write_manifest(path: Path, manifest: Manifest, key: dict[str, Any]) -> str:
    """Write a manifest and what it was made from, whole or not at all, and return its digest."""
    digest = manifest.digest
    columns: dict[str, Any] = {"split": [], "id": [], "file": [], "mask": []}
    for name, rows in manifest.splits.items():
        columns["split"] += [name] * len(rows.ids)
        columns["id"] += rows.ids
        columns["file"] += rows.files
        columns["mask"] += rows.masks
    if manifest.kind != "masks":
        del columns["mask"]
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    offsets, values = _joined(manifest)
    for number, name in enumerate(COLUMNS[manifest.kind]):
        column = pa.array(np.ascontiguousarray(values[:, number]), pa.int32())
        table[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
    meta = json.dumps({"head": manifest.head(), "key": key, "digest": digest})
    with atomic_path(path) as temporary:
        parquet.write_table(pa.table(table).replace_schema_metadata({META: meta.encode()}), temporary)
    return digest


def _joined(manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Offsets and labels of all splits one after another."""
    width = len(COLUMNS[manifest.kind])
    offsets, values, start = [np.zeros(1, dtype=np.int64)], [np.empty((0, width), dtype=np.int32)], 0
    for rows in manifest.splits.values():
        offsets.append(rows.offsets[1:] + start)
        values.append(rows.values)
        start += int(rows.offsets[-1])
    return np.concatenate(offsets), np.concatenate(values)


def read_manifest(path: Path, key: dict[str, Any]) -> tuple[Manifest, str]:
    """Read a manifest that was made from ``key``, and compute its digest again."""
    if not path.is_file():
        raise MissingError(f"{path}: no manifest there")
    try:
        table = parquet.read_table(path)
        meta = json.loads(table.schema.metadata[META])
        head = meta["head"]
        if meta["key"] != json.loads(json.dumps(key)) or head["format"] != FORMAT:
            raise MissingError(f"{path}: was made from other annotations or by another version")
        manifest = Manifest(
            head["kind"],
            tuple(head["classes"]),
            tuple(head["predicates"]),
            {name: _rows(table, name, head["kind"]) for name in head["splits"]},
            head["notes"],
        )
        expected = meta["digest"]
    except (pa.ArrowException, LookupError, TypeError, ValueError, OSError) as error:
        if isinstance(error, MissingError):
            raise
        raise CorruptFileError(f"{path}: cannot be read as a manifest ({error}). Remove the file.") from error
    digest = manifest.digest
    if digest != expected:
        raise CorruptFileError(
            f"{path}: its content has the digest {digest}, but it was written with {expected}: it was "
            "changed. Remove the file; it is made again."
        )
    return manifest, digest


def _rows(table: Any, split: str, kind: str) -> Rows:
    part = table.filter(pc.equal(table["split"], split)).combine_chunks()

    def column(name: str) -> Any:
        array = part[name]
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array

    names = COLUMNS[kind]
    count = part.num_rows
    values = np.empty((0, len(names)), dtype=np.int32)
    offsets = np.zeros(count + 1, dtype=np.int64)
    if names and count:
        lists = [column(name) for name in names]
        offsets = np.asarray(lists[0].offsets, dtype=np.int64)
        offsets = offsets - offsets[0]
        values = np.stack([np.asarray(one.flatten(), dtype=np.int32) for one in lists], axis=1)
    return Rows(
        tuple(part["id"].to_pylist()),
        tuple(part["file"].to_pylist()),
        values,
        offsets,
        tuple(part["mask"].to_pylist()) if kind == "masks" else (),
    )
