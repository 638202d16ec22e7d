"""Training of the small autoencoders that COMiT is compared with on the embedded scenes.

One loss on pixels (mean squared error of images in [-1, 1]) and, where the quantizer learns its codebook,
the two losses of vector quantization; gradients pass straight through the rounding. Images, their order and
the optimizer are those of ``comit-nano``.

``python -m comit_bench.train --config vq-grid-nano`` or ``titok-nano``. One process.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.errors import UsageError
from comit_bench.files import atomic_path
from comit_bench.nn.vq import EPS
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.base import only_finite, to_uint8
from comit_bench.tokenizers.titok import adapter as titok_files
from comit_bench.tokenizers.titok import model as titok
from comit_bench.tokenizers.vq_grid import adapter as grid_files
from comit_bench.tokenizers.vq_grid import model as vq_grid
from comit_bench.train.card import USE_TOKENIZER, CardText, RunFacts, render
from comit_bench.train.config import AutoencoderRun
from comit_bench.train.data import PROBE_VAL_SCENES, Broken, Order, mirror, paint_scenes, painted_drawings
from comit_bench.train.objectives.base import (
    Process,
    RowBatch,
    RowSteps,
    TrainObjective,
    only_process,
    weights_facts,
)
from comit_bench.train.optimizers import Together
from comit_bench.train.sampling import flips
from comit_bench.train.validation import float_psnr, perplexity

Network = vq_grid.VqGrid | titok.Titok
SETS = {"scenes": "scenes-recognition", "drawings": "drawings"}  # names of the training data, for tables
MEASURES = ("psnr", "psnr_mean_colour", "shuffled_gap", "ids_used", "perplexity")


def make_network(run: AutoencoderRun) -> Network:
    """The freshly initialised network of a run, a function of its seed."""
    generator = generator_for(run.seed, f"autoencoder/{run.model}/init")
    network: Network
    try:
        if run.model in vq_grid.PRESETS:
            network = vq_grid.VqGrid(_resized(vq_grid.PRESETS[run.model], run.image_size, "patch"))
        else:
            spec = titok.PRESETS[run.model]
            network = titok.Titok(_resized(spec, run.image_size, "encoder_patch", "decoder_patch"))
    except ValueError as error:
        raise UsageError(f"image_size: {error}") from error
    network.init_weights(generator)
    return network


def _resized(spec: Any, side: int | None, *patches: str) -> Any:
    """A spec for images of ``side`` pixels in as many patches; None leaves it as it is."""
    if side is None:
        return spec
    if any(getattr(spec, patch) * side % spec.image_size for patch in patches):
        raise ValueError(f"{side} px cannot be cut into as many patches as {spec.image_size} px")
    grown = {patch: getattr(spec, patch) * side // spec.image_size for patch in patches}
    return replace(spec, image_size=side, **grown)


def straight_through(network: Network, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize [B, K, d] so that the gradient of the codes reaches ``z``.

    Returns:
        Codes [B, K, d], mean squared distance as it pulls the codebook, and as it pulls the encoder (both 0
        when no codebook is learnt), and ids [B, K] (empty then).
    """
    if isinstance(network, vq_grid.VqGrid):
        return network.quantizer(z), z.new_zeros(()), z.new_zeros(()), torch.empty(0, dtype=torch.int64)
    quantize = network.quantize
    if quantize.l2_norm:
        z = F.normalize(z, dim=-1, eps=EPS)
    ids = quantize.ids(z.detach())
    rows = quantize.codes(ids)
    codes = z + (rows - z).detach()
    return codes, F.mse_loss(rows, z.detach()), F.mse_loss(z, rows.detach()), ids


