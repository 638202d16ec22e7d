"""From averaged weights to a folder that loads as a tokenizer: config, weights, model card."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from comit_bench import __version__
from comit_bench.files import atomic_path
from comit_bench.models.comit import Comit
from comit_bench.tokenizers.comit import config_from_spec, save
from comit_bench.train.config import TrainConfig

NAMES = {
    "val_flow": "flow-matching loss",
    "psnr_one_step": "PSNR of one-step reconstructions (dB)",
    "psnr_guided": "PSNR of 10-step guided reconstructions (dB)",
    "psnr_mean_colour": "PSNR of the mean-colour image (dB, baseline)",
    "shuffled_gap": "one-step PSNR lost with another image's message (dB)",
    "ids_used": "distinct ids used",
    "perplexity": "perplexity of the ids",
}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the model card tells about a finished run."""

    step: int
    skipped: int
    images: int
    seconds: float
    hardware: str
    command: str
    metrics: dict[str, float]


def training_data(config: TrainConfig) -> str:
    """Name of the data for tables: ``data.title``, or what follows from the source."""
    data = config.data
    if data.title:
        return data.title
    if data.kind == "scenes":
        return f"scenes-recognition {data.split} ({data.count} scenes)"
    source = str(data.source)
    if data.kind == "hf" and not Path(source).expanduser().exists():
        return source  # a hub id
    return Path(source).expanduser().resolve().name


def model_card(config: TrainConfig, model: Comit, facts: RunFacts) -> str:
    """Markdown: what it is, how it was made, how good it is, how to load it."""
    spec = model.spec
    parameters = sum(p.numel() for p in model.predictor.parameters())
    metrics = "\n".join(f"| {NAMES.get(k, k)} | {v:.4g} |" for k, v in facts.metrics.items())
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return f"""# {config.name}

COMiT image tokenizer ({parameters:,} parameters without the autoencoder): {spec.image_size} px images become
{spec.message_length} tokens of a vocabulary of {model.quantizer.vocab_size:,}. Trained with comit_bench
{__version__}; the layout of the files is the released one.

- training data: {training_data(config)}, {facts.images:,} images
- steps: {facts.step:,} of {config.global_batch} images ({facts.skipped} skipped as not finite)
- weights: exponential moving average ({config.optim.ema})
- time: {facts.seconds / 3600:.2f} h on {facts.hardware}
- licence of the weights: {config.weights_licence}

Command: `{facts.command}`

## Validation

On images that were not trained on, averaged weights, message of the whole image:

| measure | value |
|---|---|
{metrics}

## Use

```python
import comit_bench

tokenizer = comit_bench.load_tokenizer("path/to/this/folder")
```

or `python -m comit_bench.run --tokenizer path/to/this/folder`.

## All settings

Choices that the paper does not print (offset of images without a message, alignment of those images, time
distribution, loss weights, crop numbers) are among them.

```yaml
{settings}```
"""


def export(
    model: Comit, config: TrainConfig, facts: RunFacts, directory: Path, *, picture: Path | None
) -> None:
    """Write the folder, whole or not at all; an older one at the same place is replaced.

    Args:
        model: Holds the averaged weights.
        config: Settings of the run.
        facts: For the model card.
        directory: Its last part is the name of the row in tables.
        picture: Grid of reconstructions to put beside the card.

    Raises:
        BenchError: Disk full or not writable.
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
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        save(model, temporary, config=layout)
        card = model_card(config, model, facts)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if picture is not None and picture.is_file():
            shutil.copyfile(picture, temporary / "reconstructions.png")
