"""Adapter for ALIT: uint8 images <-> the message of one iteration.

A checkpoint is a directory with ``config.json`` and safetensors under the released key names, or one file
of weights together with a name (``config.py`` knows the names). The released files are pickles behind
plain links: ``comit-bench weights fetch NAME`` brings them here and converts them once.

What the benchmark fixes, because the released program draws it at evaluation: no halting and the mean of
the VAE's posterior. Both can be asked for; the noise then comes from the image's own generator.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UnsupportedOperation, UsageError
from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.finite import observe
from comit_bench.tokenizers.alit.base_model import Vqgan
from comit_bench.tokenizers.alit.config import (
    VARIANTS,
    choose_variant,
    config_from_spec,
    load_file,
    spec_from_config,
)
from comit_bench.tokenizers.alit.family import FAMILY
from comit_bench.tokenizers.alit.model import GRID, Alit, Iteration, select_length
from comit_bench.tokenizers.base import (
    LATENTS,
    POSTERIORS,
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
    on_device,
    one_of,
    only_finite,
    own_streams,
    speed_up,
    split_options,
    switch,
    switch_or_auto,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import weight_file, write_checkpoint
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import WeightsOrigin, locate, random_network, spec_of, untrained

VERSION = "1"  # raised when the same weights and configuration may give other ids


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes; see there and :class:`AlitTokenizer`."""

    base: str  # texts and numbers whose values are checked, with more words, where they are used
    latent: str
    allow_pickle: bool
    iterations: int | float | None
    halting: bool
    posterior: str
    latents: str
    compile: bool | Literal["auto"]
    dtype: torch.dtype


