"""Adapter for ALIT: uint8 images <-> the message of one iteration.

A checkpoint is a directory with ``config.json`` and safetensors under the released key names, or one file
of weights together with a name (``alit_config.py`` knows the names). The released files are pickles behind
plain links: ``comit-bench weights fetch NAME`` brings them here and converts them once.

What the benchmark fixes, because the released program draws it at evaluation: no halting and the mean of
the VAE's posterior. Both can be asked for; the noise then comes from the image's own generator.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import MissingError, UnsupportedOperation, UsageError, did_you_mean
from comit_bench.files import write_atomic
from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.finite import observe
from comit_bench.tokenizers.alit.base_model import Vqgan
from comit_bench.tokenizers.alit.config import (
    VARIANTS,
    Variant,
    build,
    choose_variant,
    config_from_spec,
    load_directory,
    load_file,
)
from comit_bench.tokenizers.alit.model import GRID, Alit, Step, select_length
from comit_bench.tokenizers.base import (
    TileReceiver,
    TokenizerInfo,
    Tokens,
    attention_in_tiles,
    autocast,
    check_ids,
    check_images,
    in_tiles,
    on_device,
    only_finite,
    own_streams,
    refuse_unknown,
    speed_up,
    switch,
    switch_or_auto,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    WEIGHT_FILES,
    as_stored,
    checkpoint_path,
    described,
    single_file_spec,
    weight_file,
    weights_digest,
    write_tensors,
)
from comit_bench.tokenizers.config_node import read_facts
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.weights import required, weight_source

VERSION = "1"  # raised when the same weights and configuration may give other ids
LATENTS = ("codes", "prequant", "raw")


class Options(TypedDict, total=False):
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


OPTIONS = tuple(Options.__annotations__)
_log = logging.getLogger(__name__)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] floats -> uint8: times 255, clipped, truncated, as the released evaluation does."""
    return observe("pixels", images).float().mul(255).clamp(0, 255).to(torch.uint8)


