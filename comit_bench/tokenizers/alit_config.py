"""ALIT's names, released variants and ``config.json``, and loading a checkpoint into a network.

The original program has no config file: its constructor arguments stand under ``base_tokenizer`` and
``adaptive_tokenizer``, as in the parity cases, and :func:`config_from_spec` writes them for released files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.models.alit import Alit, AlitSpec, variant
from comit_bench.models.alit_base import VaeSpec
from comit_bench.models.maskgit_vqgan import VqganSpec
from comit_bench.tokenizers.checkpoints import load_checked, read_config, read_tensors, weight_file

IGNORED = ("gan_losses.",)  # training losses in the released files, with networks of their own
IN1K, IN100 = "ImageNet-1k train", "ImageNet-100 train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What a name stands for: preset, base tokenizer, codebook or none, training data."""

    preset: str
    base: str = "vqgan"
    quantized: bool = True
    data: str = IN100

    @property
    def spec(self) -> AlitSpec:
        """Sizes of the network."""
        return variant(self.preset, base=self.base, quantized=self.quantized)


VARIANTS: dict[str, Variant] = {
    "alit-small": Variant(preset="alit-small", data=IN1K),
    "alit-small-in100": Variant(preset="alit-small"),
    "alit-base": Variant(preset="alit-base"),
    "alit-semilarge": Variant(preset="alit-semilarge"),
    "alit-small-continuous": Variant(preset="alit-small", quantized=False),
    "alit-small-vae": Variant(preset="alit-small", base="vae"),
    "alit-small-vae-continuous": Variant(preset="alit-small", base="vae", quantized=False),
}


def choose_variant(name: str, base: str | None, latent: str | None) -> tuple[str, Variant]:
    """Apply the options ``base`` and ``latent`` to a name; a combination may have no released file.

    Raises:
        UsageError: Unknown option values.
    """
    known = VARIANTS[name]
    for option, value, allowed in (
        ("base", base, ("vqgan", "vae")),
        ("latent", latent, ("quantized", "continuous")),
    ):
        if value is not None and value not in allowed:
            raise UsageError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    wanted = replace(
        known,
        base=base or known.base,
        quantized=known.quantized if latent is None else latent == "quantized",
    )
    if wanted == known:
        return name, known
    for other, candidate in VARIANTS.items():
        if candidate == replace(wanted, data=candidate.data):
            return other, candidate
    parts = [known.preset, *(["vae"] if wanted.base == "vae" else [])]
    return "-".join([*parts, *([] if wanted.quantized else ["continuous"])]), wanted


def _base_spec(node: Mapping[str, Any]) -> VqganSpec | VaeSpec:
    kind = node.get("id")
    if kind == "vqgan":
        inner = node.get("ddconfig", {})
        default = VqganSpec()
        return VqganSpec(
            hidden=inner.get("ch", default.hidden),
            multipliers=tuple(inner.get("ch_mult", default.multipliers)),
            blocks=inner.get("num_res_blocks", default.blocks),
            latent_channels=inner.get("z_channels", node.get("embed_dim", default.latent_channels)),
            codebook_size=node.get("n_embed", default.codebook_size),
        )
    if kind == "vae":
        if node.get("decoder_attn_resolutions"):
            raise ValueError("base_tokenizer.decoder_attn_resolutions must be empty: no such model is known")
        plain = VaeSpec()
        return VaeSpec(
            hidden=node.get("ch", plain.hidden),
            multipliers=tuple(node.get("ch_mult", plain.multipliers)),
            blocks=node.get("num_res_blocks", plain.blocks),
            latent_channels=node.get("embed_dim", plain.latent_channels),
            attention_at=tuple(node.get("encoder_attn_resolutions", plain.attention_at)),
            resolution=node.get("resolution", plain.resolution),
            scale=node.get("latent_scale", plain.scale),
        )
    raise ValueError(f"base_tokenizer.id must be 'vqgan' or 'vae', got {kind!r}")


