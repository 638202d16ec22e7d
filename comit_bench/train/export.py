"""From averaged weights to a folder that loads as a tokenizer: config, weights, model card, pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from comit_bench.files import atomic_path
from comit_bench.tokenizers.comit.checkpoint import config_from_spec, save
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.card import CURVES, PICTURE, RunFacts, model_card, training_data
from comit_bench.train.config import TrainConfig
from comit_bench.train.curves import save_curves

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def export(
    model: Comit,
    config: TrainConfig,
    facts: RunFacts,
    directory: Path,
    *,
    picture: Path | None,
    logs: Path | None = None,
) -> None:
    """Write the folder, whole or not at all; an older one at the same place is replaced.

    Args:
        model: Holds the averaged weights.
        config: Settings of the run.
        facts: For the model card.
        directory: Its last part is the name of the row in tables.
        picture: Grid of reconstructions to put beside the card.
        logs: Directory of the run's CSV logs, for the learning curves.

    Raises:
        BenchError: Disk full or not writable, or weights too large for ``export.dtype``.
    """
    layout = config_from_spec(model.spec)
    extra = dict(layout.get("comit_bench", {}))
    extra |= {
        "trained": True,
        "training_data": training_data(config),
        "weights_licence": config.weights_licence,
        "steps": facts.step,
    }
    layout["comit_bench"] = extra
    pictures = set()
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        save(model, temporary, config=layout, dtype=DTYPES[config.export.dtype])
        if picture is not None and picture.is_file():
            shutil.copyfile(picture, temporary / PICTURE)
            pictures.add(PICTURE)
        if logs is not None and save_curves(logs, temporary / CURVES):
            pictures.add(CURVES)
        card = model_card(config, model, facts, frozenset(pictures))
        (temporary / "README.md").write_text(card, encoding="utf-8")
