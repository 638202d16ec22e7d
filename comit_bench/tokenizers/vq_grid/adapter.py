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

from comit_bench.errors import MissingError, UsageError, did_you_mean
from comit_bench.files import shipped_weights, write_atomic
from comit_bench.nn.sizes import DEPTH, SIDE, WIDTH
from comit_bench.tokenizers.base import (
    TokenizerInfo,
    Tokens,
    check_ids,
    decode_pixels,
    encode_pixels,
    refuse_unknown,
    switch,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    WEIGHT_FILES,
    as_stored,
    checkpoint_path,
    described,
    load_network,
    read_config,
    read_weights,
    single_file_spec,
    weight_file,
    weights_digest,
    write_tensors,
)
from comit_bench.tokenizers.config_node import Facts, Node, read_facts
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.vq_grid.model import PRESETS, VqGrid, VqGridSpec

FAMILY = "vq-grid"
VERSION = "1"  # raised when the same weights and configuration may give other ids


class Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes."""

    dtype: torch.dtype
    allow_pickle: bool


OPTIONS = tuple(Options.__annotations__)


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
    """Read ``config.json``.

    Raises:
        UsageError: Another family, or a size that is missing, unknown, of another type or does not fit.
    """
    if config.get("family") != FAMILY or not isinstance(config.get("model"), dict):
        raise UsageError(f"{source}: expected family {FAMILY!r} and a node 'model' with the sizes")
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
    return {"family": FAMILY, "model": {**asdict(spec), "fsq_levels": list(spec.fsq_levels)}}


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
        extra: Facts about the weights: ``trained``, ``training_data``, ``weights_licence``, ``steps``.
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

    def encode_flops(self, policy: str | None) -> float:
        """FLOPs per image of the encoder, for estimates (attention and linear layers)."""
        spec = self.model.spec

        def call(n: int, width: int) -> float:
            return 24.0 * n * width**2 + 4.0 * n**2 * width

        outer = spec.depth * call(4 * spec.message_length, spec.width)
        return outer + spec.inner_depth * call(spec.message_length, spec.inner_width)

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
        return encode_pixels(self.model.encode, images_u8, self.info, device=self.device, dtype=self.dtype)

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
        return decode_pixels(self.model.decode, tokens, self.info, device=self.device, dtype=self.dtype)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors``; :func:`load` takes the folder."""
        info = self.info
        extra = {"trained": info.trained, "training_data": info.training_data}
        save(self.model, directory, extra={**extra, "weights_licence": info.weights_licence})


def _info(model: VqGrid, name: str, weights: str, facts: Facts, revision: str | None = None) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        name=name,
        family=FAMILY,
        kind="learned",
        revision=revision,
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=model.quantizer.vocab_size,
        code_dim=len(spec.fsq_levels),
        resolution=spec.image_size,
        preprocessing=f"center_crop|resize({spec.image_size},bilinear)",
        trained=facts.trained,
        training_data=facts.training_data or "unknown",
        weights_licence=facts.weights_licence or "unknown",
        configuration=configuration_digest(spec),
        version=VERSION,
    )


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> VqGridTokenizer:
    """Load a vq-grid tokenizer by preset name or directory.

    Args:
        name: ``vq-grid-nano`` or a checkpoint directory.
        weights: Checkpoint directory, a file of weights (with a preset name), ``random`` (untrained), or
            None: the directory, or what ships.
        device: Where it runs.
        offline: Nothing is ever fetched, so it makes no difference.
        seed: Of random weights.
        **options: ``dtype`` and ``allow_pickle``.

    Raises:
        MissingError: No such directory.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    refuse_unknown(options, OPTIONS, FAMILY)
    settings: dict[str, Any] = {**options}
    allow = switch(settings.pop("allow_pickle", False), "allow_pickle")
    preset = name.lower()
    if weights == "random":
        if preset not in PRESETS:
            raise UsageError(
                f"--weights random needs a preset, not {preset!r}.{did_you_mean(preset, PRESETS)}"
            )
        model = build(PRESETS[preset], empty=device.type == "meta")
        if device.type != "meta":
            model.init_weights(torch.Generator().manual_seed(seed))
        nothing = Facts(trained=False, training_data="none", weights_licence="none")
        info = _info(model, preset, f"random:{seed}", nothing)
        return VqGridTokenizer(model, info, device=device, **settings)
    local = checkpoint_path(weights or name)
    if weights is None and preset in PRESETS and not local.is_dir():
        local = shipped_weights(preset)
    if not local.is_dir() and not (weights and local.is_file()):
        raise MissingError(f"{local}: no such directory. Give one with config.json and {WEIGHT_FILES[0]}.")
    config: dict[str, Any] = {}
    if local.is_dir():
        path = weight_file(local)
        model, config = load_directory(local, allow_pickle=allow)
    else:
        path = local
        model = load_file(path, single_file_spec(name, local, PRESETS), allow_pickle=allow)
    label, revision = described(name, local, PRESETS)
    facts = read_facts(config, local / "config.json")
    info = _info(model, label, weights_digest(path), facts, revision)
    return VqGridTokenizer(model, info, device=device, **settings)
