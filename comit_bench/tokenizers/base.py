"""The tokenizer contract. Adapters satisfy it by shape; nothing inherits from it.

Shape legend: ``B`` batch, ``K`` message length, ``d`` code dimension, ``H W`` image sides.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from comit_bench.errors import BenchError, UsageError, did_you_mean, shown
from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.finite import observe, watching
from comit_bench.nn.precision import exact_products, full_precision
from comit_bench.tokenizers.options import OFF, ON

# Every adapter computes in tiles of this many images and pads the last one. The arithmetic of one
# image then never depends on how many others were handed over, so ids are the same bits for every
# --batch-size (matrix kernels and vector tails may differ between batch sizes in the last place,
# which is enough to flip a token at a rounding boundary). Only measurements of one image change it.
TILE = 8
tile_rows: ContextVar[int] = ContextVar("tile_rows", default=TILE)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LATENTS = ("codes", "prequant", "raw")  # see HasHiddenFeatures
STEMS = ("", "cnn")  # see TokenizerInfo
POSTERIORS = ("mode", "sample")  # what is taken of a VAE's
Streams = Sequence[torch.Generator] | None  # of random numbers: one CPU generator per image


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """What a table prints about a tokenizer and what a cache key needs to know.

    Attributes:
        name: Name used in tables, e.g. ``comit-l``.
        family: Adapter family, e.g. ``comit``.
        kind: ``learned``, ``baseline`` (no learned network) or ``reference`` (brackets scores).
        revision: Hub commit, or None.
        weights: ``sha256:<hex>``, ``random:<seed>``, ``fitted:<hex>`` or ``none``.
        parameters: Number of weights of the tokenizer itself (without a frozen VAE).
        message_length: Tokens per image, K.
        vocab_size: Number of distinct ids, or None for continuous codes.
        code_dim: Length of one code vector, d.
        resolution: Side of the square uint8 image that ``encode`` takes, in pixels.
        preprocessing: Declared string, see ``comit_bench.data.images.preprocess``.
        trained: False for random weights; such rows carry a mark in every table.
        training_data: What the weights were trained or fitted on.
        code_licence: Licence of the code that computes the tokens.
        weights_licence: Licence of the weights.
        options: Every setting that can change ids (mask mode, posterior, ...). Part of the protocol.
        configuration: ``sha256:<hex>`` of what config files and defaults decided about network, VAE and
            quantizer (:func:`comit_bench.tokenizers.identity.configuration_digest`); empty when weights and
            options say everything. Equal weights under another configuration are another tokenizer.
        version: Of the code: raised when the same weights, configuration and options may give other ids.
            Empty: the source of the tokenizer's class is digested instead.
        group: Name that trainings of one recipe with several seeds have in common; empty for a training that
            stands alone. Part of no key and no protocol.
        stem: ``cnn``: tokens are patches of pixels, and probes learn a convolutional network in front of
            their input layer. Empty: none. Part of the protocol, not of the tokens' key.
    """

    name: str
    family: str
    kind: str
    revision: str | None = None
    weights: str
    parameters: int
    message_length: int
    vocab_size: int | None
    code_dim: int
    resolution: int
    preprocessing: str
    trained: bool = True
    training_data: str = "unknown"
    code_licence: str = "Apache-2.0"
    weights_licence: str = "unknown"
    options: dict[str, str] = field(default_factory=dict)
    configuration: str = ""
    version: str = ""
    group: str = ""
    stem: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The messages of a batch.

    Attributes:
        ids: int64 [B, K], or None when the tokenizer is continuous.
        codes: float32 [B, K, d], the vectors as they re-enter the decoder; what probes read.
        offsets: float32 [B, 2] decoding offset (COMiT), or None.
    """

    ids: Tensor | None
    codes: Tensor
    offsets: Tensor | None = None

    def __len__(self) -> int:
        return int(self.codes.shape[0])


@runtime_checkable
class Tokenizer(Protocol):
    """Anything that maps uint8 RGB images to a message and, if it can, back."""

    @property
    def info(self) -> TokenizerInfo: ...

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """Tokenize uint8 [B, 3, S, S] (S = ``info.resolution``).

        Args:
            images_u8: RGB images, already preprocessed as ``info.preprocessing`` says.
            policy: Cropping policy for tokenizers that look at crops; None is their default.
            generators: One CPU generator per image, used for everything random about it.

        Raises:
            ValueError: Wrong shape or type, or randomness is needed and no generators were given.
            UsageError: Not a policy of a tokenizer that looks at crops.
        """
        ...

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Look up codes: int [..., K] -> float32 [..., K, d].

        Raises:
            ValueError: An id outside the vocabulary.
            UnsupportedOperation: A continuous tokenizer.
        """
        ...

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Reconstruct uint8 [B, 3, S, S]; one noise seed per image, see :func:`decodes_with_noise`.

        Raises:
            ValueError: Codes of another shape, or not one seed per image.
            UnsupportedOperation: When the tokenizer has no decoder.
        """
        ...


