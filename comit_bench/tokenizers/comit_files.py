"""Files of COMiT: ``config.json`` and ``model.safetensors`` as they were released <-> network.

A checkpoint is a directory with ``config.json`` (top-level nodes ``predictor``, ``quantizer``, ``vae``,
each with a class path and keyword arguments; classes are matched by the last part of the path) and
``model.safetensors`` under the released key names. What :func:`save` writes loads in the original
program and vice versa; settings that the original does not know (mask mode, crop geometry of small
images) stand in an extra node ``comit_bench`` that it never reads.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.errors import BenchError, UsageError
from comit_bench.files import write_atomic
from comit_bench.models.comit import Comit, ComitSpec
from comit_bench.models.crops import CropGeometry
from comit_bench.models.vae import build_vae
from comit_bench.tokenizers.checkpoints import (
    load_checked,
    modern_attention,
    read_config,
    read_tensors,
    weight_file,
    write_tensors,
)

LINEAR_VAES = {"stand_in_vae": "stand-in", "dct_vae": "dct"}  # class in config.json -> our name
VAE_HUB = {"sd-mse": "stabilityai/sd-vae-ft-mse", "sd-ema": "stabilityai/sd-vae-ft-ema"}
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
UNUSED = ("predictor.y_pos_offset", "predictor.c_final_layer.")  # in released files, never read
PREFIX = "comit.components"  # class paths as in the reference cases; only the last part is matched

PREDICTOR_DEFAULTS: dict[str, Any] = {
    "max_input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_msg_tokens": 16,
    "msg_tokens_dim": 64,
    "representation_layer": 8,
}


def _class_name(node: dict[str, Any]) -> str:
    return str(node.get("_target_", "")).rsplit(".", 1)[-1]


def _node(config: dict[str, Any], key: str, expected: str, source: Path) -> dict[str, Any]:
    node = config.get(key)
    if not isinstance(node, dict) or _class_name(node) != expected:
        raise UsageError(
            f"{source}: node {key!r} should be a {expected}, found {node!r}. Is this a COMiT checkpoint? "
            f"Its config.json has the nodes predictor, quantizer and vae."
        )
    return node


def spec_from_config(config: dict[str, Any], source: Path) -> ComitSpec:
    """Read a released (or our own) ``config.json``.

    Raises:
        UsageError: A node is missing, of another class, or its values contradict each other.
    """
    predictor = {**PREDICTOR_DEFAULTS, **_node(config, "predictor", "RuledDiT", source)}
    levels = tuple(_node(config, "quantizer", "FSQ", source).get("levels") or ())
    if predictor["msg_tokens_dim"] != len(levels):
        raise UsageError(
            f"{source}: predictor.msg_tokens_dim is {predictor['msg_tokens_dim']}, but quantizer.levels "
            f"{list(levels)} has {len(levels)} entries"
        )
    vae = config.get("vae")
    kind, factor = "none", 1
    if vae is not None:
        name = _class_name(vae)
        if name == "SDAutoencoderKL":
            kind, factor = f"sd-{vae.get('model_type')}", 8
            if kind not in VAE_HUB:
                raise UsageError(
                    f"{source}: vae.model_type must be 'mse' or 'ema', got {vae.get('model_type')!r}"
                )
        elif name in LINEAR_VAES:
            kind, factor = LINEAR_VAES[name], int(vae["factor"])
        else:
            raise UsageError(f"{source}: unknown vae class {name!r}: expected SDAutoencoderKL or null")
    extra = dict(config.get("comit_bench", {}))
    geometry = extra.pop("geometry", None)
    try:
        return ComitSpec(
            depth=predictor["depth"],
            width=predictor["hidden_size"],
            heads=predictor["num_heads"],
            message_length=predictor["num_msg_tokens"],
            fsq_levels=levels,
            mlp_ratio=predictor["mlp_ratio"],
            max_input_size=predictor["max_input_size"],
            patch_size=predictor["patch_size"],
            in_channels=predictor["in_channels"],
            out_channels=predictor["out_channels"],
            representation_layer=predictor["representation_layer"],
            mask_mode=extra.get("mask_mode", "additive"),
            vae=kind,
            vae_factor=factor,
            geometry=CropGeometry(**geometry) if geometry else CropGeometry(),
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"{source}: {error}") from error


def config_from_spec(spec: ComitSpec) -> dict[str, Any]:
    """The inverse of :func:`spec_from_config`, in the released layout."""
    vae: dict[str, Any] | None = None
    if spec.vae in VAE_HUB:
        vae = {"_target_": f"{PREFIX}.vae.SDAutoencoderKL", "model_type": spec.vae.removeprefix("sd-")}
    elif spec.vae in LINEAR_VAES.values():
        target = next(name for name, kind in LINEAR_VAES.items() if kind == spec.vae)
        vae = {"_target_": target, "factor": spec.vae_factor}
    config: dict[str, Any] = {
        "predictor": {
            "_target_": f"{PREFIX}.predictor.RuledDiT",
            "max_input_size": spec.max_input_size,
            "patch_size": spec.patch_size,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "hidden_size": spec.width,
            "depth": spec.depth,
            "num_heads": spec.heads,
            "mlp_ratio": spec.mlp_ratio,
            "num_msg_tokens": spec.message_length,
            "msg_tokens_dim": spec.code_dim,
            "representation_layer": spec.representation_layer,
        },
        "quantizer": {"_target_": f"{PREFIX}.quantizer.FSQ", "levels": list(spec.fsq_levels)},
        "vae": vae,
    }
    extra: dict[str, Any] = {}
    if spec.mask_mode != "additive":
        extra["mask_mode"] = spec.mask_mode
    if spec.geometry != CropGeometry():
        extra["geometry"] = {"crop": spec.geometry.crop, "half": spec.geometry.half}
    if extra:
        config["comit_bench"] = extra
    return config


def save(
    model: Comit,
    directory: Path,
    *,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` in the released layout.

    Args:
        model: The network; its VAE is written under ``vae.`` as the original does.
        directory: Made if absent.
        config: Written verbatim when given (to keep a released config as it was).
        dtype: Of the stored weights; loading always gives float32.

    Raises:
        BenchError: A weight is too large for ``dtype``.
    """
    tensors = {key: value.to(dtype) for key, value in model.state_dict().items()}
    large = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if large:
        kind = str(dtype).removeprefix("torch.")
        raise BenchError(
            f"{', '.join(large[:4])}: not finite as {kind}. Export as float32, or look at the run."
        )
    write_tensors(directory / "model.safetensors", tensors)
    write_atomic(
        directory / "config.json", json.dumps(config or config_from_spec(model.spec), indent=1) + "\n"
    )


