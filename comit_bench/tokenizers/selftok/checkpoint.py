"""SelfTok's files <-> network.

A checkpoint is a directory with ``model.safetensors`` (or ``weights.safetensors``) under the released key
names and ``config.json`` (``selftok_config.py``), or one file of weights together with a name. The VAE is
not in it: ``vae_weights.safetensors`` beside it, with its constructor arguments in the config's node
``vae``; or a diffusers directory ``vae/``, or one that is named; or the hub's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.errors import MissingError, UsageError
from comit_bench.files import write_atomic
from comit_bench.nn.vae import KLVaeSpec
from comit_bench.tokenizers.checkpoints import (
    WEIGHT_FILES,
    as_stored,
    load_network,
    modern_attention,
    read_config,
    read_weights,
    weight_file,
    write_tensors,
)
from comit_bench.tokenizers.selftok.config import (
    LANDMARKS,
    SETTINGS,
    config_from_spec,
    spec_from_config,
    used,
    vae_spec,
)
from comit_bench.tokenizers.selftok.family import VAE_FILES, VAE_HUB
from comit_bench.tokenizers.selftok.model import Selftok, SelftokSpec

OWN_VAE = "vae_weights.safetensors"
VAE = "vae.vae."
VAE_LANDMARKS = ("encoder.conv_in", "decoder.conv_in", "encoder.mid_block", "decoder.mid_block")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network and where it comes from.

    Attributes:
        model: On the CPU, float32, evaluating.
        weights: File of the encoder and decoder.
        vae: File of the VAE, or None when the network has none.
    """

    model: Selftok
    weights: Path
    vae: Path | None


def find_vae(
    config: Mapping[str, Any], beside: Path | None, named: Path | None, *, offline: bool
) -> tuple[KLVaeSpec, Path]:
    """Sizes and weights of the VAE that belongs to a checkpoint.

    Args:
        config: Of the checkpoint.
        beside: Directory of the checkpoint, or None.
        named: Directory that the user named, or None.
        offline: Never ask the hub.

    Raises:
        MissingError: It is not here, and the hub is out of reach or wants a login.
        UsageError: It is another VAE.
    """
    if named is None and beside is not None and isinstance(config.get("vae"), Mapping):
        own = beside / OWN_VAE
        if own.is_file():
            return vae_spec(config["vae"], beside / "config.json"), own
    folder = named if named is not None else (beside / "vae" if beside is not None else None)
    if folder is not None and all((folder / name).is_file() for name in VAE_FILES):
        return vae_spec(read_config(folder), folder / VAE_FILES[0]), folder / VAE_FILES[1]
    if named is not None:
        raise MissingError(
            f"--option vae={named}: this directory does not hold {' and '.join(VAE_FILES)}, the VAE of SD3 "
            "as diffusers stores it."
        )
    from comit_bench.tokenizers.hub import fetch

    hint = "or pass --option vae=DIR with the VAE of SD3 (the hub may ask for a login and a licence)"
    folder = fetch(VAE_HUB, tuple(f"vae/{name}" for name in VAE_FILES), offline=offline, hint=hint)
    return vae_spec(read_config(folder), folder / VAE_FILES[0]), folder / VAE_FILES[1]


def build(spec: SelftokSpec) -> Selftok:
    """The network on the meta device, to be loaded."""
    with torch.device("meta"):
        return Selftok(spec)


def load_files(
    weights: Path,
    config: Mapping[str, Any],
    source: Path,
    vae: tuple[KLVaeSpec, Path] | None,
    *,
    allow_pickle: bool = False,
) -> Loaded:
    """Load one file of weights, and a VAE, into an evaluating float32 network on the CPU.

    Args:
        weights: safetensors with the released keys; what nothing reads is ignored.
        config: See ``selftok_config.py``.
        source: Named in errors about the config.
        vae: From :func:`find_vae`, or None for a network of latents only.
        allow_pickle: Whether a torch file may be read.

    Raises:
        CorruptFileError: A file cannot be read, or holds tensors of another type, NaN or infinity.
        UsageError: The weights do not fit the config, or are a pickle that was not allowed.
    """
    tensors = used(read_weights(weights, LANDMARKS, allow_pickle=allow_pickle, average=False))
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    spec = spec_from_config(config, shapes, source, None if vae is None else vae[0])
    if vae is not None and vae[0].channels != spec.channels:
        raise UsageError(f"{vae[1]}: a VAE of {vae[0].channels} channels, the latents have {spec.channels}")
    model = build(spec)
    load_network(model, tensors, weights, optional=("vae.",), settings=SETTINGS)
    if vae is not None and model.vae is not None:
        load_network(model.vae.vae, modern_attention(read_weights(vae[1], VAE_LANDMARKS)), vae[1])
    return Loaded(model.eval(), weights, None if vae is None else vae[1])


def load_directory(
    directory: Path,
    *,
    vae: Path | None = None,
    offline: bool = False,
    latents_only: bool = False,
    allow_pickle: bool = False,
) -> Loaded:
    """Load a checkpoint directory.

    Args:
        directory: See above.
        vae: Directory of the VAE, when it lies elsewhere.
        offline: Never ask the hub.
        latents_only: Leave the VAE out.
        allow_pickle: Whether a torch file may be read.

    Raises:
        MissingError: Files, or the VAE, are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The weights do not fit the config.
    """
    config, weights = read_config(directory), weight_file(directory)
    found = None if latents_only else find_vae(config, directory, vae, offline=offline)
    return load_files(weights, config, directory / "config.json", found, allow_pickle=allow_pickle)


def save(model: Selftok, directory: Path, spec: SelftokSpec | None = None) -> None:
    """Write ``config.json``, ``model.safetensors`` and, if there is a VAE, ``vae_weights.safetensors``.

    Args:
        model: The network.
        directory: Made if absent.
        spec: What the config says, when the schedule differs from the network's.
    """
    write_tensors(directory / WEIGHT_FILES[0], as_stored(model.own_state(), torch.float32))
    if model.vae is not None:
        write_tensors(directory / OWN_VAE, _plain(model.vae.vae.state_dict()))
    write_atomic(directory / "config.json", json.dumps(config_from_spec(spec or model.spec), indent=1) + "\n")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As stored by diffusers: float32, whatever type it computes in."""
    return {key: value.float() for key, value in tensors.items()}
