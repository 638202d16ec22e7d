"""Training of the small autoencoders that COMiT is compared with on the embedded scenes.

One loss on pixels (mean squared error of images in [-1, 1]) and, where the quantizer learns its codebook,
the two losses of vector quantization; gradients pass straight through the rounding. Images, their order and
the optimizer are those of ``comit-nano``.

``python -m comit_bench.train --config vq-grid-nano`` or ``titok-nano``. One process; everything follows
from seed and step, so a killed run continues from its last checkpoint, bit for bit on a CPU.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.files import atomic_path, user_path
from comit_bench.nn.vq import EPS
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.base import only_finite, to_uint8
from comit_bench.tokenizers.titok import adapter as titok_files
from comit_bench.tokenizers.titok import model as titok
from comit_bench.tokenizers.vq_grid import adapter as grid_files
from comit_bench.tokenizers.vq_grid import model as vq_grid
from comit_bench.train.autoencoder_card import Facts, card
from comit_bench.train.config import AutoencoderRun
from comit_bench.train.data import PROBE_VAL_SCENES, Order, paint_scenes
from comit_bench.train.logs import CsvLog
from comit_bench.train.optimizers import Together, make_optimizer
from comit_bench.train.runstate import RunState, only_training
from comit_bench.train.schedule import learning_rate
from comit_bench.train.validation import perplexity, psnr

Network = vq_grid.VqGrid | titok.Titok
COLUMNS = ("step", "images", "learning_rate", "loss", "pixels", "codebook", "grad_norm", "images_per_s")
MEASURES = ("step", "psnr", "psnr_mean_colour", "shuffled_gap", "ids_used", "perplexity")
PARTS = ("loss", "pixels", "codebook")


def make_network(run: AutoencoderRun) -> Network:
    """The freshly initialised network of a run, a function of its seed."""
    generator = generator_for(run.seed, f"autoencoder/{run.model}/init")
    network: Network
    if run.model in vq_grid.PRESETS:
        network = vq_grid.VqGrid(vq_grid.PRESETS[run.model])
    else:
        network = titok.Titok(titok.PRESETS[run.model])
    network.init_weights(generator)
    return network


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


class Objective(nn.Module):
    """The network and its loss.

    Args:
        network: What is trained.
        run: Weights of the losses.
    """

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
    with only_finite(type(network).__name__):
        ids = torch.cat([network.encode(part.float().div(255))[0] for part in pixels.split(batch)])
        table = network.quantizer if isinstance(network, vq_grid.VqGrid) else network.quantize
        codes = table.codes(ids)
        drawn = torch.cat([to_uint8(network.decode(part)) for part in codes.split(batch)])
    images, others = (part.float().div(127.5) - 1 for part in (pixels, drawn))
    flat = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    quality = psnr(images, others)
    counts = torch.bincount(ids.flatten())
    return {
        "psnr": float(quality.double().mean()),
        "psnr_mean_colour": float(psnr(images, flat).double().mean()),
        "shuffled_gap": float((quality - psnr(images, others.roll(1, 0))).double().mean()),
        "ids_used": int((counts > 0).sum()),
        "perplexity": perplexity(counts),
    }


class _Run(RunState):
    """State of a run on disk, and its logs."""

    def __init__(self, run: AutoencoderRun, module: Objective) -> None:
        leave_out = {"output", "log_every", "validate_every", "save_every", "val_count"}
        settings = run.model_dump(mode="json", exclude=leave_out)
        self.objective = module
        self.together = make_optimizer(module, run, torch.device("cpu"))
        directory = user_path(run.output, "output") / run.name
        super().__init__("autoencoder", directory, settings, module, self.together)
        self.log = CsvLog(self.directory / "log.csv", COLUMNS)
        self.validation = CsvLog(self.directory / "validation.csv", MEASURES)

    def step(self, run: AutoencoderRun, number: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One update; the parts of the loss [3] and the norm of the gradient."""
        optim = run.optim
        losses: Tensor = self.objective(pixels)
        self.together.zero_grad()
        losses[0].backward()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), optim.clip)
        rate = _rate(run, number)
        for group in self.together.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        self.together.step()
        if run.restart_every and (number + 1) % run.restart_every == 0 and number + 1 < run.restart_until:
            generator = generator_for(run.seed, f"autoencoder/restart/{number}")
            self.objective.restart(pixels, generator, self.together)
        return losses.detach(), norm.detach()


