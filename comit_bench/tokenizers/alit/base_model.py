"""The two 2D base tokenizers of ALIT: an f16 VQGAN and a KL-VAE.

The VQGAN shares its residual block with TiTok's pixel decoder (``nn/vqgan.py``), but not the frame
around it, which is the VAE's: ``mid`` always has two blocks and the released names differ.

What is unusual:

- The VQGAN is the MaskGIT-style one: no attention, bias-free 3x3 convolutions, average pooling, and where
  a block changes its width the shortcut is a 1x1 convolution of the *branch*; the input is not added.
- The VAE sees pixels in [0, 1], its latent is scaled by 0.2325 on the way in and never scaled back.
- Both compute in float32, also under autocast: they decide ids and, by their pixels, lengths.

Shape legend: ``B`` batch, ``C`` base latent channels, ``V`` base codebook size, ``S`` image side,
``G`` = S / 2^(levels - 1) grid side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import CHANNELS, SIDE, check_sizes
from comit_bench.nn.vq import VectorQuantizer
from comit_bench.nn.vqgan import EPS, GROUPS, VqganBlock, VqganSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSpec:
    """LDM-style KL-VAE.

    ``attention_at`` are nominal resolutions of encoder levels with attention; level 0 has
    ``resolution``, every further level half of it. The decoder's levels have none.
    """

    hidden: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 16
    attention_at: tuple[int, ...] = (16,)
    resolution: int = 256
    scale: float = 0.2325

    def __post_init__(self) -> None:
        check_sizes(self, hidden=8192, blocks=64, latent_channels=CHANNELS, resolution=SIDE)
        if not 1 <= len(self.multipliers) <= 16 or any(self.hidden * m % GROUPS for m in self.multipliers):
            raise ValueError(
                f"hidden {self.hidden} times {list(self.multipliers)}: every width must be a multiple of "
                f"{GROUPS}"
            )


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


class Resample(nn.Module):
    """A convolution after nearest doubling (``up``), or with stride 2 after padding bottom and right."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, c, 2h, 2w] or [B, c, h/2, w/2]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """The blocks of one resolution, attention after each where there is any, then the resampling."""

    def __init__(self, blocks: Sequence[nn.Module], attention: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.upsample: Resample | None = None
        self.downsample: Resample | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, c', h', w']."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                x = resample(x)
        return x


def _widths(start: int, end: int, blocks: int) -> list[tuple[int, int]]:
    """Input and output width of the blocks of a level; the first one changes the width."""
    return [(start if i == 0 else end, end) for i in range(blocks)]


class Middle(nn.Module):
    """Two blocks at the lowest resolution, and what stands between them."""

    def __init__(self, channels: int, block: type[nn.Module], attention: nn.Module | None = None) -> None:
        super().__init__()
        self.block_1, self.block_2 = block(channels, channels), block(channels, channels)
        self.attn_1 = attention

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> the same shape."""
        x = self.block_1(x)
        out: Tensor = self.block_2(x if self.attn_1 is None else self.attn_1(x))
        return out