class Loader(Protocol):
    """What an entry point of the group ``comit_bench.tokenizers`` is: a function that makes a tokenizer.

    It is called with the entry point's name and with those of the keywords below that it names (a loader
    with ``**options`` also gets ``weights``, ``device`` and ``offline``). Every further keyword argument is
    an option: ``--option KEY=VALUE`` sets it, read as its annotation says: ``int``, ``float``, ``bool``,
    ``str``, ``Literal[...]`` or a union of them.

    Whether the tokenizer looks at crops (:class:`LooksAtCrops`) is known without loading it when the loader
    is, or is annotated to return, its class; or when it has an attribute ``looks_at_crops``.
    """

    def __call__(
        self,
        name: str,
        *,
        weights: str | None,
        device: torch.device,
        offline: bool,
        seed: int,
        dtype: torch.dtype,
        **options: Any,
    ) -> Tokenizer:
        """Make the tokenizer.

        Args:
            name: As it was asked for: the entry point's; of the families of this package a preset, a hub id
                or a checkpoint directory.
            weights: ``--weights``: a directory, a file (beside the name of a preset), ``random`` (untrained),
                or None: the directory that is named, what ships, what was fetched, or the hub.
            device: Where it computes.
            offline: Whether no hub may be asked.
            seed: Of random weights.
            dtype: ``torch.float32``, or ``torch.bfloat16`` with ``--dtype bfloat16``; a loader that does not
                name it computes in float32 always.

        Raises:
            UsageError: An option or weights that make no sense.
            MissingError: Weights that are not on this machine, and cannot be had.
            CorruptFileError: A file that cannot be read.
        """
        ...


@runtime_checkable
class LooksAtCrops(Protocol):
    """A tokenizer that looks at crops of an image, one after the other, under a cropping policy.

    Every ``--policy`` is a row of its own. Other tokenizers see whole images and have one row.
    """

    @property
    def info(self) -> TokenizerInfo: ...

    def policy(self, name: str | None) -> object:
        """A policy as it runs; ``str()`` of it is its canonical name, part of every key and protocol.

        Args:
            name: As asked for, e.g. ``global+raster:4``; None is the tokenizer's own.

        Raises:
            UsageError: Not a policy of this tokenizer.
        """
        ...


def looks_at_crops(tokenizer: object) -> TypeGuard[LooksAtCrops]:
    """Whether a tokenizer is a :class:`LooksAtCrops`, also one that hands calls on to another."""
    return callable(getattr(tokenizer, "policy", None))


@dataclass(frozen=True, slots=True)
class CropStep:
    """Messages after one more crop.

    Attributes:
        tokens: B messages, as ``encode`` makes them under a policy that stops here.
        boxes: int64 [B, 3], (left, top, side) in pixels of the crop that each has seen last.
    """

    tokens: Tokens
    boxes: Tensor


