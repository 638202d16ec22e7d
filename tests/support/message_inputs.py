"""Tasks that read messages only: roles made of arrays, and small recipes on small scenes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

from comit_bench.data.split import OpenData, Split
from comit_bench.probing.fit import MessageSource
from comit_bench.recipes.specs import TaskSpec
from comit_bench.tasks.base import Inputs, Role


def spec_of(kind: str, **changes: Any) -> TaskSpec:
    """A recipe of a kind on a data set that nobody looks for."""
    content = {
        "name": "x",
        "version": 1,
        "title": "x",
        "kind": kind,
        "suite": "extra",
        "dataset": "x",
        "seeds": 1,
    }
    return TaskSpec.model_validate(content | changes)


def inputs_of(
    spec: TaskSpec,
    codes: torch.Tensor,
    labels: np.ndarray,
    classes: tuple[str, ...],
    *,
    ids: torch.Tensor | None = None,
    names: tuple[str, ...] | None = None,
    vocab: int | None = None,
    batch_size: int = 64,
) -> Inputs:
    """One report role over messages in memory.

    Args:
        spec: The recipe.
        codes: float [n, K, d].
        labels: int64 [n].
        classes: Class names.
        ids: int64 [n, K], handed out by the role's store and tokenizer.
        names: Ids of the images; numbers when not given.
        vocab: Size of the vocabulary.
        batch_size: Of the inputs.
    """
    count, length, _ = codes.shape
    names = names or tuple(f"{i:05d}" for i in range(count))
    split = Split("val", names, [Path("x")] * count, np.asarray(labels, dtype=np.int64))
    store = SimpleNamespace(
        layout=SimpleNamespace(vocab_size=None if ids is None else vocab, count=count),
        ids=lambda rows: ids.numpy()[rows],  # type: ignore[union-attr]
        codes=lambda rows: codes.numpy()[rows],
        offsets=lambda rows: None,
    )
    info = SimpleNamespace(name="case", message_length=length, vocab_size=None if ids is None else vocab)
    lookup: dict[bytes, torch.Tensor] = {}
    if ids is not None:
        lookup = {ids[i].numpy().tobytes(): codes[i] for i in range(count)}
    tokenizer = SimpleNamespace(
        info=info, codes_from_ids=lambda wanted: torch.stack([lookup[w.numpy().tobytes()] for w in wanted])
    )
    rows = np.arange(count)
    role = Role(split, rows, rows, MessageSource(codes=codes), store)  # type: ignore[arg-type]
    data = OpenData("x", 1, classes, {"val": split}, "sha256:0", {"val": "sha256:0"}, Path("x"))
    return Inputs(
        spec=spec, data=data, roles={"report": role}, seeds=[0], cache=Path("x"), batch_size=batch_size,
        tokenizer=tokenizer,  # type: ignore[arg-type]
    )  # fmt: skip


def write_recipe(root: Path, kind: str, layout: str, val: int, **task: Any) -> Path:
    """A task ``small`` on ``val`` scenes of a layout, for ``--include-path``; returns ``root``."""
    dataset = {
        "name": "small-scenes",
        "version": 1,
        "title": "Small scenes",
        "reader": "class-folders",
        "folder": "small-scenes",
        "splits": {"val": ["val"]},
        "generator": {"layout": layout, "train": 0, "val": val},
        "licence": "CC BY 4.0",
        "obtain": "made by this test",
    }
    content = {"name": "small", "version": 1, "title": "Small", "kind": kind, "suite": "extra", "seeds": 1}
    content |= {"dataset": "small-scenes", **task}
    for folder, file, values in (("datasets", "dataset.yaml", dataset), ("probes", "task.yaml", content)):
        place = root / folder / str(values["name"])
        place.mkdir(parents=True)
        (place / file).write_text(yaml.safe_dump(values), encoding="utf-8")
    return root
