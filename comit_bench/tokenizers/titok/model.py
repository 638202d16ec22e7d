"""TiTok: an image as K discrete tokens of a ViT ("An Image is Worth 32 Tokens", arXiv 2406.07550).

Where things are: variants -> ``PRESETS``; encoder -> ``TitokEncoder``; quantizer
-> ``vq.py``; decoder -> ``TitokDecoder`` and, for the pixels of the legacy family, ``nn/vqgan.py``;
released names -> the parameter names here.

What is unusual:

- Legacy checkpoints (L-32, B-64, S-128) read the K x D memory of the latents *as* D x K before the last
  projection. Token j is therefore no read-out of latent j: it mixes channels j, j + K, ... of all of them.
  The decoder takes it as its j-th input all the same, and the weights were trained that way.
- The legacy decoder predicts logits over the 1024 codes of a VQGAN and draws the *softmax mixture* of them,
  never the argmax. The single-stage family (BL, SL) predicts RGB patches and smooths them with one
  convolution.
- Nothing is random. Positions are learned, so one model knows one image size.
- The last block of either transformer computes only the rows that are read, and the decoder's queries, the
  same for every image, pass the first projection once per call.

Shape legend: ``B`` batch, ``K`` tokens, ``d`` code dimension, ``D`` width, ``G`` grid side (G^2 patches),
``S`` image side, ``P`` patch side. Sequences are [class, G^2 patches or queries, K tokens].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import CHANNELS, DEPTH, ENTRIES, HEADS, SIDE, TOKENS, WIDTH, check_sizes
from comit_bench.nn.vit import PlainBlock, grid_probe, run_blocks
from comit_bench.nn.vq import VectorQuantizer
from comit_bench.nn.vqgan import VqganDecoder, VqganSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSize:
    """Width, depth, heads of one transformer."""

    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        check_sizes(self, width=WIDTH, layers=DEPTH, heads=HEADS)


SPREAD = 2.0  # of untrained baselines; with 1.0 most tokens are still the same for all images
SIZES = {
    "small": VitSize(width=512, layers=8, heads=8),
    "base": VitSize(width=768, layers=12, heads=12),
    "large": VitSize(width=1024, layers=24, heads=16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TitokSpec:
    """Everything that determines a TiTok network.

    ``pixels`` holds the sizes of the VQGAN decoder of the legacy family, None for the family that
    predicts RGB directly. ``legacy`` and ``pixels`` go together in every released checkpoint.
    """

    encoder: VitSize
    decoder: VitSize
    message_length: int
    vocab_size: int = 4096
    code_dim: int = 12
    l2_norm: bool = True
    image_size: int = 256
    encoder_patch: int = 16
    decoder_patch: int = 16
    pixels: VqganSpec | None = field(default_factory=VqganSpec)

    def __post_init__(self) -> None:
        check_sizes(self, message_length=TOKENS, vocab_size=ENTRIES, code_dim=CHANNELS, image_size=SIDE)
        for side, size in (("encoder", self.encoder), ("decoder", self.decoder)):
            if size.width % size.heads or size.layers < 1:
                raise ValueError(f"{side}: {size} needs at least one layer and a width of whole heads")
        for name, patch in (("encoder", self.encoder_patch), ("decoder", self.decoder_patch)):
            if patch < 1 or self.image_size % patch:
                raise ValueError(f"{name} patch {patch} does not tile an image of {self.image_size} pixels")
        if self.pixels is not None and self.pixels.factor != self.decoder_patch:
            raise ValueError(
                f"the pixel decoder enlarges {self.pixels.factor} times, but the decoder's patches are "
                f"{self.decoder_patch} pixels wide"
            )

    @property
    def legacy(self) -> bool:
        """Whether latents are re-read as the legacy family does, and pixels come from a VQGAN."""
        return self.pixels is not None


def _single_stage(encoder: str, length: int) -> TitokSpec:
    return TitokSpec(
        encoder=SIZES[encoder],
        decoder=SIZES["large"],
        message_length=length,
        vocab_size=8192,
        code_dim=64,
        l2_norm=False,
        pixels=None,
    )


PRESETS: dict[str, TitokSpec] = {
    "titok-l-32": TitokSpec(encoder=SIZES["large"], decoder=SIZES["large"], message_length=32),
    "titok-b-64": TitokSpec(encoder=SIZES["base"], decoder=SIZES["base"], message_length=64),
    "titok-s-128": TitokSpec(encoder=SIZES["small"], decoder=SIZES["small"], message_length=128),
    "titok-bl-64": _single_stage("base", 64),
    "titok-bl-128": _single_stage("base", 128),
    "titok-sl-256": _single_stage("small", 256),
    # ours, for the embedded scenes: the single-stage decoder with the codebook on the sphere of the legacy
    # family, which stays in use where the plain one collapses
    "titok-nano": TitokSpec(
        encoder=VitSize(width=64, layers=2, heads=2),
        decoder=VitSize(width=64, layers=3, heads=2),
        message_length=16,
        vocab_size=1024,
        image_size=32,
        encoder_patch=4,
        decoder_patch=4,
        pixels=None,
    ),
}


class TitokEncoder(nn.Module):
    """Image and latent tokens -> K vectors."""

    def __init__(self, spec: TitokSpec) -> None:
        super().__init__()
        width = spec.encoder.width
        self.spec = spec
        self.class_embedding = nn.Parameter(torch.zeros(1, width))
        grid = spec.image_size // spec.encoder_patch
        self.positional_embedding = nn.Parameter(torch.zeros(grid * grid + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(spec.message_length, width))
        self.patch_embed = nn.Conv2d(3, width, spec.encoder_patch, stride=spec.encoder_patch)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            PlainBlock(width, spec.encoder.heads) for _ in range(spec.encoder.layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, spec.code_dim, 1)

    def sequence(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """[B, 3, S, S] and [K, D] -> [B, 1 + G^2 + K, D], the input of the first block."""
        batch = images.shape[0]
        patches = rearrange(self.patch_embed(images), "b d h w -> b (h w) d")
        patches = patches + self.positional_embedding[1:]
        first = self.class_embedding + self.positional_embedding[:1]
        latents = latent_tokens + self.latent_token_positional_embedding
        ends = (first.expand(batch, -1, -1), latents.expand(batch, -1, -1))
        out: Tensor = self.ln_pre(torch.cat([ends[0], patches, ends[1]], dim=1))
        return out

    def head(self, latents: Tensor) -> Tensor:
        """Latents after ``ln_post`` [B, K, D] -> vectors to quantize [B, K, d]."""
        if self.spec.legacy:  # the memory of [K, D] read as [D, K]: not a transposition
            columns = latents.reshape(latents.shape[0], latents.shape[2], latents.shape[1])
        else:
            columns = latents.transpose(1, 2)
        with full_precision(latents.device):
            z: Tensor = self.conv_out(columns.unsqueeze(-1).float())  # [B, d, K, 1]
        return z.squeeze(-1).transpose(1, 2)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] and [K, D] -> [B, K, d]."""
        x = self.sequence(images, latent_tokens)
        x = run_blocks(self.transformer, x, read=slice(-latent_tokens.shape[0], None))
        return self.head(self.ln_post(x))


