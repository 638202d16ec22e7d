"""ALIT's names, released variants and ``config.json``, and loading a checkpoint into a network.

The original program has no config file: its constructor arguments stand under ``base_tokenizer`` and
``adaptive_tokenizer``, as in the parity cases, and :func:`config_from_spec` writes them for released files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from comit_bench.errors import UsageError, shown
from comit_bench.nn.sizes import DEPTH, HEADS, SIDE, TOKENS, WIDTH
from comit_bench.nn.vqgan import VqganSpec
from comit_bench.tokenizers.alit.base_model import VaeSpec
from comit_bench.tokenizers.alit.family import FAMILY
from comit_bench.tokenizers.alit.model import Alit, AlitSpec, variant
from comit_bench.tokenizers.base import one_of
from comit_bench.tokenizers.checkpoints import load_network, on_meta, read_weights, select_weights
from comit_bench.tokenizers.config_node import Node, blaming

IGNORED = ("gan_losses.",)  # training losses in the released files, with networks of their own
LANDMARKS = (
    "encoder_positional_embedding",
    "decoder_positional_embedding",
    "latent_tokens",
    "base_tokenizer",
)
IS_IT = "Is this an ALIT checkpoint?"
SIZES = {  # of adaptive_tokenizer, and the largest that make sense
    "encoder_width": WIDTH,
    "encoder_num_layers": DEPTH,
    "encoder_num_heads": HEADS,
    "decoder_width": WIDTH,
    "decoder_num_layers": DEPTH,
    "decoder_num_heads": HEADS,
}
OPTIONAL = (
    *("factorize_latent", "train_stage", "quantize_latent", "vq_codebook_size", "vq_token_dim"),
    *("vq_use_l2_norm", "num_init_latent_tokens", "max_rollout_iters", "img_size", "patch_size"),
    *("dynamic_halting", "dynamic_halting_threshold"),
)
_A = "adaptive_tokenizer."
# what in config.json decides about a tensor
SETTINGS = (
    (r"encoder\.transformer", f"{_A}encoder_num_layers and encoder_width"),
    (r"decoder\.transformer", f"{_A}decoder_num_layers and decoder_width"),
    (r"latent_tokens", f"{_A}num_init_latent_tokens and encoder_width"),
    (r"timestep_embedding", f"{_A}max_rollout_iters and encoder_width"),
    (r"quantize", f"{_A}vq_codebook_size, vq_token_dim and quantize_latent"),
    (r"base_tokenizer", "base_tokenizer"),
    (r"decoder\.ffn", f"{_A}decoder_width and base_tokenizer.n_embed"),
    (r"patch_embed", f"{_A}patch_size, encoder_width and base_tokenizer.embed_dim"),
    (r"decoder", f"{_A}decoder_width and vq_token_dim"),
    (r".", f"{_A}encoder_width"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What a name stands for: preset, base tokenizer, codebook or none."""

    preset: str
    base: str = "vqgan"
    quantized: bool = True

    @property
    def spec(self) -> AlitSpec:
        """Sizes of the network."""
        return variant(self.preset, base=self.base, quantized=self.quantized)


VARIANTS = {
    preset.name: Variant(
        preset="-".join(preset.name.split("-")[:2]),
        base="vae" if "-vae" in preset.name else "vqgan",
        quantized=preset.vocab_size is not None,
    )
    for preset in FAMILY.presets
}


def choose_variant(name: str, base: str | None, latent: str | None) -> tuple[str, Variant]:
    """Apply the options ``base`` and ``latent`` to a name; a combination may have no released file."""
    known = VARIANTS[name]
    if base is not None:
        one_of(base, "base", ("vqgan", "vae"))
    if latent is not None:
        one_of(latent, "latent", ("quantized", "continuous"))
    wanted = replace(
        known,
        base=base or known.base,
        quantized=known.quantized if latent is None else latent == "quantized",
    )
    if wanted == known:
        return name, known
    for other, candidate in VARIANTS.items():
        if candidate == wanted:
            return other, candidate
    parts = [known.preset, *(["vae"] if wanted.base == "vae" else [])]
    return "-".join([*parts, *([] if wanted.quantized else ["continuous"])]), wanted


