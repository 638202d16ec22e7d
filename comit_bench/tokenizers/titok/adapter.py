"""Adapter for TiTok: released files <-> model, uint8 images <-> messages.

A checkpoint is a directory with ``config.json`` (nodes ``model.vq_model`` and
``dataset.preprocessing.crop_size``) and ``model.safetensors`` (or, when allowed, ``pytorch_model.bin``), or a
single file of weights beside a preset name. Keys of ``config.json`` that older files omit have the defaults
of the released program; nodes that describe generators are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UsageError, shown
from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.sizes import DEPTH, HEADS, SIDE, TOKENS
from comit_bench.nn.vqgan import VqganSpec
from comit_bench.tokenizers.base import (
    Streams,
    TileReceiver,
    TokenizerInfo,
    Tokens,
    attention_in_tiles,
    check_codes,
    check_ids,
    computing,
    decode_tiles,
    encode_tiles,
    speed_up,
    split_options,
    switch_or_auto,
    to_uint8,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import load_network, on_meta, read_weights, write_checkpoint
from comit_bench.tokenizers.config_node import Node, blaming
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import WeightsOrigin, locate, random_network, spec_of, untrained
from comit_bench.tokenizers.titok.family import FAMILY
from comit_bench.tokenizers.titok.model import PRESETS, SIZES, Titok, TitokSpec, VitSize

LANDMARKS = ("latent_tokens", "encoder.transformer", "decoder.transformer", "quantize.embedding")
IGNORED = ("quantize.embed_prob", "pixel_encoder.")  # never needed to encode or decode
VERSION = "1"  # raised when the same weights and configuration may give other ids


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes; see :class:`TitokTokenizer`."""

    dtype: torch.dtype
    compile: bool | Literal["auto"]
    allow_pickle: bool


VQ_KEYS = (
    *("codebook_size", "token_size", "use_l2_norm", "vit_enc_model_size", "vit_dec_model_size"),
    *("vit_enc_patch_size", "vit_dec_patch_size", "num_latent_tokens", "finetune_decoder", "is_legacy"),
    "quantize_mode",
)
PIXEL_KEYS = ("channel_mult", "num_resolutions", "hidden_channels", "num_res_blocks", "z_channels")
IS_IT = "A TiTok config.json has model.vq_model and dataset.preprocessing."
_VQ = "model.vq_model."
# what in config.json decides about a tensor
SETTINGS = (
    (r"latent_tokens|.+\.latent_token_positional_embedding", f"{_VQ}num_latent_tokens and the model size"),
    (
        r"encoder\.(positional|patch_embed)",
        f"{_VQ}vit_enc_patch_size, dataset.preprocessing.crop_size, model size",
    ),
    (r"decoder\.positional", f"{_VQ}vit_dec_patch_size, dataset.preprocessing.crop_size and the model size"),
    (r"encoder\.conv_out|decoder\.decoder_embed", f"{_VQ}token_size and the model size"),
    (r"encoder", f"{_VQ}vit_enc_model_size (or reduced.encoder)"),
    (r"decoder", f"{_VQ}vit_dec_model_size (or reduced.decoder), is_legacy and vit_dec_patch_size"),
    (r"quantize", f"{_VQ}codebook_size and token_size"),
    (r"pixel", f"{_VQ}is_legacy (and reduced.pixel_decoder)"),
)


def _size(node: Node, key: str, reduced: Node, side: str) -> VitSize:
    """A named size, or the block ``reduced`` that small cases carry instead."""
    if side in reduced.values:
        own = reduced.node(side)
        own.check_keys(("width", "num_layers", "num_heads"))
        return VitSize(
            width=own.whole("width"),
            layers=own.whole("num_layers", high=DEPTH),
            heads=own.whole("num_heads", high=HEADS),
        )
    name = node.values.get(key)
    if not isinstance(name, str) or name not in SIZES:
        raise UsageError(
            f"{node.source}: {side} size {shown(name)} is not one of {', '.join(SIZES)}, and there is no "
            f"reduced.{side}"
        )
    return SIZES[name]


def _pixels(reduced: Node) -> VqganSpec:
    """Sizes of the pixel decoder: the released ones, or those of small cases."""
    if "pixel_decoder" not in reduced.values:
        return VqganSpec()
    node = reduced.node("pixel_decoder")
    node.check_keys(PIXEL_KEYS, unread=("resolution", "num_channels", "dropout"))
    count = node.whole("num_resolutions", high=8)
    return VqganSpec(
        hidden=node.whole("hidden_channels", high=8192),
        multipliers=node.wholes("channel_mult", high=64, length=count),
        blocks=node.whole("num_res_blocks", high=64),
        latent_channels=node.whole("z_channels", high=4096),
    )


def spec_from_config(config: Mapping[str, Any], source: Path) -> TitokSpec:
    """Read a released (or our own) ``config.json``."""
    top = Node(config, source)
    node, images = top.node("model.vq_model", IS_IT), top.node("dataset.preprocessing", IS_IT)
    node.check_keys(VQ_KEYS, unread=("commitment_cost",))
    mode = node.values.get("quantize_mode", "vq")
    if mode != "vq":
        raise UsageError(
            f"{source}: quantize_mode {shown(mode)}: only 'vq' is discrete; the VAE variants are continuous"
        )
    legacy, pixels = node.flag("is_legacy", True), node.flag("finetune_decoder", True)
    if legacy != pixels:
        raise UsageError(
            f"{source}: is_legacy {legacy} with finetune_decoder {pixels}: released tokenizers have both "
            "true (pixels from a VQGAN) or both false (RGB directly); a stage-1 file has no pixel decoder."
        )
    reduced = top.maybe("reduced")
    reduced.check_keys(("encoder", "decoder", "pixel_decoder"))
    with blaming(source):
        return TitokSpec(
            encoder=_size(node, "vit_enc_model_size", reduced, "encoder"),
            decoder=_size(node, "vit_dec_model_size", reduced, "decoder"),
            message_length=node.whole("num_latent_tokens", high=TOKENS),
            vocab_size=node.whole("codebook_size", high=1 << 24),
            code_dim=node.whole("token_size", high=4096),
            l2_norm=node.flag("use_l2_norm", True),
            image_size=images.whole("crop_size", high=SIDE),
            encoder_patch=node.whole("vit_enc_patch_size", high=1024),
            decoder_patch=node.whole("vit_dec_patch_size", high=1024),
            pixels=_pixels(reduced) if legacy else None,
        )


