"""FlexTok's released files <-> network.

A checkpoint is a directory with ``model.safetensors`` (or ``weights.safetensors``) and ``config.json``.
The blocks of the config (``vae``, ``encoder``, ``decoder``, ``regularizer``, …) also stand in the header of
the safetensors file, as Python literals; they fill in what config.json lacks, or replace it when there is
none. Module names inside ``module_dict`` are matched by suffix and shape when they are not the expected
ones.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.nn.plain_files import too_deep
from comit_bench.tokenizers.checkpoints import (
    load_network,
    on_meta,
    read_config,
    read_metadata,
    read_vae,
    read_weights,
    weight_file,
    write_checkpoint,
)
from comit_bench.tokenizers.config_node import Node
from comit_bench.tokenizers.family import VAE_FILES
from comit_bench.tokenizers.flextok.config import (
    DECODER,
    ENCODER,
    SETTINGS,
    ConfigReader,
    Shapes,
    config_from_spec,
    spec_from_reader,
    vae_spec,
)
from comit_bench.tokenizers.flextok.family import VAE_HUB, unwrap
from comit_bench.tokenizers.flextok.model import FlexTok, FlexTokSpec
from comit_bench.tokenizers.hub import fetch

BLOCKS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
LANDMARKS = ("encoder.module_dict", "decoder.module_dict")
VAE = "vae.vae."
_log = logging.getLogger(__name__)


def _heads_to(position: int, suffixes: set[str]) -> Callable[[Shapes, int], bool]:
    """A linear map whose weight has the code dimension at ``position``."""
    return lambda shapes, d: set(shapes) == suffixes and shapes["proj.weight"][position] == d


_PROJ = {"proj.weight", "proj.bias"}
# How to recognise a module whose name is another one: (shapes, code dimension) -> bool
SIGNATURES: dict[str, dict[str, Callable[[Shapes, int], bool]]] = {
    ENCODER: {
        "enc_patch_emb": lambda s, d: "patch_proj.weight" in s,
        "enc_posemb_module": lambda s, d: set(s) == {"posembs"},
        "enc_register_module": lambda s, d: set(s) == {"registers"},
        "enc_transformer": lambda s, d: all(key.startswith("blocks.") for key in s),
        "enc_to_latents": _heads_to(0, _PROJ),
    },
    DECODER: {
        "dec_from_latents": _heads_to(1, _PROJ),
        "dec_registers_posemb_module": lambda s, d: set(s) == {"posembs"} and s["posembs"][:2] == (1, 1),
        "dec_nested_dropout": lambda s, d: set(s) == {"dropout_mask_token"},
        "dec_latent_dropout": lambda s, d: set(s) == {"nullcond"},
        "dec_noise_patch_emb": lambda s, d: "patch_proj.weight" in s,
        "dec_patches_posemb_module": lambda s, d: set(s) == {"posembs"} and s["posembs"][:2] != (1, 1),
        "dec_time_embedder": lambda s, d: {"mlp.0.weight", "mlp.2.weight"} <= set(s) <= {
            f"mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
        },
        "dec_transformer": lambda s, d: all(key.startswith("blocks.") for key in s),
        "dec_to_patches": lambda s, d: "adaLN_modulation.1.weight" in s and "proj.weight" in s,
    },
}  # fmt: skip


def header_config(path: Path, blocks: Sequence[str] = BLOCKS) -> dict[str, Any]:
    """Config blocks in the header of a safetensors file; values are parsed as literals, never run."""
    metadata = read_metadata(path)
    found: dict[str, Any] = {}
    for key in blocks:
        if key not in metadata:
            continue
        try:
            found[key] = ast.literal_eval(metadata[key])
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise CorruptFileError(
                f"{path}: block {key!r} of the header is no Python literal ({error}). Download it again, or "
                "put the release's config.json beside it."
            ) from error
    if too_deep(found):
        raise CorruptFileError(f"{path}: a block of the header is nested deeper than any config")
    return found


def released_config(
    directory: Path | None, weights: Path, sizes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json`` of a directory, completed from the header of the weights.

    Args:
        directory: Of the checkpoint; None for a single file.
        weights: Its weights; only one safetensors file has such a header.
        sizes: A config for a file that comes without one.

    Raises:
        MissingError: There is neither.
        CorruptFileError: One of them cannot be read.
    """
    config: dict[str, Any] = {}
    if directory is not None and (directory / "config.json").exists():
        config = dict(unwrap(read_config(directory)))
    absent = [block for block in BLOCKS if block not in config]
    has_header = weights.suffix == ".safetensors"
    header = header_config(weights, absent) if absent and has_header else {}
    if not config and not header and sizes is not None:
        return sizes
    if not config and not header:
        raise MissingError(
            f"{weights.parent}: no config.json, and the header of {weights.name} holds no config. A FlexTok "
            "checkpoint has at least one of them: download both files again."
        )
    return {**config, **header}


