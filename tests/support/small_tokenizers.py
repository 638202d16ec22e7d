"""An adapter of every family with a network small enough for unit tests, on any device.

Nothing is compiled. Presets that ship are loaded as they are; the others have random weights of sizes that no
preset has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from alit_sizes import TINY, TINY_VAE
from diffusers import VQModel
from selftok_sizes import RENDERER, SMALL
from torch import Tensor

from comit_bench.nn.vae import SD_VAE, KLVae, KLVaeSpec
from comit_bench.nn.vqgan import VqganSpec
from comit_bench.tokenizers import vqmodel
from comit_bench.tokenizers.alit import adapter as alit
from comit_bench.tokenizers.alit.model import Alit, AlitSpec
from comit_bench.tokenizers.base import Tokenizer, TokenizerInfo
from comit_bench.tokenizers.comit import adapter as comit
from comit_bench.tokenizers.comit.crops import CropGeometry
from comit_bench.tokenizers.comit.model import PRESETS, Comit, ComitSpec
from comit_bench.tokenizers.flextok import adapter as flextok
from comit_bench.tokenizers.flextok.blocks import TableSpec
from comit_bench.tokenizers.flextok.model import FlexTok, FlexTokSpec, TrunkSpec
from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.origin import random_network, untrained
from comit_bench.tokenizers.selftok import adapter as selftok
from comit_bench.tokenizers.selftok.model import Selftok, SelftokSpec
from comit_bench.tokenizers.titok import adapter as titok
from comit_bench.tokenizers.titok.model import Titok, TitokSpec, VitSize

GRID = TableSpec(kind="grid", size=(2, 2))
FLEXTOK = FlexTokSpec(
    encoder=TrunkSpec(depth=2, width=32, head_dim=16, positions=GRID),
    decoder=TrunkSpec(depth=2, width=48, head_dim=16, positions=GRID),
    registers=8,
    register_positions=8,
    vae=KLVaeSpec(channels=4, widths=(8, 8, 8, 8), layers=1, groups=4),
)
LEGACY = TitokSpec(
    encoder=VitSize(width=32, layers=2, heads=2),
    decoder=VitSize(width=32, layers=2, heads=2),
    message_length=6,
    vocab_size=50,
    image_size=32,
    encoder_patch=4,
    decoder_patch=4,
    pixels=VqganSpec(hidden=32, multipliers=(1, 1, 1), blocks=1, latent_channels=8, codebook_size=20),
)
SD_NANO: ComitSpec = replace(
    PRESETS["comit-nano"],
    in_channels=4,
    out_channels=4,
    mask_mode="additive",
    vae="sd-mse",
    vae_factor=8,
    geometry=CropGeometry(crop=24, half=32),
)
VQ: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "vq_embed_dim": 5,
    "num_vq_embeddings": 37,
    "sample_size": 24,
}
Build = Callable[..., Tokenizer]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def fill(network: torch.nn.Module) -> None:
    """Weights from a seed: diffusers draws from the global state."""
    g = seeded(7)
    for name, parameter in network.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=g) * scale)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)


def small_sd_vae() -> KLVae:
    """The SD-VAE with 8 channels everywhere and weights from a seed."""
    made = KLVae(replace(SD_VAE, widths=(8,) * 4, groups=4, layers=1))
    fill(made)
    return made


def comit_sd(**options: Any) -> Tokenizer:
    model = Comit(SD_NANO, small_sd_vae())
    model.predictor.init_weights(seeded(), zero_gates=False)
    info = comit._info(model, untrained("comit-sd", 0))
    return comit.ComitTokenizer(model, info, steps=2, **options)


def titok_legacy(**options: Any) -> Tokenizer:
    model = Titok(LEGACY)
    model.init_weights(seeded(), spread=True)
    info = titok._info(model, untrained("titok-legacy", 0))
    return titok.TitokTokenizer(model.eval(), info, compile="off", **options)


def small_alit(spec: AlitSpec = TINY, **options: Any) -> Tokenizer:
    model = Alit(spec).requires_grad_(False)
    model.init_weights(seeded())
    g = seeded(1)
    for parameter in model.parameters():  # messages then differ between images
        parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    info = alit._info(model, untrained("alit", 0))
    return alit.AlitTokenizer(model.eval(), info, compile="off", **options)


def small_flextok(**options: Any) -> Tokenizer:
    model = random_network(FlexTok, FLEXTOK, torch.device("cpu"), 0, zero_gates=False)
    info = flextok._info(model, untrained("flextok", 0))
    return flextok.FlexTokTokenizer(model, info, steps=2, compile="off", **options)


def small_selftok(spec: SelftokSpec = SMALL, **options: Any) -> Tokenizer:
    model = random_network(Selftok, spec, torch.device("cpu"), 0, zero_gates=False)
    info = selftok._info(model, untrained("selftok", 0))
    return selftok.SelftokTokenizer(model, info, compile="off", **options)


def small_vqmodel(**options: Any) -> Tokenizer:
    model = VQModel(**VQ).eval()
    fill(model)
    info = TokenizerInfo(
        name="vqmodel",
        family="vqmodel",
        kind="learned",
        weights="random:0",
        parameters=1,
        message_length=36,
        vocab_size=37,
        code_dim=5,
        resolution=24,
        preprocessing="center_crop|resize(24,bilinear)",
    )
    return vqmodel.VqModelTokenizer(model, info, grid=6, **options)


def small_kmeans(*, device: torch.device, dtype: torch.dtype = torch.float32) -> Tokenizer:
    centroids = torch.randint(0, 256, (40, 192), generator=seeded(), dtype=torch.uint8)
    return KMeansPatchTokenizer(centroids, resolution=32, patch=8, training_data="none", device=device)


def shipped(name: str) -> Build:
    def build(*, device: torch.device, dtype: torch.dtype = torch.float32) -> Tokenizer:
        tokenizer: Any = load_tokenizer(name, device=str(device))
        tokenizer.dtype = dtype  # on the CPU load_tokenizer refuses bfloat16, which is slow there
        return tokenizer  # type: ignore[no-any-return]

    return build


SMALL_TOKENIZERS: dict[str, Build] = {
    "comit-nano": shipped("comit-nano"),
    "comit-sd": comit_sd,
    "titok-nano": shipped("titok-nano"),
    "titok-legacy": titok_legacy,
    "vq-grid-nano": shipped("vq-grid-nano"),
    "alit": small_alit,
    "alit-halting": lambda **options: small_alit(replace(TINY, threshold=0.02), halting="on", **options),
    "alit-vae": lambda **options: small_alit(TINY_VAE, posterior="sample", **options),
    "flextok": small_flextok,
    "selftok": small_selftok,
    "selftok-renderer": lambda **options: small_selftok(RENDERER, **options),
    "vqmodel": small_vqmodel,
    "kmeans-patch": small_kmeans,
    "pixel-oracle": shipped("pixel-oracle"),
}
ROUNDING = tuple(
    n for n in SMALL_TOKENIZERS if n not in ("kmeans-patch", "pixel-oracle")
)  # they have networks


def pictures(tokenizer: Tokenizer, count: int) -> Tensor:
    """Smooth uint8 images [count, 3, S, S] of the tokenizer's size, all different."""
    side = tokenizer.info.resolution
    colours = torch.rand(count, 3, 3, 3, generator=seeded(5))
    smooth = torch.nn.functional.interpolate(colours, size=side, mode="bilinear")
    return smooth.mul(255).to(torch.uint8)


def streams(count: int) -> list[torch.Generator]:
    """One generator per image."""
    return [seeded(100 + i) for i in range(count)]