def config_from_spec(spec: TitokSpec) -> dict[str, Any]:
    """The inverse of :func:`spec_from_config`, in the released layout."""
    names = {size: name for name, size in SIZES.items()}
    node: dict[str, Any] = {
        "codebook_size": spec.vocab_size,
        "token_size": spec.code_dim,
        "use_l2_norm": spec.l2_norm,
        "commitment_cost": 0.25,
        "vit_enc_model_size": names.get(spec.encoder, "custom"),
        "vit_dec_model_size": names.get(spec.decoder, "custom"),
        "vit_enc_patch_size": spec.encoder_patch,
        "vit_dec_patch_size": spec.decoder_patch,
        "num_latent_tokens": spec.message_length,
        "finetune_decoder": spec.legacy,
        "is_legacy": spec.legacy,
        "quantize_mode": "vq",
    }
    config: dict[str, Any] = {
        "model": {"vq_model": node},
        "dataset": {"preprocessing": {"crop_size": spec.image_size}},
    }
    reduced: dict[str, Any] = {}
    for side, size in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        if size not in names:
            sizes = asdict(size)
            reduced[side] = {k if k == "width" else f"num_{k}": v for k, v in sizes.items()}
    if spec.pixels is not None and spec.pixels != VqganSpec():
        reduced["pixel_decoder"] = {
            "channel_mult": list(spec.pixels.multipliers),
            "num_resolutions": len(spec.pixels.multipliers),
            "hidden_channels": spec.pixels.hidden,
            "num_res_blocks": spec.pixels.blocks,
            "z_channels": spec.pixels.latent_channels,
        }
    return {**config, "reduced": reduced} if reduced else config


def save(
    model: Titok,
    directory: Path,
    *,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint directory in the released layout; a ``config`` that is given is written verbatim."""
    write_checkpoint(directory, model.state_dict(), config or config_from_spec(model.spec), dtype)


class TitokTokenizer:
    """TiTok behind the tokenizer contract.

    Args:
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; the last layer and the quantizer
            stay in float32.
        compile: Compile the pixel decoder: ``auto`` is on CUDA when Triton is installed.
    """

    decodes_with_noise = False

    def __init__(
        self,
        model: Titok,
        info: TokenizerInfo,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compile: bool | str = "auto",
    ) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.device = device
        self.dtype = dtype
        self.info = info
        info.options["dtype"] = str(dtype).split(".")[-1]
        compiled = switch_or_auto(compile, "compile")
        if model.pixel_decoder is not None:
            speed_up(model.pixel_decoder, device, compiled=compiled)

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; nothing about it is random."""
        warn_policy(self.info.name, policy)
        return encode_tiles(self, lambda images: Tokens(*self.model.encode(images.div(255))), images_u8)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.model.quantize.size)
        return self.model.quantize.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        check_codes(tokens.codes, self.info)
        return decode_tiles(self, lambda codes: to_uint8(self.model.decode(codes)), tokens.codes)

    @property
    def attention_layers(self) -> int:
        return self.model.spec.decoder.layers

    def attention_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """Empty: the decoder is a single pass."""
        return ()

    def attention(
        self, tokens: Tokens, request: AttentionRequest, receive: TileReceiver, *, seeds: Sequence[int]
    ) -> None:
        """How much every decoded position looks at every token, [b, heads, K, G, G]; see the contract."""

        def tile(codes: Tensor, hand_on: MapReceiver) -> None:
            with computing(self):
                self.model.decoder.attention(codes.to(self.device), request, hand_on)

        attention_in_tiles(tile, receive, tokens.codes)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` in the released layout."""
        save(self.model, directory)


def _info(model: Titok, origin: WeightsOrigin) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        family="titok",
        kind="learned",
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=spec.vocab_size,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"resize_short({spec.image_size},bicubic)|center_crop({spec.image_size})",
        configuration=configuration_digest(spec),
        version=VERSION,
        **asdict(origin),
    )


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> TitokTokenizer:
    """Load a TiTok tokenizer; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: ``titok-l-32`` … ``titok-sl-256``, ``titok-nano``, a hub id, or a checkpoint directory.
        **options: ``allow_pickle``; the others are passed to :class:`TitokTokenizer`.
    """
    settings, allow = split_options(options, _Options, "TiTok")
    if weights == "random":
        spec, origin = spec_of(name, PRESETS), untrained(name.lower(), seed)
        model = random_network(Titok, spec, device, seed, spread=True)
    else:
        place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow)
        path, config, spec = place.read(PRESETS, spec_from_config)
        tensors = read_weights(path, LANDMARKS, allow_pickle=allow)
        kept = {k: v for k, v in tensors.items() if not k.startswith(IGNORED)}
        model = load_network(on_meta(Titok, spec), kept, path, settings=SETTINGS)
        origin = place.origin(path, config, PRESETS)
    return TitokTokenizer(model, _info(model, origin), device=device, **settings)