def build(spec: ComitSpec, *, empty: bool = False) -> Comit:
    """Make the network; ``empty`` leaves the weights on the meta device, to be loaded."""
    kind = "sd" if spec.vae in VAE_HUB else spec.vae
    with torch.device("meta") if empty else nullcontext():
        return Comit(spec, build_vae(kind, spec.vae_factor))


def _fill_unused(model: Comit, tensors: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        if key.startswith(UNUSED) and key not in tensors:
            tensors[key] = torch.zeros(value.shape)


def load_directory(
    directory: Path, *, vae: Path | None = None, offline: bool = False
) -> tuple[Comit, dict[str, Any]]:
    """Load a checkpoint directory into an evaluating float32 network on the CPU.

    Args:
        directory: Holds config.json and model.safetensors (or weights.safetensors).
        vae: Directory of the SD-VAE; by default ``directory/vae``, then the hub. Only used when the
            checkpoint has no ``vae.`` weights of its own.
        offline: Never ask the hub.

    Returns:
        The network and its raw config.

    Raises:
        MissingError: Files or VAE weights are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The weights do not fit the config.
    """
    config = read_config(directory)
    spec = spec_from_config(config, directory / "config.json")
    path = weight_file(directory)
    tensors = read_tensors(path)
    model = build(spec, empty=True)
    if spec.vae in VAE_HUB and not any(key.startswith("vae.") for key in tensors):
        tensors.update(sd_vae_tensors(spec.vae, vae or directory / "vae", offline=offline))
    if spec.vae in ("none", "dct"):
        tensors = {k: v for k, v in tensors.items() if not k.startswith("vae.")}
    _fill_unused(model, tensors)
    load_checked(model, tensors, path)
    return model.eval(), config


def sd_vae_tensors(kind: str, local: Path, *, offline: bool) -> dict[str, Tensor]:
    """Weights of the SD-VAE under the keys ``vae.vae.…``.

    Args:
        kind: ``sd-mse`` or ``sd-ema``.
        local: Directory to look in first.
        offline: Never ask the hub.

    Raises:
        MissingError: Neither there nor to be had.
    """
    from comit_bench.tokenizers.hub import fetch

    repository = VAE_HUB[kind]
    directory = local
    if not (local / VAE_FILES[1]).is_file():
        directory = fetch(repository, VAE_FILES, offline=offline, hint=f"or put them into {local}")
    tensors = read_tensors(directory / VAE_FILES[1])
    return {f"vae.vae.{key}": value for key, value in modern_attention(tensors).items()}
