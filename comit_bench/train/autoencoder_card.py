"""The model card of a small autoencoder."""

from __future__ import annotations

import json
from dataclasses import dataclass

from comit_bench import __version__
from comit_bench.tokenizers.titok.model import Titok
from comit_bench.tokenizers.vq_grid.model import VqGrid
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


def _recipe(run: AutoencoderRun, network: VqGrid | Titok) -> str:
    """Lines of a list: loss, codebook, optimizer."""
    loss = "mean squared error of pixels in [-1, 1]"
    lines = [f"loss: {loss}"]
    if isinstance(network, Titok):
        table, encoder = run.codebook_weight, run.codebook_weight * run.commitment
        lines = [f"loss: {loss}, plus {table:g} x codebook loss, plus {encoder:g} x commitment loss"]
    if run.restart_every:
        lines.append(
            f"codebook: until step {run.restart_until:,}, rows that nothing chose for {run.restart_every} "
            "steps become\n  encoder vectors of the batch. TiTok does not do this; without it every image "
            "got the same\n  message here"
        )
    optim = run.optim
    adam = f"Adam (rate {optim.learning_rate:g})"
    muon = f"Muon (rate {optim.muon_learning_rate:g}) for the matrices inside the blocks"
    lines.append(f"optimizer: {f'{muon}, {adam} for the rest' if optim.name == 'muon' else adam}")
    return "\n".join(f"- {line}" for line in lines)


def card(run: AutoencoderRun, network: VqGrid | Titok, facts: Facts) -> str:
    """Markdown with the front matter that the hub reads."""
    settings = json.dumps(run.model_dump(mode="json", exclude={"output"}), indent=1)
    message, size = _tokens(network)
    found = facts.measures
    what = (
        "TiTok's architecture (arXiv 2406.07550) at nano size, single-stage decoder, trained from scratch"
        if isinstance(network, Titok)
        else "A two-dimensional autoencoder of transformers, made for this comparison"
    )
    return f"""---
license: {run.weights_licence.lower()}
library_name: comit-bench
tags: [comit-bench, image-tokenizer, discrete-tokens]
---
# {run.name}

{what}.
A baseline for embedded scenes of {network.spec.image_size} px, with no use on photographs. Made by
comit_bench {__version__}.

- parameters: {facts.parameters:,} (stored as float16)
- message: {message}
- training: {run.steps:,} steps of {run.batch} of {run.count:,} painted scenes with one object each (among
  them those that probes are trained on), whole images, no labels, no augmentation
{_recipe(run, network)}

Measured on {run.val_count} held-out scenes that no probe uses, with the stored weights and 8-bit
reconstructions:

| measure | value |
|---|---|
| PSNR (dB) | {found["psnr"]:.2f} |
| PSNR of the mean-colour image (dB, baseline) | {found["psnr_mean_colour"]:.2f} |
| PSNR lost with another image's message (dB) | {found["shuffled_gap"]:.2f} |
| distinct ids used (of {size}) | {found["ids_used"]:.0f} |
| perplexity of the ids | {found["perplexity"]:.0f} |

- time: {facts.seconds / 60:.1f} min of wall clock on {facts.hardware}
- command: `{facts.command}`

Settings:

```json
{settings}
```
"""
