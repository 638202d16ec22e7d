"""Adapter for COMiT: uint8 images <-> messages. Reading and writing the files is ``checkpoint.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UsageError, shown
from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.finite import observe
from comit_bench.nn.flow import SOLVERS, Guidance, evaluation_times, reached
from comit_bench.nn.vae import KLVae
from comit_bench.tokenizers.base import (
    MOST_STEPS,
    POSTERIORS,
    CropStep,
    Streams,
    TileReceiver,
    TokenizerInfo,
    Tokens,
    attention_in_tiles,
    check_ids,
    check_images,
    computing,
    decode_tiles,
    encode_tiles,
    number,
    on_device,
    one_of,
    only_finite,
    own_streams,
    split_options,
)
from comit_bench.tokenizers.checkpoints import on_meta, weights_digest
from comit_bench.tokenizers.comit.checkpoint import build, load_file, save, spec_from_config
from comit_bench.tokenizers.comit.codec import (
    Decoded,
    Encoded,
    NoiseSource,
    decode,
    encode,
    one_step_decode,
    to_uint8,
)
from comit_bench.tokenizers.comit.codec import (
    locate as locate_cells,
)
from comit_bench.tokenizers.comit.crops import CropPolicy, parse_policy
from comit_bench.tokenizers.comit.family import FAMILY, UNTRAINED
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit, ComitSpec
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import WeightsOrigin, locate, spec_of, untrained

DECODE_DEFAULTS: dict[str, Any] = {"steps": 10, "solver": "euler", "guidance": 7.5, "momentum": -0.5}
VERSION = "1"  # raised when the same weights and configuration may give other ids


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes; see :class:`ComitTokenizer`."""

    posterior: Literal["mode", "sample"]
    steps: int
    solver: Literal["euler", "midpoint"]
    guidance: float
    momentum: float
    allow_pickle: bool
    dtype: torch.dtype


def networks() -> dict[str, ComitSpec]:
    """Sizes by preset: ablations of comit-nano differ in their weights alone."""
    return {preset.name: PRESETS.get(preset.name, PRESETS["comit-nano"]) for preset in FAMILY.presets}


