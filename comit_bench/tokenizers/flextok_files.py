"""FlexTok's released files <-> network.

A checkpoint is a directory with ``model.safetensors`` (or ``weights.safetensors``) and ``config.json``.
The blocks of the config (``vae``, ``encoder``, ``decoder``, ``regularizer``, …) also stand in the header of
the safetensors file, as Python literals; they fill in what config.json lacks, or replace it when there is
none. Most of a block only wires the original program together; what is read is listed in section (f1) of
the specification. A value that neither place has is taken from the shapes, or is a documented assumption
that the record carries.

Module names inside ``module_dict`` are matched by suffix and shape when they are not the expected ones.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.files import write_atomic
from comit_bench.models.flextok import FlexTok, FlexTokSpec, TrunkSpec
from comit_bench.models.flextok_blocks import TableSpec
from comit_bench.models.vae import KLVaeSpec
from comit_bench.tokenizers.checkpoints import (
    load_checked,
    read_config,
    read_tensors,
    weight_file,
    write_tensors,
)

BLOCKS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
ENCODER, DECODER, VAE = "encoder.module_dict.", "decoder.module_dict.", "vae.vae."
_log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]  # of one module: suffix -> shape


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


# ----------------------------------------------------------------------------- config


def header_config(path: Path) -> dict[str, Any]:
    """The config blocks in the header of a safetensors file; values are parsed as literals, never run.

    Raises:
        CorruptFileError: Not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError, EOFError) as error:
        raise CorruptFileError(f"{path}: not a readable safetensors file ({error})") from error
    found: dict[str, Any] = {}
    for key in BLOCKS:
        if key not in metadata:
            continue
        try:
            found[key] = ast.literal_eval(metadata[key])
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise CorruptFileError(
                f"{path}: block {key!r} of the header is no Python literal ({error}). Download it again."
            ) from error
    return found


def unwrap(config: dict[str, Any]) -> dict[str, Any]:
    """The blocks, also when they stand inside ``{"config": {...}}``."""
    inner = config.get("config")
    return inner if isinstance(inner, dict) and "encoder" not in config else config


