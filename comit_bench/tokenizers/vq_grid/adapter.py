"""Adapter for vq-grid: our own files <-> model, uint8 images <-> messages.

A checkpoint is a directory with ``config.json`` (``family``, the sizes under ``model``, facts about the
weights under ``comit_bench``) and ``model.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.files import write_atomic
from comit_bench.nn.sizes import DEPTH, SIDE, WIDTH
from comit_bench.tokenizers.base import (
    TokenizerInfo,
    Tokens,
    check_codes,
    check_ids,
    decode_tiles,
    encode_tiles,
    refuse_unknown,
    switch,
    to_uint8,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    WEIGHT_FILES,
    as_stored,
    load_network,
    read_config,
    read_weights,
    weight_file,
    write_tensors,
)
from comit_bench.tokenizers.config_node import Node
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import Origin, locate, spec_of, untrained
from comit_bench.tokenizers.vq_grid.family import FAMILY
from comit_bench.tokenizers.vq_grid.model import PRESETS, VqGrid, VqGridSpec

VERSION = "1"  # raised when the same weights and configuration may give other ids


class Options(TypedDict, total=False):
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
    try:
        return VqGridSpec(**sizes, fsq_levels=node.levels("fsq_levels"))
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{source}: {error}") from error


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
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        model: The network.
        directory: Made if absent.
        extra: Facts about the weights: ``trained``, ``training_data``, ``weights_licence``, ``steps``,
            ``group``.
        dtype: Of the stored weights; loading always gives float32.
    """
    config = config_from_spec(model.spec) | ({"comit_bench": dict(extra)} if extra else {})
    write_tensors(directory / WEIGHT_FILES[0], as_stored(model.state_dict(), dtype))
    write_atomic(directory / "config.json", json.dumps(config, indent=1) + "\n")


def build(spec: VqGridSpec, *, empty: bool = False) -> VqGrid:
    """Make the network; ``empty`` leaves the weights on the meta device, to be loaded."""
    with torch.device("meta") if empty else nullcontext():
        return VqGrid(spec)


def load_file(path: Path, spec: VqGridSpec, *, allow_pickle: bool = False) -> VqGrid:
    """Load a file of weights into an evaluating float32 network on the CPU.

    Raises:
        CorruptFileError: The file cannot be read, or holds tensors of another type, NaN or infinity.
        UsageError: The weights do not fit the spec, or are a pickle that was not allowed.
    """
    tensors = read_weights(path, LANDMARKS, allow_pickle=allow_pickle)
    model = build(spec, empty=True)
    load_network(model, tensors, path, settings=SETTINGS)
    return model.eval()


def load_directory(directory: Path, *, allow_pickle: bool = False) -> tuple[VqGrid, dict[str, Any]]:
    """Load a checkpoint directory; see :func:`load_file`. Also returns its raw config.

    Raises:
        MissingError: Files are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The config is wrong or the weights do not fit it.
    """
    config = read_config(directory)
    spec = spec_from_config(config, directory / "config.json")
    return load_file(weight_file(directory), spec, allow_pickle=allow_pickle), config


class VqGridTokenizer:
    """vq-grid behind the tokenizer contract.

    Args:
        model: Network in eval mode.
        info: Its description.
        device: Where it runs.
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

    def encode(
        self,
        images_u8: Tensor,
        *,
        policy: str | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tokens:
        """Tokenize uint8 [B, 3, S, S]; nothing about it is random.

        Raises:
            ValueError: Wrong shape or type.
        """
        warn_policy(self.info.name, policy)
        return encode_tiles(self, lambda images: Tokens(*self.model.encode(images.div(255))), images_u8)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Integers [..., K] -> float32 [..., K, d].

        Raises:
            ValueError: An id outside the vocabulary.
        """
        check_ids(ids, self.model.quantizer.vocab_size)
        return self.model.quantizer.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages -> uint8 [B, 3, S, S]; the seeds change nothing.

        Raises:
            ValueError: Codes of another shape.
        """
        check_codes(tokens.codes, self.info)
        return decode_tiles(self, lambda codes: to_uint8(self.model.decode(codes)), tokens.codes)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors``; :func:`load` takes the folder."""
        info = self.info
        extra = {"trained": info.trained, "training_data": info.training_data}
        extra |= {"group": info.group} if info.group else {}
        save(self.model, directory, extra={**extra, "weights_licence": info.weights_licence})


def _info(model: VqGrid, origin: Origin) -> TokenizerInfo:
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


def _random(name: str, device: torch.device, seed: int) -> tuple[VqGrid, TokenizerInfo]:
    model = build(spec_of(name, PRESETS), empty=device.type == "meta")
    if device.type != "meta":
        model.init_weights(torch.Generator().manual_seed(seed))
    return model, _info(model, untrained(name.lower(), seed))


def _stored(
    name: str, weights: str | None, *, offline: bool, allow_pickle: bool
) -> tuple[VqGrid, TokenizerInfo]:
    place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow_pickle)
    path, config, spec = place.read(PRESETS, spec_from_config)
    model = load_file(path, spec, allow_pickle=allow_pickle)
    return model, _info(model, place.origin(path, config, PRESETS))


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> VqGridTokenizer:
    """Load a vq-grid tokenizer.

    Args:
        name: ``vq-grid-nano``, a hub id, or a checkpoint directory.
        weights: Checkpoint directory, a file of weights (with a preset name), ``random`` (untrained), or
            None: the directory, or what ships.
        device: Where it runs.
        offline: Never ask the hub.
        seed: Of random weights.
        **options: ``dtype`` and ``allow_pickle``.

    Raises:
        MissingError: No such directory.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    refuse_unknown(options, Options.__annotations__, FAMILY.name)
    settings: dict[str, Any] = {**options}
    allow = switch(settings.pop("allow_pickle", False), "allow_pickle")
    if weights == "random":
        model, info = _random(name, device, seed)
    else:
        model, info = _stored(name, weights, offline=offline, allow_pickle=allow)
    return VqGridTokenizer(model, info, device=device, **settings)
