"""Adapter for COMiT: uint8 images <-> messages. Reading and writing the files is ``checkpoint.py``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import MissingError, UsageError, did_you_mean, shown
from comit_bench.files import shipped_weights
from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.finite import observe
from comit_bench.nn.flow import SOLVERS, Guidance, evaluation_times, reached
from comit_bench.nn.vae import SDVae
from comit_bench.tokenizers.base import (
    MOST_STEPS,
    TileReceiver,
    TokenizerInfo,
    Tokens,
    attention_in_tiles,
    autocast,
    check_ids,
    check_images,
    in_tiles,
    number,
    on_device,
    only_finite,
    own_streams,
    refuse_unknown,
    switch,
)
from comit_bench.tokenizers.checkpoints import (
    checkpoint_path,
    described,
    read_config,
    single_file_spec,
    weight_file,
    weights_digest,
)
from comit_bench.tokenizers.comit.checkpoint import build, load_file, save, spec_from_config
from comit_bench.tokenizers.comit.codec import (
    Encoded,
    NoiseSource,
    decode,
    encode,
    one_step_decode,
    to_uint8,
)
from comit_bench.tokenizers.comit.crops import CropPolicy, parse_policy
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.tokenizers.config_node import read_facts
from comit_bench.tokenizers.identity import configuration_digest

HUB = {name: f"cvg-unibe/{name}" for name in ("comit-b", "comit-l", "comit-xl")}
UNTRAINED = "comit-nano-untrained"
DECODE_DEFAULTS: dict[str, Any] = {"steps": 10, "solver": "euler", "guidance": 7.5, "momentum": -0.5}
# names whose weights come with the package (and the untrained baseline) -> their network
SHIPPED = dict.fromkeys(
    ("comit-nano", "comit-nano-no-srepa", "comit-nano-no-local-crops", UNTRAINED), "comit-nano"
)
VERSION = "1"  # raised when the same weights and configuration may give other ids


class Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes; see :class:`ComitTokenizer`."""

    posterior: Literal["mode", "sample"]
    steps: int
    solver: Literal["euler", "midpoint"]
    guidance: float
    momentum: float
    allow_pickle: bool
    dtype: torch.dtype


