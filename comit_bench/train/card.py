"""The card of what was trained: Markdown with the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from comit_bench import __version__
from comit_bench.train.config import AnyRun

LIBRARY = "comit-bench"
PICTURE, CURVES = "reconstructions.png", "curves.png"
HUB_LICENCES = frozenset(
    {
        "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
        "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0",
        "agpl-3.0", "mpl-2.0", "openrail", "unlicense",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the model card tells about a finished run."""

    step: int
    skipped: int  # steps left out because they were not finite
    images: int  # training images seen, repetitions counted
    train_images: int  # different ones
    val_images: int
    seconds: float  # wall time
    hardware: str
    command: str
    metrics: dict[str, float]  # by the columns of the validation log


@dataclass(frozen=True, slots=True)
class CardText:
    """What a card says that only the objective knows."""

    tags: tuple[str, ...]  # of the hub
    what: str  # it is, and is for
    facts: tuple[str, ...]  # a list: sizes, how it is stored
    data: str  # training images
    measured: str  # on which images the metrics were measured, and how
    names: dict[str, str]  # what the metrics mean
    recipe: tuple[str, ...]  # a list: how it was trained
    use: str  # how to load it
    remarks: str = ""  # after the recipe


USE_TOKENIZER = """```python
import comit_bench

tokenizer = comit_bench.load_tokenizer("path/to/this/folder")
```

or `python -m comit_bench.run --tokenizer path/to/this/folder`."""
USE_TEACHER = "`python -m comit_bench.train --config comit-nano teacher.path=path/to/this/folder`."


def front_matter(config: AnyRun, tags: Sequence[str] = ()) -> dict[str, Any]:
    """Licence, library and tags under the names of the hub."""
    licence = config.weights_licence.strip().lower()
    known = licence in HUB_LICENCES
    matter: dict[str, Any] = {"license": licence if known else "other"}
    if not known:
        matter["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence).strip("-") or "unspecified"
    return {**matter, "library_name": LIBRARY, "tags": [LIBRARY, *tags]}


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def render(config: AnyRun, facts: RunFacts, about: CardText, pictures: frozenset[str] = frozenset()) -> str:
    """The card: what it is, how good it is, how it was made, how to load it.

    ``pictures`` says which of ``PICTURE`` and ``CURVES`` lie beside it.
    """
    matter = yaml.safe_dump(front_matter(config, about.tags), sort_keys=False)
    settings = yaml.safe_dump(config.model_dump(mode="json", exclude={"output"}), sort_keys=False)
    epochs = facts.images / max(facts.train_images, 1)
    skipped = f"{facts.skipped} steps skipped as not finite"
    metrics = "\n".join(f"| {about.names.get(k, k)} | {v:.4g} |" for k, v in facts.metrics.items())
    lines = (
        *about.facts,
        f"training data: {about.data}, {facts.train_images:,} images, {epochs:.2f} epochs",
        f"steps: {facts.step:,} of {config.global_batch} images, {facts.images:,} images in all ({skipped})",
        f"wall time: {facts.seconds / 3600:.2f} h on {facts.hardware}, computed in {config.precision}",
        f"licence of the weights: {config.weights_licence}",
    )
    return f"""---
{matter}---
# {config.name}

{about.what} Made by comit_bench {__version__} and torch {torch.__version__}.

{_list(lines)}

Command:

```bash
{facts.command or "(started from Python)"}
```

## Validation

{facts.val_images:,} {about.measured}:

| measure | value |
|---|---|
{metrics}

{_pictures(pictures)}## Use

{about.use}

## How it was trained

{_list(about.recipe)}
{about.remarks}
All settings:

```yaml
{settings}```
"""


def _pictures(pictures: frozenset[str]) -> str:
    text = ""
    if PICTURE in pictures:
        text += (
            "Validation images, the crops that were seen (numbered in order; dark parts were not seen), and "
            f"the reconstructions from the message after the last crop:\n\n![Reconstructions]({PICTURE})\n\n"
        )
    if CURVES in pictures:
        text += f"Over the steps of the run:\n\n![Learning curves]({CURVES})\n\n"
    return text