def is_flextok(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of FlexTok's."""
    config = unwrap(config)
    blocks = (config.get("encoder"), config.get("decoder"))
    return all(isinstance(b, dict) and isinstance(b.get("module_dict"), dict) for b in blocks)


def released_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a directory, completed from the header of the weights.

    Raises:
        MissingError: There is neither.
        CorruptFileError: One of them cannot be read.
    """
    weights = weight_file(directory)
    header = header_config(weights)
    if not (directory / "config.json").is_file():
        if not header:
            raise MissingError(
                f"{directory}: no config.json, and the header of {weights.name} holds no config. A FlexTok "
                "checkpoint has at least one of them: download both files again."
            )
        return header
    return {**header, **unwrap(read_config(directory))}


@dataclass
class _Reader:
    """Looks values up in the config and remembers what had to be assumed."""

    config: dict[str, Any]
    source: Path
    shapes: dict[str, dict[str, Shapes]]
    names: dict[str, str]  # expected module name -> name in this checkpoint
    assumed: dict[str, Any] = field(default_factory=dict)

    def block(self, part: str) -> dict[str, Any]:
        """A top-level block, or an empty one."""
        value = self.config.get(part)
        return value if isinstance(value, dict) else {}

    def modules(self, part: str) -> dict[str, dict[str, Any]]:
        """The blocks of an encoder or decoder by name, as this config names them."""
        value = self.block(part).get("module_dict")
        return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}

    def module(self, part: str, name: str) -> dict[str, Any]:
        """One block, under the expected name or the checkpoint's."""
        modules = self.modules(part)
        return modules.get(self.names.get(name, name), modules.get(name, {}))

    def anywhere(self, part: str, key: str, fallback: Any) -> Any:
        """The value of ``key`` in whichever block of a part has it."""
        values = [block[key] for block in self.modules(part).values() if block.get(key) is not None]
        if len({repr(value) for value in values}) > 1:
            raise UsageError(f"{self.source}: {part} has several values of {key!r}: {values}")
        return values[0] if values else self.assume(f"{part}.{key}", fallback)

    def assume(self, path: str, value: Any) -> Any:
        """Note that a value which changes results is not in the config."""
        self.assumed[path] = value
        return value

    def shape(self, part: str, name: str, suffix: str) -> tuple[int, ...] | None:
        """Shape of a stored tensor, or None."""
        return self.shapes[part].get(name, {}).get(suffix)

    def size(self, value: Any, part: str, name: str, suffix: str, axis: int) -> int:
        """A size from the config, else from the shapes.

        Raises:
            UsageError: Neither has it.
        """
        shape = self.shape(part, name, suffix)
        if isinstance(value, int):
            return value
        if shape is None:
            raise UsageError(
                f"{self.source}: neither the config nor the weights say how large {name} is ({part}{name}."
                f"{suffix} is missing). Is this a FlexTok checkpoint?"
            )
        return shape[axis]


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from _walk(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner)


def _refuse_variants(reader: _Reader) -> None:
    """Refuse what this implementation does not compute."""
    wanted = {"use_mup_readout": False, "gated_mlp": True, "qk_norm": True, "use_gated_mlp": True}
    for part in ("encoder", "decoder"):
        for key, value in _walk(reader.modules(part)):
            if key in wanted and bool(value) is not wanted[key]:
                raise UsageError(
                    f"{reader.source}: {part} sets {key} = {value}, which is no released FlexTok and cannot "
                    "be computed here"
                )
    for part, mode in (("encoder", "causal_last"), ("decoder", "full")):
        found = reader.anywhere(part, "mask_mode", mode)
        if found != mode:
            raise UsageError(f"{reader.source}: {part} mask_mode is {found!r}, expected {mode!r}")


def _table(reader: _Reader, part: str, prefix: str, name: str) -> TableSpec:
    """The kind of a position table by its shape; only the config tells a sum from a product."""
    block, shape = reader.module(part, name), reader.shape(prefix, name, "posembs")
    scaling = block.get("posemb_scaling") or reader.assume(f"{name}.posemb_scaling", "absolute")
    if scaling not in ("absolute", "interpolate"):
        raise UsageError(
            f"{reader.source}: {name}.posemb_scaling {scaling!r}: expected absolute or interpolate"
        )
    if shape is None:
        raise UsageError(f"{reader.source}: {prefix}{name}.posembs is missing. Is this a FlexTok checkpoint?")
    stretch = scaling == "interpolate"
    if len(shape) == 4 and shape[:2] == (1, 1):
        return TableSpec(kind="line", size=(shape[3],), interpolate=stretch)
    if len(shape) == 4 and shape[0] == 1:
        return TableSpec(kind="grid", size=(shape[2], shape[3]), interpolate=stretch)
    if len(shape) == 4 and shape[:2] == (2, 1):
        kinds: dict[Any, Literal["sum", "prod"]] = {"learnable_sum": "sum", "learnable_prod": "prod"}
        type_ = block.get("posemb_type") or reader.assume(f"{name}.posemb_type", "learnable_sum")
        if type_ in kinds:
            return TableSpec(kind=kinds[type_], size=(shape[3],), interpolate=stretch)
        raise UsageError(
            f"{reader.source}: {name}.posemb_type is {type_!r}, but its table {list(shape)} is of the learned "
            "kind: expected learnable_sum or learnable_prod"
        )
    raise UsageError(
        f"{reader.source}: {name}.posembs has the shape {list(shape)}, expected [1, D, H, W], [1, 1, D, N] "
        "or [2, 1, D, N]"
    )


def _patch(reader: _Reader, part: str, *names: str) -> tuple[int, int]:
    found = {
        name: tuple(
            reader.module(part, name).get("patch_sizes") or reader.assume(f"{name}.patch_sizes", [2, 2])
        )
        for name in names
    }
    patch = found[names[0]]
    if len(patch) != 2 or any(other != patch for other in found.values()):
        raise UsageError(f"{reader.source}: patch sizes {found}: expected one pair of numbers")
    return (int(patch[0]), int(patch[1]))


def _trunk(reader: _Reader, part: str, prefix: str, name: str, patch: tuple[int, int]) -> TrunkSpec:
    block = reader.module(part, name)
    blocks = {int(key.split(".")[1]) for key in reader.shapes[prefix].get(name, {})}
    stated = block.get("depth")
    depth = stated if isinstance(stated, int) else 1 + max(blocks, default=-1)
    table = "enc_posemb_module" if prefix == ENCODER else "dec_patches_posemb_module"
    positions = _table(reader, part, prefix, table)
    if positions.kind == "line":
        raise UsageError(f"{reader.source}: {prefix}{table} is one line of positions, patches need a grid")
    return TrunkSpec(
        depth=depth,
        width=reader.size(block.get("dim"), prefix, name, "blocks.0.attn.wq.weight", 1),
        head_dim=int(block.get("head_dim") or reader.assume(f"{name}.head_dim", 64)),
        mlp_ratio=float(block.get("mlp_ratio") or 4.0),
        patch=patch,
        positions=positions,
    )


def _streams(reader: _Reader) -> int:
    expansion = reader.module("decoder", "dec_transformer").get("adaLN_expansion")
    expansion = reader.assume("dec_transformer.adaLN_expansion", 2) if expansion is None else int(expansion)
    apart = reader.anywhere("decoder", "per_subseq_embs", True)
    if (expansion, bool(apart)) not in ((2, True), (1, False)):
        raise UsageError(
            f"{reader.source}: adaLN_expansion {expansion} with per_subseq_embs {apart}: expected 2 with true, "
            "or 1 with false"
        )
    return expansion


def vae_spec(config: dict[str, Any], channels: int, scale: float) -> KLVaeSpec:
    """Sizes of the VAE: those of the release unless ``fixture`` or ``comit_bench`` say otherwise."""
    arch: dict[str, Any] = {}
    for node in ("fixture", "comit_bench"):
        if isinstance(config.get(node), dict):
            arch.update(config[node].get("vae_arch") or {})
    spec = KLVaeSpec(channels=channels, scale=scale)
    return replace(
        spec,
        widths=tuple(arch.get("block_out_channels", spec.widths)),
        layers=int(arch.get("layers_per_block", spec.layers)),
        groups=int(arch.get("norm_num_groups", spec.groups)),
    )


def spec_from_reader(reader: _Reader, scale: float) -> FlexTokSpec:
    """Everything but the scale of the latents, from config and shapes.

    Raises:
        UsageError: A value is missing, contradicts the weights, or is of a variant that is not computed.
    """
    _refuse_variants(reader)
    time = reader.module("decoder", "dec_time_embedder")
    stated = time.get("max_timestep")
    channels = reader.block("vae").get("latent_channels")
    if not isinstance(channels, int):
        patch = reader.shape(ENCODER, "enc_patch_emb", "patch_proj.weight")
        p, q = _patch(reader, "encoder", "enc_patch_emb")
        channels = patch[1] // (p * q) if patch else reader.assume("vae.latent_channels", 16)
    line = _table(reader, "decoder", DECODER, "dec_registers_posemb_module")
    if line.kind != "line":
        raise UsageError(f"{reader.source}: the decoder's registers need one line of positions, not a grid")
    register = reader.module("encoder", "enc_register_module")
    levels = reader.block("regularizer").get("levels")
    try:
        return FlexTokSpec(
            encoder=_trunk(
                reader, "encoder", ENCODER, "enc_transformer", _patch(reader, "encoder", "enc_patch_emb")
            ),
            decoder=_trunk(
                reader,
                "decoder",
                DECODER,
                "dec_transformer",
                _patch(reader, "decoder", "dec_noise_patch_emb", "dec_to_patches"),
            ),
            registers=reader.size(register.get("n_max"), ENCODER, "enc_register_module", "registers", 0),
            register_positions=line.size[0],
            fsq_levels=tuple(levels or reader.assume("regularizer.levels", (8, 8, 8, 5, 5, 5))),
            streams=_streams(reader),
            time_features=int(time.get("frequency_embedding_size") or 256),
            max_timestep=float(
                stated if stated is not None else reader.assume("dec_time_embedder.max_timestep", 1000.0)
            ),
            vae=vae_spec(reader.config, channels, scale),
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"{reader.source}: {error}") from error


def config_from_spec(spec: FlexTokSpec) -> dict[str, Any]:
    """A config in the released layout, with every value that this program reads."""

    def positions(table: TableSpec) -> dict[str, Any]:
        kind = {"grid": "sincos", "line": "learnable_sum"}.get(table.kind, f"learnable_{table.kind}")
        scaling = "interpolate" if table.interpolate else "absolute"
        return {"max_sizes": list(table.size), "posemb_type": kind, "posemb_scaling": scaling}

    def trunk(part: TrunkSpec) -> dict[str, Any]:
        return {k: getattr(part, n) for k, n in (("dim", "width"), ("depth",) * 2, ("head_dim",) * 2)} | {
            "mlp_ratio": part.mlp_ratio
        }

    line = TableSpec(kind="line", size=(spec.register_positions,))
    encoder, decoder = spec.encoder, spec.decoder
    released = KLVaeSpec(channels=spec.vae.channels, scale=spec.vae.scale)
    config: dict[str, Any] = {
        "vae": {
            "latent_channels": spec.vae.channels,
            "scaling_factor": spec.vae.scale,
            "sample_posterior": True,
        },
        "encoder": {
            "module_dict": {
                "enc_patch_emb": {"patch_sizes": list(encoder.patch)},
                "enc_posemb_module": positions(encoder.positions),
                "enc_register_module": {"n_max": spec.registers},
                "enc_seq_packer": {"mask_mode": "causal_last"},
                "enc_transformer": trunk(encoder),
                "enc_to_latents": {"use_mup_readout": False},
            }
        },
        "decoder": {
            "module_dict": {
                "dec_registers_posemb_module": positions(line),
                "dec_noise_patch_emb": {"patch_sizes": list(decoder.patch)},
                "dec_patches_posemb_module": positions(decoder.positions),
                "dec_seq_packer": {"mask_mode": "full", "per_subseq_embs": spec.streams == 2},
                "dec_time_embedder": {
                    "frequency_embedding_size": spec.time_features,
                    "max_timestep": spec.max_timestep,
                },
                "dec_transformer": {**trunk(decoder), "adaLN_expansion": spec.streams},
                "dec_to_patches": {"patch_sizes": list(decoder.patch), "use_mup_readout": False},
            }
        },
        "regularizer": {"levels": list(spec.fsq_levels)},
    }
    if spec.vae != released:
        config["comit_bench"] = {
            "vae_arch": {
                "block_out_channels": list(spec.vae.widths),
                "layers_per_block": spec.vae.layers,
                "norm_num_groups": spec.vae.groups,
            }
        }
    return config


# ------------------------------------------------------------------------ state dict


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

    Wrapper prefixes go, renamed modules get their expected names, what nothing reads is left out with a
    warning.

    Returns:
        The tensors that are loaded, and the renamed modules.
    """
    plain = {}
    for key, value in tensors.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        plain[key] = value
    renamed = match_modules(plain, code_dim)
    back = {name: expected for expected, name in renamed.items()}
    kept: dict[str, Tensor] = {}
    ignored: set[str] = set()
    for key, value in plain.items():
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


# ---------------------------------------------------------------------------- loading


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network, its raw config, and values that neither config nor weights had."""

    model: FlexTok
    config: dict[str, Any]
    assumed: dict[str, Any]


def _vae_repository(vae: dict[str, Any], channels: int) -> str:
    return str(vae.get("hf_hub_path") or f"EPFL-VILAB/flextok_vae_c{channels}")


def _vae_directory(
    vae: dict[str, Any], channels: int, local: Path, names: tuple[str, ...], offline: bool
) -> Path:
    """The directory with the stand-alone VAE's files: beside the checkpoint, else of the hub."""
    if all((local / name).is_file() for name in names):
        return local
    from comit_bench.tokenizers.hub import fetch

    hint = f"or put them into {local}"
    if names == VAE_FILES[:1]:
        hint += ", or pass --option scaling_factor=VALUE"
    return fetch(_vae_repository(vae, channels), names, offline=offline, hint=hint)


def _scale(
    vae: dict[str, Any], channels: int, local: Path, given: float | None, *, offline: bool, source: Path
) -> float:
    """The latent scale: of the config, of the VAE's own config, or the caller's."""
    stated = vae.get("scaling_factor")
    if stated is None and given is None:
        directory = _vae_directory(vae, channels, local, VAE_FILES[:1], offline)
        stated = read_config(directory).get("scaling_factor")
        source = directory / "config.json"
    if stated is not None and given is not None and float(stated) != float(given):
        raise UsageError(f"{source}: scaling_factor is {stated}, but the option says {given}")
    value = stated if stated is not None else given
    try:
        scale = float(cast(Any, value))
    except (TypeError, ValueError):
        scale = 0.0
    if not scale > 0:
        raise UsageError(
            f"{source}: scaling_factor is {value!r}, expected a positive number. Pass it: --option "
            "scaling_factor=VALUE."
        )
    return scale


def load_directory(directory: Path, *, scaling_factor: float | None = None, offline: bool = False) -> Loaded:
    """Load a checkpoint directory into an evaluating float32 network on the CPU.

    Args:
        directory: Holds the weights and config.json; a stand-alone VAE may lie in ``directory/vae``.
        scaling_factor: Latent scale, for checkpoints whose config has none.
        offline: Never ask the hub.

    Raises:
        MissingError: Files, or the weights or the scale of the VAE, are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The weights do not fit the config, or it is of a variant that is not computed.
    """
    path = weight_file(directory)
    config = released_config(directory)
    source = directory / "config.json" if (directory / "config.json").is_file() else path
    regularizer = config.get("regularizer")
    levels = regularizer.get("levels") if isinstance(regularizer, dict) else None
    tensors, renamed = normalise(read_tensors(path), len(levels or (8, 8, 8, 5, 5, 5)))
    shapes: dict[str, Any] = {prefix: _by_module(tensors, prefix) for prefix in SIGNATURES}
    reader = _Reader(config, source, shapes, renamed)
    spec = spec_from_reader(reader, 1.0)
    vae, local, channels = reader.block("vae"), directory / "vae", spec.vae.channels
    scale = _scale(vae, channels, local, scaling_factor, offline=offline, source=source)
    if vae.get("scaling_factor") is None and scaling_factor is not None:
        reader.assume("vae.scaling_factor", scale)
    spec = replace(spec, vae=replace(spec.vae, scale=scale))
    if not any(key.startswith(VAE) for key in tensors):
        alone = _vae_directory(vae, channels, local, VAE_FILES, offline)
        arch = {"fixture": {"vae_arch": read_config(alone)}}
        spec = replace(spec, vae=vae_spec(arch, channels, scale))
        own, _ = normalise({VAE + k: v for k, v in read_tensors(alone / VAE_FILES[1]).items()}, spec.code_dim)
        tensors.update(own)
    with torch.device("meta"):
        model = FlexTok(spec)
    load_checked(model, tensors, path)
    return Loaded(model.eval(), config, reader.assumed)


def save(model: FlexTok, directory: Path, *, config: dict[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in the released layout.

    Args:
        model: The network; its VAE is written under ``vae.vae.`` as the release does.
        directory: Made if absent.
        config: Written verbatim when given (to keep a released config as it was).
    """
    write_tensors(directory / "model.safetensors", model.state_dict())
    text = json.dumps(config or config_from_spec(model.spec), indent=1) + "\n"
    write_atomic(directory / "config.json", text)
