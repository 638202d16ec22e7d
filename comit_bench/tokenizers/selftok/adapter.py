"""Adapter for SelfTok: uint8 images <-> 512 or 1024 tokens.

``decoder=diffusion`` (50 steps from noise) and ``decoder=renderer`` (one step, no noise) are two released
files with an encoder each; the message is encoded with the file whose decoder is used. Encoding is
deterministic: the mode of the VAE's posterior, and no sampling of ids. Reading files is ``selftok_files.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.files import user_path
from comit_bench.tokenizers.base import (
    TokenizerInfo,
    Tokens,
    check_codes,
    check_ids,
    decode_tiles,
    encode_tiles,
    refuse_unknown,
    seeded_noise,
    switch,
    switch_or_auto,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    read_config,
    single_file_spec,
    weights_digest,
)
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import Origin, locate, spec_of, untrained
from comit_bench.tokenizers.selftok.checkpoint import (
    build,
    find_vae,
    load_directory,
    load_files,
    save,
)
from comit_bench.tokenizers.selftok.codec import (
    decode_latents,
    encode,
    render,
    sample,
    to_uint8,
)
from comit_bench.tokenizers.selftok.config import (
    ASSUMED_1024,
    read_schedule,
    release_name,
    released_config,
)
from comit_bench.tokenizers.selftok.family import FAMILY
from comit_bench.tokenizers.selftok.fast import FastSelftok
from comit_bench.tokenizers.selftok.model import PRESETS, Schedule, Selftok, SelftokSpec, variant

VERSION = "1"  # raised when the same weights and configuration may give other ids
DECODERS = ("diffusion", "renderer")
LATENTS = ("codes", "prequant", "raw")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes; see there and :class:`SelftokTokenizer`."""

    decoder: str  # texts whose values are checked, with more words, where they are used
    vae: str
    allow_pickle: bool
    latents: str
    steps: int | None
    stages: str
    k_per_stage: str
    vae_dtype: str
    compile: bool | Literal["auto"]
    dtype: torch.dtype


