"""Image autoencoders that a flow runs in: KL autoencoders, DCT, none, and the parity stand-in.

All map images [B, 3, S, S] in [-1, 1] to latents [B, C, S/f, S/f] and back; none is trained here.
The random part of encoding is explicit: pass ``noise`` of the latent's shape to sample the posterior,
or nothing for its mode. All compute in float32, also under autocast (a latent decides which token is sent),
unless :meth:`KLVae.set_dtype` says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import CHANNELS, check_sizes


class LatentCodec(Protocol):
    """What COMiT asks of an autoencoder; ``factor`` is pixels per latent cell."""

    factor: int
    stochastic: bool

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class IdentityVae(nn.Module):
    """A null VAE: the latent is the image itself."""

    factor = 1
    stochastic = False

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, C, S, S] -> the same."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, S, S] -> the same."""
        return latents


DCT_ORDERS = {12: 2, 22: 3, 35: 4}  # channels -> highest frequency of the brightness


class DctVae(nn.Module):
    """A fixed linear autoencoder for small images: the low frequencies of each ``factor`` x ``factor`` block.

    What the SD-VAE is to photographs: a few numbers per block for the flow to predict instead of all, so that
    most of its loss is about the picture and not about noise that has to be copied. Orthonormal 2D cosine
    transform (DCT-II) of three orthonormal colour axes, brightness first; kept are the frequencies
    u + v <= order of the brightness and u + v < order of the two others. ``decode`` is the inverse: pixels
    within that space come back exactly.

    Args:
        factor: Block side, 3 or more. Latents are scaled by 4 / factor, so that their spread does not grow
            with it.
        channels: 12, 22 or 35, which are the orders 2, 3 and 4.
        mean: Value (in [-1, 1]) that becomes the latent 0; the scenes are dark.

    Raises:
        ValueError: ``factor`` below 3, or another number of channels.
    """

    stochastic = False
    basis: Tensor

    def __init__(self, factor: int = 4, channels: int = 12, mean: float = -0.6) -> None:
        super().__init__()
        if factor < 3:
            raise ValueError(f"the blocks of the DCT must have 3 pixels a side or more, got {factor}")
        if channels not in DCT_ORDERS:
            raise ValueError(f"the DCT keeps {', '.join(map(str, DCT_ORDERS))} channels, got {channels}")
        self.factor, self.mean, self.scale = factor, mean, 4 / factor
        point = torch.arange(factor, dtype=torch.float64, device="cpu")
        wave = torch.cos(math.pi * (2 * point + 1) * point[:, None] / (2 * factor))
        wave = wave * torch.where(point[:, None] == 0, 1.0, 2.0).div(factor).sqrt()  # [frequency, pixel]
        colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64, device="cpu")
        colours = colours / colours.norm(dim=1, keepdim=True)
        order = DCT_ORDERS[channels]
        grid = range(min(order + 1, factor))
        kept = [(c, u, v) for c in range(3) for u in grid for v in grid if u + v <= order - (c > 0)]
        rows = [torch.einsum("k,x,y->kxy", colours[c], wave[u], wave[v]) for c, u, v in kept]
        self.register_buffer("basis", torch.stack(rows).float(), persistent=False)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] -> [B, channels, S/f, S/f]."""
        with full_precision(images.device):
            return F.conv2d((images.float() - self.mean) * self.scale, self.basis, stride=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, 3, h*f, w*f], not clamped."""
        with full_precision(latents.device):
            blocks = F.conv_transpose2d(latents.float(), self.basis, stride=self.factor)
            return blocks / self.scale + self.mean


class StandInVae(nn.Module):
    """The linear VAE of the parity cases: average pooling by f and a 3 -> 4 map, and back."""

    stochastic = False

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.enc_weight = nn.Parameter(torch.zeros(4, 3))
        self.enc_bias = nn.Parameter(torch.zeros(4))
        self.dec_weight = nn.Parameter(torch.zeros(3, 4))
        self.dec_bias = nn.Parameter(torch.zeros(3))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] -> [B, 4, S/f, S/f]."""
        with full_precision(images.device):
            pooled = F.avg_pool2d(images.float(), self.factor)
            return F.conv2d(pooled, self.enc_weight[:, :, None, None], self.enc_bias)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] -> [B, 3, h*f, w*f], every value repeated f x f."""
        with full_precision(latents.device):
            pixels = F.conv2d(latents.float(), self.dec_weight[:, :, None, None], self.dec_bias)
            return F.interpolate(pixels, scale_factor=self.factor, mode="nearest")


