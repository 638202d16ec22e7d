"""Adapter for any diffusers ``VQModel``: a grid of discrete tokens from a convolutional autoencoder.

A checkpoint is a directory as diffusers writes it: ``config.json`` (``_class_name`` is ``VQModel``) and
``diffusion_pytorch_model.safetensors``. Tokens are read in raster order; the code of a token is its codebook
row, before ``post_quant_conv``.

Unusual: such a network takes images of any size, and the ``sample_size`` of its config is only a hint that
several released ones left at the class's default of 32. ``resolution=N`` overrides it, and is stored with
every score.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import torch
from diffusers import VQModel
from einops import rearrange
from torch import Tensor

from comit_bench.errors import MissingError, UsageError, shown
from comit_bench.nn.finite import observe
from comit_bench.nn.sizes import SIDE
from comit_bench.nn.vq import nearest
from comit_bench.tokenizers.base import (
    Streams,
    TokenizerInfo,
    Tokens,
    autocast,
    check_codes,
    check_ids,
    decode_tiles,
    encode_tiles,
    split_options,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    WEIGHT_FILES,
    checkpoint_path,
    described,
    load_network,
    modern_attention,
    read_config,
    read_weights,
    weight_file,
    weights_digest,
)
from comit_bench.tokenizers.config_node import Node
from comit_bench.tokenizers.hub import fetch_checkpoint
from comit_bench.tokenizers.identity import configuration_digest

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
VERSION = "1"  # raised when the same weights and configuration may give other ids


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes."""

    dtype: torch.dtype
    resolution: int
    allow_pickle: bool


LANDMARKS = ("encoder.conv_in", "decoder.conv_in", "quantize.embedding")
DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
KEYS = (
    *("act_fn", "block_out_channels", "down_block_types", "up_block_types", "in_channels", "out_channels"),
    *("latent_channels", "layers_per_block", "norm_num_groups", "norm_type", "num_vq_embeddings"),
    *("vq_embed_dim", "sample_size", "mid_block_add_attention", "lookup_from_codebook", "force_upcast"),
)
# what in config.json decides about a tensor
SETTINGS = (
    (r"quantize", "num_vq_embeddings and vq_embed_dim"),
    (r"(quant|post_quant)_conv", "latent_channels and vq_embed_dim"),
    (r".", "block_out_channels, layers_per_block and the block types"),
)
DEFAULT_SAMPLE_SIZE = 32  # of the diffusers class, whatever the network was trained on
_log = logging.getLogger(__name__)


def check_config(config: dict[str, Any], source: Path) -> int:
    """Look at every size before diffusers builds from it; the pixels per token, on one side."""
    if config.get("_class_name") != "VQModel":
        raise UsageError(f"{source}: _class_name is {shown(config.get('_class_name'))}, expected 'VQModel'")
    node = Node(config, source)
    node.check_keys(KEYS, unread=("_class_name", "_diffusers_version", "_name_or_path", "scaling_factor"))
    widths = node.wholes("block_out_channels", (64,), high=8192)
    groups = node.whole("norm_num_groups", 32, high=8192)
    if any(width % groups for width in widths):
        raise node.wrong("block_out_channels", f"be multiples of norm_num_groups ({groups})", list(widths))
    for key, allowed in (("down_block_types", DOWN), ("up_block_types", UP)):
        blocks = node.values.get(key, [allowed[0]])
        if (
            not isinstance(blocks, list)
            or len(blocks) != len(widths)
            or any(b not in allowed for b in blocks)
        ):
            raise node.wrong(
                key, f"list one of {', '.join(allowed)} for each of {len(widths)} levels", blocks
            )
    node.whole("layers_per_block", 1, high=16)
    for key, default, high in (("latent_channels", 3, 4096), ("num_vq_embeddings", 256, 1 << 24)):
        node.whole(key, default, high=high)
    if node.values.get("vq_embed_dim") is not None:
        node.whole("vq_embed_dim", high=4096)
    node.text("act_fn", "silu", allowed=("silu", "swish", "mish", "gelu", "relu"))
    node.text("norm_type", "group", allowed=("group", "spatial"))
    for key in ("mid_block_add_attention", "lookup_from_codebook", "force_upcast"):
        node.flag(key, True)
    if node.whole("in_channels", 3) != 3 or node.whole("out_channels", 3) != 3:
        raise UsageError(f"{source}: in_channels and out_channels must be 3 (RGB)")
    return 1 << (len(widths) - 1)


