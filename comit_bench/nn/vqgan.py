"""The convolutional decoder of the MaskGIT VQGAN, which TiTok and ALIT draw pixels with.

Unusual, and kept because the weights were trained with it: a residual block that changes the width does
not add its input; it adds a 1 x 1 convolution of its own *output*. Convolutions inside residual blocks
have no bias, those after an upsampling have one. There is no attention. Stages are stored by level, 0 the
finest, and run from the coarsest down.

Shape legend: ``B`` batch, ``Z`` latent channels, ``C`` channels, ``h w`` latent sides, ``f`` = 2^(levels-1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.sizes import CHANNELS, ENTRIES, check_sizes

GROUPS, EPS = 32, 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class VqganSpec:
    """Sizes; the defaults are those of the released f16 network."""

    hidden: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 256
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        check_sizes(self, hidden=8192, blocks=64, latent_channels=CHANNELS, codebook_size=ENTRIES)
        if (
            not 1 <= len(self.multipliers) <= 16
            or not 1 <= min(self.multipliers) <= max(self.multipliers) <= 64
        ):
            raise ValueError(f"multipliers of a VQGAN must be 1 to 16 numbers up to 64: {self.multipliers}")
        if any(self.hidden * m % GROUPS for m in self.multipliers):
            raise ValueError(
                f"hidden {self.hidden} times {list(self.multipliers)}: every width must be a multiple of "
                f"{GROUPS}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level, finest first."""
        return tuple(self.hidden * m for m in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        return 1 << (len(self.multipliers) - 1)


class VqganBlock(nn.Module):
    """Norm, SiLU, 3 x 3 convolution, twice; see the module's docstring for the shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, eps=EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(h))
        return out


class UpStage(nn.Module):
    """Residual blocks of one level, then (except on the finest) nearest x 2 and a 3 x 3 convolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(VqganBlock(outputs if j else inputs, outputs) for j in range(blocks))
        self.upsample_conv = nn.Conv2d(outputs, outputs, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, 2h, 2w] (or h, w)."""
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        out: Tensor = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class VqganDecoder(nn.Module):
    """Latents to pixels; parameter names are those of TiTok's files (ALIT's adapter renames its own)."""

    def __init__(self, spec: VqganSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = spec.widths
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(VqganBlock(widths[-1], widths[-1]) for _ in range(spec.blocks))
        above = (*widths[1:], widths[-1])  # width of the level that runs before
        self.up = nn.ModuleList(
            UpStage(a, w, spec.blocks, upsample=level > 0)
            for level, (a, w) in enumerate(zip(above, widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, Z, h, w] -> [B, 3, f h, f w], not clamped."""
        x = self.conv_in(latents)
        for block in self.mid:
            x = block(x)
        for stage in reversed(self.up):
            x = stage(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