_log = logging.getLogger(__name__)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] floats -> uint8: times 255, clipped, truncated, as the released evaluation does."""
    return observe("pixels", images).float().mul(255).clamp(0, 255).to(torch.uint8)


class AlitTokenizer:
    """ALIT behind the tokenizer contract.

    Args:
        iterations: 1 to T; the message has K0 times as many tokens. None is all.
        halting: ``off`` (default, deterministic) or ``on`` (released, VQGAN base only).
        posterior: ``mode`` (default, deterministic) or ``sample`` (released, VAE base only).
        latents: What probes read: ``codes`` (what enters the decoder), ``prequant`` (before
            quantization) or ``raw`` (rows of the encoder, which the original program calls encoding).
        compile: Compile the pixel decoder: ``auto`` is on CUDA when Triton is installed.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; base tokenizer, last layer and
            quantizers stay in float32.
    """

    decodes_with_noise = False

    def __init__(
        self,
        model: Alit,
        info: TokenizerInfo,
        *,
        device: torch.device,
        iterations: int | None = None,
        halting: str | bool = "off",
        posterior: str = "mode",
        latents: str = "codes",
        compile: bool | str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        spec = model.spec
        self.model = model.to(device).requires_grad_(False).eval()
        self.device, self.dtype = device, dtype
        wanted = spec.iterations if iterations is None else iterations
        if wanted not in range(1, spec.iterations + 1):
            raise UsageError(f"iterations must be a whole number from 1 to {spec.iterations}, got {wanted!r}")
        self.iterations = int(wanted)
        self.halting = switch(halting, "halting") and spec.halting
        posterior = one_of(posterior, "posterior", POSTERIORS)
        self.sample = posterior == "sample" and model.base.stochastic
        self.latents = one_of(latents, "latents", LATENTS)
        quantized = isinstance(model.base, Vqgan)
        if self.halting and not quantized:
            _log.warning("%s: halting=on changes nothing: the VAE models have no working halting", info.name)
            self.halting = False
        if posterior == "sample" and quantized:
            _log.warning("%s: posterior=sample changes nothing: a VQGAN has no posterior", info.name)
        speed_up(self.model.base.decoder, device, compiled=switch_or_auto(compile, "compile"))
        options = {
            "base": model.base_tokenizer.kind,
            "iterations": str(self.iterations),
            "halting": "on" if self.halting else "off",
            "posterior": ("sample" if self.sample else "mode") if model.base.stochastic else "none",
            "latents": latents,
            "dtype": str(dtype).split(".")[-1],
        }
        ids = latents == "codes" and model.quantize is not None
        self.info = replace(
            info,
            message_length=spec.first_tokens * self.iterations,
            vocab_size=spec.codebook_size if ids else None,
            code_dim=spec.width if latents == "raw" else spec.code_dim,
            options={**info.options, **options},
        )

    def _noise(self, own: Sequence[torch.Generator] | None) -> tuple[Tensor | None, list[Tensor] | None]:
        """Posterior noise [B, C, 16, 16] and halting noise, T - 1 times [B, N], image by image.

        All T - 1 are drawn whatever ``iterations`` is, each by a call of its own, so an iteration's
        message does not depend on how many follow.
        """
        if not (self.sample or self.halting):
            return None, None
        if own is None:
            raise ValueError("sampling and halting are random: one generator per image is needed")
        spec, normal, uniform = self.model.spec, None, None
        if self.sample:
            shape = (spec.base.latent_channels, GRID, GRID)
            normal = torch.stack([torch.randn(shape, generator=g) for g in own]).to(self.device)
        if self.halting:
            drawn = [[torch.rand(GRID**2, generator=g) for _ in range(spec.iterations - 1)] for g in own]
            uniform = [torch.stack(parts).to(self.device) for parts in zip(*drawn, strict=True)]
        return normal, uniform

    def _steps(self, pixels: Tensor, generators: Streams) -> Iterator[Iteration]:
        normal, uniform = self._noise(generators)
        return self.model.iterate(pixels, iterations=self.iterations, noise=normal, uniforms=uniform)

    def messages(self, images_u8: Tensor, *, generators: Streams = None) -> list[Iteration]:
        """All iterations of one un-tiled encoding with their trace, for figures and inspection."""
        with only_finite(self.info.name), computing(self):
            return list(self._steps(on_device(images_u8, self.device).div(255), generators))

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """The message of the last iteration that was asked for; see the contract."""
        warn_policy(self.info.name, policy)

        def tile(images: Tensor, index: Tensor) -> Tokens:
            for step in self._steps(images.div(255), own_streams(generators, index)):
                last = step
            if self.latents == "codes":
                return Tokens(last.ids, last.codes)
            return Tokens(None, (last.latents if self.latents == "raw" else last.prequant).float())

        return encode_tiles(self, tile, images_u8, torch.arange(len(images_u8)))

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        quantizer = self.model.quantize
        if quantizer is None or self.latents != "codes":
            raise UnsupportedOperation(f"{self.info.name} with latents={self.latents} is continuous: no ids")
        check_ids(ids, quantizer.size)
        return quantizer.codes(ids.to(self.device))

    def _decoder_codes(self, codes: Tensor) -> Tensor:
        """What was handed to probes -> what enters the decoder."""
        spec = self.model.spec
        length = codes.shape[1] if codes.ndim == 3 else -1
        whole, wrong = divmod(length, spec.first_tokens)
        if (
            codes.ndim != 3
            or wrong
            or not 1 <= whole <= spec.iterations
            or codes.shape[2] != self.info.code_dim
        ):
            raise ValueError(
                f"{self.info.name} decodes codes of shape [B, K, {self.info.code_dim}] with K a multiple of "
                f"{spec.first_tokens} up to {spec.message_length}, got {list(codes.shape)}"
            )
        if self.latents == "raw":
            return self.model.codes_of(codes)[1]
        return self.model.quantized(codes)[0] if self.latents == "prequant" else codes

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages of any one iteration; see the contract."""

        def tile(codes: Tensor) -> Tensor:
            return to_uint8(self.model.reconstruct(self._decoder_codes(codes)))

        return decode_tiles(self, tile, tokens.codes)

    @property
    def attention_layers(self) -> int:
        return self.model.spec.decoder_layers

    def attention_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """Empty: the distillation decoder is a single pass."""
        return ()

    def attention(
        self, tokens: Tokens, request: AttentionRequest, receive: TileReceiver, *, seeds: Sequence[int]
    ) -> None:
        """How much every image position looks at every token, float32 [b, heads, K, 16, 16]; the contract.

        The released notebook shows block 6 (from 0) of alit-small's 8, averages the heads, resizes
        bilinearly and stretches every map to [0, 1].
        """

        def tile(codes: Tensor, hand_on: MapReceiver) -> None:
            with computing(self):
                self.model.attention(self._decoder_codes(codes.to(self.device)), request, hand_on)

        attention_in_tiles(tile, receive, tokens.codes)

    def lengths(
        self,
        images_u8: Tensor,
        *,
        threshold: float = 0.07,
        generators: Streams = None,
    ) -> Tensor:
        """Iterations (from 1) that each image needs: the released length selection with a batch of one.

        Args:
            images_u8: uint8 [B, 3, S, S].
            threshold: Of the mean absolute pixel error; the released demos use 0.05.
            generators: One per image when halting or sampling is on.
        """
        check_images(images_u8, self.info)
        chosen = []

        def draw(codes: Tensor) -> Tensor:
            return observe("pixels", self.model.reconstruct(codes))

        with only_finite(self.info.name), computing(self):
            for index, image in enumerate(images_u8):
                own = None if generators is None else [generators[index].clone_state()]
                target = on_device(image[None], self.device).div(255)
                steps = self._steps(target, own)
                chosen.append(select_length(steps, draw, target, threshold=threshold)[0])
        return torch.cat(chosen).cpu() + 1

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` under the released key names."""
        save(self.model, directory)


def save(model: Alit, directory: Path) -> None:
    """Write a checkpoint directory."""
    write_checkpoint(directory, model.state_dict(), config_from_spec(model.spec))


def _info(model: Alit, origin: WeightsOrigin) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        family="alit",
        kind="learned",
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=spec.codebook_size if spec.quantized else None,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"resize_short({spec.image_size},bicubic)|center_crop({spec.image_size})",
        configuration=configuration_digest(spec),
        version=VERSION,
        **asdict(origin),
    )


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> AlitTokenizer:
    """Load an ALIT tokenizer; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: ``alit-small``, ``alit-base``, ``alit-semilarge``, one of their released variants, or a
            checkpoint directory.
        weights: A released ``.pth`` (if ``allow_pickle``) is converted once.
        **options: ``base`` (vqgan, vae) and ``latent`` (quantized, continuous) choose a variant;
            ``allow_pickle`` (default off); the others are those of :class:`AlitTokenizer`.
    """
    settings, allow = split_options(options, _Options, "ALIT")
    base, latent = settings.pop("base", None), settings.pop("latent", None)
    presets = {label: variant.spec for label, variant in VARIANTS.items()}
    if name.lower() in VARIANTS and not Path(name).is_dir():
        name, choice = choose_variant(name.lower(), base, latent)
        if name not in VARIANTS and weights is None:
            raise UsageError(
                f"no weights were released for {choice.preset} with base={choice.base} and "
                f"latent={'quantized' if choice.quantized else 'continuous'}: pass --weights. "
                f"Released: {', '.join(VARIANTS)}"
            )
        presets[name] = choice.spec
    elif base or latent:
        raise UsageError("the options base and latent choose among released names; a checkpoint has its own")
    if weights == "random":
        spec, origin = spec_of(name, presets), untrained(name, seed)
        model = random_network(Alit, spec, device, seed)
    else:
        place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow)
        config: dict[str, Any] = {}
        if name in presets and place.local.is_dir() and not (place.local / "config.json").is_file():
            path, spec = weight_file(place.local), presets[name]
        else:
            path, config, spec = place.read(presets, spec_from_config)
        model, origin = load_file(path, spec, allow_pickle=allow), place.origin(path, config, presets)
    return AlitTokenizer(model, _info(model, origin), device=device, **settings)