def read_spec(config: dict[str, Any], source: Path, resolution: object) -> tuple[int, int]:
    """Image side and tokens per side.

    Args:
        config: Content of ``config.json``.
        source: File named in errors.
        resolution: What the user asked for, or None.
    """
    factor = check_config(config, source)
    if resolution is None:
        stated = config.get("sample_size")
        resolution = Node(config, source).whole("sample_size", high=SIDE) if stated else DEFAULT_SAMPLE_SIZE
        if resolution == DEFAULT_SAMPLE_SIZE:
            _log.warning(
                "%s: sample_size is %d, the class's default, which may not be what the network was trained "
                "on: --option resolution=N sets it",
                source,
                resolution,
            )
    whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not whole or not factor <= cast(int, resolution) <= SIDE or cast(int, resolution) % factor:
        raise UsageError(
            f"--option resolution={shown(resolution)}: this VQModel makes one token of {factor} x {factor} "
            f"pixels, so the side must be a multiple of {factor}, up to {SIDE}"
        )
    return cast(int, resolution), cast(int, resolution) // factor


class VqModelTokenizer:
    """A diffusers ``VQModel`` behind the tokenizer contract.

    Args:
        grid: Tokens per side.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; the last layer and the search
            stay in float32.
    """

    decodes_with_noise = False

    def __init__(
        self,
        model: Any,
        info: TokenizerInfo,
        *,
        grid: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.grid = grid
        self.device = device
        self.dtype = dtype
        self.info = info
        info.options["dtype"] = str(dtype).split(".")[-1]

    @property
    def table(self) -> Tensor:
        """The codebook, float32 [V, d]."""
        weight: Tensor = self.model.quantize.embedding.weight
        return weight.float()

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; nothing about it is random."""
        warn_policy(self.info.name, policy)

        def tile(images: Tensor) -> Tokens:
            hidden = self.model.encoder(images.div(127.5).sub(1))
            with autocast(self.device, torch.float32):  # this decides the ids
                z = self.model.quant_conv(hidden.float())
                flat = rearrange(z, "b d h w -> (b h w) d")
                ids = nearest(flat, self.table).view(len(images), -1)
            return Tokens(ids, torch.nn.functional.embedding(ids, self.table))

        return encode_tiles(self, tile, images_u8)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.info.vocab_size or 0)
        return torch.nn.functional.embedding(ids.to(self.device), self.table)

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        check_codes(tokens.codes, self.info)
        spatial = self.model.config.get("norm_type", "group") == "spatial"

        def tile(codes: Tensor) -> Tensor:
            latents = rearrange(codes, "b (h w) d -> b d h w", h=self.grid)
            hidden = self.model.post_quant_conv(latents)
            image = self.model.decoder(hidden, latents if spatial else None).float()
            return observe("pixels", image).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)

        return decode_tiles(self, tile, tokens.codes)


def _directory(source: str, *, offline: bool) -> Path:
    """The checkpoint directory of that name, or of a hub id."""
    local = checkpoint_path(source)
    if local.is_file():
        raise UsageError(f"{source}: this is a file. Give the directory that holds {' and '.join(FILES)}.")
    if not local.is_dir():
        if "/" not in source or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise MissingError(f"{source}: no such directory. Give one that holds {' and '.join(FILES)}.")
        hint = "or pass --weights DIR"
        local = fetch_checkpoint(source, weights=FILES[1], offline=offline, hint=hint)
    return local


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> VqModelTokenizer:
    """Load a diffusers ``VQModel``; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: A directory, a hub id, or ``vqmodel`` together with ``weights``, which is one of them.
        **options: ``resolution`` in pixels (default: the config's ``sample_size``), ``allow_pickle``
            and ``dtype``.
    """
    settings, allow = split_options(options, _Options, "vqmodel")
    resolution = settings.pop("resolution", None)
    source = weights or name
    if source.lower() in ("vqmodel", "random"):
        raise UsageError(
            "vqmodel stands for any diffusers VQModel: name one with --weights DIR (or a hub id), or give "
            "the directory itself as the tokenizer. There are no weights of its own."
        )
    local = _directory(source, offline=offline)
    config = read_config(local)
    side, grid = read_spec(config, local / FILES[0], resolution)
    path = weight_file(local, (FILES[1], *WEIGHT_FILES))
    try:
        with torch.device("meta"):
            model: Any = cast(Any, VQModel).from_config(config)
        with torch.no_grad():  # costs nothing there
            model.quant_conv(model.encoder(torch.empty(1, 3, side, side, device="meta")))
    except Exception as error:  # diffusers checks little, and what it raises depends on its version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{local / FILES[0]}: diffusers makes no VQModel of it ({reason})") from error
    tensors = read_weights(path, LANDMARKS, allow_pickle=allow)
    load_network(model, modern_attention(tensors), path, settings=SETTINGS)
    size, dim = model.quantize.embedding.weight.shape
    label, revision = described(source, local, ())
    info = TokenizerInfo(
        name=label,
        family="vqmodel",
        kind="learned",
        revision=revision,
        weights=weights_digest(path),
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=grid * grid,
        vocab_size=size,
        code_dim=dim,
        resolution=side,
        preprocessing=f"resize_short({side},bicubic)|center_crop({side})",
        options={"resolution": str(side)},
        configuration=configuration_digest(dict(model.config)),
        version=VERSION,
    )
    return VqModelTokenizer(model, info, grid=grid, device=device, **settings)
