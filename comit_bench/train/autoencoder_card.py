"""The model card of a small autoencoder."""

from __future__ import annotations

import json
from dataclasses import dataclass

from comit_bench import __version__
from comit_bench.models.titok import Titok
from comit_bench.models.vq_grid import VqGrid
from comit_bench.train.config import AutoencoderRun


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run found out.

    Attributes:
        parameters: Of the whole network.
        seconds: Wall time of the training steps and the validation.
        hardware: In words.
        command: What was typed.
        measures: Of the exported weights on held-out scenes.
    """

    parameters: int
    seconds: float
    hardware: str
    command: str
    measures: dict[str, float]


def _tokens(network: VqGrid | Titok) -> tuple[str, int]:
    """What the message is, in words, and its vocabulary."""
    spec = network.spec
    if isinstance(network, VqGrid):
        levels = ", ".join(map(str, network.spec.fsq_levels))
        size = network.quantizer.vocab_size
        side = network.spec.grid
        return (
            f"{spec.message_length} tokens on a {side} x {side} grid, finite scalar quantization with the "
            f"levels ({levels}): {size} ids",
            size,
        )
    size = network.spec.vocab_size
    sphere = ", compared on the unit sphere" if network.spec.l2_norm else ""
    return (
        f"{spec.message_length} tokens read off latent tokens, a learned codebook of {size} vectors of "
        f"{network.spec.code_dim}{sphere}",
        size,
    )


def card(run: AutoencoderRun, network: VqGrid | Titok, facts: Facts) -> str:
    """Markdown with the front matter that the hub reads."""
    settings = json.dumps(run.model_dump(mode="json", exclude={"output"}), indent=1)
    message, size = _tokens(network)
    found = facts.measures
    paper = (
        "TiTok's architecture (arXiv 2406.07550) at nano size, single-stage decoder, trained from scratch"
        if isinstance(network, Titok)
        else "A two-dimensional autoencoder of transformers, made for this comparison"
    )
    losses = (
        f"mean squared error of pixels in [-1, 1], plus {run.codebook_weight:g} times the codebook loss, "
        f"plus {run.codebook_weight * run.commitment:g} times the commitment loss"
        if isinstance(network, Titok)
        else "mean squared error of pixels in [-1, 1]"
    )
    optimizer = (
        f"Muon (rate {run.optim.muon_learning_rate:g}) for the matrices inside the blocks, Adam (rate "
        f"{run.optim.learning_rate:g}) for the rest"
        if run.optim.name == "muon"
        else f"Adam (rate {run.optim.learning_rate:g})"
    )
    restarts = (
        f"""
- codebook: until step {run.restart_until:,}, rows that nothing chose for {run.restart_every} steps are set to
  encoder vectors of the batch. TiTok does not do this; without it every image gets the same message here"""
        if run.restart_every
        else ""
    )
    return f"""---
license: {run.weights_licence.lower()}
library_name: comit-bench
tags: [comit-bench, image-tokenizer, discrete-tokens]
---
# {run.name}

{paper}: a baseline for embedded scenes of {network.spec.image_size} px, with no use on photographs. Made by
comit_bench {__version__}.

- parameters: {facts.parameters:,} (stored as float16)
- message: {message}
- training: {run.steps:,} steps of {run.batch} of {run.count:,} painted scenes with one object each, whole
  images, no labels, no augmentation
- loss: {losses}{restarts}
- optimizer: {optimizer}

Measured on {run.val_count} held-out scenes that no probe uses, with the stored weights and 8-bit
reconstructions:

| measure | value |
|---|---|
| PSNR (dB) | {found["psnr"]:.2f} |
| PSNR of the mean-colour image (dB, baseline) | {found["psnr_mean_colour"]:.2f} |
| PSNR lost with another image's message (dB) | {found["shuffled_gap"]:.2f} |
| distinct ids used (of {size}) | {found["ids_used"]:.0f} |
| perplexity of the ids | {found["perplexity"]:.0f} |

- time: {facts.seconds / 60:.1f} min of wall clock on {facts.hardware}, other programs running beside it
- command: `{facts.command}`

Settings:

```json
{settings}
```
"""