class AlitTokenizer:
    """ALIT behind the tokenizer contract.

    Args:
        model: Network in eval mode.
        info: Its description.
        device: Where it runs.
        iterations: 1 to T; the message has K0 times as many tokens. None is all.
        halting: ``off`` (default, deterministic) or ``on`` (released, VQGAN base only).
        posterior: ``mode`` (default, deterministic) or ``sample`` (released, VAE base only).
        latents: What probes read: ``codes`` (what enters the decoder), ``prequant`` (before
            quantization) or ``raw`` (rows of the encoder, which the original program calls encoding).
        compile: Compile the pixel decoder: ``auto`` is on CUDA when Triton is installed.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; base tokenizer, last layer and
            quantizers stay in float32.
    """

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
        if posterior not in ("mode", "sample"):
            raise UsageError(f"posterior must be 'mode' or 'sample', got {posterior!r}")
        if latents not in LATENTS:
            raise UsageError(f"latents must be one of {', '.join(LATENTS)}, got {latents!r}")
        self.sample = posterior == "sample" and model.base.stochastic
        self.latents = latents
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

    def encode_flops(self, policy: str | None) -> float:
        """FLOPs per image of encoding, for estimates: transformers and, roughly, the base encoder."""
        spec = self.model.spec
        flops = 1.7e6 * spec.image_size**2 * (spec.base.hidden / 128) ** 2  # convolutions of the base encoder

        def stack(n: int, width: int, layers: int) -> float:
            return layers * (24.0 * n * width**2 + 4.0 * n**2 * width)

        for t in range(self.iterations):
            n = 1 + GRID**2 + spec.first_tokens * (t + 1)
            flops += stack(n, spec.width, spec.layers)
            if self.halting and t + 1 < self.iterations:
                flops += stack(n, spec.decoder_width, spec.decoder_layers)
        return flops

    def _pixels(self, images_u8: Tensor) -> Tensor:
        return on_device(images_u8, self.device).div(255)

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

    def _steps(
        self, images_u8: Tensor, generators: Sequence[torch.Generator] | None, iterations: int
    ) -> Iterator[Step]:
        normal, uniform = self._noise(generators)
        return self.model.iterate(
            self._pixels(images_u8), iterations=iterations, noise=normal, uniforms=uniform
        )

    def messages(
        self, images_u8: Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> list[Step]:
        """All iterations of one un-tiled encoding with their trace, for figures and inspection."""
        with only_finite(self.info.name), torch.inference_mode(), autocast(self.device, self.dtype):
            return list(self._steps(images_u8, generators, self.iterations))

    def encode(
        self,
        images_u8: Tensor,
        *,
        policy: str | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tokens:
        """Tokenize uint8 [B, 3, S, S]: the message of the last iteration that was asked for.

        Raises:
            ValueError: Wrong shape or type, or randomness is asked for and no generators were given.
        """
        check_images(images_u8, self.info)
        warn_policy(self.info.name, policy)

        def tile(images: Tensor, index: Tensor) -> Tokens:
            own = own_streams(generators, index)
            with torch.inference_mode(), autocast(self.device, self.dtype):
                for step in self._steps(images, own, self.iterations):
                    last = step
            if self.latents == "codes":
                return Tokens(last.ids, last.codes)
            return Tokens(None, (last.latents if self.latents == "raw" else last.prequant).float())

        return in_tiles(tile, images_u8, torch.arange(images_u8.shape[0]), name=self.info.name)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Integers [..., K] -> float32 [..., K, d], unit vectors.

        Raises:
            ValueError: An id outside the vocabulary.
            UnsupportedOperation: There are no ids.
        """
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
        codes = codes.to(self.device)
        if self.latents == "raw":
            return self.model.codes_of(codes)[1]
        return self.model.quantized(codes)[0] if self.latents == "prequant" else codes

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages of one iteration -> uint8 [B, 3, S, S]; the seeds change nothing.

        Raises:
            ValueError: Codes of another shape.
        """

        def tile(codes: Tensor) -> Tokens:
            with torch.inference_mode(), autocast(self.device, self.dtype):
                return Tokens(None, to_uint8(self.model.reconstruct(self._decoder_codes(codes))))

        return in_tiles(tile, tokens.codes, name=self.info.name).codes

    @property
    def attention_layers(self) -> int:
        """Blocks whose maps can be read."""
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
            with torch.inference_mode(), autocast(self.device, self.dtype):
                self.model.attention(self._decoder_codes(codes), request.layers, hand_on)

        attention_in_tiles(tile, receive, tokens.codes)

    def lengths(
        self,
        images_u8: Tensor,
        *,
        threshold: float = 0.07,
        generators: Sequence[torch.Generator] | None = None,
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

        with only_finite(self.info.name), torch.inference_mode(), autocast(self.device, self.dtype):
            for index, image in enumerate(images_u8):
                own = None if generators is None else [generators[index].clone_state()]
                steps = self._steps(image[None], own, self.iterations)
                target = self._pixels(image[None])
                chosen.append(select_length(steps, draw, target, threshold=threshold)[0])
        return torch.cat(chosen).cpu() + 1

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` under the released key names."""
        save(self.model, directory)


def save(model: Alit, directory: Path, *, config: dict[str, Any] | None = None) -> None:
    """Write a checkpoint directory.

    Args:
        model: The network.
        directory: Made if absent.
        config: Written verbatim when given.
    """
    write_tensors(directory / WEIGHT_FILES[0], as_stored(model.state_dict(), torch.float32))
    text = json.dumps(config or config_from_spec(model.spec), indent=1)
    write_atomic(directory / "config.json", text + "\n")


def _info(
    model: Alit, name: str, weights: str, *, data: str, licence: str, revision: str | None = None
) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        name=name,
        family="alit",
        kind="learned",
        revision=revision,
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=spec.codebook_size if spec.quantized else None,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"resize_short({spec.image_size},bicubic)|center_crop({spec.image_size})",
        trained=not weights.startswith("random"),
        training_data=data,
        weights_licence=licence,
        configuration=configuration_digest(spec),
        version=VERSION,
    )


def _load_random(
    name: str, choice: Variant | None, seed: int, device: torch.device
) -> tuple[Alit, TokenizerInfo]:
    if choice is None:
        raise UsageError(f"--weights random needs a name, not {name!r}.{did_you_mean(name, VARIANTS)}")
    model = build(choice.spec, empty=True)
    if device.type != "meta":
        model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed))
    return model.eval(), _info(model, name, f"random:{seed}", data="none", licence="none")


def _local(
    name: str,
    weights: str | None,
    choice: Variant | None,
    base: object,
    latent: object,
    *,
    allow_pickle: bool,
) -> Path:
    """The directory or file that holds the weights."""
    if weights:
        return weight_source(name, checkpoint_path(weights), allow_pickle=allow_pickle)
    directory = checkpoint_path(name)
    if directory.is_dir():
        return directory
    if choice is None:
        raise MissingError(f"{name}: no such directory, and no name of ALIT.{did_you_mean(name, VARIANTS)}")
    if VARIANTS.get(name) != choice:
        raise UsageError(
            f"no weights were released for {choice.preset} with base={base or choice.base} and "
            f"latent={latent or ('quantized' if choice.quantized else 'continuous')}: pass --weights. "
            f"Released: {', '.join(VARIANTS)}"
        )
    return required(name, hint=" or pass --weights DIR")


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> AlitTokenizer:
    """Load an ALIT tokenizer by name or directory.

    Args:
        name: ``alit-small``, ``alit-base``, ``alit-semilarge``, one of their released variants, or a
            checkpoint directory.
        weights: Checkpoint directory, a file of weights (``.safetensors``, or, if ``allow_pickle``, a
            released ``.pth``, which is converted once), ``random`` (untrained), or None: the directory or
            the cache.
        device: Where it runs.
        offline: Changes nothing: loading never uses the network, ``weights fetch`` does.
        seed: Of random weights.
        **options: ``base`` (vqgan, vae) and ``latent`` (quantized, continuous) choose a variant;
            ``allow_pickle`` (default off); the others are those of :class:`AlitTokenizer`.

    Raises:
        MissingError: The weights are not on this machine.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    refuse_unknown(options, OPTIONS, "ALIT")
    settings: dict[str, Any] = {**options}
    base, latent = settings.pop("base", None), settings.pop("latent", None)
    allow = switch(settings.pop("allow_pickle", "off"), "allow_pickle")
    label, choice = name.lower(), None
    if label in VARIANTS and not Path(name).is_dir():
        label, choice = choose_variant(label, base, latent)
    elif base or latent:
        raise UsageError("the options base and latent choose among released names; a checkpoint has its own")
    if weights == "random":
        return AlitTokenizer(*_load_random(label, choice, seed, device), device=device, **settings)
    local = _local(label if choice else name, weights, choice, base, latent, allow_pickle=allow)
    path = local if local.is_file() else weight_file(local)
    config: dict[str, Any] = {}
    if local.is_file() and choice is None:
        single_file_spec(name, local, VARIANTS)  # the name is none of them: says so
    if choice is not None and not (local / "config.json").is_file():
        model = load_file(path, choice.spec, allow_pickle=allow)
    else:
        model, config = load_directory(local, allow_pickle=allow)
    own, revision = described(name, local, ())
    facts = read_facts(config, local / "config.json")
    released = choice is not None and weights is None
    info = _info(
        model,
        own if choice is None else label,
        weights_digest(path),
        data=facts.training_data or (choice.data if choice is not None and released else "unknown"),
        licence=facts.weights_licence or ("none stated" if released else "unknown"),
        revision=revision,
    )
    return AlitTokenizer(model, info, device=device, **settings)