def spec_from_config(config: Mapping[str, Any], source: Path) -> AlitSpec:
    """Read a ``config.json``; what it leaves out has the released value.

    Raises:
        UsageError: Nodes are missing or contradict each other, or ask for an unreleased kind of model.
    """
    nodes = {key: config.get(key) for key in ("base_tokenizer", "adaptive_tokenizer")}
    for key, node in nodes.items():
        if not isinstance(node, dict):
            raise UsageError(
                f"{source}: node {key!r} should be a mapping, found {node!r}. Is this an ALIT checkpoint?"
            )
    node = dict(nodes["adaptive_tokenizer"] or {})
    try:
        if not node.get("factorize_latent", True):
            raise ValueError("factorize_latent = false is not supported: no such model was released")
        if node.get("train_stage", "full_finetuning") != "full_finetuning":
            raise ValueError(
                f"train_stage {node['train_stage']!r}: only fully finetuned (stage 2) models are supported"
            )
        base = _base_spec(nodes["base_tokenizer"] or {})
        return AlitSpec(
            width=node["encoder_width"],
            layers=node["encoder_num_layers"],
            heads=node["encoder_num_heads"],
            decoder_width=node["decoder_width"],
            decoder_layers=node["decoder_num_layers"],
            decoder_heads=node["decoder_num_heads"],
            base=base,
            quantized=node.get("quantize_latent", True),
            codebook_size=node.get("vq_codebook_size", 4096),
            code_dim=node.get("vq_token_dim", 12),
            l2_norm=node.get("vq_use_l2_norm", True),
            first_tokens=node.get("num_init_latent_tokens", 32),
            iterations=node.get("max_rollout_iters", 8),
            image_size=node.get("img_size", 256),
            patch_size=node.get("patch_size", 16),
            halting=node.get("dynamic_halting", True),
            threshold=node.get("dynamic_halting_threshold", 0.55 if isinstance(base, VqganSpec) else 0.025),
        )
    except KeyError as error:
        raise UsageError(f"{source}: adaptive_tokenizer has no {error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{source}: {error}") from error


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
    inner = content.get("ema", content) if isinstance(content, Mapping) else content
    if not isinstance(inner, Mapping) or not all(isinstance(v, Tensor) for v in inner.values()):
        raise CorruptFileError(
            f"{source}: expected a state dict, or a mapping with the entry 'ema' that is one"
        )
    return without_losses(inner)


def released_config(name: str) -> dict[str, Any]:
    """The ``config.json`` that belongs to a released file."""
    return config_from_spec(VARIANTS[name].spec)


def build(spec: AlitSpec, *, empty: bool = False) -> Alit:
    """Make the network; ``empty`` leaves the weights on the meta device, to be loaded."""
    with torch.device("meta" if empty else "cpu"):
        return Alit(spec)


def check_fits(name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse tensors that are not those of a released variant.

    Raises:
        UsageError: Lists what is missing, unexpected or of another shape.
    """
    load_checked(build(VARIANTS[name].spec, empty=True), tensors, source)


def load_file(path: Path, spec: AlitSpec) -> Alit:
    """Load a file of tensors into an evaluating float32 network on the CPU.

    Raises:
        CorruptFileError: The file cannot be read.
        UsageError: The tensors do not fit the spec.
    """
    model = build(spec, empty=True)
    load_checked(model, without_losses(read_tensors(path)), path)
    return model.eval()


def load_directory(directory: Path) -> tuple[Alit, dict[str, Any]]:
    """Load a checkpoint directory.

    Returns:
        The network and its raw config.

    Raises:
        MissingError: ``config.json`` or the weights are not there.
        CorruptFileError: A file cannot be read.
        UsageError: The weights do not fit the config.
    """
    config = read_config(directory)
    return load_file(weight_file(directory), spec_from_config(config, directory / "config.json")), config
