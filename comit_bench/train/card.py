"""The card of what was trained: Markdown with the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from comit_bench import __version__
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.config import AnyRun, TrainConfig

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
    """What the model card tells about a finished run.

    Attributes:
        step: Optimizer steps.
        skipped: Of them, left out because they were not finite.
        images: Training images seen, repetitions counted.
        train_images: Different ones.
        val_images: Images behind the metrics.
        seconds: Wall time.
        hardware: In words.
        command: What was typed.
        metrics: By the columns of the validation log.
    """

    step: int
    skipped: int
    images: int
    train_images: int
    val_images: int
    seconds: float
    hardware: str
    command: str
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class About:
    """What a card says that only the objective knows.

    Attributes:
        tags: Of the hub.
        what: What it is and what it is for.
        facts: Lines of a list: sizes, how it is stored.
        data: Training images.
        measured: On which images the metrics were measured, and how.
        names: What the metrics mean.
        recipe: Lines of a list: how it was trained.
        use: How to load it.
        remarks: What follows the recipe.
    """

    tags: tuple[str, ...]
    what: str
    facts: tuple[str, ...]
    data: str
    measured: str
    names: dict[str, str]
    recipe: tuple[str, ...]
    use: str
    remarks: str = ""


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


def render(config: AnyRun, facts: RunFacts, about: About, pictures: frozenset[str] = frozenset()) -> str:
    """What it is, how good it is, how it was made, how to load it.

    Args:
        config: Settings of the run.
        facts: What happened.
        about: What is special.
        pictures: Which of the two pictures lie beside the card.
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


# ------------------------------------------------------------------------ COMiT


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


def measure_names(config: TrainConfig) -> dict[str, str]:
    """What the columns of the validation log mean, in the card's words."""
    settings = config.validation
    return {
        "val_flow": "flow-matching loss",
        "psnr_one_step": "PSNR of one-step reconstructions (dB)",
        "psnr_guided": f"PSNR of guided reconstructions (dB; {settings.steps} steps, weight "
        f"{settings.guidance:g})",
        "psnr_mean_colour": "PSNR of the mean-colour image (dB, baseline)",
        "shuffled_gap": "one-step PSNR lost with another image's message (dB)",
        "ids_used": "distinct ids used",
        "perplexity": "perplexity of the ids",
    }


def _crops(config: TrainConfig) -> str:
    crops, side = config.crops, config.model.spec().geometry.crop
    share = f"with probability {crops.global_first:g}"
    if crops.global_first_among == "all":
        share += " among all images, those decoded from the empty message included"
    if crops.max_crops == 1 and crops.count_global:
        return f"one per image, the whole image {share}"
    early = f"; only the whole image before step {crops.warmup_steps:,}" if crops.warmup_steps else ""
    drawn = "step" if crops.per == "batch" else "image"
    limit = f"at most {crops.max_crops}"
    if not crops.count_global:
        limit += " and a whole image before them"
    return (
        f"1 + Poisson(exp(u)) per {drawn}, u of mean ln {crops.mean:g} - sigma²/2 and sigma {crops.sigma:g}, "
        f"{limit}; {side} px at uniformly random places, the first one the whole image {share}{early}"
    )


def _images(config: TrainConfig) -> str:
    """What is done to an image before the network sees it."""
    mirrored = f"mirrored with probability {config.data.flip:g}" if config.data.flip else "as they are"
    vae = config.model.spec().vae
    if not vae.startswith("sd-"):
        return f"{mirrored}; the autoencoder ({vae}) has no posterior"
    kind = "samples" if config.objective.posterior == "sample" else "the mode"
    return f"{mirrored}; latents are {kind} of the autoencoder's posterior"


def _objective(config: TrainConfig) -> list[str]:
    goal, teacher = config.objective, config.teacher
    place = "minus the location of the last crop" if goal.skipped_offset == "last-crop" else "zero"
    lines = [
        f"flow matching, t = sigmoid({goal.time_mu:g} + {goal.time_sigma:g} n), gradient through the last "
        f"{goal.backprop_updates} message update(s)",
        f"images decoded from the empty message: probability {goal.skip:g}; their offset is {place}",
    ]
    if goal.message_dropout:
        lines.append(f"messages that skip the rounding: probability {goal.message_dropout:g}")
    if goal.repa_weight or goal.srepa_weight:
        counted = "also" if goal.srepa_on_skipped else "not"
        ramp = f", rising from 0 over {goal.alignment_ramp:,} steps" if goal.alignment_ramp else ""
        lines.append(
            f"alignment with {teacher.name}: REPA weight {goal.repa_weight:g}, SREPA weight "
            f"{goal.srepa_weight:g}{ramp}; SREPA is {counted} asked of images with the empty message; "
            f"projections of {goal.projector_layers} layers, {goal.projector_width} wide"
        )
    else:
        lines.append("no alignment with a teacher (REPA and SREPA weights are 0)")
    return lines


def _optimizer(config: TrainConfig) -> str:
    optim = config.optim
    warm = ", with a short memory at first" if optim.ema_warmup else ""
    name, muon = "Adam", ""
    if optim.name == "muon":
        name = "Muon for the matrices inside the blocks, Adam for the rest"
        muon = f" (Muon {optim.muon_learning_rate:g}, momentum {optim.muon_momentum:g})"
    fall = "an inverse square root"
    if optim.cosine_steps is not None:
        fall = f"a cosine to 5 % at step {optim.cosine_steps:,}"
    start = " Embedded codes start as strong as positions." if config.model.init == "message" else ""
    return (
        f"{name}; peak learning rate {optim.learning_rate:g}{muon} after {optim.warmup_steps:,} steps, then "
        f"{fall}; betas {optim.betas[0]:g} and {optim.betas[1]:g}, eps {optim.eps:g}, weight decay "
        f"{optim.weight_decay:g}, gradient norm clipped at {optim.clip:g}; averages of the weights "
        f"{optim.ema:g}{warm}.{start}"
    )


REMARKS = """
Choices that the paper does not print (mirror images, the posterior, whose number of crops is drawn, whether
the whole image is one of them, of which images its probability is, offset and alignment of images without a
message, time distribution, loss weights) are named above.
"""


def model_card(
    config: TrainConfig, model: Comit, facts: RunFacts, pictures: frozenset[str] = frozenset()
) -> str:
    """The card of a COMiT tokenizer; see :func:`render`."""
    spec = model.spec
    parameters = sum(p.numel() for p in model.predictor.parameters())
    rounded = "; measured before rounding to float16" if config.export.dtype == "float16" else ""
    about = About(
        tags=("comit", "image-tokenizer", "discrete-tokens", "flow-matching"),
        what=f"COMiT image tokenizer ({parameters:,} parameters without the autoencoder): {spec.image_size} "
        f"px images become\n{spec.message_length} tokens of a vocabulary of {model.quantizer.vocab_size:,} "
        f"(FSQ levels {list(spec.fsq_levels)}). The layout of the files is the released one.",
        facts=(
            f"weights: exponential moving average ({config.optim.ema:g}), stored as {config.export.dtype}",
        ),
        data=training_data(config),
        measured=f"images that were not trained on; averaged weights{rounded}; message of the whole image",
        names=measure_names(config),
        recipe=(
            f"images: {_images(config)}",
            f"crops: {_crops(config)}",
            *_objective(config),
            f"optimizer: {_optimizer(config)}",
            f"attention mask: {spec.mask_mode}; seed {config.seed}",
        ),
        use=USE_TOKENIZER,
        remarks=REMARKS,
    )
    return render(config, facts, about, pictures)