class PixelLoss(nn.Module):
    """The network and its loss."""

    used: Tensor | None  # how often each row of the codebook was chosen since the last restart

    def __init__(self, network: Network, run: AutoencoderRun) -> None:
        super().__init__()
        self.network = network
        self.codebook_weight, self.commitment = run.codebook_weight, run.commitment
        rows = network.quantize.size if isinstance(network, titok.Titok) else None
        self.register_buffer("used", None if rows is None else torch.zeros(rows, dtype=torch.int64))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [3]: the loss, its part on pixels, its part on the codebook (weighted)."""
        images = pixels.float().div(255)
        z = self.network.vectors(images)
        codes, table, commit, ids = straight_through(self.network, z)
        if self.used is not None:
            self.used += torch.bincount(ids.flatten(), minlength=len(self.used))
        error = 4 * F.mse_loss(self.network.decode(codes), images)  # of images in [-1, 1]
        codebook = self.codebook_weight * (table + self.commitment * commit)
        return torch.stack([error + codebook, error, codebook])

    @torch.no_grad()
    def restart(self, pixels: Tensor, generator: torch.Generator, optimizer: Together) -> int:
        """Give the rows of the codebook that nobody chose to vectors of a batch, and count anew.

        Args:
            pixels: uint8 [B, 3, S, S].
            generator: Chooses the vectors.
            optimizer: Forgets the direction in which these rows were moving.

        Returns:
            The number of such rows.
        """
        if self.used is None or not isinstance(self.network, titok.Titok):
            return 0
        z = self.network.vectors(pixels.float().div(255)).flatten(0, 1)
        if self.network.quantize.l2_norm:
            z = F.normalize(z, dim=-1, eps=EPS)
        dead = (self.used == 0).nonzero().flatten()
        table = self.network.quantize.embedding.weight
        table[dead] = z[torch.randint(len(z), (len(dead),), generator=generator)]
        for part in optimizer.parts:
            if table in part.state:
                part.state[table]["exp_avg"][dead] = 0.0
        self.used.zero_()
        return len(dead)


@torch.inference_mode()
def measure(network: Network, pixels: Tensor, *, batch: int = 64) -> dict[str, float]:
    """Quality of 8-bit reconstructions of uint8 [n, 3, S, S] and use of the ids; see ``MEASURES``.

    PSNR is averaged over images. ``shuffled_gap`` is what it loses when every image is given the message of
    the image before it.

    Raises:
        BenchError: The network computes NaN or infinity.
    """
    pixels = pixels.to(next(network.parameters()).device)
    with only_finite(type(network).__name__):
        ids = torch.cat([network.encode(part.float().div(255))[0] for part in pixels.split(batch)])
        table = network.quantizer if isinstance(network, vq_grid.VqGrid) else network.quantize
        codes = table.codes(ids)
        drawn = torch.cat([to_uint8(network.decode(part)) for part in codes.split(batch)])
    images, others = (part.float().div(127.5) - 1 for part in (pixels, drawn))
    flat = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    quality = float_psnr(images, others)
    counts = torch.bincount(ids.flatten())
    return {
        "psnr": float(quality.double().mean()),
        "psnr_mean_colour": float(float_psnr(images, flat).double().mean()),
        "shuffled_gap": float((quality - float_psnr(images, others.roll(1, 0))).double().mean()),
        "ids_used": int((counts > 0).sum()),
        "perplexity": perplexity(counts),
    }


class AutoencoderObjective(TrainObjective):
    """See the module. The last weights are exported, rounded to float16.

    Raises:
        UsageError: Several processes.
    """

    parts = ("loss", "pixels", "codebook")
    measures = MEASURES
    config: AutoencoderRun
    network: Network
    module: PixelLoss

    def __init__(self, config: AutoencoderRun, process: Process) -> None:
        only_process(config, process)
        self.config, self.process = config, process
        side = make_network(config).spec.image_size
        if config.data == "drawings":
            self.pixels = painted_drawings("train", 0, config.count, side).images
            self.held = painted_drawings("val", 0, config.val_count, side).images
        else:
            self.pixels = paint_scenes("train", 0, config.count, side).images
            self.held = paint_scenes("val", PROBE_VAL_SCENES, config.val_count, side).images
        if config.on_device:
            self.pixels = self.pixels.to(process.device)
        self.train_images, self.val_images = config.count, config.val_count
        self.order, self.broken = Order(config.count, config.seed), Broken(config.count, 0.0)
        self.steps = RowSteps(config.steps, self._rows)

    def _rows(self, step: int) -> Tensor:
        """Images of a step, the same ones as in a COMiT run of this seed."""
        return self.order.numbers(self.order.places(step, self.config.batch))

    def _shown(self, step: int, rows: slice) -> Tensor:
        """Pixels of some images of a step, mirrored where those of a COMiT run are."""
        samples = self.order.samples(self.order.places(step, self.config.batch)[rows])
        pixels = self.pixels[(samples % self.order.count).to(self.pixels.device)]
        return mirror(pixels, flips(self.config.seed, samples, self.config.flip))

    def build(self) -> None:
        self.network = make_network(self.config)
        self.module = PixelLoss(self.network, self.config).to(self.process.device)

    def inputs(self, batch: RowBatch, rows: slice) -> tuple[Tensor]:
        return (self._shown(batch.step, rows).to(self.process.device),)

    def after(self, batch: RowBatch, optimizer: Together) -> None:
        run, done = self.config, batch.step + 1
        if run.restart_every and done % run.restart_every == 0 and done < run.restart_until:
            generator = generator_for(run.seed, f"autoencoder/restart/{batch.step}")
            self.module.restart(*self.inputs(batch, slice(None)), generator, optimizer)

    def validate(self, network: nn.Module) -> tuple[dict[str, float], None]:
        return measure(cast(Network, network), self.held), None

    def export(self, network: nn.Module, facts: RunFacts, target: Path, picture: Path) -> None:
        """Round to float16, measure what is left, write the folder."""
        run, network = self.config, cast(Network, network)
        for value in network.parameters():
            value.data = value.detach().half().float()
        facts = replace(facts, metrics=measure(network, self.held))
        extra = weights_facts(run, facts, f"{SETS[run.data]} train ({run.count} scenes)")
        with atomic_path(target) as temporary:
            temporary.mkdir()
            if isinstance(network, vq_grid.VqGrid):
                grid_files.save(network, temporary, extra=extra, dtype=torch.float16)
            else:
                config = titok_files.config_from_spec(network.spec) | {"comit_bench": extra}
                titok_files.save(network, temporary, config=config, dtype=torch.float16)
            text = render(run, facts, about(run, network))
            (temporary / "README.md").write_text(text, encoding="utf-8")


def about(run: AutoencoderRun, network: Network) -> CardText:
    """What the card says of an autoencoder."""
    side, length = network.spec.image_size, network.spec.message_length
    loss = "mean squared error of pixels in [-1, 1]"
    if isinstance(network, vq_grid.VqGrid):
        size, spec = network.quantizer.vocab_size, network.spec
        what = "A two-dimensional autoencoder of transformers, made for this comparison"
        message = f"on a {spec.grid} x {spec.grid} grid, finite scalar quantization with the levels "
        message += f"({', '.join(map(str, spec.fsq_levels))}): {size} ids"
    else:
        size = network.spec.vocab_size
        what = "TiTok's architecture (arXiv 2406.07550) at nano size, single-stage, trained from scratch"
        sphere = ", compared on the unit sphere" if network.spec.l2_norm else ""
        message = f"read off latent tokens, a learned codebook of {size} vectors of {network.spec.code_dim}"
        message += sphere
        loss += f", plus {run.codebook_weight:g} x codebook loss, plus "
        loss += f"{run.codebook_weight * run.commitment:g} x commitment loss"
    recipe = [f"loss: {loss}"]
    if run.restart_every:
        recipe.append(
            f"codebook: until step {run.restart_until:,}, rows that nothing chose for {run.restart_every} "
            "steps become encoder vectors of the batch. TiTok does not do this; without it every image got "
            "the same message here"
        )
    optim = run.optim
    adam = f"Adam (rate {optim.learning_rate:g})"
    muon = f"Muon (rate {optim.muon_learning_rate:g}) for the matrices inside the blocks"
    recipe.append(f"optimizer: {f'{muon}, {adam} for the rest' if optim.name == 'muon' else adam}")
    return CardText(
        tags=("image-tokenizer", "discrete-tokens"),
        what=f"{what}.\nA baseline for embedded scenes of {side} px, with no use on photographs.",
        facts=(
            f"parameters: {sum(p.numel() for p in network.parameters()):,} (stored as float16)",
            f"message: {length} tokens {message}",
        ),
        data="painted scenes with one object each (among them those of the probes), whole, without labels"
        if run.data == "scenes"
        else "painted scenes with one to three drawings each, none of a probe, whole, without labels",
        measured="scenes that no probe uses, with the stored weights and 8-bit reconstructions",
        names={
            "psnr": "PSNR (dB)",
            "psnr_mean_colour": "PSNR of the mean-colour image (dB, baseline)",
            "shuffled_gap": "PSNR lost with another image's message (dB)",
            "ids_used": f"distinct ids used (of {size})",
            "perplexity": "perplexity of the ids",
        },
        recipe=tuple(recipe),
        use=USE_TOKENIZER,
    )
