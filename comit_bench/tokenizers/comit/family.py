"""COMiT: what there is of it."""

from __future__ import annotations

from comit_bench.tokenizers.family import (
    VAE_FILES,
    Config,
    Family,
    Hub,
    NoWeights,
    Part,
    Preset,
    Shipped,
    Source,
    value_at,
)

VAE_HUB = {"sd-mse": "stabilityai/sd-vae-ft-mse", "sd-ema": "stabilityai/sd-vae-ft-ema"}
UNTRAINED = "comit-nano-untrained"


def _released(size: str, parameters: float, depth: int, width: int) -> Preset:
    return Preset(
        name=f"comit-{size}",
        source=Hub(repository=f"cvg-unibe/comit-{size}"),
        parameters=parameters,
        message_length=256,
        vocab_size=64000,
        training_data="ImageNet-1k",
        weights_licence="see the hub page",
        sizes={
            "predictor.depth": depth,
            "predictor.hidden_size": width,
            "predictor.num_msg_tokens": 256,
            "quantizer.levels": [8, 8, 8, 5, 5, 5],
        },
    )


def _nano(name: str, source: Source = Shipped()) -> Preset:  # noqa: B008
    return Preset(
        name=name,
        source=source,
        parameters=0.45,
        message_length=16,
        vocab_size=1000,
        sizes={
            "predictor.depth": 4,
            "predictor.hidden_size": 64,
            "predictor.num_msg_tokens": 16,
            "quantizer.levels": [8, 5, 5, 5],
        },
    )


def _sign(config: Config) -> Config | None:
    return config if str(value_at(config, "predictor._target_")).endswith("RuledDiT") else None


FAMILY = Family(
    name="comit",
    loader="comit_bench.tokenizers.comit.adapter:load",
    sign=_sign,
    crops=True,
    presets=(
        _released("b", 173.84, 12, 768),
        _released("l", 610.85, 24, 1024),
        _released("xl", 900.38, 28, 1152),
        _nano("comit-nano"),
        _nano("comit-nano-no-srepa"),
        _nano("comit-nano-no-local-crops"),
        _nano(UNTRAINED, NoWeights("random weights, always")),
    ),
    parts=tuple(
        Part(name=f"{kind}-vae", source=Hub(repository=place, files=VAE_FILES), note="VAE of COMiT")
        for kind, place in VAE_HUB.items()
    ),
)
