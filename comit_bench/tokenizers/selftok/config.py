"""SelfTok's released files and ``config.json`` -> sizes, tensors, schedule.

The original's configs are YAML files of a whole program and are not shipped with the weights. Here, as in
the parity cases, a ``config.json`` states what the tensors cannot: the kind of decoder, the numbers of
heads, the schedule of visible tokens, and the constructor arguments of the VAE. Sizes are read off the
tensors; where the config states one as well, both must agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from comit_bench.errors import UsageError, shown
from comit_bench.nn.sizes import HEADS, SIDE
from comit_bench.nn.state_dicts import check_types, compare, count_numbers
from comit_bench.nn.vae import KLVaeSpec
from comit_bench.tokenizers.checkpoints import on_meta, select_weights
from comit_bench.tokenizers.config_node import Node, blaming, kl_vae_spec
from comit_bench.tokenizers.selftok.model import (
    SD3_VAE,
    DecoderSpec,
    EncoderSpec,
    Schedule,
    Selftok,
    SelftokSpec,
    variant,
)

Shapes = Mapping[str, tuple[int, ...]]
KINDS = {"tokenizer": "diffusion", "renderer": "renderer"}  # config.json -> option decoder
ASSUMED_1024 = Schedule(counts=(384, 368, 144, 96, 32))  # twice those of 512: not published
_UNUSED = re.compile(
    r"diffusion\.|encoder\.final_layer_norm2?\.|model\.y_embedder\.|encoder\.quantizer\.(continuous|steps|count)$|"
    r"encoder\.quantizer\._codebook\.(initted|tpc_initted|cluster_size|cluster_size_wo_react|embed_avg|"
    r"timestep_p_over_c)$"
)
# Settings of the original that would change the arithmetic: only these values were released.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "encoder": {
        "qformer_mode": ("dual",),
        "time_adaln": (True,),
        "bidirectional": (False,),
        "pre_norm": (False,),
        "post_norm": (True,),
        "qk_norm": (False, None, "None"),
        "attn_mask": (False,),
    },
    "decoder": {"time_adaln": ("pos_emb",), "qkv_bias": (True,), "qk_norm": (False, None, "None")},
}


KNOWN = {
    "": (
        *("system", "kind", "image_size", "k", "in_channels", "encoder", "quantizer", "decoder"),
        *("context_see_xt", "num_steps", "stages", "k_per_stage", "vae"),
    ),
    "encoder": (
        *("patch_size", "hidden_size", "num_heads", "query_dim", "query_heads", "depth", "mlp_ratio"),
        *("pos_embed_max_size", *_FIXED["encoder"]),
    ),
    "decoder": (
        *("patch_size", "hidden_size", "num_heads", "depth", "mlp_ratio", "pos_embed_max_size"),
        *_FIXED["decoder"],
    ),
    "quantizer": ("codebook_size", "code_dim"),
}
UNREAD = ("repeat", "encoder_hidden_size", "batch", "family", "comit_bench")
LANDMARKS = ("encoder.query_tokens", "encoder.blocks", "model.joint_blocks")
# what in config.json decides about a tensor
SETTINGS = (
    (r"encoder", "the node encoder (depth, hidden_size, query_dim)"),
    (r"model", "the node decoder (depth, hidden_size)"),
    (r"vae", "the node vae"),
)


def depth_of(keys: Mapping[str, Any], prefix: str) -> int:
    """Blocks below a prefix; numbers with gaps count as what is there, and what is missing is told later."""
    return count_numbers(keys, re.escape(prefix) + r"(\d+)\.")


def is_renderer(keys: Mapping[str, Any]) -> bool:
    """Whether these tensors hold the one-step decoder."""
    return "model.mask_token" in keys


def used(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that encoding and decoding read."""
    last = depth_of(tensors, "model.joint_blocks.") - 1
    skipped = [f"model.joint_blocks.{last}.context_block.t_embedder."]
    if is_renderer(tensors):
        skipped.append("model.pos_embed")
    return {k: v for k, v in tensors.items() if not (_UNUSED.match(k) or k.startswith(tuple(skipped)))}


