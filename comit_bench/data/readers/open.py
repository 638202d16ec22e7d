"""The protocol of readers of annotated images, and readers of other packages.

``coco``, ``visual_genome`` and ``saliency`` have these functions (the first two also keep what they have
read); another package names an object that has them as an entry point of the group ``comit_bench.readers``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from comit_bench.data.manifests import Manifest
from comit_bench.data.readers import coco, saliency, visual_genome
from comit_bench.data.split import Kind
from comit_bench.errors import CorruptFileError
from comit_bench.recipes.specs import DatasetSpec, reader_of_others

BUILTIN: dict[str, Any] = {"coco": coco, "visual-genome": visual_genome, "saliency": saliency}


class Reader:
    """One format. ``kind`` and ``build`` must be written.

    Attributes:
        kind: What the labels are, see :class:`comit_bench.data.split.Split`.
    """

    kind: Kind

    def places(self, spec: DatasetSpec, folder: Path) -> dict[str, Path]:
        """Directories that ``Rows.files`` begin with; looked for before anything is read.

        Raises:
            MissingError: One is not there.
        """
        return {"": folder}

    def build(self, spec: DatasetSpec, folder: Path) -> Manifest:
        """Which image is in which split with which labels, see :func:`comit_bench.data.manifests.rows_from`.

        Raises:
            MissingError, CorruptFileError: Name the file.
        """
        raise NotImplementedError

    def counted(self, manifest: Manifest, samples: dict[str, int]) -> dict[str, int]:
        """What is compared with ``expected`` of the recipe: samples by split."""
        return samples


def manifest_reader(name: str) -> Any:
    """The reader of a format with annotations; class folders have none."""
    return BUILTIN.get(name) or reader_of_others(name)


def build_manifest(spec: DatasetSpec, folder: Path) -> Manifest:
    """What a reader that keeps nothing finds.

    Raises:
        CorruptFileError: Splits or labels are not what the recipe and the reader promise.
    """
    reader = manifest_reader(spec.reader)
    manifest: Manifest = reader.build(spec, folder)
    if spec.reader in BUILTIN:
        return manifest
    where = f"reader {spec.reader!r} on {folder}"
    if manifest.kind != reader.kind or set(manifest.splits) != set(spec.splits):
        raise CorruptFileError(
            f"{where}: made {manifest.kind} of {', '.join(manifest.splits)}, expected {reader.kind} of "
            f"{', '.join(spec.splits)}"
        )
    for name, rows in manifest.splits.items():
        if manifest.kind == "classes" and not (np.diff(rows.offsets) == 1).all():
            raise CorruptFileError(f"{where}: an image of {name!r} has not exactly one class")
        if manifest.kind in ("classes", "multilabel") and rows.values.size:
            low, high = int(rows.values.min()), int(rows.values.max())
            if low < 0 or high >= len(manifest.classes):
                raise CorruptFileError(
                    f"{where}: a label of {name!r} is not in 0..{len(manifest.classes) - 1}: {low}..{high}"
                )
    return manifest
