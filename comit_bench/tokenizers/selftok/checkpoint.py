"""SelfTok's files <-> network.

A checkpoint is a directory with ``model.safetensors`` (or ``weights.safetensors``) under the released key
names and ``config.json`` (``config.py``), or one file of weights together with a name. The VAE is
not in it: ``vae_weights.safetensors`` beside it, with its constructor arguments in the config's node
``vae``; or a diffusers directory ``vae/``, or one that is named; or the hub's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comit_bench.errors import MissingError, UsageError
from comit_bench.nn.vae import KLVaeSpec
from comit_bench.tokenizers.checkpoints import (
    load_network,
    on_meta,
    read_config,
    read_vae,
    read_weights,
    write_checkpoint,
    write_tensors,
)
from comit_bench.tokenizers.family import VAE_FILES
from comit_bench.tokenizers.hub import fetch
from comit_bench.tokenizers.selftok.config import (
    LANDMARKS,
    SETTINGS,
    config_from_spec,
    spec_from_config,
    used,
    vae_spec,
)
from comit_bench.tokenizers.selftok.family import VAE_HUB
from comit_bench.tokenizers.selftok.model import Selftok, SelftokSpec

OWN_VAE = "vae_weights.safetensors"


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
    hint = "or pass --option vae=DIR with the VAE of SD3 (the hub may ask for a login and a licence)"
    folder = fetch(VAE_HUB, tuple(f"vae/{name}" for name in VAE_FILES), offline=offline, hint=hint)
    return vae_spec(read_config(folder), folder / VAE_FILES[0]), folder / VAE_FILES[1]


def load_files(
    weights: Path,
    config: Mapping[str, Any],
    source: Path,
    vae: tuple[KLVaeSpec, Path] | None,
    *,
    allow_pickle: bool = False,
) -> Selftok:
    """Load one file of weights, and a VAE, into an evaluating float32 network on the CPU.

    Args:
        weights: safetensors with the released keys; what nothing reads is ignored.
        config: See ``config.py``.
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
    model = load_network(on_meta(Selftok, spec), tensors, weights, optional=("vae.",), settings=SETTINGS)
    if vae is not None and model.vae is not None:
        load_network(model.vae.vae, read_vae(vae[1]), vae[1])
    return model


def save(model: Selftok, directory: Path, spec: SelftokSpec | None = None) -> None:
    """Write ``config.json``, ``model.safetensors`` and, if there is a VAE, ``vae_weights.safetensors``.

    Args:
        model: The network.
        directory: Made if absent.
        spec: What the config says, when the schedule differs from the network's.
    """
    if model.vae is not None:  # float32, whatever type it computes in
        write_tensors(directory / OWN_VAE, {k: v.float() for k, v in model.vae.vae.state_dict().items()})
    write_checkpoint(directory, model.own_state(), config_from_spec(spec or model.spec))
