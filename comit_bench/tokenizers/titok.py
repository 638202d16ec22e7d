"""Adapter for TiTok: released files <-> model, uint8 images <-> messages.

A checkpoint is a directory with ``config.json`` (nodes ``model.vq_model`` and
``dataset.preprocessing.crop_size``) and ``model.safetensors`` (or, when allowed, ``pytorch_model.bin``), or a
single file of weights beside a preset name. Keys of ``config.json`` that older files omit have the defaults
of the released program; nodes that describe generators are not read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comit_bench.errors import MissingError, UsageError, did_you_mean
from comit_bench.files import sha256_file, shipped_weights, write_atomic
from comit_bench.models.attention import AttentionRequest, MapReceiver
from comit_bench.models.maskgit_vqgan import VqganSpec
from comit_bench.models.titok import PRESETS, SIZES, Titok, TitokSpec, VitSize
from comit_bench.tokenizers.base import (
    TileReceiver,
    TokenizerInfo,
    Tokens,
    attention_in_tiles,
    autocast,
    check_ids,
    decode_pixels,
    encode_pixels,
    refuse_unknown,
    speed_up,
    switch,
    switch_or_auto,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import (
    PICKLES,
    WEIGHT_FILES,
    load_checked,
    read_config,
    read_pickled,
    read_tensors,
    weight_file,
    write_tensors,
)

HUB = {
    "titok-l-32": "yucornetto/tokenizer_titok_l32_imagenet",
    "titok-b-64": "yucornetto/tokenizer_titok_b64_imagenet",
    "titok-s-128": "yucornetto/tokenizer_titok_s128_imagenet",
    "titok-bl-64": "yucornetto/tokenizer_titok_bl64_vq8k_imagenet",
    "titok-bl-128": "yucornetto/tokenizer_titok_bl128_vq8k_imagenet",
    "titok-sl-256": "yucornetto/tokenizer_titok_sl256_vq8k_imagenet",
}
SHIPPED = ("titok-nano",)  # weights come with the package
PICKLED = "pytorch_model.bin"
IGNORED = ("quantize.embed_prob", "pixel_encoder.")  # never needed to encode or decode
OPTIONS = ("dtype", "compile", "allow_pickle")
_log = logging.getLogger(__name__)


def _node(config: Mapping[str, Any], path: str, source: Path) -> dict[str, Any]:
    node: Any = config
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UsageError(
            f"{source}: node {path!r} is missing. A TiTok config.json has model.vq_model and "
            "dataset.preprocessing."
        )
    return node


def _whole(node: Mapping[str, Any], key: str, source: Path) -> int:
    value = node.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{source}: {key} must be a positive whole number, found {value!r}")
    return value


def _flag(node: Mapping[str, Any], key: str, default: bool, source: Path) -> bool:
    value = node.get(key, default)
    if not isinstance(value, bool):
        raise UsageError(f"{source}: {key} must be true or false, found {value!r}")
    return value


def _size(name: object, reduced: Mapping[str, Any], side: str, source: Path) -> VitSize:
    """A named size, or the block ``reduced`` that small cases carry instead."""
    if side in reduced:
        node = _node(reduced, side, source)
        return VitSize(
            width=_whole(node, "width", source),
            layers=_whole(node, "num_layers", source),
            heads=_whole(node, "num_heads", source),
        )
    if name not in SIZES:
        raise UsageError(
            f"{source}: {side} size {name!r} is not one of {', '.join(SIZES)}, and there is no reduced.{side}"
        )
    return SIZES[str(name)]


def _pixels(reduced: Mapping[str, Any], source: Path) -> VqganSpec:
    if "pixel_decoder" not in reduced:
        return VqganSpec()
    node = _node(reduced, "pixel_decoder", source)
    multipliers, levels = node.get("channel_mult"), _whole(node, "num_resolutions", source)
    if not isinstance(multipliers, list) or len(multipliers) != levels:
        raise UsageError(
            f"{source}: channel_mult {multipliers!r} must list num_resolutions = {levels} numbers"
        )
    return VqganSpec(
        hidden=_whole(node, "hidden_channels", source),
        multipliers=tuple(int(m) for m in multipliers),
        blocks=_whole(node, "num_res_blocks", source),
        latent_channels=_whole(node, "z_channels", source),
    )


def spec_from_config(config: Mapping[str, Any], source: Path) -> TitokSpec:
    """Read a released (or our own) ``config.json``.

    Raises:
        UsageError: A node or value is missing, wrong, or describes a model that is not discrete.
    """
    node = _node(config, "model.vq_model", source)
    mode = node.get("quantize_mode", "vq")
    if mode != "vq":
        raise UsageError(
            f"{source}: quantize_mode {mode!r}: only 'vq' is discrete; the VAE variants are continuous"
        )
    legacy, pixels = (_flag(node, key, True, source) for key in ("is_legacy", "finetune_decoder"))
    if legacy != pixels:
        raise UsageError(
            f"{source}: is_legacy {legacy} with finetune_decoder {pixels}: released tokenizers have both "
            "true (pixels from a VQGAN) or both false (RGB directly); a stage-1 file has no pixel decoder."
        )
    reduced = _node(config, "reduced", source) if "reduced" in config else {}
    try:
        return TitokSpec(
            encoder=_size(node.get("vit_enc_model_size"), reduced, "encoder", source),
            decoder=_size(node.get("vit_dec_model_size"), reduced, "decoder", source),
            message_length=_whole(node, "num_latent_tokens", source),
            vocab_size=_whole(node, "codebook_size", source),
            code_dim=_whole(node, "token_size", source),
            l2_norm=_flag(node, "use_l2_norm", True, source),
            image_size=_whole(_node(config, "dataset.preprocessing", source), "crop_size", source),
            encoder_patch=_whole(node, "vit_enc_patch_size", source),
            decoder_patch=_whole(node, "vit_dec_patch_size", source),
            pixels=_pixels(reduced, source) if legacy else None,
        )
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{source}: {error}") from error


def config_from_spec(spec: TitokSpec) -> dict[str, Any]:
    """The inverse of :func:`spec_from_config`, in the released layout."""
    names = {size: name for name, size in SIZES.items()}
    node: dict[str, Any] = {
        "codebook_size": spec.vocab_size,
        "token_size": spec.code_dim,
        "use_l2_norm": spec.l2_norm,
        "commitment_cost": 0.25,
        "vit_enc_model_size": names.get(spec.encoder, "custom"),
        "vit_dec_model_size": names.get(spec.decoder, "custom"),
        "vit_enc_patch_size": spec.encoder_patch,
        "vit_dec_patch_size": spec.decoder_patch,
        "num_latent_tokens": spec.message_length,
        "finetune_decoder": spec.legacy,
        "is_legacy": spec.legacy,
        "quantize_mode": "vq",
    }
    config: dict[str, Any] = {
        "model": {"vq_model": node},
        "dataset": {"preprocessing": {"crop_size": spec.image_size}},
    }
    reduced: dict[str, Any] = {}
    for side, size in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        if size not in names:
            sizes = asdict(size)
            reduced[side] = {k if k == "width" else f"num_{k}": v for k, v in sizes.items()}
    if spec.pixels is not None and spec.pixels != VqganSpec():
        reduced["pixel_decoder"] = {
            "channel_mult": list(spec.pixels.multipliers),
            "num_resolutions": len(spec.pixels.multipliers),
            "hidden_channels": spec.pixels.hidden,
            "num_res_blocks": spec.pixels.blocks,
            "z_channels": spec.pixels.latent_channels,
        }
    return {**config, "reduced": reduced} if reduced else config


def save(
    model: Titok,
    directory: Path,
    *,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` in the released layout.

    Args:
        model: The network.
        directory: Made if absent.
        config: Written verbatim when given (to keep a released config as it was).
        dtype: Of the stored weights; loading always gives float32.
    """
    write_tensors(directory / WEIGHT_FILES[0], {k: v.to(dtype) for k, v in model.state_dict().items()})
    text = json.dumps(config or config_from_spec(model.spec), indent=1)
    write_atomic(directory / "config.json", text + "\n")