def _vqgan(node: Node) -> VqganSpec:
    node.check_keys(("id", "embed_dim", "n_embed", "ddconfig"))
    inner, default = node.maybe("ddconfig"), VqganSpec()
    inner.check_keys(
        ("ch", "ch_mult", "num_res_blocks", "z_channels"),
        unread=("double_z", "resolution", "in_channels", "out_ch", "attn_resolutions", "dropout"),
    )
    channels = node.whole("embed_dim", default.latent_channels, high=4096)
    return VqganSpec(
        hidden=inner.whole("ch", default.hidden, high=8192),
        multipliers=inner.wholes("ch_mult", default.multipliers, high=64),
        blocks=inner.whole("num_res_blocks", default.blocks, high=64),
        latent_channels=inner.whole("z_channels", channels, high=4096),
        codebook_size=node.whole("n_embed", default.codebook_size, high=1 << 24),
    )


def _vae(node: Node) -> VaeSpec:
    plain = VaeSpec()
    node.check_keys(
        (
            *("id", "embed_dim", "ch", "ch_mult", "num_res_blocks", "encoder_attn_resolutions", "resolution"),
            "latent_scale",
        ),
        unread=("decoder_attn_resolutions",),
    )
    if node.values.get("decoder_attn_resolutions"):
        raise node.wrong(
            "decoder_attn_resolutions",
            "be empty: no such model is known",
            node.values["decoder_attn_resolutions"],
        )
    return VaeSpec(
        hidden=node.whole("ch", plain.hidden, high=8192),
        multipliers=node.wholes("ch_mult", plain.multipliers, high=64),
        blocks=node.whole("num_res_blocks", plain.blocks, high=64),
        latent_channels=node.whole("embed_dim", plain.latent_channels, high=4096),
        attention_at=node.wholes("encoder_attn_resolutions", plain.attention_at, high=SIDE, shortest=0),
        resolution=node.whole("resolution", plain.resolution, high=SIDE),
        scale=node.number("latent_scale", plain.scale, above=0, high=1e4),
    )


def spec_from_config(config: Mapping[str, Any], source: Path) -> AlitSpec:
    """Read a ``config.json``; what it leaves out has the released value."""
    top = Node(config, source)
    inner, node = (top.node(key, IS_IT) for key in ("base_tokenizer", "adaptive_tokenizer"))
    node.check_keys((*SIZES, *OPTIONAL), unread=("vq_commitment_cost",))
    if not node.flag("factorize_latent", True):
        raise UsageError(f"{source}: factorize_latent = false is not supported: no such model was released")
    stage = node.text("train_stage", "full_finetuning")
    if stage != "full_finetuning":
        raise UsageError(
            f"{source}: train_stage {stage!r}: only fully finetuned (stage 2) models are supported"
        )
    kind = inner.values.get("id")
    if kind not in ("vqgan", "vae"):
        raise UsageError(f"{source}: base_tokenizer.id must be 'vqgan' or 'vae', got {shown(kind)}")
    sizes = {key: node.whole(key, high=high) for key, high in SIZES.items()}
    with blaming(source):
        base = _vqgan(inner) if kind == "vqgan" else _vae(inner)
        return AlitSpec(
            width=sizes["encoder_width"],
            layers=sizes["encoder_num_layers"],
            heads=sizes["encoder_num_heads"],
            decoder_width=sizes["decoder_width"],
            decoder_layers=sizes["decoder_num_layers"],
            decoder_heads=sizes["decoder_num_heads"],
            base=base,
            quantized=node.flag("quantize_latent", True),
            codebook_size=node.whole("vq_codebook_size", 4096, high=1 << 24),
            code_dim=node.whole("vq_token_dim", 12, high=4096),
            l2_norm=node.flag("vq_use_l2_norm", True),
            first_tokens=node.whole("num_init_latent_tokens", 32, high=TOKENS),
            iterations=node.whole("max_rollout_iters", 8, high=TOKENS),
            image_size=node.whole("img_size", 256, high=SIDE),
            patch_size=node.whole("patch_size", 16, high=1024),
            halting=node.flag("dynamic_halting", True),
            threshold=node.number(
                "dynamic_halting_threshold", 0.55 if kind == "vqgan" else 0.025, low=0, high=1
            ),
        )


