"""Before the first step: every check that can be made, then the pieces of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from comit_bench.errors import UsageError, shown
from comit_bench.files import shipped_weights
from comit_bench.nn.ranks import launched, meeting, without_launcher
from comit_bench.nn.teachers import Teacher, load_teacher
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.checkpoints import load_network
from comit_bench.tokenizers.comit.checkpoint import build, find_sd_vae, read_sd_vae
from comit_bench.tokenizers.comit.family import VAE_HUB
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.tokenizers.load import resolve_device
from comit_bench.train.config import AnyRun, TrainConfig

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Work:
    """How a global batch is divided: ``ranks * pieces * device_batch`` images per optimizer step."""

    ranks: int
    pieces: int
    device_batch: int


def divide(config: AnyRun, ranks: int) -> Work:
    """Derive the gradient accumulation."""
    if config.global_batch % ranks:
        raise UsageError(f"global_batch {config.global_batch} is no multiple of {ranks} processes")
    part = config.global_batch // ranks
    device_batch = config.device_batch or part
    if part % device_batch:
        raise UsageError(
            f"global_batch {config.global_batch} over {ranks} processes makes {part} images each, no "
            f"multiple of device_batch {device_batch}. Choose device_batch among the divisors of {part}."
        )
    return Work(ranks, part // device_batch, device_batch)


def make_teacher(config: TrainConfig, device: torch.device) -> Teacher | None:
    """The frozen teacher, None without one; one of our own without a path is the one that ships."""
    spec, teacher = config.model.spec(), config.teacher
    path = teacher.path
    if path is None and teacher.name in ("scenes-teacher", "drawings-teacher"):
        path = shipped_weights(teacher.name)
    grid = spec.max_input_size // spec.patch_size
    return load_teacher(teacher.name, path=path, grid=grid, device=device)


def check_device(config: AnyRun, device: str) -> None:
    """The device must exist and support the precision."""
    if device not in DEVICES:
        raise UsageError(
            f"--device {shown(device)}: supported are {', '.join(DEVICES)}. To choose a GPU set "
            "CUDA_VISIBLE_DEVICES."
        )
    has_cuda = resolve_device(device).type == "cuda"
    if config.precision == "bfloat16" and (device == "cpu" or not has_cuda):
        raise UsageError("precision bfloat16 needs a CUDA device; on the CPU use precision=float32")


def make_accelerator(config: AnyRun, device: str) -> Accelerator:
    """One process, or the group that ``accelerate launch`` or ``torchrun`` started.

    Raises:
        UsageError: A device that is not there, or variables of a launcher that contradict each other.
        BenchError: The other processes do not come.
    """
    check_device(config, device)
    place = launched()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # a run that this process did before may have had another device or precision
        AcceleratorState._reset_state(reset_partial_state=True)
    with meeting(place) if place.world > 1 else without_launcher():
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        )


def make_model(config: TrainConfig) -> Comit:
    """A fresh network, the same for the same seed, with the frozen autoencoder's weights.

    Raises:
        MissingError: The autoencoder's weights are not here and cannot be had.
        CorruptFileError: They are damaged.
        UsageError: Sizes that do not fit.
    """
    spec = config.model.spec()
    model = build(spec)
    model.predictor.init_weights(generator_for(config.seed, "train/init"))
    if config.model.init == "message":
        model.predictor.favour_message()
    if spec.vae in VAE_HUB:
        path = config.model.vae_path or Path("vae")
        tensors = read_sd_vae(find_sd_vae(spec.vae, path, offline=False))
        load_network(model.vae, {k.removeprefix("vae."): v for k, v in tensors.items()}, path)
    model.vae.requires_grad_(False).eval()
    return model