class TitokDecoder(nn.Module):
    """Codes -> logits over pixel codes (legacy) or RGB (single-stage)."""

    def __init__(self, spec: TitokSpec) -> None:
        super().__init__()
        width, patch = spec.decoder.width, spec.decoder_patch
        self.patch = patch
        self.grid = spec.image_size // patch
        self.decoder_embed = nn.Linear(spec.code_dim, width)
        self.class_embedding = nn.Parameter(torch.zeros(1, width))
        self.positional_embedding = nn.Parameter(torch.zeros(self.grid**2 + 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(spec.message_length, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            PlainBlock(width, spec.decoder.heads) for _ in range(spec.decoder.layers)
        )
        self.ln_post = nn.LayerNorm(width)
        if spec.pixels is not None:
            entries = spec.pixels.codebook_size
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, entries, 1)
            )
            self.conv_out = None
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch * patch, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def sequence(self, codes: Tensor) -> Tensor:
        """[B, K, d] -> [B, 1 + G^2 + K, D], the input of the first block."""
        tokens = self.decoder_embed(codes) + self.latent_token_positional_embedding
        queries = torch.cat([self.class_embedding, self.mask_token[0].expand(self.grid**2, -1)])
        queries = (queries + self.positional_embedding).expand(codes.shape[0], -1, -1)
        out: Tensor = self.ln_pre(torch.cat([queries, tokens], dim=1))
        return out

    def attention(self, codes: Tensor, request: AttentionRequest, receive: MapReceiver) -> None:
        """Maps [B, H, K, G, G] of codes [B, K, d]; see :func:`~comit_bench.nn.vit.grid_probe`."""
        depth, edge = len(self.transformer), 1 + self.grid**2
        probe = grid_probe(request, receive, depth=depth, side=self.grid, tokens=codes.shape[1])
        blocks = list(self.transformer)[: max(request.layers) + 1]
        run_blocks(blocks, self.sequence(codes), shared=edge, probe=probe)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, K, d] -> [B, 1024, G, G] (legacy) or [B, 3, S, S]."""
        last = 1 + self.grid**2
        x = run_blocks(self.transformer, self.sequence(codes), read=slice(1, last), shared=last)
        x = rearrange(self.ln_post(x), "b (h w) d -> b d h w", h=self.grid)
        out: Tensor = self.ffn(x)
        if self.conv_out is None:
            return out
        x = rearrange(out, "b (p q c) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
        out = self.conv_out(x)
        return out


class Titok(nn.Module):
    """Encoder, quantizer and decoder of one checkpoint."""

    def __init__(self, spec: TitokSpec) -> None:
        super().__init__()
        self.spec = spec
        self.latent_tokens = nn.Parameter(torch.zeros(spec.message_length, spec.encoder.width))
        self.encoder = TitokEncoder(spec)
        self.quantize = VectorQuantizer(spec.vocab_size, spec.code_dim, l2_norm=spec.l2_norm)
        self.decoder = TitokDecoder(spec)
        self.pixel_quantize: nn.Module | None = None
        self.pixel_decoder: nn.Module | None = None
        if spec.pixels is not None:
            self.pixel_quantize = _Codebook(spec.pixels.codebook_size, spec.pixels.latent_channels)
            self.pixel_decoder = VqganDecoder(spec.pixels)

    def vectors(self, images: Tensor) -> Tensor:
        """What is quantized: images [B, 3, S, S] in [0, 1] -> [B, K, d]."""
        z: Tensor = self.encoder(images, self.latent_tokens)
        return z

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] in [0, 1] -> ids int64 [B, K] and codes float32 [B, K, d]."""
        ids, codes = self.quantize(self.vectors(images))
        return ids, codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, d] -> images [B, 3, S, S], nominally in [0, 1], not clamped."""
        out: Tensor = self.decoder(codes)
        if self.pixel_decoder is None or self.pixel_quantize is None:
            return out
        image: Tensor = self.pixel_decoder(self.pixel_quantize(out))
        return image

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, spread: bool = False) -> None:
        """Initialise for training from scratch.

        What the spec leaves open (the pixel decoder is never trained from scratch) is initialised as
        torch initialises convolutions.

        Args:
            generator: CPU generator.
            spread: Draw the transformers' matrices much wider. A freshly initialised network sends
                nearly the same message for every image, so the untrained baseline does this.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if ".ln_" in name or ".norm" in name:
                continue
            value = torch.empty(parameter.shape)
            if name.endswith("bias"):
                value.zero_()
            elif name.endswith("in_proj_weight"):
                nn.init.xavier_uniform_(value, generator=generator)
            elif name.endswith("quantize.embedding.weight"):
                value.uniform_(-1 / value.shape[0], 1 / value.shape[0], generator=generator)
            elif name.startswith("pixel_decoder."):
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            elif name.endswith(("embedding", "_token", "_tokens")):
                value.normal_(0.0, value.shape[-1] ** -0.5, generator=generator)
            else:
                nn.init.trunc_normal_(value, std=0.02, generator=generator)
            if spread and ".transformer." in name and value.ndim == 2:
                value.normal_(0.0, SPREAD * value.shape[1] ** -0.5, generator=generator)
            parameter.copy_(value)


class _Codebook(nn.Module):
    """Rows that are mixed by a softmax over logits."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def forward(self, logits: Tensor) -> Tensor:
        """[B, size, h, w] -> [B, dim, h, w]."""
        return torch.einsum("bnhw,nc->bchw", logits.softmax(dim=1), self.embedding.weight)