def unpack(content: object, source: Path) -> dict[str, Tensor]:
    """The state dict inside a released pickle: flat, or under ``state_dict``; averages are left alone.

    Raises:
        CorruptFileError: Neither.
    """
    return used(select_weights(content, LANDMARKS, source, average=False))


def _dimension(shapes: Shapes, key: str, axis: int, rank: int, source: Path) -> int:
    shape = shapes.get(key)
    if shape is None or len(shape) != rank:
        what = "is missing" if shape is None else f"has the shape {list(shape)}, expected {rank} axes"
        raise UsageError(f"{source}: {key} {what}. This is no whole SelfTok checkpoint.")
    if shape[axis] < 1:
        raise UsageError(f"{source}: {key} has the empty shape {list(shape)}")
    return shape[axis]


def _side(count: int, key: str, source: Path) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise UsageError(f"{source}: {key} has {count} positions, which is no square")
    return side


class _Node(Node):
    """One mapping of the config; what it states must agree with the tensors."""

    def __init__(self, config: Mapping[str, Any], name: str, source: Path) -> None:
        super().__init__(config.get(name, {}) if name else config, source, name)
        self.check_keys(KNOWN[name], unread=UNREAD)
        for key, allowed in _FIXED.get(name, {}).items():
            value = self.values.get(key, allowed[0])
            if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
                raise UsageError(
                    f"{source}: {self.label(key)} is {shown(value)}: only {allowed[0]!r} was released and is "
                    "computed"
                )

    def agree(self, key: str, found: float) -> None:
        stated = self.values.get(key, found)
        if isinstance(stated, bool) or not isinstance(stated, int | float) or stated != found:
            raise UsageError(
                f"{self.source}: {self.label(key)} is {shown(stated)}, but the tensors have {found:g}. "
                "Config and weights do not belong together."
            )


