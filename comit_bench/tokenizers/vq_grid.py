"""Adapter for vq-grid: our own files <-> model, uint8 images <-> messages.

A checkpoint is a directory with ``config.json`` (``family``, the sizes under ``model``, facts about the
weights under ``comit_bench``) and ``model.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.errors import MissingError, UsageError, did_you_mean
from comit_bench.files import sha256_file, shipped_weights, write_atomic
from comit_bench.models.vq_grid import PRESETS, VqGrid, VqGridSpec
from comit_bench.tokenizers.base import (
    TokenizerInfo,
    Tokens,
    check_ids,
    decode_pixels,
    encode_pixels,
    refuse_unknown,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    WEIGHT_FILES,
    load_checked,
    read_config,
    read_tensors,
    weight_file,
    write_tensors,
)

FAMILY = "vq-grid"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def spec_from_config(config: Mapping[str, Any], source: Path) -> VqGridSpec:
    """Read ``config.json``.

    Raises:
        UsageError: Another family, or a size that is missing, unknown or does not fit.
    """
    node = config.get("model")
    if config.get("family") != FAMILY or not isinstance(node, dict):
        raise UsageError(f"{source}: expected family {FAMILY!r} and a node 'model' with the sizes")
    names = {field.name for field in fields(VqGridSpec)}
    for key in node.keys() ^ names:
        what = "missing" if key in names else f"unknown.{did_you_mean(str(key), names)}"
        raise UsageError(f"{source}: model.{key} is {what}")
    levels = node["fsq_levels"]
    if not isinstance(levels, list) or not all(map(_is_whole, levels)):
        raise UsageError(f"{source}: model.fsq_levels must list whole numbers, found {levels!r}")
    for key, value in node.items():
        if key != "fsq_levels" and not _is_whole(value):
            raise UsageError(f"{source}: model.{key} must be a whole number, found {value!r}")
    try:
        return VqGridSpec(**{**node, "fsq_levels": tuple(levels)})
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error


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
    write_tensors(directory / WEIGHT_FILES[0], {k: v.to(dtype) for k, v in model.state_dict().items()})
    write_atomic(directory / "config.json", json.dumps(config, indent=1) + "\n")


def build(spec: VqGridSpec, *, empty: bool = False) -> VqGrid:
    """Make the network; ``empty`` leaves the weights on the meta device, to be loaded."""
    with torch.device("meta") if empty else nullcontext():
        return VqGrid(spec)


def load_directory(directory: Path) -> tuple[VqGrid, dict[str, Any]]:
    """Load a checkpoint directory into an evaluating float32 network on the CPU, with its raw config.

    Raises:
        MissingError: Files are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The config is wrong or the weights do not fit it.
    """
    config = read_config(directory)
    model = build(spec_from_config(config, directory / "config.json"), empty=True)
    path = weight_file(directory)
    load_checked(model, read_tensors(path), path)
    return model.eval(), config


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


def _info(model: VqGrid, name: str, weights: str, extra: Mapping[str, Any]) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        name=name,
        family=FAMILY,
        kind="learned",
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=model.quantizer.vocab_size,
        code_dim=len(spec.fsq_levels),
        resolution=spec.image_size,
        preprocessing=f"center_crop|resize({spec.image_size},bilinear)",
        trained=bool(extra.get("trained", True)),
        training_data=str(extra.get("training_data", "unknown")),
        weights_licence=str(extra.get("weights_licence", "unknown")),
    )


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Any,
) -> VqGridTokenizer:
    """Load a vq-grid tokenizer by preset name or directory.

    Args:
        name: ``vq-grid-nano`` or a checkpoint directory.
        weights: Checkpoint directory, ``random`` (untrained), or None: the directory, or what ships.
        device: Where it runs.
        offline: Nothing is ever fetched, so it makes no difference.
        seed: Of random weights.
        **options: ``dtype``.

    Raises:
        MissingError: No such directory.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    refuse_unknown(options, ("dtype",), FAMILY)
    preset = name.lower()
    if weights == "random":
        if preset not in PRESETS:
            raise UsageError(
                f"--weights random needs a preset, not {preset!r}.{did_you_mean(preset, PRESETS)}"
            )
        model = build(PRESETS[preset], empty=device.type == "meta")
        if device.type != "meta":
            model.init_weights(torch.Generator().manual_seed(seed))
        nothing = {"trained": False, "training_data": "none", "weights_licence": "none"}
        info = _info(model, preset, f"random:{seed}", nothing)
        return VqGridTokenizer(model, info, device=device, **options)
    local = Path(weights or name).expanduser()
    if weights is None and preset in PRESETS and not local.is_dir():
        local = shipped_weights(preset)
    if not local.is_dir():
        raise MissingError(f"{local}: no such directory. Give one with config.json and {WEIGHT_FILES[0]}.")
    model, config = load_directory(local)
    label = preset if preset in PRESETS else (name if not Path(name).is_dir() else Path(name).resolve().name)
    info = _info(model, label, sha256_file(weight_file(local)), config.get("comit_bench", {}))
    return VqGridTokenizer(model, info, device=device, **options)
