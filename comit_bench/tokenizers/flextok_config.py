"""FlexTok's released config -> the sizes of a network, and back. Section (f1) of the specification.

Most of a config only wires the original program together; what is read is listed in the specification. A
value that is not there comes from the shapes of the weights, or is a documented assumption that is handed
back, so that a record can carry it. Variants that are not computed here are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from comit_bench.errors import UsageError
from comit_bench.models.flextok import FlexTokSpec, TrunkSpec
from comit_bench.models.flextok_blocks import TableSpec
from comit_bench.models.vae import KLVaeSpec

ENCODER, DECODER = "encoder.module_dict.", "decoder.module_dict."
Shapes = Mapping[str, tuple[int, ...]]  # of one module: suffix -> shape


@dataclass
class ConfigReader:
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


def _refuse_variants(reader: ConfigReader) -> None:
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


def _table(reader: ConfigReader, part: str, prefix: str, name: str) -> TableSpec:
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
            f"{reader.source}: {name}.posemb_type is {type_!r}, but its table {list(shape)} is of the "
            "learned kind: expected learnable_sum or learnable_prod"
        )
    raise UsageError(
        f"{reader.source}: {name}.posembs has the shape {list(shape)}, expected [1, D, H, W], [1, 1, D, N] "
        "or [2, 1, D, N]"
    )


def _patch(reader: ConfigReader, part: str, *names: str) -> tuple[int, int]:
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


def _trunk(reader: ConfigReader, part: str, prefix: str, name: str, patch: tuple[int, int]) -> TrunkSpec:
    block = reader.module(part, name)
    found = (re.match(r"blocks\.(\d+)\.", key) for key in reader.shapes[prefix].get(name, {}))
    blocks = {int(match[1]) for match in found if match}
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


def _streams(reader: ConfigReader) -> int:
    expansion = reader.module("decoder", "dec_transformer").get("adaLN_expansion")
    expansion = reader.assume("dec_transformer.adaLN_expansion", 2) if expansion is None else int(expansion)
    apart = reader.anywhere("decoder", "per_subseq_embs", True)
    if (expansion, bool(apart)) not in ((2, True), (1, False)):
        raise UsageError(
            f"{reader.source}: adaLN_expansion {expansion} with per_subseq_embs {apart}: expected 2 with "
            "true, or 1 with false"
        )
    return expansion


def vae_spec(config: dict[str, Any], channels: int, scale: float = 1.0) -> KLVaeSpec:
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


def spec_from_reader(reader: ConfigReader) -> FlexTokSpec:
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
            vae=vae_spec(reader.config, channels),
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
