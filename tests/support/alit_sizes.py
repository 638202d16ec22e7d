"""ALIT networks small enough for unit tests."""

from __future__ import annotations

from dataclasses import replace

from comit_bench.nn.vqgan import VqganSpec
from comit_bench.tokenizers.alit.base_model import VaeSpec
from comit_bench.tokenizers.alit.model import AlitSpec

TINY = AlitSpec(
    width=40,
    layers=2,
    heads=4,
    decoder_width=32,
    decoder_layers=3,
    decoder_heads=2,
    base=VqganSpec(hidden=32, multipliers=(2, 1), blocks=1, latent_channels=12, codebook_size=20),
    codebook_size=64,
    code_dim=5,
    first_tokens=4,
    iterations=3,
    image_size=32,
    patch_size=2,
    threshold=0.05,
)
TINY_VAE = replace(
    TINY, base=VaeSpec(hidden=32, multipliers=(1, 2), blocks=1, latent_channels=8, resolution=32)
)