def _rate(run: AutoencoderRun, step: int) -> float:
    optim = run.optim
    return learning_rate(
        step, peak=optim.learning_rate, warmup=optim.warmup_steps, cosine_steps=optim.cosine_steps
    )


def _rows(run: AutoencoderRun, order: Order, step: int) -> list[int]:
    """Images of a step, the same ones as in a COMiT run of this seed."""
    return [order.index(slot) for slot in order.slots(step, run.batch)]


def fit_autoencoder(run: AutoencoderRun, *, progress: bool = True, command: str = "") -> Path:
    """Train, measure and export.

    Returns:
        The folder with ``config.json``, ``model.safetensors`` and the card; ``--tokenizer`` takes it.

    Raises:
        UsageError: Settings that do not fit, or a checkpoint of other ones.
        CorruptFileError: A checkpoint that cannot be read.
        BenchError: Another training runs in this folder, or it cannot be written.
    """
    with only_training(run.output.expanduser() / run.name):
        return _fit(run, progress, command)


def _fit(run: AutoencoderRun, progress: bool, command: str) -> Path:
    from tqdm import tqdm

    network = make_network(run)
    state = _Run(run, Objective(network, run))
    first = state.load()
    state.log.start(first)
    state.validation.start(first)
    side = network.spec.image_size
    pixels = paint_scenes("train", 0, run.count, side).images
    held = paint_scenes("val", PROBE_VAL_SCENES, run.val_count, side).images
    order, seen = Order(run.count, run.seed), []
    began, before = time.monotonic(), state.seconds
    bar = tqdm(range(first, run.steps), run.name, run.steps, initial=first, disable=not progress, unit="step")
    for step in bar:
        seen.append(state.step(run, step, pixels[_rows(run, order, step)]))
        done, now = step + 1, time.monotonic()
        state.seconds = before + now - began
        last = done == run.steps
        if done % run.log_every == 0 or last:
            means = torch.stack([losses for losses, _ in seen]).mean(dim=0).tolist()
            rate = round((done - first) * run.batch / (now - began), 1)
            row = {"step": done, "images": done * run.batch, "learning_rate": _rate(run, step)}
            row |= {"grad_norm": float(seen[-1][1]), "images_per_s": rate}
            state.log.append(row | dict(zip(PARTS, means, strict=True)))
            bar.set_postfix_str(f"loss {means[0]:.4f} {rate} img/s")
            seen.clear()
        if done % run.validate_every == 0 or last:
            state.validation.append({"step": done, **measure(network, held)})
        if done % run.save_every == 0 or last:
            state.save(done)
    return _export(run, network, state, held, command)


def _export(run: AutoencoderRun, network: Network, state: _Run, held: Tensor, command: str) -> Path:
    """Round to float16, measure what is left, write the folder."""
    for value in network.parameters():
        value.data = value.detach().half().float()
    facts = Facts(
        parameters=sum(p.numel() for p in network.parameters()),
        seconds=state.seconds,
        hardware=f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
        command=command,
        measures=measure(network, held),
    )
    extra = {
        "trained": True,
        "training_data": f"scenes-recognition train ({run.count} scenes)",
        "weights_licence": run.weights_licence,
        "steps": run.steps,
    }
    target = state.directory / run.name
    with atomic_path(target) as temporary:
        temporary.mkdir()
        if isinstance(network, vq_grid.VqGrid):
            grid_files.save(network, temporary, extra=extra, dtype=torch.float16)
        else:
            config = titok_files.config_from_spec(network.spec) | {"comit_bench": extra}
            titok_files.save(network, temporary, config=config, dtype=torch.float16)
        (temporary / "README.md").write_text(card(run, network, facts), encoding="utf-8")
    return target
