"""Adapter for FlexTok: uint8 images <-> 256 ordered tokens, or a prefix of them.

Tokenization is deterministic by default: the mean of the VAE's posterior. The released program samples it;
``posterior=sample`` does so with one generator per image. Reading the files is ``checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.tokenizers.base import (
    MOST_STEPS,
    POSTERIORS,
    Streams,
    TokenizerInfo,
    Tokens,
    check_ids,
    decode_tiles,
    encode_tiles,
    number,
    one_of,
    seeded_noise,
    split_options,
    switch_or_auto,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import weights_digest
from comit_bench.tokenizers.flextok.checkpoint import load_directory, save
from comit_bench.tokenizers.flextok.codec import Sampling, decode, encode, to_uint8
from comit_bench.tokenizers.flextok.config import config_from_spec
from comit_bench.tokenizers.flextok.family import FAMILY
from comit_bench.tokenizers.flextok.model import PRESETS, FlexTok
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import WeightsOrigin, locate, random_network, spec_of, untrained

GUIDANCE, GUIDANCE_SMALL = 7.5, 15.0  # the authors' choice; the second for flextok-d12-d12
MODES = ("apg", "cfg")
VERSION = "1"  # raised when the same weights and configuration may give other ids


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes; see there and :class:`FlexTokTokenizer`."""

    tokens: int | None
    posterior: Literal["mode", "sample"]
    steps: int
    guidance: float
    guidance_mode: Literal["apg", "cfg"]
    scaling_factor: float
    allow_pickle: bool
    compile: bool | Literal["auto"]
    dtype: torch.dtype


def _prefix(tokens: object, most: int) -> int:
    return int(number(tokens, "FlexTok: tokens", whole=True, low=1, high=most))


def _sampling(
    *,
    tokens: object = None,
    posterior: object = "mode",
    steps: object = 25,
    guidance: object = GUIDANCE,
    guidance_mode: object = "apg",
    compile: object = "auto",
    **_: object,
) -> Sampling:
    """The sampler's settings, after a look at all options: before minutes of drawing or reading weights."""
    if tokens is not None:
        _prefix(tokens, max(spec.registers for spec in PRESETS.values()))
    one_of(posterior, "posterior", POSTERIORS)
    one_of(guidance_mode, "guidance_mode", MODES)
    switch_or_auto(compile, "compile")
    return Sampling(
        steps=int(number(steps, "FlexTok: steps", whole=True, low=1, high=MOST_STEPS)),
        guidance=number(guidance, "FlexTok: guidance", low=0.0),
        projected=guidance_mode == "apg",
    )