@dataclass(frozen=True, kw_only=True, slots=True)
class KLVaeSpec:
    """A diffusers ``AutoencoderKL`` with a latent scale; defaults are the sizes of Stable Diffusion's.

    Latents are ``(mode - shift) * scale``; ``quant_convs`` are the 1x1 convolutions beside the latents.
    """

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scale: float = 1.0
    shift: float = 0.0
    quant_convs: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, channels=CHANNELS, layers=16, groups=8192)
        if not 1 <= len(self.widths) <= 16 or not 1 <= min(self.widths) <= max(self.widths) <= 8192:
            raise ValueError(f"widths of a VAE must be 1 to 16 numbers up to 8192: {list(self.widths)}")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"widths of a VAE {list(self.widths)} must be multiples of {self.groups} groups")

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.widths) - 1))


SD_VAE = KLVaeSpec(scale=0.18215)


class KLVae(nn.Module):
    """Diffusers' ``AutoencoderKL``: Stable Diffusion's (``SD_VAE``), FlexTok's, SelfTok's.

    It computes in one type, float32 unless :meth:`set_dtype` says otherwise, also under autocast.
    """

    stochastic = True
    dtype = torch.float32

    def __init__(self, spec: KLVaeSpec) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.spec, self.factor, self.scale = spec, spec.factor, spec.scale
        blocks = len(spec.widths)
        self.vae: Any = AutoencoderKL.from_config(
            {
                "in_channels": 3,
                "out_channels": 3,
                "down_block_types": ["DownEncoderBlock2D"] * blocks,
                "up_block_types": ["UpDecoderBlock2D"] * blocks,
                "block_out_channels": list(spec.widths),
                "layers_per_block": spec.layers,
                "latent_channels": spec.channels,
                "norm_num_groups": spec.groups,
                "scaling_factor": spec.scale,
                "use_quant_conv": spec.quant_convs,
                "use_post_quant_conv": spec.quant_convs,
            }
        )

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype``, images and the arithmetic around the latents of ``encode`` included."""
        if dtype != self.dtype:
            self.dtype = dtype
            nn.Module.to(self.vae, dtype)  # diffusers' own warns that it would be wrong for other models

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights from a CPU generator: Xavier-uniform maps, unit norms, zero biases."""
        for name, parameter in self.vae.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.constant_(parameter, float(name.endswith("weight")))

    def prepare(self, device: torch.device, *, compiled: bool | None = None) -> None:
        """Faster pixels: channels last on CUDA, and a compiled decoder.

        Args:
            device: Where it runs.
            compiled: Compile the decoder; None does so on CUDA where Triton is installed.
        """
        cuda = device.type == "cuda"
        if cuda:
            self.vae.to(memory_format=torch.channels_last)
        if compiled or (compiled is None and cuda and find_spec("triton") is not None):
            self.vae.decoder.compile()  # in place: parameter names stay

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> mean and clamped log-variance, [B, C, S/f, S/f] each, unscaled."""
        with full_precision(images.device):
            posterior = self.vae.encode(images.to(self.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] -> scaled latents: mean of the posterior, or mean + std * noise."""
        mean, logvar = self.posterior(images)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return (mean - self.spec.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, f h, f w], not clamped."""
        with full_precision(latents.device):
            unscaled = latents.float() / self.scale + self.spec.shift
            images: Tensor = self.vae.decode(unscaled.to(self.dtype)).sample
        return images


def build_vae(kind: str, factor: int = 8, channels: int = 12) -> IdentityVae | DctVae | StandInVae | KLVae:
    """Make an autoencoder with untrained weights: ``none``, ``dct``, ``stand-in`` or ``sd``.

    ``channels`` is asked of the DCT alone.
    """
    if kind == "none":
        return IdentityVae()
    if kind == "dct":
        # the photographs behind digits (4 px blocks) are darker than those behind drawings
        return DctVae(factor, channels, mean=-0.6 if factor == 4 else -0.3)
    if kind == "stand-in":
        return StandInVae(factor)
    if kind == "sd":
        return KLVae(SD_VAE)
    raise ValueError(f"unknown VAE kind {kind!r}: expected none, dct, stand-in or sd")
