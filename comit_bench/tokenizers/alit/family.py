"""ALIT: what there is of it."""

from __future__ import annotations

from comit_bench.tokenizers.family import Config, Family, Preset, Release

_CONFIG = "comit_bench.tokenizers.alit.config"
_DROPBOX = "https://www.dropbox.com/scl/fi"
IN1K, IN100 = "ImageNet-1k train", "ImageNet-100 train"
_SIZES = {"small": (1024, 8), "base": (768, 12), "semilarge": (1024, 16)}  # width and layers


def _released(name: str, parameters: float, file: str, link: str, data: str = IN100) -> Preset:
    """``alit-small-vae-continuous``: size, base tokenizer if a VAE, and whether there is a codebook."""
    quantized = not name.endswith("-continuous")
    width, layers = _SIZES[name.split("-")[1]]
    return Preset(
        name=name,
        source=Release(
            file=f"{file}.pth",
            url=f"{_DROPBOX}/{link}&dl=1",
            unpack=f"{_CONFIG}:unpack",
            config=f"{_CONFIG}:released_config",
            check=f"{_CONFIG}:check_fits",
            allow=("argparse:Namespace",),
        ),
        parameters=parameters,
        message_length=256,
        vocab_size=4096 if quantized else None,
        training_data=data,
        weights_licence="none stated",
        sizes={
            "adaptive_tokenizer.encoder_width": width,
            "adaptive_tokenizer.encoder_num_layers": layers,
            "adaptive_tokenizer.quantize_latent": quantized,
            "base_tokenizer.id": "vae" if "-vae" in name else "vqgan",
        },
    )


def _sign(config: Config) -> Config | None:
    return config if config.get("system") == "alit" else None


FAMILY = Family(
    name="alit",
    loader="comit_bench.tokenizers.alit.adapter:load",
    sign=_sign,
    presets=(
        _released(
            "alit-small",
            262.05,
            "alit_small_vqgan_quantized_latents_imagenet",
            "u8jyro5wysttp5mvs6gir/alit_vqgan_small_quantized_latent.pth"
            "?rlkey=1py1s9755gjhdyw5ifd9h2wff&st=swdbevjk",
            IN1K,
        ),
        _released(
            "alit-small-in100",
            262.05,
            "alit_small_vqgan_quantized_latents",
            "iszluhiop09z3afo2gw5f/alit_small_vqgan_quantized_latents.pth"
            "?rlkey=klt0zgeunb60l1snuzhjdzdq2&st=zgwzgc2r",
        ),
        _released(
            "alit-base",
            228.69,
            "alit_base_vqgan_quantized_latents",
            "6cygifz37knpqtkxgfj81/alit_base_vqgan_quantized_latents.pth"
            "?rlkey=r8hn0d4d8j8eg2wjorzl9c67s&st=c5iv7wor",
        ),
        _released(
            "alit-semilarge",
            463.59,
            "alit_semilarge_vqgan_quantized_latents",
            "wcp7s6w86slh1yy4m3egc/alit_semilarge_vqgan_quantized_latents.pth"
            "?rlkey=cf2s13c6ah3ru4ly9tb911gi7&st=d11uoq0i",
        ),
        _released(
            "alit-small-continuous",
            262.0,
            "alit_small_vqgan_continuous_latents",
            "twbxjch2hutxjsy3sd85y/alit_small_vqgan_continuous_latents.pth"
            "?rlkey=68ycbjp6upkrxt22w5rm58cjv&st=5nyk6uvu",
        ),
        _released(
            "alit-small-vae",
            272.11,
            "alit_small_vae_quantized_latents",
            "svykasoyyoapfzlghjuz2/alit_small_vae_quantized_latents.pth"
            "?rlkey=dtvyj74zq593zc7c63miwkhs3&st=dwm9w2sp",
        ),
        _released(
            "alit-small-vae-continuous",
            272.06,
            "alit_small_vae_continuous_latents",
            "bq2yzr7dufvrpnycb856b/alit_small_vae_continuous_latents.pth"
            "?rlkey=hjx6jpr6vvfzhtgkp1cc1rnrs&st=4aa1vyh9",
        ),
    ),
)