OPTIONS = tuple(Options.__annotations__)


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
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; message head, quantizer and VAE stay in
            float32.
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
            raise UsageError(f"posterior must be 'mode' or 'sample', got {shown(posterior)}")
        if solver not in SOLVERS:
            raise UsageError(f"solver must be {' or '.join(SOLVERS)}, got {shown(solver)}")
        steps = int(number(steps, "steps", whole=True, low=1, high=MOST_STEPS))
        weight, pull = number(guidance, "guidance"), number(momentum, "momentum")
        self.model = model.to(device).requires_grad_(False).eval()
        self.network = FastPredictor(self.model.predictor)  # for good: these weights do not change
        self.device = device
        self.posterior = posterior
        self.steps, self.solver = steps, solver
        self.guidance = Guidance(weight=weight, momentum=pull)
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
            raise UsageError(f"--policy {shown(name)}: {error}") from error

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
        return on_device(images_u8, self.device).div(255).sub(0.5).div(0.5)

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.dtype)

    def messages(
        self,
        images_u8: Tensor,
        policy: CropPolicy,
        generators: Sequence[torch.Generator] | None,
        *,
        noise: NoiseSource | None = None,
    ) -> Encoded:
        """One un-tiled encoding with its trace, for figures and inspection; ``noise`` is as in ``encode``."""
        with only_finite(self.info.name), torch.inference_mode(), self._autocast():
            return encode(
                self.model,
                self._pixels(images_u8),
                policy,
                generators=generators,
                noise=noise,
                posterior=self.posterior,
                network=self.network,
            )

    def one_step(self, codes: Tensor, offsets: Tensor, noise: Tensor) -> Tensor:
        """What a message [B, M, d] says after one Euler step without guidance, un-tiled.

        Args:
            codes: [B, M, d].
            offsets: [B, 2] decoding offsets.
            noise: [B, C, h, w].

        Returns:
            float32 [B, 3, S, S], about [-1, 1], as adaptive policies compare it with the image.
        """
        with only_finite(self.info.name), torch.inference_mode(), self._autocast():
            given = codes.to(self.device), offsets.to(self.device), noise.to(self.device)
            latents = one_step_decode(self.model, *given, network=self.network)
            return observe("pixels", self.model.codec.decode(latents))

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
            own = own_streams(generators, index)
            done = self.messages(images, parsed, own)
            return Tokens(done.ids, done.codes, done.offset)

        return in_tiles(tile, images_u8, torch.arange(images_u8.shape[0]), name=self.info.name)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Integers [..., K] -> float32 [..., K, d].

        Raises:
            ValueError: An id outside the vocabulary.
        """
        check_ids(ids, self.model.quantizer.vocab_size)
        return self.model.quantizer.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages -> uint8 [B, 3, S, S], one noise seed per image."""
        if tokens.offsets is None:
            raise ValueError("COMiT decodes from codes and their decoding offsets; these tokens have none")
        noise = torch.stack([self.noise(seed) for seed in seeds])

        def tile(codes: Tensor, offsets: Tensor, y: Tensor) -> Tokens:
            with torch.inference_mode(), self._autocast():
                latents = decode(
                    self.model,
                    codes.to(self.device),
                    offsets.to(self.device),
                    y.to(self.device, non_blocking=True),
                    steps=self.steps,
                    solver=self.solver,
                    guidance=self.guidance,
                    network=self.network,
                ).latents
                return Tokens(None, to_uint8(self.model.codec.decode(latents)))

        return in_tiles(tile, tokens.codes, tokens.offsets, noise, name=self.info.name).codes

    def noise(self, seed: int) -> Tensor:
        """The noise [C, h, w] that ``decode`` starts from, for one image's seed."""
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
        noise = torch.stack([self.noise(seed) for seed in seeds])

        def tile(codes: Tensor, offsets: Tensor, y: Tensor, hand_on: MapReceiver) -> None:
            with torch.inference_mode(), self._autocast():
                decode(
                    self.model,
                    codes.to(self.device),
                    offsets.to(self.device),
                    y.to(self.device, non_blocking=True),
                    steps=self.steps,
                    solver=self.solver,
                    guidance=self.guidance,
                    attention=request,
                    receive=hand_on,
                    finish=False,
                    network=self.network,
                )

        attention_in_tiles(tile, receive, tokens.codes, tokens.offsets, noise)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` in the released layout."""
        save(self.model, directory)


def _info(
    model: Comit,
    name: str,
    weights: str,
    *,
    trained: bool,
    training_data: str,
    licence: str,
    revision: str | None = None,
    vae: Path | None = None,
) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        name=name,
        family="comit",
        kind="learned",
        revision=revision,
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
        options={} if vae is None else {"vae_weights": weights_digest(vae)},
        configuration=configuration_digest(spec),
        version=VERSION,
    )


def _load_random(preset: str, device: torch.device, seed: int, options: dict[str, Any]) -> ComitTokenizer:
    network = SHIPPED.get(preset, preset)
    if network not in PRESETS:
        raise UsageError(f"--weights random needs a preset, not {preset!r}.{did_you_mean(preset, PRESETS)}")
    model = build(PRESETS[network], empty=device.type == "meta")
    if device.type != "meta":
        generator = torch.Generator().manual_seed(seed)
        model.predictor.init_weights(generator, zero_gates=False)
        if isinstance(model.vae, SDVae):
            model.vae.init_weights(generator)
    info = _info(model, preset, f"random:{seed}", trained=False, training_data="none", licence="none")
    return ComitTokenizer(model, info, device=device, **options)


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> ComitTokenizer:
    """Load a COMiT tokenizer by preset name or directory.

    Args:
        name: ``comit-b`` … ``comit-nano``, an ablation of it, a hub id, or a checkpoint directory.
        weights: Checkpoint directory, a file of weights (with a preset name), ``random`` (untrained), or
            None: the directory, what ships, or the hub.
        device: Where it runs.
        offline: Never ask the hub.
        seed: Of random weights.
        **options: ``allow_pickle``; the others are passed to :class:`ComitTokenizer`.

    Raises:
        MissingError: No weights on this machine and the hub is out of reach.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    from comit_bench.tokenizers.hub import fetch_checkpoint

    refuse_unknown(options, OPTIONS, "COMiT")
    settings: dict[str, Any] = {**options}
    allow = switch(settings.pop("allow_pickle", False), "allow_pickle")
    preset = name.lower()
    if preset == UNTRAINED and weights not in (None, "random"):
        raise UsageError(f"{UNTRAINED} always has random weights: --weights {weights} is for comit-nano")
    if weights == "random" or preset == UNTRAINED:
        return _load_random(preset, device, seed, settings)
    local = checkpoint_path(weights or name)
    if weights is None and preset in SHIPPED and not local.is_dir():
        local = shipped_weights(preset)
    if weights and not local.exists():
        raise MissingError(
            f"--weights {weights}: no such directory or file. Give a directory with config.json and "
            "model.safetensors, one file of weights, or 'random'."
        )
    if not weights and not local.is_dir():
        local = fetch_checkpoint(
            HUB.get(preset, name), offline=offline, hint="or pass --weights DIR", allow_pickle=allow
        )
    config: dict[str, Any] = {}
    if local.is_dir():
        path, config = weight_file(local), read_config(local)
        spec = spec_from_config(config, local / "config.json")
    else:
        path = local
        spec = single_file_spec(name, local, {**PRESETS, **{k: PRESETS[v] for k, v in SHIPPED.items()}})
    loaded = load_file(path, spec, beside=path.parent, offline=offline, allow_pickle=allow)
    facts = read_facts(config, local / "config.json")
    known = preset in HUB and not weights
    label, revision = described(name, local, (*PRESETS, *SHIPPED))
    info = _info(
        loaded.model,
        label,
        weights_digest(path),
        revision=revision,
        trained=facts.trained,
        training_data=facts.training_data or ("ImageNet-1k" if known else "unknown"),
        licence=facts.weights_licence or ("see the hub page" if known else "unknown"),
        vae=loaded.vae_file,
    )
    return ComitTokenizer(loaded.model, info, device=device, **settings)
