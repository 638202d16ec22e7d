"""``pixel-oracle`` and ``supervised-cnn``: the raw patches of an image as its "tokens". References.

Patches lose nothing, so ``pixel-oracle`` shows what the probe of the protocol reads from pixels with these
data and this budget. It is no ceiling: a message can be easier to read than pixels. ``supervised-cnn`` is
the same patches with a small convolutional network in front of the probe, trained from scratch with the
task's labels (``comit_bench/probing/stem.py``): how far plain supervised learning gets with these data. It
is no ceiling either. Both share one store of tokens.

Unusual: there is no vocabulary (``ids`` is None), and ``decode`` is the exact inverse of ``encode``.

Shape legend: ``B`` batch, ``K`` patches per image in raster order, ``p`` patch side, ``S`` image side,
``d`` = 3 p p, the values of one patch ordered (channel, row, column).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from einops import rearrange
from torch import Tensor

from comit_bench.errors import UnsupportedOperation, UsageError, shown
from comit_bench.nn.finite import observe
from comit_bench.tokenizers.base import (
    Streams,
    TokenizerInfo,
    Tokens,
    check_codes,
    check_images,
    only_finite,
    refuse_unknown,
    warn_policy,
)
from comit_bench.tokenizers.identity import configuration_digest

VERSION = "1"  # raised when the same weights and configuration may give other ids
SUPERVISED = "supervised-cnn"


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes."""

    patch: int
    resolution: int


LARGEST = 1 << 14  # pixels of a side


def check_grid(resolution: int, patch: int) -> int:
    """Patches per side of a square image."""
    for what, value in (("resolution", resolution), ("patch", patch)):
        if type(value) is not int:  # they may come from a command line
            raise UsageError(f"{what} must be a whole number of pixels, got {shown(value)}")
        if value > LARGEST:
            raise UsageError(f"{what} must be at most {LARGEST} pixels, got {shown(value)}")
    if patch < 1 or resolution < patch or resolution % patch:
        if patch < 1:
            raise UsageError(f"patch {patch}: expected a side of at least 1 pixel")
        lower = resolution // patch * patch
        near = " or ".join(str(side) for side in (lower, lower + patch) if side > 0)
        sides = [str(p) for p in range(1, resolution + 1) if resolution % p == 0]
        raise UsageError(
            f"resolution {resolution} is not a multiple of patch {patch}: take resolution {near}, "
            f"or one of the patches that tile {resolution} pixels: {', '.join(sides) or 'none'}"
        )
    return resolution // patch


def patch_sides(message_length: int, code_dim: int, who: str) -> tuple[int, int]:
    """Patches per side, and side of a patch in pixels, of K tokens of length d as a square image.

    Args:
        message_length: K.
        code_dim: d.
        who: Named in errors.

    Raises:
        UsageError: K is no square number, or d not three times one.
    """
    grid, patch = math.isqrt(message_length), math.isqrt(code_dim // 3)
    if grid * grid != message_length or 3 * patch * patch != code_dim:
        raise UsageError(
            f"{who}: stem 'cnn' lays tokens out as a square image of RGB patches, so it needs a square "
            f"number of tokens (16, 64, ...) of 3 x side x side values (48, 192, ...); got {message_length} "
            f"tokens of {code_dim} values. Leave info.stem empty for tokens that are no pixels."
        )
    return grid, patch


def to_patches(images: Tensor, patch: int) -> Tensor:
    """Cut [B, 3, S, S] into [B, K, d], raster order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def from_patches(patches: Tensor, patch: int) -> Tensor:
    """Inverse of :func:`to_patches` for square images: [B, K, d] -> [B, 3, S, S]."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=side, w=side, p=patch, q=patch)


def to_codes(values_u8: Tensor) -> Tensor:
    """Map 0..255 to float32 in [-1, 1].

    The subtraction is exact and the division correctly rounded, so the result has the same bits for
    every batch size and device.
    """
    return (values_u8.float() - 127.5) / 127.5


def from_codes(codes: Tensor) -> Tensor:
    """Inverse of :func:`to_codes`; values beyond [-1, 1] are clipped."""
    return (observe("pixels", codes).float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class PixelOracleTokenizer:
    """Raw patches as continuous codes in [-1, 1].

    Args:
        resolution: Side of the images, in pixels; a multiple of ``patch``.
        patch: Side of one patch, in pixels.
        device: Where codes are returned.
        supervised: It is ``supervised-cnn``, whose probes learn a convolutional network in front.

    Raises:
        UsageError: The patches do not tile the image.
    """

    decodes_with_noise = False

    def __init__(
        self,
        *,
        resolution: int = 32,
        patch: int = 8,
        device: torch.device | str = "cpu",
        supervised: bool = False,
    ) -> None:
        grid = check_grid(resolution, patch)
        self.patch = patch
        self.device = torch.device(device)
        self.info = TokenizerInfo(
            name=SUPERVISED if supervised else "pixel-oracle",
            family="pixel-oracle",
            kind="reference",
            weights="none",
            parameters=0,
            message_length=grid * grid,
            vocab_size=None,
            code_dim=3 * patch * patch,
            resolution=resolution,
            preprocessing=f"center_crop|resize({resolution},bilinear)",
            training_data="labels of the train split" if supervised else "none",
            weights_licence="none",
            options={"patch": str(patch)},
            configuration=configuration_digest({"patch": patch, "resolution": resolution}),
            version=VERSION,
            stem="cnn" if supervised else "",
        )

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; nothing about it is random."""
        check_images(images_u8, self.info)
        warn_policy(self.info.name, policy)
        return Tokens(None, to_codes(to_patches(images_u8.to(self.device), self.patch)))

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        raise UnsupportedOperation(f"{self.info.name} has continuous codes and no ids to look up")

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Exactly the encoded images; see the contract.

        Raises:
            BenchError: Codes that are not finite.
        """
        check_codes(tokens.codes, self.info)
        with only_finite(self.info.name):
            return from_patches(from_codes(tokens.codes.to(self.device)), self.patch)


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> PixelOracleTokenizer:
    """Build the reference ``name`` from ``patch`` and ``resolution``, in pixels; it has no weights."""
    refuse_unknown(options, _Options.__annotations__, name)
    return PixelOracleTokenizer(supervised=name.lower() == SUPERVISED, device=device, **options)
