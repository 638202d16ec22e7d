"""COMiT-nano with pixels as latents, for tests that feed images where latents are meant."""

from __future__ import annotations

from dataclasses import replace

from comit_bench.tokenizers.comit.model import PRESETS

PIXEL_NANO = replace(
    PRESETS["comit-nano"],
    width=96,
    heads=4,
    max_input_size=32,
    patch_size=4,
    in_channels=3,
    out_channels=3,
    vae="none",
    vae_factor=1,
)