class BaseDecoder(nn.Module):
    """Features -> image; ``up`` is indexed by level and runs from the lowest resolution to the highest."""

    def __init__(
        self,
        spec: VqganSpec | VaeSpec,
        block: type[nn.Module],
        blocks: int,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width = spec.hidden * spec.multipliers[-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, block, attention)
        levels: list[Level] = []
        for index in reversed(range(len(spec.multipliers))):
            end = spec.hidden * spec.multipliers[index]
            level = Level([block(a, b) for a, b in _widths(width, end, blocks)])
            width = end
            if index > 0:
                level.upsample = Resample(width, up=True)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        """[B, C, G, G] -> [B, 3, S, S], not clamped."""
        x = self.mid(self.conv_in(code))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class VqganEncoder(nn.Module):
    """Image -> continuous features."""

    def __init__(self, spec: VqganSpec) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, spec.hidden, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        width = spec.hidden
        for multiplier in spec.multipliers:
            end = spec.hidden * multiplier
            self.down.append(Level([VqganBlock(a, b) for a, b in _widths(width, end, spec.blocks)]))
            width = end
        self.mid = Middle(width, VqganBlock)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, spec.latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C, G, G]."""
        x = self.conv_in(images)
        for index, level in enumerate(self.down):
            x = level(x)
            if index + 1 < len(self.down):
                x = F.avg_pool2d(x, 2)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Vqgan(nn.Module):
    """The VQGAN base; its codebook names image tokens (for halting) and is mixed by the decoder."""

    stochastic = False

    def __init__(self, spec: VqganSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = VqganEncoder(spec)
        self.decoder = BaseDecoder(spec, VqganBlock, spec.blocks)
        self.quantize = VectorQuantizer(spec.codebook_size, spec.latent_channels, l2_norm=False)

    @property
    def outputs(self) -> int:
        """What the distillation decoder predicts per image token: logits over the codebook."""
        return self.spec.codebook_size

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> continuous features [B, C, G, G]; there is nothing to sample."""
        with full_precision(images.device):
            features: Tensor = self.encoder(images.float())
        return features

    def indices(self, features: Tensor) -> Tensor:
        """[B, C, G, G] -> nearest codebook rows, int64 [B, G*G], row-major."""
        return self.quantize.ids(rearrange(features, "b c h w -> b (h w) c"))

    def mix(self, logits: Tensor) -> Tensor:
        """[B, N, V] -> [B, N, C]: the mean of the codebook under softmax(logits)."""
        return logits.float().softmax(dim=-1) @ self.quantize.embedding.weight

    def decode(self, code: Tensor) -> Tensor:
        """[B, C, G, G] -> [B, 3, S, S]."""
        with full_precision(code.device):
            images: Tensor = self.decoder(code.float())
        return images


class VaeBlock(nn.Module):
    """Ordinary residual block with biases."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w]."""
        u = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        out: Tensor = u + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class VaeAttention(nn.Module):
    """Single-head attention over positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> the same shape."""
        a = self.norm(x)
        q, k, v = (rearrange(f(a), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.proj_out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[-2]))
        return out


class VaeEncoder(nn.Module):
    """Image -> moments before ``quant_conv``."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, spec.hidden, 3, padding=1)
        self.down = nn.ModuleList()
        width, resolution, last = spec.hidden, spec.resolution, len(spec.multipliers) - 1
        for index, multiplier in enumerate(spec.multipliers):
            end = spec.hidden * multiplier
            attended = spec.blocks if resolution in spec.attention_at else 0
            level = Level(
                [VaeBlock(a, b) for a, b in _widths(width, end, spec.blocks)],
                [VaeAttention(end) for _ in range(attended)],
            )
            width = end
            if index < last:
                level.downsample = Resample(width, up=False)
            self.down.append(level)
            resolution //= 2
        self.mid = Middle(width, VaeBlock, VaeAttention(width))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 2 * spec.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 2C, G, G]."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Vae(nn.Module):
    """The KL-VAE base; the distillation decoder predicts its latents directly."""

    stochastic = True

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = VaeEncoder(spec)
        lowest = spec.hidden * spec.multipliers[-1]
        self.decoder = BaseDecoder(spec, VaeBlock, spec.blocks + 1, VaeAttention(lowest))
        self.quant_conv = nn.Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1)

    @property
    def outputs(self) -> int:
        """What the distillation decoder predicts per image token: the latent itself."""
        return self.spec.latent_channels

    def moments(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 2C, G, G]: means, then log variances."""
        with full_precision(images.device):
            out: Tensor = self.quant_conv(self.encoder(images.float()))
        return out

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 2C, G, G] -> scaled latent [B, C, G, G]; without noise the mean."""
        mean, logvar = moments.float().chunk(2, dim=1)
        if noise is not None:
            mean = mean + torch.exp(logvar.clamp(-30.0, 20.0) / 2) * noise
        return self.spec.scale * mean

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> scaled latent [B, C, G, G]."""
        return self.sample(self.moments(images), noise)

    def mix(self, predicted: Tensor) -> Tensor:
        """[B, N, C] -> the same: the prediction is the latent, in the scale that the decoder takes."""
        return predicted

    def decode(self, code: Tensor) -> Tensor:
        """[B, C, G, G] -> [B, 3, S, S]; not divided by the scale."""
        with full_precision(code.device):
            images: Tensor = self.decoder(self.post_quant_conv(code.float()))
        return images


def build_base(spec: VqganSpec | VaeSpec) -> Vqgan | Vae:
    """The base network of a spec, with untrained weights."""
    return Vqgan(spec) if isinstance(spec, VqganSpec) else Vae(spec)
