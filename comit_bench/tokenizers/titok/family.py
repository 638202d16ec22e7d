"""TiTok: what there is of it."""

from __future__ import annotations

from comit_bench.tokenizers.family import Config, Family, Hub, Preset, Shipped, value_at

_SIZES = {"s": "small", "b": "base", "l": "large"}


def _released(name: str, repository: str, parameters: float, vocab: int = 4096) -> Preset:
    """``titok-bl-64``: base encoder, large decoder, 64 tokens; one letter stands for both."""
    letters, length = name.split("-")[1:]
    return Preset(
        name=name,
        source=Hub(
            repository=f"yucornetto/tokenizer_titok_{repository}_imagenet",
            otherwise={"model.safetensors": "pytorch_model.bin"},
        ),
        parameters=parameters,
        message_length=int(length),
        vocab_size=vocab,
        training_data="ImageNet-1k",
        weights_licence="Apache-2.0 (earlier: MIT)",
        sizes={
            "model.vq_model.vit_enc_model_size": _SIZES[letters[0]],
            "model.vq_model.vit_dec_model_size": _SIZES[letters[-1]],
            "model.vq_model.num_latent_tokens": int(length),
            "model.vq_model.codebook_size": vocab,
        },
    )


def _sign(config: Config) -> Config | None:
    return config if isinstance(value_at(config, "model.vq_model"), dict) else None


FAMILY = Family(
    name="titok",
    loader="comit_bench.tokenizers.titok.adapter:load",
    sign=_sign,
    presets=(
        _released("titok-l-32", "l32", 641.05),
        _released("titok-b-64", "b64", 204.81),
        _released("titok-s-128", "s128", 83.67),
        _released("titok-bl-64", "bl64_vq8k", 390.02, 8192),
        _released("titok-bl-128", "bl128_vq8k", 390.18, 8192),
        _released("titok-sl-256", "sl256_vq8k", 330.26, 8192),
        Preset(
            name="titok-nano",
            source=Shipped(),
            parameters=0.28,
            message_length=16,
            vocab_size=1024,
            sizes={
                "reduced.encoder": {"width": 64, "num_layers": 2, "num_heads": 2},
                "reduced.decoder": {"width": 64, "num_layers": 3, "num_heads": 2},
                "model.vq_model.num_latent_tokens": 16,
                "model.vq_model.codebook_size": 1024,
            },
        ),
    ),
)
