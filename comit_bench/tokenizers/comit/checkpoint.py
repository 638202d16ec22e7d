"""Files of COMiT: ``config.json`` and ``model.safetensors`` as they were released <-> network.

A checkpoint is a directory with ``config.json`` (top-level nodes ``predictor``, ``quantizer``, ``vae``,
each with a class path and keyword arguments; classes are matched by the last part of the path) and
``model.safetensors`` under the released key names. What :func:`save` writes loads in the original
program and vice versa; settings that the original does not know (mask mode, crop geometry of small
images) stand in an extra node ``comit_bench`` that it never reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.nn.sizes import DEPTH, HEADS, SIDE, TOKENS, WIDTH
from comit_bench.nn.vae import DCT_ORDERS, build_vae
from comit_bench.tokenizers.checkpoints import (
    load_network,
    on_meta,
    read_vae,
    read_weights,
    write_checkpoint,
)
from comit_bench.tokenizers.comit.crops import GRID, CropGeometry
from comit_bench.tokenizers.comit.family import VAE_HUB
from comit_bench.tokenizers.comit.model import Comit, ComitSpec
from comit_bench.tokenizers.config_node import Node, blaming
from comit_bench.tokenizers.family import VAE_FILES
from comit_bench.tokenizers.hub import fetch

LINEAR_VAES = {"stand_in_vae": "stand-in", "dct_vae": "dct"}  # class in config.json -> our name
UNUSED = ("predictor.y_pos_offset", "predictor.c_final_layer.")  # in released files, never read
LANDMARKS = ("predictor",)
MASKS = ("additive", "hard")
IS_IT = "Is this a COMiT checkpoint? Its config.json has the nodes predictor, quantizer and vae."
# what in config.json decides about a tensor
SETTINGS = (
    (r"predictor\.blocks\.\d+\.mlp", "predictor.depth, hidden_size and mlp_ratio"),
    (r"predictor\.blocks", "predictor.depth and hidden_size"),
    (r"predictor\.pos_embed", "predictor.max_input_size, patch_size and hidden_size"),
    (r"predictor\.(r_pos_embed|r_to_pos_embed)", "predictor.num_msg_tokens and hidden_size"),
    (r"predictor\.(x_embedder|final_layer)", "predictor.patch_size, in_channels and hidden_size"),
    (r"predictor\.(r_embedder|r_final_layer)", "quantizer.levels and predictor.hidden_size"),
    (r"predictor", "predictor.hidden_size"),
    (r"vae", "vae"),
)
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


def _class_name(node: Node) -> str:
    return node.text("_target_", "").rsplit(".", 1)[-1]


def _node(top: Node, key: str, expected: str) -> Node:
    node = top.node(key, IS_IT)
    if _class_name(node) != expected:
        raise node.wrong("_target_", f"end in {expected}", node.values.get("_target_"))
    return node


def _vae(top: Node, channels: int) -> tuple[str, int]:
    """Kind and factor of the autoencoder; its latents must be those of the predictor."""
    own: tuple[int, ...]
    if top.values.get("vae") is None:
        kind, factor, own = "none", 1, (3,)
    else:
        node = top.node("vae")
        name = _class_name(node)
        node.check_keys(("factor", "model_type"), unread=("_target_",))
        if name == "SDAutoencoderKL":
            kind, factor, own = f"sd-{node.text('model_type', allowed=('mse', 'ema'))}", 8, (4,)
        elif name in LINEAR_VAES:
            kind, own = LINEAR_VAES[name], tuple(DCT_ORDERS) if name == "dct_vae" else (4,)
            factor = node.whole("factor", low=3 if name == "dct_vae" else 1, high=256)
        else:
            raise UsageError(f"{top.source}: unknown vae class {name!r}: expected SDAutoencoderKL or null")
    if channels not in own:
        raise UsageError(
            f"{top.source}: predictor.in_channels is {channels}, but latents of the vae ({kind}) have "
            f"{' or '.join(map(str, own))}"
        )
    return kind, factor


def _geometry(extra: Node, image_size: int, cell: int) -> CropGeometry:
    node, released = extra.maybe("geometry"), CropGeometry()
    node.check_keys(("crop", "half"), strict=True)
    crop = node.whole("crop", released.crop, high=SIDE)
    if crop > image_size - GRID + 1:
        raise node.wrong("crop", f"leave room for {GRID} crops a side in {image_size} px", crop)
    if crop % cell:
        raise node.wrong("crop", f"be a multiple of {cell} (VAE factor times patch)", crop)
    return CropGeometry(crop=crop, half=node.whole("half", released.half, high=SIDE))


def spec_from_config(config: dict[str, Any], source: Path) -> ComitSpec:
    """Read a released (or our own) ``config.json``."""
    top = Node(config, source)
    top.check_keys(("predictor", "quantizer", "vae", "comit_bench"))
    predictor, quantizer = _node(top, "predictor", "RuledDiT"), _node(top, "quantizer", "FSQ")
    predictor.check_keys(PREDICTOR_DEFAULTS, unread=("_target_",))
    quantizer.check_keys(("levels",), unread=("_target_",))
    extra = top.maybe("comit_bench")
    extra.check_keys(
        ("geometry", "mask_mode", "trained", "training_data", "weights_licence", "group"), unread=("steps",)
    )

    def whole(key: str, high: int, low: int = 1) -> int:
        return predictor.whole(key, PREDICTOR_DEFAULTS[key], low=low, high=high)

    levels = quantizer.levels("levels")
    if (stated := whole("msg_tokens_dim", WIDTH)) != len(levels):
        raise UsageError(
            f"{source}: predictor.msg_tokens_dim is {stated}, but quantizer.levels {list(levels)} has "
            f"{len(levels)} entries"
        )
    channels, patch, side = (
        whole("in_channels", 4096),
        whole("patch_size", 1024),
        whole("max_input_size", SIDE),
    )
    if (out := whole("out_channels", 4096)) != channels:
        raise predictor.wrong("out_channels", f"be equal to in_channels ({channels})", out)
    kind, factor = _vae(top, channels)
    with blaming(source):
        return ComitSpec(
            depth=whole("depth", DEPTH),
            width=whole("hidden_size", WIDTH),
            heads=whole("num_heads", HEADS),
            message_length=whole("num_msg_tokens", TOKENS),
            fsq_levels=levels,
            mlp_ratio=predictor.number("mlp_ratio", PREDICTOR_DEFAULTS["mlp_ratio"], above=0, high=64),
            max_input_size=side,
            patch_size=patch,
            in_channels=channels,
            out_channels=out,
            representation_layer=whole("representation_layer", DEPTH, 0),
            mask_mode="hard" if extra.text("mask_mode", "additive", allowed=MASKS) == "hard" else "additive",
            vae=kind,
            vae_factor=factor,
            geometry=_geometry(extra, side * factor, factor * patch),
        )


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
    """Write a checkpoint directory in the released layout, the VAE under ``vae.`` as the original does.

    A ``config`` that is given is written verbatim.
    """
    write_checkpoint(directory, model.state_dict(), config or config_from_spec(model.spec), dtype)


def build(spec: ComitSpec) -> Comit:
    """Make the network and its VAE."""
    kind = "sd" if spec.vae in VAE_HUB else spec.vae
    return Comit(spec, build_vae(kind, spec.vae_factor, spec.in_channels))


def _fill_unused(model: Comit, tensors: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        if key.startswith(UNUSED) and key not in tensors:
            tensors[key] = torch.zeros(value.shape)


def load_file(path: Path, spec: ComitSpec, *, offline: bool, allow_pickle: bool) -> tuple[Comit, Path | None]:
    """Load a file of weights into an evaluating float32 network on the CPU.

    Args:
        path: safetensors, an index of shards, or (when allowed) a torch file. Without ``vae.`` weights of
            its own, the SD-VAE in the folder ``vae/`` beside it, or the hub's, is taken.
        spec: Sizes of the network.
        offline: Never ask the hub.
        allow_pickle: Whether a torch file may be read.

    Returns:
        The network, and the file of its VAE when the checkpoint has none of its own.

    Raises:
        MissingError: Files or VAE weights are not here.
        CorruptFileError: A file cannot be read, or holds tensors of another type, NaN or infinity.
        UsageError: The weights do not fit the spec, or are a pickle that was not allowed.
    """
    tensors, vae_file = read_weights(path, LANDMARKS, allow_pickle=allow_pickle), None
    model = on_meta(build, spec)
    if spec.vae in VAE_HUB and not any(key.startswith("vae.") for key in tensors):
        vae_file = find_sd_vae(spec.vae, path.parent / "vae", offline=offline)
        tensors.update(read_sd_vae(vae_file))
    if spec.vae in ("none", "dct"):
        tensors = {k: v for k, v in tensors.items() if not k.startswith("vae.")}
    _fill_unused(model, tensors)
    return load_network(model, tensors, path, settings=SETTINGS), vae_file


def find_sd_vae(kind: str, local: Path, *, offline: bool) -> Path:
    """The file of the SD-VAE's weights: in ``local``, else the hub's.

    Raises:
        MissingError: Neither there nor to be had.
    """
    path = local / VAE_FILES[1]
    if path.is_file():
        return path
    return fetch(VAE_HUB[kind], VAE_FILES, offline=offline, hint=f"or put them into {local}") / VAE_FILES[1]


def read_sd_vae(path: Path) -> dict[str, Tensor]:
    """Weights of the SD-VAE under the keys ``vae.vae.…``."""
    return {f"vae.vae.{key}": value for key, value in read_vae(path).items()}
