"""FlexTok's released config -> the sizes of a network, and back.

Most of a config only wires the original program together; what is read is listed in the specification. A
value that is not there comes from the shapes of the weights, or is a documented assumption that is handed
back, so that a record can carry it. Variants that are not computed here are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from comit_bench.errors import UsageError, shown
from comit_bench.nn.sizes import DEPTH
from comit_bench.nn.state_dicts import count_numbers
from comit_bench.nn.vae import KLVaeSpec
from comit_bench.tokenizers.config_node import Node, blaming, kl_vae_spec
from comit_bench.tokenizers.flextok.blocks import TableSpec
from comit_bench.tokenizers.flextok.model import FlexTokSpec, TrunkSpec

ENCODER, DECODER = "encoder.module_dict.", "decoder.module_dict."
TRUNK = ("depth", "dim", "head_dim", "mlp_ratio", "adaLN_expansion")
# what in config.json decides about a tensor
SETTINGS = (
    (r"encoder\.module_dict\.enc_transformer", "encoder.module_dict.enc_transformer (depth, dim)"),
    (r"decoder\.module_dict\.dec_transformer", "decoder.module_dict.dec_transformer (depth, dim)"),
    (r"encoder\.module_dict\.enc_register_module", "encoder.module_dict.enc_register_module (n_max)"),
    (r"(encoder|decoder)\.module_dict\.(enc_to_latents|dec_from_latents)", "regularizer.levels"),
    (r"encoder", "the blocks of the encoder (patch_sizes, dim) and vae.latent_channels"),
    (r"decoder", "the blocks of the decoder (patch_sizes, dim) and vae.latent_channels"),
    (r"vae", "vae, or comit_bench.vae_arch for another size than the released one"),
)
Shapes = Mapping[str, tuple[int, ...]]  # of one module: suffix -> shape


@dataclass
class ConfigReader:
    """Looks values up in the config and remembers what had to be assumed."""

    config: dict[str, Any]
    source: Path
    shapes: dict[str, dict[str, Shapes]]
    names: dict[str, str]  # expected module name -> name in this checkpoint
    assumed: dict[str, Any] = field(default_factory=dict)

    @property
    def top(self) -> Node:
        """The whole config."""
        return Node(self.config, self.source)

    def block(self, part: str) -> Node:
        """A top-level block, or an empty one."""
        return self.top.maybe(part)

    def modules(self, part: str) -> dict[str, Node]:
        """The blocks of an encoder or decoder by name, as this config names them."""
        held = self.block(part).maybe("module_dict")
        return {k: Node(v, self.source, held.label(k)) for k, v in held.values.items() if isinstance(v, dict)}

    def module(self, part: str, name: str, *known: str) -> Node:
        """One block, under the expected name or the checkpoint's; ``known`` are the keys that are read."""
        modules = self.modules(part)
        empty = Node({}, self.source, f"{part}.module_dict.{name}")
        node = modules.get(self.names.get(name, name), modules.get(name, empty))
        node.check_keys(known, told=False)
        return node

    def anywhere(self, part: str, key: str, fallback: Any) -> Any:
        """The value of ``key`` in whichever block of a part has it."""
        blocks = self.modules(part).values()
        values = [node.values[key] for node in blocks if node.values.get(key) is not None]
        if len({repr(value) for value in values}) > 1:
            raise UsageError(f"{self.source}: {part} has several values of {key!r}: {shown(values)}")
        return values[0] if values else self.assume(f"{part}.{key}", fallback)

    def assume(self, path: str, value: Any) -> Any:
        """Note that a value which changes results is not in the config."""
        self.assumed[path] = value
        return value

    def shape(self, part: str, name: str, suffix: str) -> tuple[int, ...] | None:
        """Shape of a stored tensor, or None."""
        return self.shapes[part].get(name, {}).get(suffix)

    def size(self, node: Node, key: str, part: str, name: str, suffix: str, axis: int) -> int:
        """A size from the config, else from the shapes."""
        shape = self.shape(part, name, suffix)
        if node.values.get(key) is not None:
            return node.whole(key)
        if shape is None or len(shape) <= axis:
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
        for key, value in _walk({name: node.values for name, node in reader.modules(part).items()}):
            if key in wanted and value is not wanted[key] and not (value is None and not wanted[key]):
                raise UsageError(
                    f"{reader.source}: {part} sets {key} = {shown(value)}, which is no released FlexTok and "
                    "cannot be computed here"
                )
    for part, mode in (("encoder", "causal_last"), ("decoder", "full")):
        found = reader.anywhere(part, "mask_mode", mode)
        if found != mode:
            raise UsageError(f"{reader.source}: {part} mask_mode is {shown(found)}, expected {mode!r}")


def _table(reader: ConfigReader, part: str, prefix: str, name: str) -> TableSpec:
    """The kind of a position table by its shape; only the config tells a sum from a product."""
    block, shape = reader.module(part, name), reader.shape(prefix, name, "posembs")
    if block.values.get("posemb_scaling") is None:
        scaling = str(reader.assume(f"{name}.posemb_scaling", "absolute"))
    else:
        scaling = block.text("posemb_scaling", allowed=("absolute", "interpolate"))
    if shape is None:
        raise UsageError(f"{reader.source}: {prefix}{name}.posembs is missing. Is this a FlexTok checkpoint?")
    stretch = scaling == "interpolate"
    if len(shape) == 4 and shape[:2] == (1, 1):
        return TableSpec(kind="line", size=(shape[3],), interpolate=stretch)
    if len(shape) == 4 and shape[0] == 1:
        return TableSpec(kind="grid", size=(shape[2], shape[3]), interpolate=stretch)
    if len(shape) == 4 and shape[:2] == (2, 1):
        kinds: dict[Any, Literal["sum", "prod"]] = {"learnable_sum": "sum", "learnable_prod": "prod"}
        type_ = block.values.get("posemb_type") or reader.assume(f"{name}.posemb_type", "learnable_sum")
        if isinstance(type_, str) and type_ in kinds:
            return TableSpec(kind=kinds[type_], size=(shape[3],), interpolate=stretch)
        raise UsageError(
            f"{reader.source}: {name}.posemb_type is {shown(type_)}, but its table {list(shape)} is of the "
            "learned kind: expected learnable_sum or learnable_prod"
        )
    raise UsageError(
        f"{reader.source}: {name}.posembs has the shape {list(shape)}, expected [1, D, H, W], [1, 1, D, N] "
        "or [2, 1, D, N]"
    )