class ComitTokenizer:
    """COMiT behind the tokenizer contract.

    Args:
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
        one_of(posterior, "posterior", POSTERIORS)
        one_of(solver, "solver", SOLVERS)
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
        """Parse a policy name; None is the default."""
        try:
            return parse_policy(name or self.default_policy)
        except ValueError as error:
            raise UsageError(f"--policy {shown(name)}: {error}") from error

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

    def _messages(
        self,
        images: Tensor,
        policy: CropPolicy,
        generators: Streams,
        noise: NoiseSource | None = None,
        later: Tensor | None = None,
    ) -> Encoded:
        """Of float32 images 0..255 on the device."""
        return encode(
            self.model,
            _centred(images),
            policy,
            generators=generators,
            noise=noise,
            posterior=self.posterior,
            network=self.network,
            later=None if later is None else _centred(later),
        )

    def messages(
        self,
        images_u8: Tensor,
        policy: CropPolicy,
        generators: Streams,
        *,
        noise: NoiseSource | None = None,
    ) -> Encoded:
        """One un-tiled encoding with its trace, for figures and inspection; ``noise`` is as in ``encode``."""
        with only_finite(self.info.name), computing(self):
            return self._messages(on_device(images_u8, self.device), policy, generators, noise)

    def one_step(self, codes: Tensor, offsets: Tensor, noise: Tensor) -> Tensor:
        """What a message [B, M, d] says after one Euler step without guidance, un-tiled.

        Args:
            codes: [B, M, d].
            offsets: [B, 2] decoding offsets.
            noise: [B, C, h, w].

        Returns:
            float32 [B, 3, S, S], about [-1, 1], as adaptive policies compare it with the image.
        """
        with only_finite(self.info.name), computing(self):
            given = codes.to(self.device), offsets.to(self.device), noise.to(self.device)
            latents = one_step_decode(self.model, *given, network=self.network)
            return observe("pixels", self.model.codec.decode(latents))

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; the "batch" that shares a map of a ``-shared`` policy is one tile of 8 images."""
        parsed = self.policy(policy)

        def tile(images: Tensor, index: Tensor) -> Tokens:
            done = self._messages(images, parsed, own_streams(generators, index))
            return Tokens(done.ids, done.codes, done.offset)

        return encode_tiles(self, tile, images_u8, torch.arange(len(images_u8)))

    def encode_by_crop(
        self, images_u8: Tensor, *, policy: str, generators: Streams = None, later: Tensor | None = None
    ) -> list[CropStep]:
        """See the contract."""
        parsed = self.policy(policy)
        if later is not None:
            check_images(later, self.info)

        def tile(images: Tensor, index: Tensor, others: Tensor | None = None) -> Tokens:
            others = None if others is None else on_device(others, self.device)
            done = self._messages(images, parsed, own_streams(generators, index), later=others)
            codes = torch.stack([step.codes for step in done.steps], dim=1)  # [b, steps, M, d]
            cells = torch.stack([step.cells for step in done.steps], dim=1)
            boxes = self.model.spec.geometry.boxes(images.shape[-1]).to(cells.device)[cells + 1]
            offsets = -locate_cells(self.model, cells, images.shape[-1])
            # frames are whole numbers far below 2^24: they travel beside the offsets unharmed
            return Tokens(self.model.quantizer.ids(codes), codes, torch.cat([offsets, boxes.float()], dim=2))

        beside = [torch.arange(len(images_u8))] + ([] if later is None else [later])
        found = encode_tiles(self, tile, images_u8, *beside)
        assert found.ids is not None and found.offsets is not None
        return [
            CropStep(Tokens(ids, codes, places[:, :2]), places[:, 2:].long())
            for ids, codes, places in zip(
                found.ids.unbind(1), found.codes.unbind(1), found.offsets.unbind(1), strict=True
            )
        ]

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.model.quantizer.vocab_size)
        return self.model.quantizer.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        def tile(*rows: Tensor) -> Tensor:
            return to_uint8(self.model.codec.decode(self._decode(*rows).latents))

        return decode_tiles(self, tile, *self._to_decode(tokens, seeds))

    def decode_one_step(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """One Euler step without guidance; see the contract."""

        def tile(codes: Tensor, offsets: Tensor, noise: Tensor) -> Tensor:
            latents = one_step_decode(self.model, codes, offsets, noise, network=self.network)
            return to_uint8(self.model.codec.decode(latents))

        return decode_tiles(self, tile, *self._to_decode(tokens, seeds))

    def _to_decode(self, tokens: Tokens, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, offsets and noise."""
        if tokens.offsets is None:
            raise ValueError("COMiT decodes from codes and their decoding offsets; these tokens have none")
        return tokens.codes, tokens.offsets, torch.stack([self.noise(seed) for seed in seeds])

    def _decode(self, codes: Tensor, offsets: Tensor, noise: Tensor, **asked: Any) -> Decoded:
        settings: dict[str, Any] = {"steps": self.steps, "solver": self.solver, "guidance": self.guidance}
        return decode(self.model, codes, offsets, noise, **settings, **asked, network=self.network)

    def noise(self, seed: int) -> Tensor:
        """The noise [C, h, w] that ``decode`` starts from, for one image's seed."""
        spec = self.model.spec
        shape = (spec.in_channels, spec.max_input_size, spec.max_input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @property
    def attention_layers(self) -> int:
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
        rows = self._to_decode(tokens, seeds)
        self.attention_times(request.times)

        def tile(codes: Tensor, offsets: Tensor, noise: Tensor, hand_on: MapReceiver) -> None:
            with computing(self):
                here = (part.to(self.device, non_blocking=True) for part in (codes, offsets, noise))
                self._decode(*here, attention=request, receive=hand_on, finish=False)

        attention_in_tiles(tile, receive, *rows)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` in the released layout."""
        save(self.model, directory)


def _centred(images: Tensor) -> Tensor:
    """0..255 -> [-1, 1]."""
    return images.div(255).sub(0.5).div(0.5)


def _info(model: Comit, origin: WeightsOrigin, vae: Path | None = None) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        family="comit",
        kind="learned",
        parameters=sum(p.numel() for p in model.predictor.parameters()),
        message_length=spec.message_length,
        vocab_size=model.quantizer.vocab_size,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"center_crop|resize({spec.image_size},bilinear)",
        options={} if vae is None else {"vae_weights": weights_digest(vae)},
        configuration=configuration_digest(spec),
        version=VERSION,
        **asdict(origin),
    )


def _random(spec: ComitSpec, device: torch.device, seed: int) -> Comit:
    if device.type == "meta":
        return on_meta(build, spec)
    model, generator = build(spec), torch.Generator().manual_seed(seed)
    model.predictor.init_weights(generator, zero_gates=False)
    if isinstance(model.vae, KLVae):
        model.vae.init_weights(generator)
    return model


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> ComitTokenizer:
    """Load a COMiT tokenizer; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: ``comit-b`` … ``comit-nano``, an ablation of it, a hub id, or a checkpoint directory.
        **options: ``allow_pickle``; the others are passed to :class:`ComitTokenizer`.
    """
    settings, allow = split_options(options, _Options, "COMiT")
    if name.lower() == UNTRAINED and weights not in (None, "random"):
        raise UsageError(f"{UNTRAINED} always has random weights: --weights {weights} is for comit-nano")
    if weights == "random" or name.lower() == UNTRAINED:
        spec, origin, vae = spec_of(name, networks()), untrained(name.lower(), seed), None
        model = _random(spec, device, seed)
    else:
        place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow)
        path, config, spec = place.read(networks(), spec_from_config)
        model, vae = load_file(path, spec, offline=offline, allow_pickle=allow)
        origin = place.origin(path, config, networks())
    return ComitTokenizer(model, _info(model, origin, vae), device=device, **settings)