class FlexTokTokenizer:
    """FlexTok behind the tokenizer contract.

    Args:
        tokens: Length of the prefix that is encoded; None is all of the model's.
        posterior: ``mode`` (default) or ``sample`` (released).
        steps: Euler steps of ``decode``.
        guidance: Guidance weight of ``decode``; 1 switches guidance off.
        guidance_mode: ``apg`` (projected, the authors' choice) or ``cfg``.
        compile: Compile the pixel decoder: ``auto`` is on CUDA when Triton is installed.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; VAE, last layer, quantizer and the sampler's
            state stay in float32.
    """

    def __init__(
        self,
        model: FlexTok,
        info: TokenizerInfo,
        *,
        device: torch.device,
        tokens: int | None = None,
        posterior: Literal["mode", "sample"] = "mode",
        steps: int = 25,
        guidance: float = GUIDANCE,
        guidance_mode: Literal["apg", "cfg"] = "apg",
        compile: bool | str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        total = model.spec.registers
        self.tokens = total if tokens is None else _prefix(tokens, total)
        self.sampling = _sampling(
            posterior=posterior, steps=steps, guidance=guidance, guidance_mode=guidance_mode, compile=compile
        )
        self.model = model.to(device).requires_grad_(False).eval()
        self.model.vae.prepare(device, compiled=switch_or_auto(compile, "compile"))
        self.device, self.dtype, self.posterior = device, dtype, posterior
        options = {
            "tokens": str(self.tokens),
            "posterior": posterior,
            "scaling_factor": f"{model.vae.scale:g}",
            "dtype": str(dtype).split(".")[-1],
        }
        self.info = replace(info, message_length=self.tokens, options={**info.options, **options})

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        spec = self.model.spec
        side = spec.image_size // spec.vae.factor
        return (spec.vae.channels, side, side)

    @property
    def decode_options(self) -> dict[str, Any]:
        """Settings of :meth:`decode`; part of the protocol of tasks that decode."""
        sampling = self.sampling
        usual = GUIDANCE_SMALL if self.info.name == "flextok-d12-d12" else GUIDANCE
        settings = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "guidance_mode": "apg" if sampling.projected else "cfg",
        }
        return {**settings, "default": settings == {"steps": 25, "guidance": usual, "guidance_mode": "apg"}}

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        warn_policy(self.info.name, policy)
        noise = torch.zeros(len(images_u8), 0)
        sampled = self.posterior == "sample"
        if sampled:
            if generators is None:
                raise ValueError("posterior='sample' needs one generator per image")
            noise = torch.stack([torch.randn(self._latent_shape, generator=g) for g in generators])

        def tile(images: Tensor, drawn: Tensor) -> Tokens:
            eps = drawn.to(self.device) if sampled else None
            done = encode(self.model, images.div(255).mul(2).sub(1), tokens=self.tokens, noise=eps)
            return Tokens(done.ids, done.codes)

        return encode_tiles(self, tile, images_u8, noise)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.model.regularizer.vocab_size)
        return self.model.regularizer.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages of any length up to the model's; see the contract."""
        spec, codes = self.model.spec, tokens.codes
        if codes.ndim != 3 or codes.shape[2] != spec.code_dim or not 1 <= codes.shape[1] <= spec.registers:
            raise ValueError(
                f"{self.info.name} decodes codes of shape [B, 1..{spec.registers}, {spec.code_dim}], got "
                f"{list(codes.shape)}"
            )
        noise = seeded_noise(seeds, self._latent_shape, codes.shape[0])

        def tile(codes: Tensor, noise: Tensor) -> Tensor:
            return to_uint8(decode(self.model, codes, noise, sampling=self.sampling))

        return decode_tiles(self, tile, codes, noise)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` in the released layout."""
        save(self.model, directory)


def _info(model: FlexTok, origin: WeightsOrigin, options: dict[str, str] | None = None) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        family="flextok",
        kind="learned",
        parameters=sum(p.numel() for part in (model.encoder, model.decoder) for p in part.parameters()),
        message_length=spec.registers,
        vocab_size=model.regularizer.vocab_size,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"resize_short({spec.image_size},bilinear)|center_crop({spec.image_size})",
        options=options or {},
        configuration=configuration_digest(spec),
        version=VERSION,
        **asdict(origin),
    )


def _stored(
    name: str, weights: str | None, scale: float | None, *, offline: bool, allow_pickle: bool
) -> tuple[FlexTok, TokenizerInfo]:
    place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow_pickle)
    sizes: dict[str, Any] | None = None
    if place.local.is_file() and name in PRESETS:
        sizes = config_from_spec(PRESETS[name])
        del sizes["vae"]["scaling_factor"]
    model, found, vae_file = load_directory(
        place.local, scaling_factor=scale, offline=offline, allow_pickle=allow_pickle, sizes=sizes
    )
    extra: dict[str, str] = {}
    if found.assumed:
        extra["assumed"] = ", ".join(f"{key}={value}" for key, value in sorted(found.assumed.items()))
    if vae_file is not None:
        extra["vae"] = weights_digest(vae_file)
    return model, _info(model, place.origin(found.path, found.config, PRESETS), extra)


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> FlexTokTokenizer:
    """Load a FlexTok tokenizer; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: ``flextok-d12-d12`` … ``flextok-d18-d28-dfn``, a hub id, or a checkpoint directory.
        **options: ``scaling_factor`` of the latents, for checkpoints whose config has none (with random
            weights it is 1); ``allow_pickle``; the others go to :class:`FlexTokTokenizer`.
    """
    settings, allow = split_options(options, _Options, "FlexTok")
    if "scaling_factor" in settings:
        settings["scaling_factor"] = number(settings["scaling_factor"], "FlexTok: scaling_factor", low=1e-6)
    scale = settings.pop("scaling_factor", None)
    preset = FAMILY.preset(name)
    name = name if preset is None else preset.name
    if name == "flextok-d12-d12":
        settings.setdefault("guidance", GUIDANCE_SMALL)
    _sampling(**settings)
    if weights == "random":
        spec = spec_of(name, PRESETS)
        spec = replace(spec, vae=replace(spec.vae, scale=scale or 1.0))
        model = random_network(FlexTok, spec, device, seed, zero_gates=False)
        info = _info(model, untrained(name, seed))
    else:
        model, info = _stored(name, weights, scale, offline=offline, allow_pickle=allow)
    return FlexTokTokenizer(model, info, device=device, **settings)