def _patch(reader: ConfigReader, part: str, *names: str) -> tuple[int, int]:
    found = {}
    for name in names:
        node = reader.module(part, name)
        stated = node.values.get("patch_sizes") is not None
        pair = node.wholes("patch_sizes", high=1024, length=2) if stated else (2, 2)
        found[name] = pair if stated else tuple(reader.assume(f"{name}.patch_sizes", list(pair)))
    patch = found[names[0]]
    if any(other != patch for other in found.values()):
        raise UsageError(f"{reader.source}: patch sizes {found}: expected one pair of numbers")
    return (patch[0], patch[1])


def _trunk(reader: ConfigReader, part: str, prefix: str, name: str, patch: tuple[int, int]) -> TrunkSpec:
    block = reader.module(part, name, *TRUNK)
    depth = count_numbers(reader.shapes[prefix].get(name, {}), r"blocks\.(\d+)\.")
    if block.values.get("depth") is not None:
        depth = block.whole("depth", high=DEPTH)
    table = "enc_posemb_module" if prefix == ENCODER else "dec_patches_posemb_module"
    positions = _table(reader, part, prefix, table)
    if positions.kind == "line":
        raise UsageError(f"{reader.source}: {prefix}{table} is one line of positions, patches need a grid")
    stated = block.values.get("head_dim") is not None
    return TrunkSpec(
        depth=depth,
        width=reader.size(block, "dim", prefix, name, "blocks.0.attn.wq.weight", 1),
        head_dim=block.whole("head_dim") if stated else reader.assume(f"{name}.head_dim", 64),
        mlp_ratio=block.number("mlp_ratio", 4.0, above=0, high=64),
        patch=patch,
        positions=positions,
    )


def _streams(reader: ConfigReader) -> int:
    node = reader.module("decoder", "dec_transformer", *TRUNK)
    stated = node.values.get("adaLN_expansion") is not None
    expansion = node.whole("adaLN_expansion") if stated else 2
    if not stated:
        reader.assume("dec_transformer.adaLN_expansion", 2)
    apart = reader.anywhere("decoder", "per_subseq_embs", True)
    if (expansion, apart) not in ((2, True), (1, False)) or not isinstance(apart, bool):
        raise UsageError(
            f"{reader.source}: adaLN_expansion {expansion} with per_subseq_embs {shown(apart)}: expected 2 "
            "with true, or 1 with false"
        )
    return expansion


def vae_spec(config: dict[str, Any], channels: int, scale: float = 1.0, *, source: Path) -> KLVaeSpec:
    """Sizes of the VAE: those of the release unless ``fixture`` or ``comit_bench`` say otherwise.

    Raises:
        UsageError: A value of another type or out of range.
    """
    arch: dict[str, Any] = {}
    for name in ("fixture", "comit_bench"):
        node = Node(config, source).maybe(name)
        arch.update(node.maybe("vae_arch").values)
    node = Node(arch, source, "vae_arch")
    return kl_vae_spec(node, KLVaeSpec(channels=channels, scale=scale), channels=channels)


def spec_from_reader(reader: ConfigReader) -> FlexTokSpec:
    """Everything but the scale of the latents, from config and shapes."""
    _refuse_variants(reader)
    time = reader.module("decoder", "dec_time_embedder", "frequency_embedding_size", "max_timestep")
    vae = reader.block("vae")
    if vae.values.get("latent_channels") is not None:
        channels = vae.whole("latent_channels", high=4096)
    else:
        patch = reader.shape(ENCODER, "enc_patch_emb", "patch_proj.weight")
        p, q = _patch(reader, "encoder", "enc_patch_emb")
        whole = patch is not None and len(patch) == 2 and patch[1] >= p * q
        channels = patch[1] // (p * q) if patch and whole else reader.assume("vae.latent_channels", 16)
    line = _table(reader, "decoder", DECODER, "dec_registers_posemb_module")
    if line.kind != "line":
        raise UsageError(f"{reader.source}: the decoder's registers need one line of positions, not a grid")
    register = reader.module("encoder", "enc_register_module", "n_max")
    quantizer = reader.block("regularizer")
    if quantizer.values.get("levels") is not None:
        levels = quantizer.levels("levels")
    else:
        levels = reader.assume("regularizer.levels", (8, 8, 8, 5, 5, 5))
    if time.values.get("max_timestep") is not None:
        longest = time.number("max_timestep", above=0, high=1e6)
    else:
        longest = reader.assume("dec_time_embedder.max_timestep", 1000.0)
    with blaming(reader.source):
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
            registers=reader.size(register, "n_max", ENCODER, "enc_register_module", "registers", 0),
            register_positions=line.size[0],
            fsq_levels=levels,
            streams=_streams(reader),
            time_features=time.whole("frequency_embedding_size", 256, low=2),
            max_timestep=longest,
            vae=vae_spec(reader.config, channels, source=reader.source),
        )


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