def config_from_spec(spec: AlitSpec) -> dict[str, Any]:
    """The inverse of :func:`spec_from_config`."""
    base: dict[str, Any]
    if isinstance(spec.base, VqganSpec):
        inner = {
            "z_channels": spec.base.latent_channels,
            "ch": spec.base.hidden,
            "ch_mult": list(spec.base.multipliers),
            "num_res_blocks": spec.base.blocks,
        }
        base = {
            "id": "vqgan",
            "embed_dim": spec.base.latent_channels,
            "n_embed": spec.base.codebook_size,
            "ddconfig": inner,
        }
    else:
        base = {
            "id": "vae",
            "embed_dim": spec.base.latent_channels,
            "ch": spec.base.hidden,
            "ch_mult": list(spec.base.multipliers),
            "num_res_blocks": spec.base.blocks,
            "encoder_attn_resolutions": list(spec.base.attention_at),
            "decoder_attn_resolutions": [],
            "resolution": spec.base.resolution,
            "latent_scale": spec.base.scale,
        }
    return {
        "system": "alit",
        "base_tokenizer": base,
        "adaptive_tokenizer": {
            "encoder_width": spec.width,
            "encoder_num_layers": spec.layers,
            "encoder_num_heads": spec.heads,
            "decoder_width": spec.decoder_width,
            "decoder_num_layers": spec.decoder_layers,
            "decoder_num_heads": spec.decoder_heads,
            "quantize_latent": spec.quantized,
            "factorize_latent": True,
            "vq_codebook_size": spec.codebook_size,
            "vq_token_dim": spec.code_dim,
            "vq_use_l2_norm": spec.l2_norm,
            "num_init_latent_tokens": spec.first_tokens,
            "img_size": spec.image_size,
            "patch_size": spec.patch_size,
            "max_rollout_iters": spec.iterations,
            "dynamic_halting": spec.halting,
            "dynamic_halting_threshold": spec.threshold,
            "train_stage": "full_finetuning",
        },
    }


def without_losses(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the tokenizer; the training losses that released files carry along are left out."""
    return {key: value for key, value in tensors.items() if not key.startswith(IGNORED)}


def unpack(content: object, source: Path) -> dict[str, Tensor]:
    """The state dict inside a released pickle: its entry ``ema``, or the pickle itself when it is flat.

    Raises:
        CorruptFileError: Neither.
    """
    return without_losses(select_weights(content, LANDMARKS, source))


def released_config(name: str) -> dict[str, Any]:
    """The ``config.json`` that belongs to a released file."""
    return config_from_spec(VARIANTS[name].spec)


def check_fits(name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse tensors that are not those of a released variant.

    Raises:
        UsageError: Lists what is missing, unexpected or of another shape.
    """
    load_network(on_meta(Alit, VARIANTS[name].spec), tensors, source)


def load_file(path: Path, spec: AlitSpec, *, allow_pickle: bool = False) -> Alit:
    """Load a file of tensors into an evaluating float32 network on the CPU.

    Raises:
        CorruptFileError: The file cannot be read, or holds tensors of another type, NaN or infinity.
        UsageError: The tensors do not fit the spec, or are a pickle that was not allowed.
    """
    tensors = without_losses(read_weights(path, LANDMARKS, allow_pickle=allow_pickle))
    return load_network(on_meta(Alit, spec), tensors, path, settings=SETTINGS)
