"""A benchmark small enough for unit tests: four classes of coloured noise in class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

COLOURS = {"red_a": (200, 40, 40), "red_b": (160, 10, 60), "blue_a": (40, 40, 200), "blue_b": (10, 90, 160)}
TRAIN, VAL = 24, 10


def write_images(root: Path, *, train: int = TRAIN, val: int = VAL) -> Path:
    """``root/tiny/{train,val}/<class>/*.png``; returns ``root``."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / "tiny" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def write_recipes(root: Path, **changes: object) -> Path:
    """A dataset ``tiny`` and a task ``tiny-colours`` for ``--include-path``; returns ``root``."""
    dataset = {
        "name": "tiny",
        "version": 1,
        "title": "Coloured noise",
        "reader": "class-folders",
        "folder": "tiny",
        "splits": {"train": ["train"], "val": ["val"]},
        "licence": "CC0",
        "obtain": "tests/support/tiny.py writes it",
        "max_broken": 0.05,
    }
    task = {
        "name": "tiny-colours",
        "version": 1,
        "title": "Which colour is it",
        "kind": "classification",
        "suite": "extra",
        "dataset": "tiny",
        "split": {"early_stop": {"source": "train", "fraction": 0.2}},
        "probe": {
            "width": 16,
            "depth": 1,
            "heads": 2,
            "batch_size": 16,
            "learning_rate": 0.01,
            "max_epochs": 6,
            "patience": 6,
        },
        "seeds": 2,
        "attributes": {"fields": ["hue", "shade"]},
        **changes,
    }
    for kind, file, content in (("datasets", "dataset.yaml", dataset), ("probes", "task.yaml", task)):
        folder = root / kind / str(content["name"])
        folder.mkdir(parents=True)
        (folder / file).write_text(yaml.safe_dump(content), encoding="utf-8")
    return root
