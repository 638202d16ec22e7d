"""COMiT's network, equation by equation: one transformer that rewrites a message and predicts a velocity.

``README.md`` says what it is for. This file computes every row of every block, with every mask written out;
``fast.py`` gives the same numbers with less work, and is what tokenizing and training run.

Shape legend: ``B`` batch, ``D`` width, ``H`` heads, ``M`` message length, ``d`` code dimension,
``X`` image tokens, ``N`` = 1 + X + 2M rows (order: offset, image, message, buffer), ``T`` = 1 or B times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from comit_bench.nn.dit import Mlp, Modulation, PatchEmbed, ScalarEmbed, sincos_grid
from comit_bench.nn.fsq import FSQ
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import (
    CHANNELS,
    DEPTH,
    HEADS,
    PATCH,
    SIDE,
    TOKENS,
    WIDTH,
    check_levels,
    check_ratio,
    check_sizes,
)
from comit_bench.nn.vae import LatentCodec
from comit_bench.tokenizers.comit.crops import CropGeometry

MaskMode = Literal["additive", "hard"]
Sizes = tuple[int, int, int]  # rows of the offset, of the image, of message and buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ComitSpec:
    """Everything that determines a COMiT network. Defaults are those of the released configs.

    ``vae`` is ``sd-mse``, ``sd-ema``, ``dct``, ``none`` or ``stand-in``; ``image_size`` follows from it.
    """

    depth: int
    width: int
    heads: int
    message_length: int = 256
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    mlp_ratio: float = 4.0
    max_input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 4
    representation_layer: int = 4
    mask_mode: MaskMode = "additive"
    vae: str = "sd-mse"
    vae_factor: int = 8
    geometry: CropGeometry = field(default_factory=CropGeometry)

    def __post_init__(self) -> None:
        check_sizes(self, depth=DEPTH, width=WIDTH, heads=HEADS, message_length=TOKENS)
        check_sizes(self, max_input_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, vae_factor=SIDE)
        check_levels(self.fsq_levels)
        check_ratio(self.mlp_ratio)
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        if self.max_input_size % self.patch_size:
            raise ValueError(f"latent side {self.max_input_size} is no multiple of patch {self.patch_size}")
        if self.mask_mode not in ("additive", "hard"):
            raise ValueError(f"mask_mode must be 'additive' or 'hard', got {self.mask_mode!r}")

    @property
    def image_size(self) -> int:
        return self.max_input_size * self.vae_factor

    @property
    def code_dim(self) -> int:
        return len(self.fsq_levels)


PRESETS: dict[str, ComitSpec] = {
    "comit-b": ComitSpec(depth=12, width=768, heads=12),
    "comit-l": ComitSpec(depth=24, width=1024, heads=16),
    "comit-xl": ComitSpec(depth=28, width=1152, heads=16),
    # 32 px scenes, 4 px DCT blocks as latents, 8 x 8 image tokens, 3 x 3 per local crop
    "comit-nano": ComitSpec(
        depth=4,
        width=64,
        heads=2,
        message_length=16,
        fsq_levels=(8, 5, 5, 5),
        max_input_size=8,
        patch_size=1,
        in_channels=12,
        out_channels=12,
        representation_layer=2,
        mask_mode="hard",
        vae="dct",
        vae_factor=4,
        geometry=CropGeometry(crop=12, half=16),
    ),
}


def modulate(u: Tensor, sizes: Sizes, image: tuple[Tensor, ...], message: tuple[Tensor, ...]) -> Tensor:
    """Scale and shift image rows by one (shift, scale), [T, 1, D] each, message and buffer by another."""
    offset, x, r = u.split(sizes, dim=1)
    return torch.cat([offset, x * (1 + image[1]) + image[0], r * (1 + message[1]) + message[0]], dim=1)


def gate(u: Tensor, sizes: Sizes, image: Tensor, message: Tensor) -> Tensor:
    """Scale a residual branch by its gates [T, 1, D]; the offset has none."""
    offset, x, r = u.split(sizes, dim=1)
    return torch.cat([offset, x * image, r * message], dim=1)


def attention_bias(image: int, message: int, mode: MaskMode) -> Tensor:
    """What is added to the logits, float32 [N, N].

    Every row may look at offset, image and message, and a buffer row at the buffer up to itself. Unusual:
    ``additive``, the released arithmetic, adds 1 where a row may look and 0 elsewhere, so nothing is hidden.
    """
    edge = 1 + image + message
    allowed = torch.zeros(edge + message, edge + message, dtype=torch.bool)
    allowed[:, :edge] = True
    allowed[edge:, edge:] = torch.ones(message, message, dtype=torch.bool).tril()
    return allowed.float() if mode == "additive" else allowed.float().log()  # 0 or minus infinity


class Attention(nn.Module):
    """Multi-head attention over all rows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> [B, N, D], and the logits before bias and softmax [B, H, N, N]."""
        q, k, v = rearrange(self.qkv(h), "b n (three h c) -> three b h n c", three=3, h=self.heads)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        mixed = (logits + bias).softmax(dim=-1) @ v
        return self.proj(rearrange(mixed, "b h n c -> b n (h c)")), logits


class Block(nn.Module):
    """Pre-norm transformer block. Image rows and message rows have modulations of their own."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.x_adaLN_modulation = Modulation(width, 6)
        self.r_adaLN_modulation = Modulation(width, 6)

    def forward(self, u: Tensor, vector: Tensor, sizes: Sizes, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, N, D] at the embedded time [T, D] -> [B, N, D] and attention logits [B, H, N, N]."""
        x = self.x_adaLN_modulation(vector).unbind(0)  # shift, scale, gate of attention; then of the MLP
        r = self.r_adaLN_modulation(vector).unbind(0)
        mixed, logits = self.attn(modulate(self.norm(u), sizes, x[:2], r[:2]), bias)
        u = u + gate(mixed, sizes, x[2], r[2])
        h = self.mlp(modulate(self.norm(u), sizes, x[3:5], r[3:5]))
        return u + gate(h, sizes, x[5], r[5]), logits


class FinalLayer(nn.Module):
    """LayerNorm and Linear; the velocity head also has a modulation."""

    def __init__(self, width: int, out: int, *, modulated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        if modulated:
            self.adaLN_modulation = Modulation(width, 2)

    def forward(self, u: Tensor, modulation: Tensor | None = None) -> Tensor:
        """[B, rows, D] -> [B, rows, out]."""
        h = self.norm(u)
        if modulation is not None:
            h = h * (1 + modulation[1]) + modulation[0]
        out: Tensor = self.linear(h)
        return out


@dataclass(frozen=True, slots=True)
class Output:
    """Everything that one call of the network computes.

    Attributes:
        velocity: [B, C, h, w].
        message: [B, M, d] before quantization.
        states: Rows [B, N, D] after every block.
        logits: Of every block's attention, before bias and softmax, [B, H, N, N].
    """

    velocity: Tensor
    message: Tensor
    states: list[Tensor]
    logits: list[Tensor]


class Predictor(nn.Module):
    """The network (released class ``RuledDiT``); parameter names are those of the released files."""

    def __init__(self, spec: ComitSpec) -> None:
        super().__init__()
        self.spec = spec
        width, length = spec.width, spec.message_length
        side = spec.max_input_size // spec.patch_size
        self.pos_embed = nn.Parameter(sincos_grid(side, width), requires_grad=False)
        self.y_pos_offset = nn.Parameter(torch.zeros(1, 1, width))  # in the files, never used
        self.r_pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.r_to_pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.c_pos_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.r_to_token = nn.Parameter(torch.zeros(1, 1, width))
        self.x_embedder = PatchEmbed(spec.in_channels, width, spec.patch_size)
        self.r_embedder = self._embedder(spec.code_dim, width)
        self.c_embedder = self._embedder(2, width)
        self.t_embedder = ScalarEmbed(width, scale=1000.0)
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.final_layer = FinalLayer(width, spec.out_channels * spec.patch_size**2, modulated=True)
        self.r_final_layer = FinalLayer(width, spec.code_dim, modulated=False)
        self.c_final_layer = FinalLayer(width, 2, modulated=False)  # in the files, never used

    @staticmethod
    def _embedder(inputs: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def image_tokens(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, X, D] with the top-left part of the position grid."""
        side = self.spec.max_input_size // self.spec.patch_size
        rows, columns = (n // self.spec.patch_size for n in latents.shape[-2:])
        grid = self.pos_embed.view(1, side, side, -1)[:, :rows, :columns].flatten(1, 2)
        tokens: Tensor = self.x_embedder(latents) + grid
        return tokens

    def message_tokens(self, codes: Tensor) -> Tensor:
        """Codes [B, M, d], or [1, 1, d] when all are equal -> [B or 1, M, D]."""
        tokens: Tensor = self.r_embedder(codes) + self.r_pos_embed
        return tokens

    def offset_token(self, offset: Tensor) -> Tensor:
        """[B, 2] -> [B, 1, D]."""
        token: Tensor = self.c_embedder(offset)[:, None] + self.c_pos_embed
        return token

    def buffer_tokens(self) -> Tensor:
        """[1, M, D]; they do not depend on the input."""
        return self.r_to_token + self.r_to_pos_embed

    def forward(
        self, latents: Tensor, codes: Tensor, offset: Tensor, time: Tensor, mask_mode: MaskMode | None = None
    ) -> Output:
        """One call.

        Args:
            latents: [B, C, h, w] of an image or a crop, or noisy ones; h = w, multiples of the patch size.
            codes: The message so far, [B, M, d], or [1, 1, d] when all are equal.
            offset: [B, 2].
            time: [T] in 0..1; 1 is data, so also an encoding.
            mask_mode: Overrides the spec's.
        """
        image, message = self.image_tokens(latents), self.message_tokens(codes)
        batch, tokens, length = image.shape[0], image.shape[1], message.shape[1]
        parts = [self.offset_token(offset), image, message, self.buffer_tokens()]
        u = torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)
        bias = attention_bias(tokens, length, mask_mode or self.spec.mask_mode).to(u)
        vector = self.t_embedder(time)
        states, logits = [], []
        for block in self.blocks:
            u, seen = block(u, vector, (1, tokens, 2 * length), bias)
            states.append(u)
            logits.append(seen)
        return Output(
            self.velocity_head(u[:, 1 : 1 + tokens], self.final_layer.adaLN_modulation(vector), latents),
            self.message_head(u[:, -length:]),
            states,
            logits,
        )

    def velocity_head(self, image: Tensor, modulation: Tensor, latents: Tensor) -> Tensor:
        """Image rows [B, X, D] -> [B, C, h, w] like ``latents``; feature index = (p*P + q)*C + channel."""
        p = self.spec.patch_size
        patches, rows = self.final_layer(image, modulation), latents.shape[-2] // p
        out: Tensor = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)
        return out

    def message_head(self, buffer: Tensor) -> Tensor:
        """Buffer rows [B, M, D] -> [B, M, d], in float32: a flipped rounding is a flipped token."""
        with full_precision(buffer.device):
            message: Tensor = self.r_final_layer(buffer.float())
        return message

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, zero_gates: bool = True) -> None:
        """Initialise for training, from an explicit generator.

        Args:
            generator: CPU generator.
            zero_gates: Modulations and velocity head start at zero (for training). An untrained
                network then sends one constant message, so the untrained baseline draws them too.
        """
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                continue
            value = torch.empty(parameter.shape)
            if name.endswith("bias"):
                value.zero_()
            elif parameter.ndim == 3 and parameter.shape[0] == 1:
                value.normal_(generator=generator)
            elif name.startswith("t_embedder"):
                value.normal_(0.0, 0.02, generator=generator)
            else:
                matrix = value.flatten(1)
                bound = math.sqrt(6.0 / sum(matrix.shape))
                value.uniform_(-bound, bound, generator=generator)
            if "adaLN" in name or name.startswith("final_layer.linear"):
                value = torch.zeros_like(value)
                if not zero_gates:
                    value.normal_(0.0, 0.5 if name.endswith("bias") else 0.02, generator=generator)
            parameter.copy_(value)

    @torch.no_grad()
    def favour_message(self) -> None:
        """Start with embedded codes as strong as their positions (a nano network's training).

        As :meth:`init_weights` leaves them, codes reach the first block at a tenth of the amplitude
        of the learnt positions they are added to, and a short training ends before this has changed.
        """
        self.get_parameter("r_embedder.0.weight").mul_(4.0)
        self.get_parameter("r_embedder.2.weight").mul_(2.0)
        self.r_pos_embed.mul_(0.3)


class Comit(nn.Module):
    """Predictor, quantizer and VAE under the released top-level names.

    The VAE module is handed in so that this file needs no optional library.
    """

    def __init__(self, spec: ComitSpec, vae: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.predictor = Predictor(spec)
        self.quantizer = FSQ(spec.fsq_levels)
        self.vae = vae

    @property
    def codec(self) -> LatentCodec:
        """The VAE, for encoding and decoding."""
        return cast(LatentCodec, self.vae)

    def prior(self, batch: int, device: torch.device) -> Tensor:
        """The empty message: codes [B, M, d] of id vocabulary // 2 everywhere."""
        ids = torch.full((batch, self.spec.message_length), self.quantizer.prior_id, device=device)
        return self.quantizer.codes(ids)