def _by_module(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, tuple[int, ...]]]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, _, suffix = key.removeprefix(prefix).partition(".")
            modules.setdefault(name, {})[suffix] = tuple(value.shape)
    return modules


def match_modules(tensors: Mapping[str, Tensor], code_dim: int) -> dict[str, str]:
    """Expected module name -> name in the checkpoint, for those that are named otherwise.

    A module is matched only when exactly one stranger has its suffixes and shapes.
    """
    renamed: dict[str, str] = {}
    for prefix, signatures in SIGNATURES.items():
        modules = _by_module(tensors, prefix)
        strangers = [name for name in modules if name not in signatures]
        for expected, fits in signatures.items():
            if expected in modules:
                continue
            candidates = [name for name in strangers if fits(modules[name], code_dim)]
            if len(candidates) == 1:
                renamed[expected] = candidates[0]
                _log.info("%s%s is taken for %s", prefix, candidates[0], expected)
    return renamed


def normalise(tensors: Mapping[str, Tensor], code_dim: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Checkpoint keys -> our keys.

    Renamed modules get their expected names, what nothing reads is left out with a warning.

    Returns:
        The tensors that are loaded, and the renamed modules.
    """
    renamed = match_modules(tensors, code_dim)
    back = {name: expected for expected, name in renamed.items()}
    kept: dict[str, Tensor] = {}
    ignored: set[str] = set()
    for key, value in tensors.items():
        prefix = next((p for p in SIGNATURES if key.startswith(p)), None)
        if prefix is not None:
            name, _, suffix = key.removeprefix(prefix).partition(".")
            name = back.get(name, name)
            if name in SIGNATURES[prefix]:
                kept[f"{prefix}{name}.{suffix}"] = value
            else:
                ignored.add(prefix + name)
        elif key.startswith(VAE) and ".to_qkv." not in key:
            kept[key] = value
        else:
            ignored.add(key)
    if ignored:
        _log.warning("ignored, because nothing reads them: %s", ", ".join(sorted(ignored)))
    return kept, renamed


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a directory holds, under our key names.

    Attributes:
        spec: Sizes; the scale of the latents is not settled yet.
        tensors: With or without the VAE's.
        config: As released.
        assumed: Values that neither config nor weights had.
        source: File that errors about the config name.
        path: File of weights, or their index.
    """

    spec: FlexTokSpec
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    assumed: dict[str, Any]
    source: Path
    path: Path

    @property
    def vae(self) -> Node:
        """The VAE's block of the config."""
        return Node(self.config, self.source).maybe("vae")


def read_checkpoint(
    place: Path, *, allow_pickle: bool = False, sizes: dict[str, Any] | None = None
) -> Checkpoint:
    """Read config and weights of a directory or of a file with both, and nothing else.

    Raises:
        MissingError: Files are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The config is of a variant that is not computed, or says too little; or a pickle that
            was not allowed.
    """
    directory = None if place.is_file() else place
    path = place if directory is None else weight_file(directory)
    config = released_config(directory, path, sizes)
    source = place / "config.json" if directory and (place / "config.json").is_file() else path
    stated = Node(config, source).maybe("regularizer").values.get("levels")
    code_dim = len(stated) if isinstance(stated, list | tuple) and stated else 6
    weights = read_weights(path, LANDMARKS, allow_pickle=allow_pickle)
    tensors, renamed = normalise(weights, code_dim)
    shapes: dict[str, Any] = {prefix: _by_module(tensors, prefix) for prefix in SIGNATURES}
    reader = ConfigReader(config, source, shapes, renamed)
    return Checkpoint(spec_from_reader(reader), tensors, config, reader.assumed, source, path)


def _vae_directory(vae: Node, channels: int, local: Path, names: tuple[str, ...], offline: bool) -> Path:
    """The directory with the stand-alone VAE's files: beside the checkpoint, else of the hub."""
    if all((local / name).is_file() for name in names):
        return local
    hint = f"or put them into {local}"
    if names == VAE_FILES[:1]:
        hint += ", or pass --option scaling_factor=VALUE"
    stated = vae.values.get("hf_hub_path") is not None
    repository = vae.text("hf_hub_path") if stated else VAE_HUB.format(channels=channels)
    return fetch(repository, names, offline=offline, hint=hint)


def _scale(
    vae: Node, channels: int, local: Path, given: float | None, *, offline: bool, source: Path
) -> float:
    """The latent scale: of the config, of the VAE's own config, or the caller's."""
    if vae.values.get("scaling_factor") is None and given is None:
        directory = _vae_directory(vae, channels, local, VAE_FILES[:1], offline)
        vae = Node(read_config(directory), directory / "config.json")
        if vae.values.get("scaling_factor") is None:
            raise UsageError(
                f"{vae.source}: scaling_factor is missing, expected a positive number. Pass it: --option "
                "scaling_factor=VALUE."
            )
    if vae.values.get("scaling_factor") is None:
        return float(cast(float, given))
    stated = vae.number("scaling_factor", above=0, high=1e6)
    if given is not None and stated != float(given):
        raise UsageError(f"{source}: scaling_factor is {stated:g}, but the option says {given}")
    return stated


def load_directory(
    directory: Path,
    *,
    scaling_factor: float | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    sizes: dict[str, Any] | None = None,
) -> tuple[FlexTok, Checkpoint, Path | None]:
    """Load a checkpoint into an evaluating float32 network on the CPU.

    Args:
        directory: Holds the weights and config.json, a stand-alone VAE may lie in ``directory/vae``; or one
            safetensors file whose header holds the config.
        scaling_factor: Latent scale, for checkpoints whose config has none.
        offline: Never ask the hub.
        allow_pickle: Whether a torch file may be read.
        sizes: A config for a single file that comes without one.

    Returns:
        The network, what the checkpoint holds, and the file of the VAE when that is another one.

    Raises:
        MissingError: Files, or the weights or the scale of the VAE, are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The weights do not fit the config, or it is of a variant that is not computed.
    """
    found = read_checkpoint(directory, allow_pickle=allow_pickle, sizes=sizes)
    vae, local, channels = found.vae, found.path.parent / "vae", found.spec.vae.channels
    scale = _scale(vae, channels, local, scaling_factor, offline=offline, source=found.source)
    if vae.values.get("scaling_factor") is None and scaling_factor is not None:
        found.assumed["vae.scaling_factor"] = scale
    spec = replace(found.spec, vae=replace(found.spec.vae, scale=scale))
    tensors, vae_file = found.tensors, None
    if not any(key.startswith(VAE) for key in tensors):
        alone = _vae_directory(vae, channels, local, VAE_FILES, offline)
        arch = {"fixture": {"vae_arch": read_config(alone)}}
        spec = replace(spec, vae=vae_spec(arch, channels, scale, source=alone / VAE_FILES[0]))
        vae_file = alone / VAE_FILES[1]
        own = {VAE + k: v for k, v in read_vae(vae_file).items()}
        own, _ = normalise(own, spec.code_dim)
        tensors = {**tensors, **own}
    model = load_network(on_meta(FlexTok, spec), tensors, found.path, settings=SETTINGS)
    return model, found, vae_file


def save(model: FlexTok, directory: Path) -> None:
    """Write a checkpoint directory in the released layout, the VAE under ``vae.vae.`` as the release does."""
    write_checkpoint(directory, model.state_dict(), config_from_spec(model.spec))