def _one_of(value: object, option: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise UsageError(
            f"SelfTok: {option} must be one of {', '.join(allowed)}, got {value!r}."
            f"{did_you_mean(str(value), allowed)}"
        )
    return str(value)


def choose_schedule(
    spec: SelftokSpec, stages: object = None, k_per_stage: object = None
) -> tuple[Schedule | None, bool]:
    """The schedule of a diffusion decoder, and whether it is merely assumed.

    Args:
        spec: Of the network.
        stages: Ends of the stages; None is 200, 400, 600, 800, 1000.
        k_per_stage: Tokens per stage; None is what the checkpoint says.
    """
    if spec.kind == "renderer":
        if stages is not None or k_per_stage is not None:
            raise UsageError("SelfTok: stages and k_per_stage are settings of decoder=diffusion")
        return None, False
    if k_per_stage is not None:
        known = spec.schedule or Schedule()
        chosen = read_schedule(known.ends if stages is None else stages, k_per_stage, "SelfTok: k_per_stage")
        if sum(chosen.counts) != spec.tokens or chosen.ends[-1] != 1000:
            raise UsageError(
                f"SelfTok: k_per_stage {','.join(map(str, chosen.counts))} must add up to {spec.tokens} "
                f"tokens, and the last of the stages {','.join(map(str, chosen.ends))} must end at 1000"
            )
        return chosen, False
    if stages is not None:
        raise UsageError("SelfTok: stages needs k_per_stage as well")
    if spec.schedule is not None:
        return spec.schedule, False
    if spec.tokens == sum(ASSUMED_1024.counts):
        return ASSUMED_1024, True
    raise UsageError(
        f"SelfTok: the schedule of visible tokens of a diffusion decoder with {spec.tokens} tokens is not "
        "known. Pass --option k_per_stage=N,N,… (tokens per stage), and --option stages=…,1000 if there are "
        "not five."
    )


class SelftokTokenizer:
    """SelfTok behind the tokenizer contract.

    Args:
        model: Network in eval mode, with a VAE.
        info: Its description.
        device: Where it runs.
        latents: What probes read: ``codes`` (what enters a decoder), ``prequant`` (projected queries before
            quantization) or ``raw`` (the encoder's queries).
        steps: Euler steps of the diffusion decoder; None is the checkpoint's.
        stages: See :func:`choose_schedule`.
        k_per_stage: See :func:`choose_schedule`.
        vae_dtype: ``float32``, or ``bfloat16`` as in the released program.
        compile: Compile the pixel decoder: ``auto`` is on CUDA when Triton is installed.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; quantizer, modulations and the sampler's
            state stay in float32.
    """

    def __init__(
        self,
        model: Selftok,
        info: TokenizerInfo,
        *,
        device: torch.device,
        latents: str = "codes",
        steps: int | None = None,
        stages: object = None,
        k_per_stage: object = None,
        vae_dtype: str = "float32",
        compile: bool | str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        spec = model.spec
        self.latents = _one_of(latents, "latents", LATENTS)
        self.schedule, self.assumed = choose_schedule(spec, stages, k_per_stage)
        if steps is not None and (type(steps) is not int or steps < 1):  # options come from a command line
            raise UsageError(f"SelfTok: steps must be a whole number of at least 1, got {steps!r}")
        if steps is not None and self.schedule is None:
            raise UsageError("SelfTok: steps is a setting of decoder=diffusion, the renderer has one step")
        self.steps = spec.steps if steps is None else steps
        vae_type = DTYPES[_one_of(vae_dtype, "vae_dtype", tuple(DTYPES))]
        wanted = switch_or_auto(compile, "compile")
        self.model = model.to(device).requires_grad_(False).eval()
        self.network = FastSelftok(self.model)  # for good: these weights do not change
        if self.model.vae is not None:
            self.model.vae.set_dtype(vae_type)
            self.model.vae.prepare(device, compiled=wanted)
        self.device, self.dtype = device, dtype
        options = {
            "decoder": spec.kind,
            "latents": self.latents,
            "vae_dtype": vae_dtype,
            "dtype": str(dtype).split(".")[-1],
        }
        if self.schedule is not None:
            counts = ",".join(map(str, self.schedule.counts))
            options["steps"], options["stages"] = str(self.steps), ",".join(map(str, self.schedule.ends))
            options["k_per_stage"] = counts
            if self.assumed:
                options["assumed"] = f"k_per_stage={counts}"
        width = {"raw": spec.encoder.query_width, "prequant": spec.quantizer_dim, "codes": spec.code_dim}
        self.info = replace(
            info,
            code_dim=width[self.latents],
            vocab_size=spec.vocab_size if self.latents == "codes" else None,
            options={**info.options, **options},
        )

    def encode(
        self,
        images_u8: Tensor,
        *,
        policy: str | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tokens:
        """Tokenize uint8 [B, 3, S, S]; nothing about it is random.

        Raises:
            ValueError: Wrong shape or type.
        """
        warn_policy(self.info.name, policy)

        def tile(images: Tensor) -> Tokens:
            done = encode(self.model, images.div(127.5).sub(1), self.network)
            if self.latents == "codes":
                return Tokens(done.ids, done.codes)
            return Tokens(None, (done.prequant if self.latents == "prequant" else done.queries).float())

        return encode_tiles(self, tile, images_u8)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Integers [..., K] -> float32 [..., K, d], after the LayerNorm.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        check_ids(ids, self.model.spec.vocab_size)
        with torch.inference_mode():
            return self.model.encoder.codes(ids.to(self.device, torch.int64))

    def _decoder_codes(self, codes: Tensor) -> Tensor:
        """What was handed to probes -> what enters the decoder."""
        if self.latents == "codes":
            return codes
        quantizer = self.model.encoder.quantizer
        return self.model.encoder.codes(
            quantizer.ids(quantizer.project(codes) if self.latents == "raw" else codes)
        )

    @property
    def decodes_with_noise(self) -> bool:
        """The renderer draws nothing."""
        return self.schedule is not None

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages -> uint8 [B, 3, S, S]; one noise seed per image, which the renderer does not use.

        Raises:
            ValueError: Codes of another shape, or not one seed per image.
        """
        spec, codes = self.model.spec, tokens.codes
        check_codes(codes, self.info)
        shape = (spec.channels, spec.latent_side, spec.latent_side)
        noise = seeded_noise(seeds, (0,) if self.schedule is None else shape, codes.shape[0])

        def tile(codes: Tensor, noise: Tensor) -> Tensor:
            codes = self._decoder_codes(codes)
            if self.schedule is None:
                latents = render(self.model, codes, self.network)
            else:
                latents = sample(
                    self.model,
                    codes,
                    noise,
                    schedule=self.schedule,
                    steps=self.steps,
                    network=self.network,
                )
            return to_uint8(decode_latents(self.model, latents.float()))

        return decode_tiles(self, tile, codes, noise)

    def save(self, directory: Path) -> None:
        """Export a checkpoint directory with the released key names; an assumed schedule is not written."""
        schedule = None if self.assumed else self.schedule
        save(self.model, directory, replace(self.model.spec, schedule=schedule, steps=self.steps))


def build_random(spec: SelftokSpec, seed: int, device: torch.device | None = None) -> Selftok:
    """An untrained network, VAE included, from a seed; on the meta ``device`` it stays without weights."""
    model = build(spec)
    if device is not None and device.type == "meta":
        return model
    model.load_state_dict({k: torch.empty(v.shape) for k, v in model.state_dict().items()}, assign=True)
    model.init_weights(torch.Generator().manual_seed(seed), zero_gates=False)
    return model


def _info(model: Selftok, origin: Origin, vae: Path | None = None) -> TokenizerInfo:
    spec = model.spec
    return TokenizerInfo(
        family="selftok",
        kind="learned",
        parameters=sum(p.numel() for part in (model.encoder, model.model) for p in part.parameters()),
        message_length=spec.tokens,
        vocab_size=spec.vocab_size,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"resize_short({spec.image_size},bilinear)|center_crop({spec.image_size})",
        options={} if vae is None else {"vae": weights_digest(vae)},
        configuration=configuration_digest(spec),
        version=VERSION,
        **asdict(origin),
    )


def _stored(
    name: str, weights: str | None, decoder: object, vae: object, *, offline: bool, allow_pickle: bool
) -> tuple[Selftok, TokenizerInfo]:
    chosen, preset = "diffusion" if decoder is None else str(decoder), name.lower()
    named = None if vae is None else user_path(str(vae), "vae")
    release = release_name(preset, chosen)
    place = locate(FAMILY, name, weights, offline=offline, allow_pickle=allow_pickle, release=release)
    if place.local.is_dir():
        config = read_config(place.local)
        found = load_directory(place.local, vae=named, offline=offline, allow_pickle=allow_pickle)
    else:
        single_file_spec(name, place.local, PRESETS)  # refuses a file that no preset is named with
        config = released_config(release)
        own_vae = find_vae(config, None, named, offline=offline)
        found = load_files(place.local, config, place.local, own_vae, allow_pickle=allow_pickle)
    spec = found.model.spec
    if spec.kind != chosen and (decoder is not None or preset in PRESETS):
        raise UsageError(
            f"{found.weights}: this is a checkpoint with the decoder {spec.kind}, not {chosen}: pass "
            f"--option decoder={spec.kind}, or the other checkpoint"
        )
    if preset in PRESETS and spec.tokens != PRESETS[preset].tokens:
        raise UsageError(f"{found.weights}: a checkpoint of {spec.tokens} tokens is not {preset}")
    return found.model, _info(found.model, place.origin(found.weights, config, PRESETS), found.vae)


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> SelftokTokenizer:
    """Load a SelfTok tokenizer.

    Args:
        name: ``selftok-512``, ``selftok-1024``, or a checkpoint directory.
        weights: Checkpoint directory, a file of weights (``.safetensors``, or, if ``allow_pickle``, a
            released ``.pth``, which is converted once), ``random`` (untrained), or None: the directory or
            the cache.
        device: Where it runs.
        offline: Never ask the hub for the VAE.
        seed: Of random weights.
        **options: ``decoder`` (diffusion, renderer), ``vae`` (directory of SD3's), ``allow_pickle``; the
            others are those of :class:`SelftokTokenizer`.

    Raises:
        MissingError: The weights are not on this machine.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    refuse_unknown(options, Options.__annotations__, "SelfTok")
    settings: dict[str, Any] = {**options}
    decoder, vae = settings.pop("decoder", None), settings.pop("vae", None)
    allow = switch(settings.pop("allow_pickle", False), "allow_pickle")
    if decoder is not None:
        _one_of(decoder, "decoder", DECODERS)
    if weights == "random":
        spec_of(name, PRESETS)
        spec = variant(name.lower(), str(decoder or "diffusion"))
        choose_schedule(  # before minutes of drawing
            spec, settings.get("stages"), settings.get("k_per_stage")
        )
        model = build_random(spec, seed, device)
        info = _info(model, untrained(name.lower(), seed))
    else:
        model, info = _stored(name, weights, decoder, vae, offline=offline, allow_pickle=allow)
    return SelftokTokenizer(model, info, device=device, **settings)