@runtime_checkable
class Gathers(Tokenizer, LooksAtCrops, Protocol):
    """A tokenizer whose message grows crop by crop and says something after each.

    Task ``gather`` asks for the policies ``random:9`` and ``global+random:10``: nine local crops in a random
    order of each image's own, without and after the whole image.
    """

    def encode_by_crop(
        self, images_u8: Tensor, *, policy: str, generators: Streams = None, later: Tensor | None = None
    ) -> list[CropStep]:
        """Messages of uint8 [B, 3, S, S] after every crop of a policy, from one encoding.

        Args:
            images_u8: As for ``encode``.
            policy: Must not be adaptive with ``later``.
            generators: As for ``encode``.
            later: uint8 [B, 3, S, S]; all crops after the first are cut out of these, at the same places.
        """
        ...

    def decode_one_step(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """What a message says without inventing what it leaves open: uint8 [B, 3, S, S].

        A flow takes one step from noise and is blurred where the message is silent; a decoder of a single
        pass decodes. Seeds are those of ``decode``.
        """
        ...


def gathers(tokenizer: object) -> TypeGuard[Gathers]:
    """Whether a tokenizer is a :class:`Gathers`, also one that hands calls on to another."""
    parts = ("policy", "encode_by_crop", "decode_one_step")
    return all(callable(getattr(tokenizer, name, None)) for name in parts)


def decodes_with_noise(tokenizer: object) -> bool:
    """Whether the seeds that ``decode`` gets can change what it returns.

    A tokenizer says no by an attribute ``decodes_with_noise = False``, of its class or of itself. One that
    says nothing may use them; so may a class that writes a ``decode`` of its own and inherits the attribute.
    """
    for part in (tokenizer, *type(tokenizer).__mro__):
        own = getattr(part, "__dict__", {})
        if "decodes_with_noise" in own:
            break
        if "decode" in own:
            return True
    return bool(getattr(tokenizer, "decodes_with_noise", True))


@runtime_checkable
class HasHiddenFeatures(Protocol):
    """A tokenizer whose messages can also be read before quantization.

    It hands them out as continuous ``codes``, with ``ids`` and ``info.vocab_size`` None, when it was loaded
    with ``--option latents=prequant`` (what is quantized) or ``latents=raw`` (rows of the encoder).
    """

    @property
    def info(self) -> TokenizerInfo: ...

    @property
    def latents(self) -> str:
        """``codes`` (what enters the decoder), ``prequant`` or ``raw``; stands in ``info.options``."""
        ...


# (row of the first image, position in request.layers, in request.times, maps [b, H, K, h, w])
TileReceiver = Callable[[int, int, int, Tensor], None]


@runtime_checkable
class Attends(Protocol):
    """A tokenizer whose decoder lets message and image attend to each other, so that maps can be read."""

    @property
    def info(self) -> TokenizerInfo: ...

    @property
    def attention_layers(self) -> int:
        """Number of blocks whose maps can be read."""
        ...

    def attention_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """When maps asked for at ``times`` are really read; empty for a decoder of a single pass.

        Raises:
            ValueError: Decoding is over before one of them.
        """
        ...

    def attention(
        self, tokens: Tokens, request: AttentionRequest, receive: TileReceiver, *, seeds: Sequence[int]
    ) -> None:
        """Hand out message-to-image maps of several layers and times while decoding once.

        Nothing is computed past the last map. Images are decoded in tiles (:data:`TILE`), so the maps of
        an image do not depend on the others.

        Args:
            tokens: B messages.
            request: Which maps. A decoder of a single pass answers the first time only.
            receive: Gets the maps of one tile, layer and time as they are computed, [b, H, K, h, w] on the
                tokenizer's device. Whatever it does not keep is freed.
            seeds: One noise seed per image, as for ``decode``.

        Raises:
            ValueError: A layer that does not exist, or a time that decoding does not reach.
        """
        ...


AttendingTokenizer = Attends  # its earlier name


@contextmanager
def only_finite(name: str) -> Iterator[None]:
    """Refuse latents, codes and pixels that are not finite before the ids or bytes made of them are used.

    Quantizers, ``to_uint8`` and :func:`in_tiles` observe what they handle (``comit_bench.nn.finite``);
    an adapter of its own wraps its calls in this and calls ``observe("latents", z)``. The device is asked
    once, when the outermost block ends.

    Args:
        name: Of the tokenizer, for the message.

    Raises:
        BenchError: Something held NaN or infinity.
    """
    with watching() as watch:
        yield
    broken = watch.broken() if watch is not None else []
    if broken:
        raise BenchError(
            f"{name}: its {' and '.join(broken)} are not finite (NaN or infinity), so they stand for no "
            "image. Its weights are damaged or do not fit its config; with --dtype bfloat16 try float32."
        )


def _tiles(batches: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """First row of every tile and that many rows of every batch; the last one is padded by repetition."""
    total, tile = batches[0].shape[0], tile_rows.get()
    for start in range(0, total, tile):
        index = torch.arange(start, start + tile).clamp_(max=total - 1)
        yield start, [batch[index.to(batch.device, non_blocking=True)] for batch in batches]


def attention_in_tiles(function: Callable[..., None], receive: TileReceiver, *batches: Tensor) -> None:
    """Call ``function`` as :func:`in_tiles` does and pass its maps on without the padding.

    Args:
        function: Takes one slice of every batch and a :data:`MapReceiver`.
        receive: Gets the maps of every tile.
        *batches: Tensors with equal first dimension B >= 1.

    Raises:
        BenchError: Maps that are not finite.
    """
    total = batches[0].shape[0]
    with only_finite("this tokenizer"):
        for start, rows in _tiles(batches):

            def hand_on(layer: int, time: int, maps: Tensor, start: int = start) -> None:
                receive(start, layer, time, observe("attention maps", maps)[: total - start])

            function(*rows, hand_on)


def in_tiles(function: Callable[..., Tokens], *batches: Tensor, name: str = "this tokenizer") -> Tokens:
    """Call ``function`` on slices of exactly :data:`TILE` rows; the last one is padded by repetition.

    Args:
        function: Takes one slice of every batch, returns Tokens with as many rows.
        *batches: Tensors with equal first dimension B >= 1.
        name: Of the tokenizer, for the message.

    Raises:
        BenchError: See :func:`only_finite`.
    """
    total = batches[0].shape[0]
    parts: list[Tokens] = []
    with only_finite(name):
        for _, rows in _tiles(batches):
            parts.append(function(*rows))
            observe("codes", parts[-1].codes)

    def join(values: list[Tensor | None]) -> Tensor | None:
        tensors = [v for v in values if v is not None]
        return torch.cat(tensors)[:total] if tensors else None

    codes = join([p.codes for p in parts])
    assert codes is not None
    return Tokens(join([p.ids for p in parts]), codes, join([p.offsets for p in parts]))


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Where a network computes in ``dtype``: float32 means float32, without an outer autocast or TF32."""
    rounded = dtype != torch.float32 and device.type != "meta"  # torch knows no autocast for meta
    with (
        exact_products(device),
        torch.autocast(device.type, dtype=dtype) if rounded else full_precision(device),
    ):
        yield


def on_device(images_u8: Tensor, device: torch.device) -> Tensor:
    """Bytes -> float32 0..255 on the device: the bytes travel, and the host does not wait for them."""
    return images_u8.to(device, non_blocking=True).float()


def check_images(images_u8: Tensor, info: TokenizerInfo) -> None:
    """Refuse anything but uint8 [B, 3, S, S] at the tokenizer's resolution.

    Raises:
        ValueError: Names the shape and type that came and those expected.
    """
    side = info.resolution
    if images_u8.dtype != torch.uint8 or images_u8.ndim != 4 or images_u8.shape[1:] != (3, side, side):
        raise ValueError(
            f"{info.name} takes uint8 images of shape [B, 3, {side}, {side}], got "
            f"{str(images_u8.dtype).removeprefix('torch.')} {list(images_u8.shape)}. "
            f"Preprocess them first: comit_bench.data.images.preprocess(image, {info.preprocessing!r})."
        )


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ValueError: Names those expected.
    """
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids must lie in 0..{vocab_size - 1}, got {low} to {high}")


def check_codes(codes: Tensor, info: TokenizerInfo) -> None:
    """Refuse anything but [B, K, d] of a tokenizer whose messages have one length.

    Raises:
        ValueError: Names the shape that came and the one expected.
    """
    expected = (info.message_length, info.code_dim)
    if codes.ndim != 3 or tuple(codes.shape[1:]) != expected:
        raise ValueError(
            f"{info.name} decodes codes of shape [B, {expected[0]}, {expected[1]}], got {list(codes.shape)}"
        )


def warn_policy(name: str, policy: str | None) -> None:
    """Say that a cropping policy has no effect on a tokenizer that reads whole images."""
    if policy not in (None, "global"):
        warnings.warn(f"{name} reads whole images: policy {policy!r} has no effect on it", stacklevel=3)


def own_streams(generators: Streams, index: Tensor) -> list[torch.Generator] | None:
    """The generators of a tile's rows, cloned: a padded row must not advance its original's stream."""
    return None if generators is None else [generators[i].clone_state() for i in index.tolist()]


class Computes(Protocol):
    """An adapter with a network on a device."""

    info: TokenizerInfo
    device: torch.device
    dtype: torch.dtype


@contextmanager
def computing(tokenizer: Computes) -> Iterator[None]:
    """Where its network computes, without gradients."""
    with torch.inference_mode(), autocast(tokenizer.device, tokenizer.dtype):
        yield


def encode_tiles(
    tokenizer: Computes, encode: Callable[..., Tokens], images_u8: Tensor, *beside: Tensor
) -> Tokens:
    """Tokenize uint8 [B, 3, S, S] tile by tile.

    Args:
        tokenizer: Whose.
        encode: Takes float32 [b, 3, S, S], 0..255 on the device, and the rows of ``beside`` where they are.
        images_u8: The images.
        beside: Further tensors with a row for every image.

    Raises:
        ValueError: Wrong shape or type.
        BenchError: See :func:`only_finite`.
    """
    check_images(images_u8, tokenizer.info)

    def tile(images: Tensor, *rows: Tensor) -> Tokens:
        with computing(tokenizer):
            return encode(on_device(images, tokenizer.device), *rows)

    return in_tiles(tile, images_u8, *beside, name=tokenizer.info.name)


def decode_tiles(tokenizer: Computes, decode: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """The way back: rows of ``batches`` on the device -> uint8 [b, 3, S, S], tile by tile.

    Raises:
        BenchError: See :func:`only_finite`.
    """

    def tile(*rows: Tensor) -> Tokens:
        with computing(tokenizer):
            moved = (part.to(tokenizer.device, non_blocking=True) for part in rows)
            return Tokens(None, decode(*moved))

    return in_tiles(tile, *batches, name=tokenizer.info.name).codes


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], count: int) -> Tensor:
    """Standard normal float32 [count, *shape], each row from a seed of its own.

    Raises:
        ValueError: Not one seed per message.
    """
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} messages: expected one each")
    own = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in own])


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] floats -> uint8: clamp, then the nearest of 256 levels."""
    return observe("pixels", images).float().clamp(0, 1).mul(255).round().to(torch.uint8)


def speed_up(decoder: nn.Module, device: torch.device, *, compiled: bool | None) -> None:
    """Channels-last pixel decoder on CUDA, and a compiled one; results stay within rounding.

    Args:
        decoder: Convolutions, on ``device`` already.
        device: Where it runs.
        compiled: None compiles on CUDA when Triton is installed.
    """
    cuda = device.type == "cuda"
    if cuda:
        decoder.to(memory_format=torch.channels_last)
    if compiled or (compiled is None and cuda and importlib.util.find_spec("triton") is not None):
        decoder.compile()  # in place: parameter names stay


def refuse_unknown(options: Iterable[str], known: Iterable[str], family: str) -> None:
    """Refuse options that a loader does not know.

    Raises:
        UsageError: Names the option and the nearest that are known.
    """
    for option in sorted(set(options) - set(known)):
        raise UsageError(f"{family} has no option {option!r}.{did_you_mean(option, known)}")


def split_options(options: Mapping[str, Any], known: type, family: str) -> tuple[dict[str, Any], bool]:
    """What a loader was given beside its arguments: the tokenizer's settings, and ``allow_pickle``.

    Args:
        options: As given.
        known: The ``TypedDict`` that lists them.
        family: Named in errors.

    Raises:
        UsageError: An option that is not listed.
    """
    refuse_unknown(options, known.__annotations__, family)
    settings = dict(options)
    return settings, switch(settings.pop("allow_pickle", False), "allow_pickle")


MOST_STEPS = 10_000  # of a sampler


def number(value: object, option: str, *, whole: bool = False, low: float = -1e6, high: float = 1e6) -> float:
    """A number of the command line or of Python.

    Raises:
        UsageError: No finite number from ``low`` to ``high``, or not a whole one where that is meant.
    """
    given = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if low <= given <= high and not (whole and given != int(given)):
        return float(given)
    what = "a whole number" if whole else "a number"
    raise UsageError(f"{option} must be {what} from {low:g} to {high:g}, got {shown(value)}")


def one_of(value: object, option: str, allowed: Sequence[str]) -> str:
    """A word of the command line or of Python.

    Raises:
        UsageError: Not one of those that are allowed.
    """
    if value in allowed:
        return str(value)
    near = did_you_mean(str(value), allowed)
    raise UsageError(f"{option} must be one of {', '.join(allowed)}, got {shown(value)}.{near}")


def switch(value: object, option: str) -> bool:
    """A switch of the command line, where every value is text or a number.

    Raises:
        UsageError: Neither on nor off.
    """
    if str(value).lower() not in ON + OFF:
        raise UsageError(f"{option} must be on or off, true or false, got {value!r}")
    return str(value).lower() in ON


def switch_or_auto(value: object, option: str) -> bool | None:
    """The same, or None for ``auto``.

    Raises:
        UsageError: None of the three.
    """
    if str(value).lower() not in ("auto", *ON, *OFF):
        raise UsageError(f"{option} must be auto, true or false, got {value!r}")
    return None if str(value).lower() == "auto" else switch(value, option)
