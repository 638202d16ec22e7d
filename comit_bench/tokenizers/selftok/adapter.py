"""Adapter for SelfTok: uint8 images <-> 512 or 1024 tokens.

``decoder=diffusion`` (50 steps from noise) and ``decoder=renderer`` (one step, no noise) are two released
files with an encoder each; the message is encoded with the file whose decoder is used. Encoding is
deterministic: the mode of the VAE's posterior, and no sampling of ids. Reading files is ``checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.files import user_path
from comit_bench.tokenizers.base import (
    DTYPES,
    LATENTS,
    Streams,
    TokenizerInfo,
    Tokens,
    check_codes,
    check_ids,
    decode_tiles,
    encode_tiles,
    one_of,
    seeded_noise,
    split_options,
    switch_or_auto,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    read_config,
    single_file_spec,
    weight_file,
    weights_digest,
)
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.origin import WeightsOrigin, locate, random_network, spec_of, untrained
from comit_bench.tokenizers.selftok.checkpoint import find_vae, load_files, save
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


class _Options(TypedDict, total=False):
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
        self.latents = one_of(latents, "SelfTok: latents", LATENTS)
        self.schedule, self.assumed = choose_schedule(spec, stages, k_per_stage)
        if steps is not None and (type(steps) is not int or steps < 1):  # options come from a command line
            raise UsageError(f"SelfTok: steps must be a whole number of at least 1, got {steps!r}")
        if steps is not None and self.schedule is None:
            raise UsageError("SelfTok: steps is a setting of decoder=diffusion, the renderer has one step")
        self.steps = spec.steps if steps is None else steps
        vae_type = DTYPES[one_of(vae_dtype, "SelfTok: vae_dtype", tuple(DTYPES))]
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

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; nothing about it is random."""
        warn_policy(self.info.name, policy)

        def tile(images: Tensor) -> Tokens:
            done = encode(self.model, images.div(127.5).sub(1), self.network)
            if self.latents == "codes":
                return Tokens(done.ids, done.codes)
            return Tokens(None, (done.prequant if self.latents == "prequant" else done.queries).float())

        return encode_tiles(self, tile, images_u8)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
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
        """See the contract; the renderer uses no noise."""
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


def _info(model: Selftok, origin: WeightsOrigin, vae: Path | None = None) -> TokenizerInfo:
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
    path, folder = place.local, None
    if path.is_dir():
        config, folder, path = read_config(path), path, weight_file(path)
    else:
        single_file_spec(name, path, PRESETS)  # refuses a file that no preset is named with
        config = released_config(release)
    found = find_vae(config, folder, named, offline=offline)
    source = path if folder is None else folder / "config.json"
    model = load_files(path, config, source, found, allow_pickle=allow_pickle)
    spec = model.spec
    if spec.kind != chosen and (decoder is not None or preset in PRESETS):
        raise UsageError(
            f"{path}: this is a checkpoint with the decoder {spec.kind}, not {chosen}: pass "
            f"--option decoder={spec.kind}, or the other checkpoint"
        )
    if preset in PRESETS and spec.tokens != PRESETS[preset].tokens:
        raise UsageError(f"{path}: a checkpoint of {spec.tokens} tokens is not {preset}")
    return model, _info(model, place.origin(path, config, PRESETS), found[1])


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> SelftokTokenizer:
    """Load a SelfTok tokenizer; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: ``selftok-512``, ``selftok-1024``, or a checkpoint directory.
        weights: A released ``.pth`` (if ``allow_pickle``) is converted once.
        **options: ``decoder`` (diffusion, renderer), ``vae`` (directory of SD3's), ``allow_pickle``; the
            others are those of :class:`SelftokTokenizer`.
    """
    settings, allow = split_options(options, _Options, "SelfTok")
    decoder, vae = settings.pop("decoder", None), settings.pop("vae", None)
    if decoder is not None:
        one_of(decoder, "SelfTok: decoder", DECODERS)
    if weights == "random":
        spec_of(name, PRESETS)
        spec = variant(name.lower(), str(decoder or "diffusion"))
        choose_schedule(  # before minutes of drawing
            spec, settings.get("stages"), settings.get("k_per_stage")
        )
        model = random_network(Selftok, spec, device, seed, zero_gates=False)
        info = _info(model, untrained(name.lower(), seed))
    else:
        model, info = _stored(name, weights, decoder, vae, offline=offline, allow_pickle=allow)
    return SelftokTokenizer(model, info, device=device, **settings)
