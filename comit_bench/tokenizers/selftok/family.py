"""SelfTok: what there is of it."""

from __future__ import annotations

from comit_bench.tokenizers.family import (
    VAE_FILES,
    Config,
    Family,
    Hub,
    Part,
    Preset,
    Release,
    value_at,
)

_CONFIG = "comit_bench.tokenizers.selftok.config"
VAE_HUB = "stabilityai/stable-diffusion-3-medium-diffusers"


def _file(name: str) -> Release:
    return Release(
        file=f"{name}_ckpt.pth",
        hub="selftok-team/SelftokTokenizer",
        unpack=f"{_CONFIG}:unpack",
        config=f"{_CONFIG}:released_config",
        check=f"{_CONFIG}:check_fits",
    )


def _released(tokens: int, parameters: float) -> Preset:
    return Preset(
        name=f"selftok-{tokens}",
        source=_file(f"tokenizer_{tokens}"),
        parameters=parameters,
        message_length=tokens,
        vocab_size=32768,
        training_data="not stated; presumably ImageNet-1k",
        weights_licence="none stated; derived from Stable Diffusion 3, whose terms may apply",
        sizes={
            "k": tokens,
            "encoder.depth": 16,
            "decoder.depth": 24,
            "quantizer.codebook_size": 32768,
        },
    )


def _renderer(tokens: int) -> Part:
    return Part(name=f"selftok-{tokens}-renderer", source=_file(f"renderer_{tokens}"))


def _sign(config: Config) -> Config | None:
    kind = config.get("kind") in ("tokenizer", "renderer")
    queries = value_at(config, "encoder.query_dim") is not None
    return config if config.get("system") == "selftok" or (kind and queries) else None


FAMILY = Family(
    name="selftok",
    loader="comit_bench.tokenizers.selftok.adapter:load",
    sign=_sign,
    presets=(_released(512, 2169.4), _released(1024, 2169.66)),
    parts=(
        _renderer(512),
        _renderer(1024),
        Part(
            name="sd3-vae",
            source=Hub(repository=VAE_HUB, files=tuple(f"vae/{name}" for name in VAE_FILES)),
            note="VAE of SelfTok",
            always=True,
        ),
    ),
)
