"""Adapter for vq-grid: our own files <-> model, uint8 images <-> messages.

A checkpoint is a directory with ``config.json`` (``family``, the sizes under ``model``, facts about the
weights under ``comit_bench``) and ``model.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.nn.sizes import DEPTH, SIDE, WIDTH
from comit_bench.tokenizers.base import (
    Streams,
    TokenizerInfo,
    Tokens,
    check_codes,
    check_ids,
    decode_tiles,
    encode_tiles,
    split_options,
    to_uint8,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import load_network, on_meta, read_weights, write_checkpoint
from comit_bench.tokenizers.config_node import Node, blaming
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import WeightsOrigin, locate, random_network, spec_of, untrained
from comit_bench.tokenizers.vq_grid.family import FAMILY
from comit_bench.tokenizers.vq_grid.model import PRESETS, VqGrid, VqGridSpec

VERSION = "1"  # raised when the same weights and configuration may give other ids


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes."""

    dtype: torch.dtype
    allow_pickle: bool


LANDMARKS = ("encoder.patch_embed", "decoder.embed")
# what in config.json decides about a tensor
SETTINGS = (
    (r"\w+\.inner_blocks", "model.inner_depth and model.inner_width"),
    (r"\w+\.inner_positions", "model.image_size, model.patch and model.inner_width"),
    (r"\w+\.positions", "model.image_size, model.patch and model.width"),
    (r"\w+\.blocks", "model.depth and model.width"),
    (r"encoder\.head|decoder\.embed", "model.fsq_levels and model.inner_width"),
    (r"encoder\.patch_embed|decoder\.pixels", "model.patch and model.width"),
    (r".", "model.width and model.inner_width"),
)


def spec_from_config(config: Mapping[str, Any], source: Path) -> VqGridSpec:
    """Read ``config.json``."""
    if config.get("family") != FAMILY.name or not isinstance(config.get("model"), dict):
        raise UsageError(f"{source}: expected family {FAMILY.name!r} and a node 'model' with the sizes")
    node = Node(config, source).node("model")
    limits = {
        "image_size": SIDE,
        "patch": 1024,
        "width": WIDTH,
        "depth": DEPTH,
        "inner_width": WIDTH,
        "inner_depth": DEPTH,
        "head_dim": WIDTH,
    }
    node.check_keys((*limits, "fsq_levels"), strict=True)
    sizes = {key: node.whole(key, high=high) for key, high in limits.items()}
    with blaming(source):
        return VqGridSpec(**sizes, fsq_levels=node.levels("fsq_levels"))


def config_from_spec(spec: VqGridSpec) -> dict[str, Any]:
    """The inverse of :func:`spec_from_config`."""
    return {"family": FAMILY.name, "model": {**asdict(spec), "fsq_levels": list(spec.fsq_levels)}}


def save(
    model: VqGrid,
    directory: Path,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint directory.

    Args:
        model: The network.
        directory: Made if absent.
        extra: Facts about the weights: ``trained``, ``training_data``, ``weights_licence``, ``steps``,
            ``group``.
        dtype: Of the stored weights; loading always gives float32.
    """
    config = config_from_spec(model.spec) | ({"comit_bench": dict(extra)} if extra else {})
    write_checkpoint(directory, model.state_dict(), config, dtype)


class VqGridTokenizer:
    """vq-grid behind the tokenizer contract.

    Args:
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; the last layer and the quantizer
            stay in float32.
    """

    decodes_with_noise = False

    def __init__(
        self,
        model: VqGrid,
        info: TokenizerInfo,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.device, self.dtype, self.info = device, dtype, info
        info.options["dtype"] = str(dtype).split(".")[-1]

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; nothing about it is random."""
        warn_policy(self.info.name, policy)
        return encode_tiles(self, lambda images: Tokens(*self.model.encode(images.div(255))), images_u8)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.model.quantizer.vocab_size)
        return self.model.quantizer.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        check_codes(tokens.codes, self.info)
        return decode_tiles(self, lambda codes: to_uint8(self.model.decode(codes)), tokens.codes)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors``; :func:`load` takes the folder."""
        info = self.info
        extra = {"trained": info.trained, "training_data": info.training_data}
        extra |= {"group": info.group} if info.group else {}
        save(self.model, directory, extra={**extra, "weights_licence": info.weights_licence})


def _info(model: VqGrid, origin: WeightsOrigin) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        family=FAMILY.name,
        kind="learned",
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=model.quantizer.vocab_size,
        code_dim=len(spec.fsq_levels),
        resolution=spec.image_size,
        preprocessing=f"center_crop|resize({spec.image_size},bilinear)",
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
) -> VqGridTokenizer:
    """Load ``vq-grid-nano``, a hub id or a directory; see :class:`~comit_bench.tokenizers.base.Loader`."""
    settings, allow = split_options(options, _Options, FAMILY.name)
    if weights == "random":
        spec, origin = spec_of(name, PRESETS), untrained(name.lower(), seed)
        model = random_network(VqGrid, spec, device, seed)
    else:
        place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow)
        path, config, spec = place.read(PRESETS, spec_from_config)
        tensors = read_weights(path, LANDMARKS, allow_pickle=allow)
        model = load_network(on_meta(VqGrid, spec), tensors, path, settings=SETTINGS)
        origin = place.origin(path, config, PRESETS)
    return VqGridTokenizer(model, _info(model, origin), device=device, **settings)
