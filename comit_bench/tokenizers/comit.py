"""Adapter for COMiT: released files <-> model, uint8 images <-> messages.

A checkpoint is a directory with ``config.json`` (top-level nodes ``predictor``, ``quantizer``, ``vae``,
each with a class path and keyword arguments; classes are matched by the last part of the path) and
``model.safetensors`` under the released key names. What :func:`save` writes loads in the original
program and vice versa; settings that the original does not know (mask mode, crop geometry of small
images) stand in an extra node ``comit_bench`` that it never reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from comit_bench.errors import BenchError, MissingError, UsageError, did_you_mean
from comit_bench.files import sha256_file, shipped_weights, write_atomic
from comit_bench.models.attention import AttentionRequest, MapReceiver
from comit_bench.models.comit import PRESETS, Comit, ComitSpec
from comit_bench.models.comit_codec import Encoded, decode, encode, to_uint8
from comit_bench.models.crops import CropGeometry, CropPolicy, parse_policy
from comit_bench.models.flow import SOLVERS, Guidance, evaluation_times, reached
from comit_bench.models.vae import build_vae
from comit_bench.tokenizers.base import (
    TILE,
    TileReceiver,
    TokenizerInfo,
    Tokens,
    attention_in_tiles,
    check_images,
    in_tiles,
)
from comit_bench.tokenizers.checkpoints import (
    load_checked,
    modern_attention,
    read_config,
    read_tensors,
    weight_file,
    write_tensors,
)

HUB = {name: f"cvg-unibe/{name}" for name in ("comit-b", "comit-l", "comit-xl")}
UNTRAINED = "comit-nano-untrained"
# names whose weights come with the package (and the untrained baseline) -> their network
SHIPPED = dict.fromkeys(
    ("comit-nano", "comit-nano-no-srepa", "comit-nano-no-local-crops", UNTRAINED), "comit-nano"
)
LINEAR_VAES = {"stand_in_vae": "stand-in", "dct_vae": "dct"}  # class in config.json -> our name
VAE_HUB = {"sd-mse": "stabilityai/sd-vae-ft-mse", "sd-ema": "stabilityai/sd-vae-ft-ema"}
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
UNUSED = ("predictor.y_pos_offset", "predictor.c_final_layer.")  # in released files, never read
_log = logging.getLogger(__name__)
PREFIX = "comit.components"  # class paths as in the reference cases; only the last part is matched

DECODE_DEFAULTS: dict[str, Any] = {"steps": 10, "solver": "euler", "guidance": 7.5, "momentum": -0.5}
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


class ComitTokenizer:
    """COMiT behind the tokenizer contract.

    Args:
        model: Network in eval mode.
        info: Its description.
        device: Where it runs.
        posterior: ``mode`` (default) or ``sample`` (released).
        steps: Solver steps of ``decode``.
        solver: ``euler`` or ``midpoint``.
        guidance: Guidance weight of ``decode``.
        momentum: Guidance momentum of ``decode``.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA.
    """

    default_policy = "global"

    def __init__(
        self,
        model: Comit,
        info: TokenizerInfo,
        *,
        device: torch.device,
        posterior: Literal["mode", "sample"] = "mode",
        steps: int = 10,
        solver: str = "euler",
        guidance: float = 7.5,
        momentum: float = -0.5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if posterior not in ("mode", "sample"):
            raise UsageError(f"posterior must be 'mode' or 'sample', got {posterior!r}")
        if solver not in SOLVERS or steps < 1:
            raise UsageError(
                f"solver {solver!r} with {steps} steps: expected {' or '.join(SOLVERS)}, 1 or more"
            )
        self.model = model.to(device).requires_grad_(False).eval()
        self.device = device
        self.posterior = posterior
        self.steps, self.solver = steps, solver
        self.guidance = Guidance(weight=guidance, momentum=momentum)
        self.dtype = dtype
        options = {"mask_mode": model.spec.mask_mode, "posterior": posterior, "vae": model.spec.vae}
        self.info = replace(info, options={**info.options, **options, "dtype": str(dtype).split(".")[-1]})

    def policy(self, name: str | None) -> CropPolicy:
        """Parse a policy name; None is the default.

        Raises:
            UsageError: Not a policy.
        """
        try:
            return parse_policy(name or self.default_policy)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def encode_flops(self, policy: str | None) -> float:
        """FLOPs per image of the backbone under a policy, for estimates (attention and linear layers)."""
        spec, parsed = self.model.spec, self.policy(policy)
        width, length = spec.width, spec.message_length

        def call(image_tokens: int, buffer: bool) -> float:
            n = 1 + image_tokens + length * (2 if buffer else 1)
            return spec.depth * (2 * n * width**2 * (4 + 2 * spec.mlp_ratio) + 4 * n**2 * width)

        whole = (spec.max_input_size // spec.patch_size) ** 2
        local = (spec.geometry.crop // spec.vae_factor // spec.patch_size) ** 2
        crops = len(parsed.indices(1, [torch.Generator()])) if not parsed.adaptive else parsed.num_crops or 1
        globals_ = int(parsed.global_crop)
        flops = globals_ * call(whole, True) + max(crops - globals_, 0) * call(local, True)
        if parsed.adaptive:
            flops += (crops - 1) * call(whole, spec.mask_mode == "additive")
        return flops

    def decode_flops(self) -> float:
        """FLOPs per image of a guided decoding, for estimates (attention and linear layers)."""
        spec = self.model.spec
        n = 1 + (spec.max_input_size // spec.patch_size) ** 2 + spec.message_length
        call = spec.depth * (2 * n * spec.width**2 * (4 + 2 * spec.mlp_ratio) + 4 * n**2 * spec.width)
        return (
            call * self.steps * (2 if self.guidance.active else 1) * (2 if self.solver == "midpoint" else 1)
        )

    @property
    def decode_options(self) -> dict[str, Any]:
        """Settings of :meth:`decode`; part of the protocol of tasks that decode."""
        settings = {
            "steps": self.steps,
            "solver": self.solver,
            "guidance": self.guidance.weight,
            "momentum": self.guidance.momentum,
        }
        return {**settings, "default": settings == DECODE_DEFAULTS}

    def _pixels(self, images_u8: Tensor) -> Tensor:
        return images_u8.to(self.device, torch.float32).div(255).sub(0.5).div(0.5)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def messages(
        self, images_u8: Tensor, policy: CropPolicy, generators: Sequence[torch.Generator] | None
    ) -> Encoded:
        """One un-tiled encoding with its trace, for figures and inspection."""
        with torch.inference_mode(), self._autocast():
            return encode(
                self.model, self._pixels(images_u8), policy, generators=generators, posterior=self.posterior
            )

    def encode(
        self,
        images_u8: Tensor,
        *,
        policy: str | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tokens:
        """Tokenize uint8 [B, 3, S, S]; see the contract.

        With a ``-shared`` policy the "batch" that shares a map is one tile of 8 images.

        Raises:
            ValueError: Wrong shape or type, or randomness is needed and no generators were given.
            UsageError: Unknown policy.
        """
        check_images(images_u8, self.info)
        parsed = self.policy(policy)

        def tile(images: Tensor, index: Tensor) -> Tokens:
            own = None
            if generators is not None:  # clones: a padded row must not advance its original's stream
                own = [generators[i].clone_state() for i in index.tolist()]
            done = self.messages(images, parsed, own)
            return Tokens(done.ids, done.codes, done.offset)

        return in_tiles(tile, images_u8, torch.arange(images_u8.shape[0]), tile=TILE)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Integers [..., K] -> float32 [..., K, d].

        Raises:
            ValueError: An id outside the vocabulary.
        """
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.model.quantizer.vocab_size):
            raise ValueError(f"ids must lie in 0..{self.model.quantizer.vocab_size - 1}")
        return self.model.quantizer.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages -> uint8 [B, 3, S, S], one noise seed per image."""
        if tokens.offsets is None:
            raise ValueError("COMiT decodes from codes and their decoding offsets; these tokens have none")
        noise = torch.stack([self._noise(seed) for seed in seeds])

        def tile(codes: Tensor, offsets: Tensor, y: Tensor) -> Tokens:
            with torch.inference_mode(), self._autocast():
                latents = decode(
                    self.model,
                    codes.to(self.device),
                    offsets.to(self.device),
                    y.to(self.device),
                    steps=self.steps,
                    solver=self.solver,
                    guidance=self.guidance,
                ).latents
                return Tokens(None, to_uint8(cast(Any, self.model.vae).decode(latents)))

        return in_tiles(tile, tokens.codes, tokens.offsets, noise).codes

    def _noise(self, seed: int) -> Tensor:
        spec = self.model.spec
        shape = (spec.in_channels, spec.max_input_size, spec.max_input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @property
    def attention_layers(self) -> int:
        """Blocks whose maps can be read."""
        return self.model.spec.depth

    def attention_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """The evaluation at which each of ``times`` is read; see the contract."""
        grid = evaluation_times(self.steps, self.solver)
        if late := [time for time in times if not reached(grid[-1], time)]:
            raise ValueError(f"no evaluation has t >= {max(late)} with {self.steps} {self.solver} steps")
        return tuple(next(t for t in grid if reached(t, time)) for time in times)

    def attention(
        self, tokens: Tokens, request: AttentionRequest, receive: TileReceiver, *, seeds: Sequence[int]
    ) -> None:
        """Message-to-image maps recorded while decoding; see the contract."""
        if tokens.offsets is None:
            raise ValueError("COMiT decodes from codes and their decoding offsets; these tokens have none")
        self.attention_times(request.times)
        noise = torch.stack([self._noise(seed) for seed in seeds])

        def tile(codes: Tensor, offsets: Tensor, y: Tensor, hand_on: MapReceiver) -> None:
            with torch.inference_mode(), self._autocast():
                decode(
                    self.model,
                    codes.to(self.device),
                    offsets.to(self.device),
                    y.to(self.device),
                    steps=self.steps,
                    solver=self.solver,
                    guidance=self.guidance,
                    attention=request,
                    receive=hand_on,
                    finish=False,
                )

        attention_in_tiles(tile, receive, tokens.codes, tokens.offsets, noise)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` in the released layout."""
        save(self.model, directory)


