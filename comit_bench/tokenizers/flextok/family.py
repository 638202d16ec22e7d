"""FlexTok: what there is of it."""

from __future__ import annotations

from comit_bench.tokenizers.family import VAE_FILES, Config, Family, Hub, Part, Preset, value_at

LICENCE = "Apple Machine Learning Research Model licence (research only)"
VAE_HUB = "EPFL-VILAB/flextok_vae_c{channels}"
ENCODER, DECODER = "encoder.module_dict", "decoder.module_dict"


def _released(name: str, parameters: float, data: str = "ImageNet-1k") -> Preset:
    """``flextok-d12-d12``: blocks of encoder and decoder."""
    depths = [int(part[1:]) for part in name.split("-")[1:3]]
    repository = name.replace("-", "_") + ("" if name.endswith("dfn") else "_in1k")
    return Preset(
        name=name,
        source=Hub(repository=f"EPFL-VILAB/{repository}"),
        parameters=parameters,
        message_length=256,
        vocab_size=64000,
        training_data=data,
        weights_licence=LICENCE,
        sizes={
            f"{ENCODER}.enc_transformer.depth": depths[0],
            f"{DECODER}.dec_transformer.depth": depths[1],
            "regularizer.levels": [8, 8, 8, 5, 5, 5],
        },
    )


def unwrap(config: Config) -> Config:
    """The blocks of a config, also when they stand inside ``{"config": {...}}``."""
    inner = config.get("config")
    return inner if isinstance(inner, dict) and "encoder" not in config else config


def _sign(config: Config) -> Config | None:
    blocks = unwrap(config)
    return blocks if all(isinstance(value_at(blocks, key), dict) for key in (ENCODER, DECODER)) else None


FAMILY = Family(
    name="flextok",
    loader="comit_bench.tokenizers.flextok.adapter:load",
    sign=_sign,
    presets=(
        _released("flextok-d12-d12", 257.83),
        _released("flextok-d18-d18", 865.91),
        _released("flextok-d18-d28", 2457.06),
        _released("flextok-d18-d28-dfn", 2457.06, "DFN (web images)"),
    ),
    parts=(
        Part(
            name="flextok-vae",
            source=Hub(repository=VAE_HUB.format(channels=16), files=VAE_FILES),
            note="VAE of FlexTok, for checkpoints that hold none",
        ),
    ),
)
