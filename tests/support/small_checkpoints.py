"""A small checkpoint directory of every family that reads one, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from alit_sizes import TINY
from selftok_sizes import SMALL

from comit_bench.nn.vae import KLVaeSpec
from comit_bench.tokenizers.alit import adapter as alit
from comit_bench.tokenizers.alit.model import Alit
from comit_bench.tokenizers.comit import checkpoint as comit_files
from comit_bench.tokenizers.comit.model import PRESETS as COMIT
from comit_bench.tokenizers.flextok import checkpoint as flextok_files
from comit_bench.tokenizers.flextok.blocks import TableSpec
from comit_bench.tokenizers.flextok.model import FlexTok, FlexTokSpec, TrunkSpec
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.origin import random_network
from comit_bench.tokenizers.selftok import checkpoint as selftok_files
from comit_bench.tokenizers.selftok.model import Selftok
from comit_bench.tokenizers.titok import adapter as titok
from comit_bench.tokenizers.titok.model import PRESETS as TITOK
from comit_bench.tokenizers.titok.model import Titok, VitSize
from comit_bench.tokenizers.vq_grid import adapter as vq_grid
from comit_bench.tokenizers.vq_grid.model import VqGrid, VqGridSpec

CPU = torch.device("cpu")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def write_comit(folder: Path) -> None:
    spec = replace(COMIT["comit-nano"], depth=2, width=32)
    model = comit_files.build(spec)
    model.predictor.init_weights(generator(), zero_gates=False)
    comit_files.save(model, folder)


def write_titok(folder: Path) -> None:
    size = VitSize(width=32, layers=2, heads=2)
    model = Titok(replace(TITOK["titok-nano"], encoder=size, decoder=size, vocab_size=64))
    model.init_weights(generator(), spread=True)
    titok.save(model, folder)


def write_vq_grid(folder: Path) -> None:
    spec = VqGridSpec(
        image_size=16, patch=2, width=16, depth=2, inner_width=32, head_dim=16, fsq_levels=(4, 3, 2)
    )
    model = VqGrid(spec)
    model.init_weights(generator())
    vq_grid.save(model, folder)


def write_alit(folder: Path) -> None:
    model = Alit(TINY)
    model.init_weights(generator())
    alit.save(model, folder)


def write_flextok(folder: Path) -> None:
    trunk = TrunkSpec(depth=2, width=32, head_dim=16, positions=TableSpec(kind="grid", size=(4, 4)))
    vae = KLVaeSpec(channels=4, widths=(8, 8), layers=1, groups=4)
    spec = FlexTokSpec(encoder=trunk, decoder=trunk, registers=8, register_positions=8, vae=vae)
    flextok_files.save(random_network(FlexTok, spec, CPU, 0, zero_gates=False), folder)


def write_selftok(folder: Path) -> None:
    selftok_files.save(random_network(Selftok, SMALL, CPU, 0, zero_gates=False), folder)


def write_vqmodel(folder: Path) -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    model: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        num_vq_embeddings=16,
        sample_size=16,
    )
    model.save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "comit": write_comit,
    "titok": write_titok,
    "vq-grid": write_vq_grid,
    "alit": write_alit,
    "flextok": write_flextok,
    "selftok": write_selftok,
    "vqmodel": write_vqmodel,
}


def weights_of(folder: Path) -> Path:
    """The one file of weights (the VAE of SelfTok apart)."""
    return next(
        folder / name
        for name in ("model.safetensors", "diffusion_pytorch_model.safetensors")
        if (folder / name).exists()
    )


def load(folder: Path, **options: Any) -> Any:
    """Load without a network; the family is told by the config."""
    return load_tokenizer(str(folder), device="cpu", offline=True, **options)