def build(spec: TitokSpec, *, empty: bool = False) -> Titok:
    """Make the network; ``empty`` leaves the weights on the meta device, to be loaded."""
    with torch.device("meta") if empty else nullcontext():
        return Titok(spec)


def find_weights(directory: Path) -> Path:
    """The weights of a checkpoint directory: safetensors before a pickle.

    Raises:
        MissingError: There are none.
    """
    pickled = directory / PICKLED
    if pickled.is_file() and not any((directory / name).is_file() for name in WEIGHT_FILES):
        return pickled
    return weight_file(directory)


def load_file(spec: TitokSpec, path: Path, *, allow_pickle: bool = False) -> Titok:
    """Build the network of a spec and load one file of weights into it, strictly.

    Raises:
        UsageError: The weights do not fit, or are a pickle that was not allowed.
        CorruptFileError: The file cannot be read.
    """
    pickled = path.suffix in PICKLES
    tensors = read_pickled(path, allow=allow_pickle) if pickled else read_tensors(path)
    model = build(spec, empty=True)
    load_checked(model, {k: v for k, v in tensors.items() if not k.startswith(IGNORED)}, path)
    return model.eval()


def load_directory(directory: Path, *, allow_pickle: bool = False) -> Titok:
    """Load a checkpoint directory into an evaluating float32 network on the CPU.

    Raises:
        MissingError: Files are not here.
        CorruptFileError: A file cannot be read.
        UsageError: The config is wrong or the weights do not fit it.
    """
    spec = spec_from_config(read_config(directory), directory / "config.json")
    return load_file(spec, find_weights(directory), allow_pickle=allow_pickle)


