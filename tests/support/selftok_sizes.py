"""SelfTok networks small enough for unit tests."""

from __future__ import annotations

from dataclasses import replace

from comit_bench.tokenizers.selftok.model import SD3_VAE, DecoderSpec, EncoderSpec, Schedule, SelftokSpec

LATENTS = Schedule(ends=(200, 400, 600, 800, 1000), counts=(4, 3, 2, 2, 1))
SMALL = SelftokSpec(
    tokens=12,
    image_size=64,
    encoder=EncoderSpec(width=16, heads=2, query_width=32, query_heads=4, depth=3, grid=8),
    decoder=DecoderSpec(width=48, heads=3, depth=3, grid=11),
    vocab_size=64,
    schedule=LATENTS,
    steps=4,
    vae=replace(SD3_VAE, widths=(8, 8, 8, 8), layers=1, groups=4),
)
RENDERER = replace(SMALL, kind="renderer", schedule=None)