def _numbers(value: object, what: str) -> tuple[int, ...]:
    """``"200,400"``, ``[200, 400]`` or ``200`` -> whole numbers."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        return tuple(int(str(part).strip()) for part in parts)
    except ValueError as error:
        raise UsageError(f"{what}: expected whole numbers separated by commas, got {shown(value)}") from error


def read_schedule(stages: object, counts: object, what: str) -> Schedule:
    """Stage ends and tokens per stage, as text or lists."""
    with blaming(what):
        return Schedule(ends=_numbers(stages, what), counts=_numbers(counts, what))


def _schedule(config: Mapping[str, Any], tokens: int, source: Path) -> Schedule | None:
    """What the config states, or what was released for as many tokens."""
    if config.get("k_per_stage") is not None:
        found = read_schedule(config.get("stages", Schedule().ends), config["k_per_stage"], str(source))
        if sum(found.counts) != tokens or found.ends[-1] != 1000:
            raise UsageError(
                f"{source}: k_per_stage must add up to {tokens} tokens, and the last of the stages end at "
                f"1000; found {shown(list(found.counts))} and {shown(list(found.ends))}"
            )
        return found
    released = Schedule()
    return released if tokens == sum(released.counts) else None


def vae_spec(config: Mapping[str, Any], source: Path) -> KLVaeSpec:
    """Sizes of a VAE from its constructor arguments (a diffusers ``config.json``)."""
    node = Node(config, source)
    for key, wanted in (("scaling_factor", SD3_VAE.scale), ("shift_factor", SD3_VAE.shift)):
        stated = config.get(key)
        if stated is not None and node.number(key, low=-1e6, high=1e6) != wanted:
            raise UsageError(
                f"{source}: the VAE's {key} is {stated}, but SelfTok's latents have {wanted}: another VAE?"
            )
    convolutions = [node.flag(f"use_{part}_conv", True) for part in ("quant", "post_quant")]
    if convolutions[0] != convolutions[1]:
        raise UsageError(f"{source}: a VAE with only one of its two quant convolutions is not supported")
    plain = KLVaeSpec(widths=(64,), layers=1, scale=SD3_VAE.scale, shift=SD3_VAE.shift)  # diffusers' defaults
    return kl_vae_spec(node, plain, quant_convs=convolutions[0])


def _encoder(config: Mapping[str, Any], shapes: Shapes, source: Path) -> EncoderSpec:
    node = _Node(config, "encoder", source)
    node.agree("patch_size", _dimension(shapes, "encoder.x_embedder.proj.weight", 2, 4, source))
    width = _dimension(shapes, "encoder.x_embedder.proj.weight", 0, 4, source)
    query_width = _dimension(shapes, "encoder.query_tokens", 2, 3, source)
    hidden = _dimension(shapes, "encoder.blocks.0.mlp.fc1.weight", 0, 2, source)
    positions = _dimension(shapes, "encoder.pos_embed", 1, 3, source)
    spec = EncoderSpec(
        width=width,
        heads=node.whole("num_heads", EncoderSpec().heads, high=HEADS),
        query_width=query_width,
        query_heads=node.whole("query_heads", EncoderSpec().query_heads, high=HEADS),
        depth=depth_of(shapes, "encoder.blocks."),
        mlp_ratio=hidden / width,
        grid=_side(positions, "encoder.pos_embed", source),
    )
    for key, value in (
        ("hidden_size", spec.width),
        ("query_dim", spec.query_width),
        ("depth", spec.depth),
        ("mlp_ratio", spec.mlp_ratio),
        ("pos_embed_max_size", spec.grid),
    ):
        node.agree(key, value)
    return spec


def _decoder(config: Mapping[str, Any], shapes: Shapes, source: Path) -> DecoderSpec:
    node = _Node(config, "decoder", source)
    node.agree("patch_size", _dimension(shapes, "encoder.x_embedder.proj.weight", 2, 4, source))
    width = _dimension(shapes, "model.context_embedder.weight", 0, 2, source)
    hidden = _dimension(shapes, "model.joint_blocks.0.x_block.mlp.fc1.weight", 0, 2, source)
    grid = node.whole("pos_embed_max_size", DecoderSpec().grid, high=SIDE)
    if not is_renderer(shapes):
        positions = _dimension(shapes, "model.pos_embed", 1, 3, source)
        grid = _side(positions, "model.pos_embed", source)
        node.agree("pos_embed_max_size", grid)
    spec = DecoderSpec(
        width=width,
        heads=node.whole("num_heads", max(width // 64, 1), high=HEADS),
        depth=depth_of(shapes, "model.joint_blocks."),
        mlp_ratio=hidden / width,
        grid=grid,
    )
    for key, value in (("hidden_size", width), ("depth", spec.depth), ("mlp_ratio", spec.mlp_ratio)):
        node.agree(key, value)
    return spec


def spec_from_config(
    config: Mapping[str, Any], shapes: Shapes, source: Path, vae: KLVaeSpec | None
) -> SelftokSpec:
    """Everything that config and tensors say.

    Args:
        config: Content of ``config.json``, or nothing.
        shapes: Key -> shape of the tensors.
        source: File named in errors.
        vae: Sizes of the VAE, or None for a network of latents only.
    """
    top, codes = _Node(config, "", source), _Node(config, "quantizer", source)
    kind = "renderer" if is_renderer(shapes) else "diffusion"
    if "kind" in config and KINDS[top.text("kind", allowed=tuple(KINDS))] != kind:
        raise UsageError(
            f"{source}: kind is {config['kind']!r}, but the tensors are those of a {kind} decoder"
        )
    tokens = _dimension(shapes, "encoder.query_tokens", 1, 3, source)
    size, dim = (_dimension(shapes, "encoder.quantizer._codebook.embed", axis, 3, source) for axis in (1, 2))
    patch_weight = "encoder.x_embedder.proj.weight"
    channels, patch = (_dimension(shapes, patch_weight, axis, 4, source) for axis in (1, 2))
    for node, key, value in (
        (top, "k", tokens),
        (top, "in_channels", channels),
        (codes, "codebook_size", size),
        (codes, "code_dim", dim),
    ):
        node.agree(key, value)
    projects = "encoder.quantizer.project_out.weight" in shapes
    mask = shapes.get("model.mask_token", (1, 1, 1))
    sees = config.get("context_see_xt", kind == "diffusion")
    if not isinstance(sees, bool):
        raise UsageError(f"{source}: context_see_xt must be true or false, found {sees!r}")
    with blaming(source):
        spec = SelftokSpec(
            tokens=tokens,
            kind="renderer" if kind == "renderer" else "diffusion",
            image_size=top.whole("image_size", SelftokSpec().image_size, high=SIDE),
            channels=channels,
            patch=patch,
            encoder=_encoder(config, shapes, source),
            decoder=_decoder(config, shapes, source),
            vocab_size=size,
            quantizer_dim=dim,
            output_dim=shapes["encoder.quantizer.project_out.weight"][0] if projects else None,
            schedule=_schedule(config, tokens, source) if kind == "diffusion" else None,
            steps=top.whole("num_steps", SelftokSpec().steps, high=10_000),
            sees_image=None if sees == (kind == "diffusion") else sees,
            positional_mask=len(mask) == 3 and mask[1] > 1,
            vae=vae,
        )
    side, grids = spec.latent_side // patch, (spec.encoder.grid, spec.decoder.grid)
    if not 1 <= side <= min(grids):
        raise UsageError(
            f"{source}: images of {spec.image_size} px are {side} patches wide; the position tables have "
            f"{grids[0]} (encoder) and {grids[1]} (decoder)"
        )
    return spec


def config_from_spec(spec: SelftokSpec) -> dict[str, Any]:
    """What :func:`spec_from_config` reads, in the layout of the parity cases."""
    config: dict[str, Any] = {
        "system": "selftok",
        "kind": "renderer" if spec.kind == "renderer" else "tokenizer",
        "image_size": spec.image_size,
        "k": spec.tokens,
        "in_channels": spec.channels,
        "encoder": {
            "patch_size": spec.patch,
            "hidden_size": spec.encoder.width,
            "num_heads": spec.encoder.heads,
            "query_dim": spec.encoder.query_width,
            "query_heads": spec.encoder.query_heads,
            "depth": spec.encoder.depth,
            "mlp_ratio": spec.encoder.mlp_ratio,
            "pos_embed_max_size": spec.encoder.grid,
        },
        "quantizer": {"codebook_size": spec.vocab_size, "code_dim": spec.quantizer_dim},
        "decoder": {
            "patch_size": spec.patch,
            "hidden_size": spec.decoder.width,
            "num_heads": spec.decoder.heads,
            "depth": spec.decoder.depth,
            "mlp_ratio": spec.decoder.mlp_ratio,
            "pos_embed_max_size": spec.decoder.grid,
        },
        "context_see_xt": spec.context_sees_image,
    }
    if spec.kind == "diffusion":
        config["num_steps"] = spec.steps
    if spec.schedule is not None:
        config["stages"] = ",".join(map(str, spec.schedule.ends))
        config["k_per_stage"] = ",".join(map(str, spec.schedule.counts))
    if spec.vae is not None:
        config["vae"] = {
            "block_out_channels": list(spec.vae.widths),
            "layers_per_block": spec.vae.layers,
            "norm_num_groups": spec.vae.groups,
            "sample_size": spec.image_size,
            "latent_channels": spec.vae.channels,
            "scaling_factor": spec.vae.scale,
            "shift_factor": spec.vae.shift,
            "use_quant_conv": spec.vae.quant_convs,
            "use_post_quant_conv": spec.vae.quant_convs,
        }
    return config


def release_name(preset: str, decoder: str) -> str:
    """Name of the released file of a preset's decoder."""
    return f"{preset}-renderer" if decoder == "renderer" else preset


def released_spec(name: str) -> SelftokSpec:
    """Sizes of a released file."""
    preset = name.removesuffix("-renderer")
    return variant(preset, "renderer" if name != preset else "diffusion")


def released_config(name: str) -> dict[str, Any]:
    """The ``config.json`` that belongs to a released file; the VAE's is its own."""
    config = config_from_spec(released_spec(name))
    return {key: value for key, value in config.items() if key != "vae"}


def check_fits(name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse tensors that are not those of a released file.

    Raises:
        UsageError: Lists what is missing, unexpected or of another shape.
    """
    expected = on_meta(Selftok, released_spec(name)).own_state()
    compare(expected, tensors, source, what=f"the released {name}")
    check_types(expected, tensors, source)