class TitokTokenizer:
    """TiTok behind the tokenizer contract.

    Args:
        model: Network in eval mode.
        info: Its description.
        device: Where it runs.
        dtype: ``float32``, or ``bfloat16`` for autocast on CUDA; the last layer and the quantizer
            stay in float32.
        compile: Compile the pixel decoder: ``auto`` is on CUDA when Triton is installed.
    """

    def __init__(
        self,
        model: Titok,
        info: TokenizerInfo,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compile: bool | str = "auto",
    ) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.device = device
        self.dtype = dtype
        self.info = info
        info.options["dtype"] = str(dtype).split(".")[-1]
        compiled = switch_or_auto(compile, "compile")
        if model.pixel_decoder is not None:
            speed_up(model.pixel_decoder, device, compiled=compiled)

    def encode_flops(self, policy: str | None) -> float:
        """FLOPs per image of the encoder, for estimates (attention and linear layers)."""
        spec = self.model.spec
        size, grid = spec.encoder, (spec.image_size // spec.encoder_patch) ** 2
        n, width = 1 + grid + spec.message_length, size.width
        return size.layers * (24.0 * n * width**2 + 4.0 * n**2 * width)

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
        return encode_pixels(self.model.encode, images_u8, self.info, device=self.device, dtype=self.dtype)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Integers [..., K] -> float32 [..., K, d], the vectors that enter the decoder.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        check_ids(ids, self.model.quantize.size)
        return self.model.quantize.codes(ids.to(self.device))

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Messages -> uint8 [B, 3, S, S]; the seeds change nothing.

        Raises:
            ValueError: Codes of another shape.
        """
        return decode_pixels(self.model.decode, tokens, self.info, device=self.device, dtype=self.dtype)

    @property
    def attention_layers(self) -> int:
        """Blocks whose maps can be read."""
        return self.model.spec.decoder.layers

    def attention_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """Empty: the decoder is a single pass."""
        return ()

    def attention(
        self, tokens: Tokens, request: AttentionRequest, receive: TileReceiver, *, seeds: Sequence[int]
    ) -> None:
        """How much every decoded position looks at every token, [b, heads, K, G, G]; see the contract."""

        def tile(codes: Tensor, hand_on: MapReceiver) -> None:
            with torch.inference_mode(), autocast(self.device, self.dtype):
                self.model.decoder.attention(codes.to(self.device), request, hand_on)

        attention_in_tiles(tile, receive, tokens.codes)

    def save(self, directory: Path) -> None:
        """Export ``config.json`` and ``model.safetensors`` in the released layout."""
        save(self.model, directory)


def _info(
    model: Titok,
    name: str,
    weights: str,
    *,
    released: bool,
    trained: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> TokenizerInfo:
    spec = model.spec
    known = {
        "training_data": ("ImageNet-1k" if released else "unknown") if trained else "none",
        "weights_licence": ("Apache-2.0 (earlier: MIT)" if released else "unknown") if trained else "none",
        **(facts or {}),  # what our own files say about themselves
    }
    return TokenizerInfo(
        name=name,
        family="titok",
        kind="learned",
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        message_length=spec.message_length,
        vocab_size=spec.vocab_size,
        code_dim=spec.code_dim,
        resolution=spec.image_size,
        preprocessing=f"resize_short({spec.image_size},bicubic)|center_crop({spec.image_size})",
        trained=trained,
        training_data=str(known["training_data"]),
        weights_licence=str(known["weights_licence"]),
    )


def _fetch(repository: str, *, offline: bool, allow_pickle: bool) -> Path:
    """Directory of a hub repository; a pickle is asked for only when allowed and nothing else is there."""
    from comit_bench.tokenizers.hub import fetch

    hint = "or pass --weights DIR or --weights FILE (a pickled .bin also needs --option allow_pickle=true)"
    try:
        return fetch(repository, ("config.json", WEIGHT_FILES[0]), offline=offline, hint=hint)
    except MissingError:
        if not allow_pickle:
            raise
        _log.info("%s: no %s to be had, trying %s", repository, WEIGHT_FILES[0], PICKLED)
        return fetch(repository, ("config.json", PICKLED), offline=offline, hint=hint)


def _load_random(preset: str, seed: int, device: torch.device) -> tuple[Titok, TokenizerInfo]:
    if preset not in PRESETS:
        raise UsageError(f"--weights random needs a preset, not {preset!r}.{did_you_mean(preset, PRESETS)}")
    model = build(PRESETS[preset], empty=True)
    if device.type != "meta":
        model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed), spread=True)
    return model, _info(model, preset, f"random:{seed}", released=False, trained=False)


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device,
    offline: bool = False,
    seed: int = 0,
    **options: Any,
) -> TitokTokenizer:
    """Load a TiTok tokenizer by preset name, hub id or directory.

    Args:
        name: ``titok-l-32`` … ``titok-sl-256``, ``titok-nano``, a hub id, or a checkpoint directory.
        weights: Checkpoint directory, a single file of weights (with a preset name), ``random``
            (untrained), or None: the directory, what ships, or the hub.
        device: Where it runs.
        offline: Never ask the hub.
        seed: Of random weights.
        **options: ``dtype``, ``compile`` (true, false) and ``allow_pickle`` (true, false).

    Raises:
        MissingError: No weights on this machine and the hub is out of reach.
        UsageError: Unknown name or option, or a checkpoint that does not fit.
        CorruptFileError: A file that cannot be read.
    """
    refuse_unknown(options, OPTIONS, "TiTok")
    allow = switch(options.pop("allow_pickle", False), "allow_pickle")
    preset = name.lower()
    if weights == "random":
        model, info = _load_random(preset, seed, device)
        return TitokTokenizer(model, info, device=device, **options)
    local = Path(weights or name).expanduser()
    if weights and not local.exists():
        raise MissingError(
            f"--weights {weights}: no such file or directory. Give a directory with config.json and "
            "model.safetensors, one file of weights, or 'random'."
        )
    released = weights is None and not local.is_dir() and preset not in SHIPPED
    if weights is None and preset in SHIPPED and not local.is_dir():
        local = shipped_weights(preset)
    if released:
        local = _fetch(HUB.get(preset, name), offline=offline, allow_pickle=allow)
    facts: Mapping[str, Any] | None = None
    if local.is_file():
        if preset not in PRESETS:
            raise UsageError(
                f"--weights {weights}: a single file says nothing about sizes. Name the preset it belongs to"
                f" (--tokenizer {' or '.join(PRESETS)}), or give a directory with config.json."
            )
        path, model = local, load_file(PRESETS[preset], local, allow_pickle=allow)
    else:
        path, model = find_weights(local), load_directory(local, allow_pickle=allow)
        facts = read_config(local).get("comit_bench")
    label = preset if preset in PRESETS else (name if not Path(name).is_dir() else Path(name).resolve().name)
    info = _info(model, label, sha256_file(path), released=released, facts=facts)
    return TitokTokenizer(model, info, device=device, **options)