def _info(
    model: Comit, name: str, weights: str, *, trained: bool, training_data: str, licence: str
) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        name=name,
        family="comit",
        kind="learned",
        weights=weights,
        parameters=sum(p.numel() for p in model.predictor.parameters()),
        message_length=spec.message_length,
        vocab_size=model.quantizer.vocab_size,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"center_crop|resize({spec.image_size},bilinear)",
        trained=trained,
        training_data=training_data,
        weights_licence=licence,
    )


def _load_random(preset: str, device: torch.device, seed: int, options: dict[str, Any]) -> ComitTokenizer:
    network = SHIPPED.get(preset, preset)
    if network not in PRESETS:
        raise UsageError(f"--weights random needs a preset, not {preset!r}.{did_you_mean(preset, PRESETS)}")
    model = build(PRESETS[network])
    model.predictor.init_weights(torch.Generator().manual_seed(seed), zero_gates=False)
    info = _info(model, preset, f"random:{seed}", trained=False, training_data="none", licence="none")
    return ComitTokenizer(model, info, device=device, **options)


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Any,
) -> ComitTokenizer:
    """Load a COMiT tokenizer by preset name or directory.

    Args:
        name: ``comit-b`` … ``comit-nano``, an ablation of it, a hub id, or a checkpoint directory.
        weights: Checkpoint directory, ``random`` (untrained), or None: the directory, what ships, or the hub.
        device: Where it runs.
        offline: Never ask the hub.
        seed: Of random weights.
        **options: Passed to :class:`ComitTokenizer`.

    Raises:
        MissingError: No weights on this machine and the hub is out of reach.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
    """
    from comit_bench.tokenizers.hub import fetch

    known = {"posterior", "steps", "solver", "guidance", "momentum", "dtype"}
    for option in options.keys() - known:
        raise UsageError(f"COMiT has no option {option!r}.{did_you_mean(option, known)}")
    preset = name.lower()
    if preset == UNTRAINED and weights not in (None, "random"):
        raise UsageError(f"{UNTRAINED} always has random weights: --weights {weights} is for comit-nano")
    if weights == "random" or preset == UNTRAINED:
        return _load_random(preset, device, seed, options)
    local = Path(weights) if weights else Path(name)
    if weights is None and preset in SHIPPED and not local.is_dir():
        local = shipped_weights(preset)
    if not local.is_dir():
        if weights:
            raise MissingError(
                f"--weights {weights}: no such directory. Give one with config.json and "
                "model.safetensors, or 'random'."
            )
        repository = HUB.get(preset, name)
        local = fetch(
            repository, ("config.json", "model.safetensors"), offline=offline, hint="or pass --weights DIR"
        )
    model, config = load_directory(local, offline=offline)
    label = Path(name).resolve().name if Path(name).is_dir() else name
    if preset in PRESETS or preset in SHIPPED:
        label = preset
    extra = dict(config.get("comit_bench", {}))
    info = _info(
        model,
        label,
        sha256_file(weight_file(local)),
        trained=bool(extra.get("trained", True)),
        training_data=str(extra.get("training_data", "ImageNet-1k" if preset in HUB else "unknown")),
        licence=str(extra.get("weights_licence", "see the hub page" if preset in HUB else "unknown")),
    )
    return ComitTokenizer(model, info, device=device, **options)
