"""vq-grid: a plain two-dimensional tokenizer, one token per cell of a grid, as a baseline of our own.

No paper: a small autoencoder after the pattern of ViT-VQGAN (Yu et al., 2022; transformer on both sides,
tokens on a grid) with finite scalar quantization in place of a codebook. Sequence lengths, vocabulary and
parameters are near those of ``comit-nano``, so that what differs is how a message is made.

What is unusual:

- Attention is global, so the token of a cell may speak of other cells; what is two-dimensional is where the
  decoder reads it. Nothing else tells the decoder about the image.
- The encoder works on two scales: patches, then cells of 2 x 2 patches; the decoder mirrors it.
- Nothing is random. Positions are learned, so one model knows one image size.

Shape legend: ``B`` batch, ``K`` tokens (cells, raster order), ``d`` code dimension, ``D`` width, ``E`` inner
width, ``G`` patches per side, ``S`` image side, ``p`` patch side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from comit_bench.nn.fsq import FSQ
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import DEPTH, PATCH, SIDE, WIDTH, check_levels, check_sizes
from comit_bench.nn.vit import PlainBlock, run_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class VqGridSpec:
    """Everything that determines a vq-grid network.

    Attributes:
        image_size: Side of the image in pixels.
        patch: Side of a patch in pixels; a cell is 2 x 2 patches.
        width: Of the blocks on patches.
        depth: Blocks on patches, on either side.
        inner_width: Of the blocks on cells.
        inner_depth: Blocks on cells, on either side.
        head_dim: Width of one attention head.
        fsq_levels: Levels per code dimension.
    """

    image_size: int = 32
    patch: int = 4
    width: int = 64
    depth: int = 2
    inner_width: int = 96
    inner_depth: int = 1
    head_dim: int = 32
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        check_sizes(self, image_size=SIDE, patch=PATCH, width=WIDTH, depth=DEPTH)
        check_sizes(self, inner_width=WIDTH, inner_depth=DEPTH, head_dim=WIDTH)
        check_levels(self.fsq_levels)
        if self.image_size % (2 * self.patch):
            raise ValueError(f"cells of {2 * self.patch} px do not tile an image of {self.image_size} px")
        for name, width in (("width", self.width), ("inner_width", self.inner_width)):
            if width % self.head_dim:
                raise ValueError(f"{name} {width} is no multiple of head_dim {self.head_dim}")

    @property
    def grid(self) -> int:
        """Cells per side."""
        return self.image_size // (2 * self.patch)

    @property
    def message_length(self) -> int:
        """K, the number of cells."""
        return self.grid**2


PRESETS = {"vq-grid-nano": VqGridSpec()}


def _blocks(width: int, depth: int, head_dim: int) -> nn.ModuleList:
    return nn.ModuleList(PlainBlock(width, width // head_dim) for _ in range(depth))


class GridEncoder(nn.Module):
    """Image -> one vector per cell."""

    def __init__(self, spec: VqGridSpec) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, spec.width, spec.patch, stride=spec.patch)
        self.positions = nn.Parameter(torch.zeros(4 * spec.message_length, spec.width))
        self.blocks = _blocks(spec.width, spec.depth, spec.head_dim)
        self.merge = nn.Conv2d(spec.width, spec.inner_width, 2, stride=2)
        self.inner_positions = nn.Parameter(torch.zeros(spec.message_length, spec.inner_width))
        self.inner_blocks = _blocks(spec.inner_width, spec.inner_depth, spec.head_dim)
        self.norm = nn.LayerNorm(spec.inner_width)
        self.head = nn.Linear(spec.inner_width, len(spec.fsq_levels))
        self.side = 2 * spec.grid

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> [B, K, d]."""
        x = rearrange(self.patch_embed(2 * images - 1), "b d h w -> b (h w) d") + self.positions
        x = rearrange(run_blocks(self.blocks, x), "b (h w) d -> b d h w", h=self.side)
        x = rearrange(self.merge(x), "b e h w -> b (h w) e") + self.inner_positions
        x = run_blocks(self.inner_blocks, x)
        with full_precision(x.device):
            out: Tensor = self.head(self.norm(x.float()))
        return out


class GridDecoder(nn.Module):
    """One code per cell -> image."""

    def __init__(self, spec: VqGridSpec) -> None:
        super().__init__()
        self.embed = nn.Linear(len(spec.fsq_levels), spec.inner_width)
        self.inner_positions = nn.Parameter(torch.zeros(spec.message_length, spec.inner_width))
        self.inner_blocks = _blocks(spec.inner_width, spec.inner_depth, spec.head_dim)
        self.split = nn.ConvTranspose2d(spec.inner_width, spec.width, 2, stride=2)
        self.positions = nn.Parameter(torch.zeros(4 * spec.message_length, spec.width))
        self.blocks = _blocks(spec.width, spec.depth, spec.head_dim)
        self.norm = nn.LayerNorm(spec.width)
        self.pixels = nn.Linear(spec.width, 3 * spec.patch**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        self.grid, self.patch = spec.grid, spec.patch

    def forward(self, codes: Tensor) -> Tensor:
        """[B, K, d] -> [B, 3, S, S], nominally in [0, 1]."""
        x = run_blocks(self.inner_blocks, self.embed(codes) + self.inner_positions)
        x = self.split(rearrange(x, "b (h w) e -> b e h w", h=self.grid))
        x = run_blocks(self.blocks, rearrange(x, "b d h w -> b (h w) d") + self.positions)
        x = self.pixels(self.norm(x))
        x = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=2 * self.grid, p=self.patch, q=self.patch)
        out: Tensor = (self.smooth(x) + 1) / 2
        return out


class VqGrid(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, spec: VqGridSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = GridEncoder(spec)
        self.quantizer = FSQ(spec.fsq_levels)
        self.decoder = GridDecoder(spec)

    def vectors(self, images: Tensor) -> Tensor:
        """What is quantized: images [B, 3, S, S] in [0, 1] -> [B, K, d]."""
        z: Tensor = self.encoder(images)
        return z

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] in [0, 1] -> ids int64 [B, K] and codes float32 [B, K, d].

        The codes are those that the ids stand for, to the last bit.
        """
        ids = self.quantizer.ids(self.quantizer(self.vectors(images)))
        return ids, self.quantizer.codes(ids)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, d] -> images [B, 3, S, S], nominally in [0, 1], not clamped."""
        out: Tensor = self.decoder(codes)
        return out

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal matrices that keep the scale of their input, small positions, zero biases."""
        for name, parameter in self.named_parameters():
            if ".ln_" in name or ".norm." in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("positions"):
                parameter.normal_(0.0, 0.2, generator=generator)
            else:  # a transposed convolution has its inputs first and no overlap here
                fan = parameter.shape[0] if ".split." in name else parameter[0].numel()
                parameter.normal_(0.0, fan**-0.5, generator=generator)
