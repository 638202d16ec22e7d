"""SelfTok's networks, equation by equation: the two-stream encoder, and the decoders, which are one trunk.

``README.md`` says what they are for. This file hides tokens behind a mask and computes every row;
``fast.py`` gives the same numbers with less work, and is what the tokenizer runs.

Shape legend: ``B`` batch, ``C h w`` latents, ``K`` tokens, ``d`` code dimension, ``D`` width of the latent
stream, ``Q`` of the queries, ``H`` of the decoder, ``N`` latent and ``P`` image tokens, ``T`` = 1 or B times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.dit import Mlp, Modulation, PatchEmbed, ScalarEmbed, sincos_grid
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import CHANNELS, DEPTH, HEADS, PATCH, SIDE, TOKENS, WIDTH, check_sizes
from comit_bench.nn.vae import KLVae, KLVaeSpec
from comit_bench.nn.vq import most_similar, unit

EPS = 1e-6
TIME_SCALE = 1000.0
FIRST, STRIDE = 1000, 8  # position of token k, on the scale of the diffusion time: 1000 + 8 k
SD3_VAE = KLVaeSpec(channels=16, scale=1.5305, shift=0.0609, quant_convs=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How many tokens the denoiser sees at a time T in 0..1000.

    Attributes:
        ends: End of every stage; the first begins at 0.
        counts: Tokens that every stage adds.
    """

    ends: tuple[int, ...] = (200, 400, 600, 800, 1000)
    counts: tuple[int, ...] = (192, 184, 72, 48, 16)

    def __post_init__(self) -> None:
        starts = (0, *self.ends)
        rising = all(a < b for a, b in zip(starts, self.ends, strict=False))
        if not self.ends or len(self.ends) != len(self.counts) or not rising or min(self.counts) < 0:
            raise ValueError(
                f"stages {list(self.ends)} with {list(self.counts)} tokens: expected rising ends and one "
                "count of at least 0 for each"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """Sizes of the encoder; defaults are the released ones."""

    width: int = 64
    heads: int = 4
    query_width: int = 512
    query_heads: int = 8
    depth: int = 16
    mlp_ratio: float = 4.0
    grid: int = 64

    def __post_init__(self) -> None:
        _check_heads("encoder", self.depth, (self.width, self.heads), (self.query_width, self.query_heads))


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """Sizes of the decoder's trunk; defaults are the released ones."""

    width: int = 1536
    heads: int = 24
    depth: int = 24
    mlp_ratio: float = 4.0
    grid: int = 192

    def __post_init__(self) -> None:
        _check_heads("decoder", self.depth, (self.width, self.heads))


def _check_heads(what: str, depth: int, *sizes: tuple[int, int]) -> None:
    bounded = 1 <= depth <= DEPTH and all(
        1 <= heads <= HEADS and 1 <= width <= WIDTH for width, heads in sizes
    )
    if not bounded or any(width % heads for width, heads in sizes):
        raise ValueError(f"{what}: depth {depth} and (width, heads) {sizes} make no transformer")


@dataclass(frozen=True, kw_only=True, slots=True)
class SelftokSpec:
    """Everything that determines a SelfTok network.

    Attributes:
        tokens: K.
        kind: Which decoder.
        schedule: Which tokens the diffusion decoder sees; None for a renderer, or when it is unknown.
        steps: Euler steps of the diffusion decoder.
        sees_image: Whether context queries look at the image; None is the released choice.
        output_dim: d of the codes when the quantizer projects them; None: it does not.
        positional_mask: The renderer's image has one learned vector per position, not one for all.
        vae: None for a network of latents only.
    """

    tokens: int = 512
    kind: Literal["diffusion", "renderer"] = "diffusion"
    image_size: int = 256
    channels: int = 16
    patch: int = 2
    encoder: EncoderSpec = field(default_factory=EncoderSpec)
    decoder: DecoderSpec = field(default_factory=DecoderSpec)
    vocab_size: int = 32768
    quantizer_dim: int = 16
    output_dim: int | None = None
    schedule: Schedule | None = None
    steps: int = 50
    sees_image: bool | None = None
    positional_mask: bool = False
    vae: KLVaeSpec | None = SD3_VAE

    def __post_init__(self) -> None:
        check_sizes(self, tokens=TOKENS, image_size=SIDE, patch=PATCH, channels=CHANNELS, steps=10_000)
        if self.kind not in ("diffusion", "renderer"):
            raise ValueError(f"the decoder is 'diffusion' or 'renderer', got {self.kind!r}")
        if self.vae is not None and self.image_size % (self.vae.factor * self.patch):
            raise ValueError(f"images of {self.image_size} px make no whole patches")

    @property
    def code_dim(self) -> int:
        return self.quantizer_dim if self.output_dim is None else self.output_dim

    @property
    def context_sees_image(self) -> bool:
        return self.kind == "diffusion" if self.sees_image is None else self.sees_image

    @property
    def latent_side(self) -> int:
        """Side of the latents of a whole image."""
        return self.image_size // (8 if self.vae is None else self.vae.factor)


PRESETS: dict[str, SelftokSpec] = {
    "selftok-512": SelftokSpec(tokens=512, schedule=Schedule()),
    "selftok-1024": SelftokSpec(tokens=1024),  # its schedule is not published
}


def variant(name: str, decoder: str) -> SelftokSpec:
    """A preset with one of its decoders, ``diffusion`` or ``renderer``."""
    spec = PRESETS[name]
    return replace(spec, kind="renderer", schedule=None) if decoder == "renderer" else spec


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then scale and shift."""
    return layer_norm(x) * (1 + scale) + shift


def token_positions(count: int, device: torch.device) -> Tensor:
    """Positions of ``count`` tokens as they are embedded, float32 [count]."""
    return FIRST + STRIDE * torch.arange(count, dtype=torch.float32, device=device)


def context_table(count: int, width: int) -> Tensor:
    """The fixed table of token positions: sine, then cosine, of each; float32 [1, count, width]."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = token_positions(count, torch.device("cpu")).double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()[None]


def central_crop(table: Tensor, rows: int, columns: int) -> Tensor:
    """The middle of a square table of positions: [1, G^2, D] -> [1, rows * columns, D]."""
    side = math.isqrt(table.shape[1])
    if rows > side or columns > side:
        raise ValueError(f"{rows} x {columns} patches, but the position table is {side} x {side}")
    top, left = (side - rows) // 2, (side - columns) // 2
    grid = table.view(1, side, side, -1)[:, top : top + rows, left : left + columns]
    return grid.reshape(1, rows * columns, -1)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, W] -> [B, heads, L, W / heads]."""
    out: Tensor = rearrange(x, "b n (h c) -> b h n c", h=heads)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads [B, h, L, c] -> [B, L, h c]; ``mask`` [L, keys] says which keys may be looked at."""
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out: Tensor = rearrange(mixed, "b h n c -> b n (h c)")
    return out


class DualAttention(nn.Module):
    """Attention of latents among themselves, and of queries over latents and queries."""

    def __init__(self, width: int, heads: int, query_width: int, query_heads: int) -> None:
        super().__init__()
        self.heads, self.query_heads = heads, query_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.to_query_kv = nn.Linear(width, 2 * query_width)
        self.query_linear = nn.Linear(query_width, 3 * query_width)
        self.query_proj = nn.Linear(query_width, query_width)

    def latents(self, n: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (to_heads(part, self.heads) for part in self.qkv(n).chunk(3, dim=-1))
        out: Tensor = self.proj(attend(q, k, v))
        return out

    def queries(self, n: Tensor, u: Tensor) -> Tensor:
        """Latents [B, N, D] and queries [B or 1, K, Q] -> [B, K, Q]."""
        own = self.query_linear(u).expand(n.shape[0], -1, -1)
        q, k_q, v_q = (to_heads(part, self.query_heads) for part in own.chunk(3, dim=-1))
        k_x, v_x = (to_heads(part, self.query_heads) for part in self.to_query_kv(n).chunk(2, dim=-1))
        out: Tensor = self.query_proj(attend(q, torch.cat([k_x, k_q], 2), torch.cat([v_x, v_q], 2)))
        return out


class DualBlock(nn.Module):
    """One encoder block: latents see latents only; queries see both, and are modulated by their positions."""

    def __init__(self, width: int, heads: int, query_width: int, query_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = DualAttention(width, heads, query_width, query_heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.q_mlp = Mlp(query_width, int(query_width * mlp_ratio))
        self.adaLN_modulation = Modulation(query_width, 6)
        self.t_embedder = ScalarEmbed(query_width)

    def modulation(self, positions: Tensor) -> Tensor:
        """[K] -> [6, 1, K, Q]: shift, scale, gate of the attention, then of the MLP."""
        parts: Tensor = self.adaLN_modulation(self.t_embedder(positions))
        return parts.transpose(1, 2)

    def forward(self, x: Tensor, q: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, N, D] and queries [B or 1, K, Q], with their :meth:`modulation` -> the same with B."""
        n = layer_norm(x)
        return self.update_latents(x, n), self.update_queries(n, q, state)

    def update_latents(self, x: Tensor, n: Tensor) -> Tensor:
        """``n`` is x after its LayerNorm."""
        x = x + self.attn.latents(n)
        out: Tensor = x + self.mlp(layer_norm(x))
        return out

    def update_queries(self, n: Tensor, q: Tensor, state: Tensor) -> Tensor:
        """One row of queries [1, K, Q] when they are the same for every image."""
        shift1, scale1, gate1, shift2, scale2, gate2 = state
        q = q + gate1 * self.attn.queries(n, modulated(q, shift1, scale1))
        out: Tensor = q + gate2 * self.q_mlp(modulated(q, shift2, scale2))
        return out


class _Codebook(nn.Module):
    embed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(1, size, dim))


class Quantizer(nn.Module):
    """Cosine search in a codebook that is used as it is stored."""

    def __init__(self, width: int, size: int, dim: int, output_dim: int | None) -> None:
        super().__init__()
        self.size = size
        self.project_in = nn.Linear(width, dim)
        self._codebook = _Codebook(size, dim)
        self.project_out = None if output_dim is None else nn.Linear(dim, output_dim)

    @property
    def table(self) -> Tensor:
        """float32 [V, d']."""
        return self._codebook.embed[0].float()

    def project(self, q: Tensor) -> Tensor:
        """Queries [..., Q] -> [..., d'], before normalisation."""
        with full_precision(q.device):
            z: Tensor = self.project_in(q.float())
        return z

    def ids(self, z: Tensor) -> Tensor:
        """[..., d'] -> int64 [...]; never under autocast."""
        with full_precision(z.device):
            return most_similar(unit(z.float()).flatten(0, -2), self.table).view(z.shape[:-1])

    def rows(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., d], before the LayerNorm."""
        with full_precision(ids.device):
            rows = F.embedding(ids, self.table)
            return rows if self.project_out is None else cast(Tensor, self.project_out(rows))


class Encoder(nn.Module):
    """Scaled latents -> queries -> ids and codes."""

    pos_embed: Tensor

    def __init__(self, spec: SelftokSpec) -> None:
        super().__init__()
        size = spec.encoder
        self.tokens, self.patch = spec.tokens, spec.patch
        table = torch.zeros(1, size.grid**2, size.width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.query_tokens = nn.Parameter(torch.zeros(1, spec.tokens, size.query_width))
        self.x_embedder = PatchEmbed(spec.channels, size.width, spec.patch)
        self.blocks = nn.ModuleList(
            DualBlock(size.width, size.heads, size.query_width, size.query_heads, size.mlp_ratio)
            for _ in range(size.depth)
        )
        self.quantizer = Quantizer(size.query_width, spec.vocab_size, spec.quantizer_dim, spec.output_dim)
        self.final_layer_norm3 = nn.LayerNorm(spec.code_dim, eps=EPS)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> queries [B, K, Q] before ``quantizer.project``; see :meth:`embed` for errors."""
        x, q = self.embed(latents), self.query_tokens.expand(latents.shape[0], -1, -1)
        positions = token_positions(self.tokens, q.device)
        for block in self.blocks:
            x, q = block(x, q, cast(DualBlock, block).modulation(positions))
        return q

    def embed(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, N, D].

        Raises:
            ValueError: Latents that are no whole patches, or more of them than positions.
        """
        rows, columns = count_patches(latents, self.patch)
        x: Tensor = self.x_embedder(latents) + central_crop(self.pos_embed, rows, columns)
        return x

    def codes(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., d], what enters a decoder."""
        rows = self.quantizer.rows(ids)
        with full_precision(ids.device):
            codes: Tensor = self.final_layer_norm3(rows)
        return codes


def count_patches(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    high, wide = latents.shape[-2:]
    if high % patch or wide % patch:
        raise ValueError(f"latents of {high} x {wide} cannot be cut into patches of {patch} x {patch}")
    return high // patch, wide // patch


class StreamAttention(nn.Module):
    """The projections of one stream of a joint attention; ``proj`` is missing where nothing is updated."""

    def __init__(self, width: int, *, updates: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if updates:
            self.proj = nn.Linear(width, width)


class StreamBlock(nn.Module):
    """Context or image side of a joint block.

    Args:
        width: H.
        mlp_ratio: Hidden size of the MLP over the width.
        updates: Whether the stream goes on; the context of the last block does not.
        positional: Modulated by token positions, through an embedder of its own, and not by the time.
    """

    def __init__(self, width: int, mlp_ratio: float, *, updates: bool, positional: bool) -> None:
        super().__init__()
        self.attn = StreamAttention(width, updates=updates)
        self.adaLN_modulation = Modulation(width, 6 if updates else 2)
        if updates:
            self.mlp = Mlp(width, int(width * mlp_ratio))
        if positional:
            self.t_embedder = ScalarEmbed(width)

    def positional(self, positions: Tensor) -> Tensor:
        """Modulation by positions [K] -> [6, 1, K, H]."""
        parts: Tensor = self.adaLN_modulation(self.t_embedder(positions))
        return parts.transpose(1, 2)

    def update(self, s: Tensor, mixed: Tensor, state: Tensor) -> Tensor:
        """Stream [B or 1, L, H] and what attention gave it [B, L, H] -> [B, L, H]."""
        s = s + state[2] * self.attn.proj(mixed)
        out: Tensor = s + state[5] * self.mlp(modulated(s, state[3], state[4]))
        return out


class JointBlock(nn.Module):
    """Context and image with their own weights and one attention over both; ``last`` updates no context."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, last: bool) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.context_block = StreamBlock(width, mlp_ratio, updates=not last, positional=not last)
        self.x_block = StreamBlock(width, mlp_ratio, updates=True, positional=False)

    def forward(
        self, context: Tensor, image: Tensor, own: Tensor, state: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            context: [B, K, H]. In the last block it comes back as it was.
            image: [B, P, H].
            own: Modulation of the context, [6, 1, K, H], or [2, T, 1, H] in the last block.
            state: Modulation of the image, [6, T, 1, H].
            mask: bool [K + P, K + P].
        """
        length = context.shape[1]
        own_qkv = self.context_block.attn.qkv(modulated(context, own[0], own[1]))
        qkv = self.x_block.attn.qkv(modulated(image, state[0], state[1]))
        q, k, v = (to_heads(part, self.heads) for part in torch.cat([own_qkv, qkv], dim=1).chunk(3, dim=-1))
        mixed = attend(q, k, v, mask)
        if not self.last:
            context = self.context_block.update(context, mixed[:, :length], own)
        return context, self.x_block.update(image, mixed[:, length:], state)


class Head(nn.Module):
    """LayerNorm, shift and scale by the time, Linear, patches put together."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.adaLN_modulation = Modulation(width, 2)
        self.linear = nn.Linear(width, patch * patch * channels)

    def forward(self, image: Tensor, state: Tensor, rows: int) -> Tensor:
        """[B, P, H] -> [B, C, h, w]."""
        y = self.linear(modulated(image, state[0], state[1]))
        out: Tensor = rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=self.patch, q=self.patch)
        return out


class Decoder(nn.Module):
    """The velocity network, or the renderer: a learned image in place of a noisy one, and the time 1."""

    pos_embed: Tensor
    context_pos_embed: Tensor

    def __init__(self, spec: SelftokSpec) -> None:
        super().__init__()
        size, width = spec.decoder, spec.decoder.width
        self.renders, self.patch, self.tokens = spec.kind == "renderer", spec.patch, spec.tokens
        self.sees_image = spec.context_sees_image
        self.side = spec.latent_side // spec.patch
        if self.renders:
            positions = self.side**2
            self.mask_token = nn.Parameter(torch.zeros(1, positions if spec.positional_mask else 1, width))
            self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        else:
            self.x_embedder = PatchEmbed(spec.channels, width, spec.patch)
            self.register_buffer("pos_embed", torch.zeros(1, size.grid**2, width))
        self.register_buffer("context_pos_embed", torch.zeros(1, spec.tokens, width))
        self.t_embedder = ScalarEmbed(width, scale=TIME_SCALE)
        self.context_embedder = nn.Linear(spec.code_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, size.heads, size.mlp_ratio, last=index == size.depth - 1)
            for index in range(size.depth)
        )
        self.final_layer = Head(width, spec.channels, spec.patch)

    def forward(self, x: Tensor | None, codes: Tensor, time: Tensor, visible: int | None = None) -> Tensor:
        """Velocity (noise - data) at noisy latents, or, for a renderer, the predicted latents [B, C, h, w].

        Args:
            x: [B, C, h, w]; None for a renderer.
            codes: [B, K, d].
            time: [T] in 0..1; 1 for a renderer.
            visible: Leading tokens that anybody may look at; None is all.

        Raises:
            ValueError: Latents that are no whole patches, or more of them than positions.
        """
        context = self.context(codes)
        image, rows = self.image_tokens(x)
        image = image.expand(len(codes), -1, -1)
        length, pixels = context.shape[1], image.shape[1]
        mask = torch.ones(length + pixels, length + pixels, dtype=torch.bool, device=codes.device)
        mask[:, visible or length : length] = False
        if not self.sees_image:
            mask[:length, length:] = False
        c = self.t_embedder(time)
        positions = token_positions(length, codes.device)
        for block in self.blocks():
            own = block.context_block
            state = own.adaLN_modulation(c) if block.last else own.positional(positions)
            context, image = block(context, image, state, block.x_block.adaLN_modulation(c), mask)
        velocity: Tensor = self.final_layer(image, self.final_layer.adaLN_modulation(c), rows)
        return velocity

    def blocks(self) -> list[JointBlock]:
        """The trunk."""
        return cast(list[JointBlock], list(self.joint_blocks))

    def context(self, codes: Tensor) -> Tensor:
        """Codes of the first k tokens [B, k, d] -> [B, k, H]."""
        embedded: Tensor = self.context_embedder(codes) + self.context_pos_embed[:, : codes.shape[1]]
        return embedded

    def image_tokens(self, x: Tensor | None) -> tuple[Tensor, int]:
        """Noisy latents -> [B, P, H] and the rows of patches; the renderer's image [1, P, H] needs none."""
        if x is None:
            return self.mask_token + self.positional_embedding, self.side
        rows, columns = count_patches(x, self.patch)
        return self.x_embedder(x) + central_crop(self.pos_embed, rows, columns), rows


class Selftok(nn.Module):
    """Encoder, decoder (``model``, as released) and VAE."""

    def __init__(self, spec: SelftokSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.model = Decoder(spec)
        self.vae = None if spec.vae is None else KLVae(spec.vae)

    def own_state(self) -> dict[str, Tensor]:
        """The state dict without the VAE: what a released file holds."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("vae.")}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, zero_gates: bool = True) -> None:
        """Initialise from an explicit CPU generator.

        Args:
            generator: CPU generator.
            zero_gates: Modulations and the head start at zero (for training). The message of an untrained
                network would then not depend on the image, so the untrained baseline draws them.
        """
        spec = self.spec
        for part in (self.encoder, self.model):
            for name, parameter in part.named_parameters():
                gate = "adaLN_modulation" in name or name.startswith("final_layer.linear")
                if gate and zero_gates:
                    nn.init.zeros_(parameter)
                elif name.startswith("final_layer_norm3"):
                    nn.init.constant_(parameter, float(name.endswith("weight")))
                elif name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.5 if gate else 0.0, generator=generator)
                elif not name.endswith("weight") or ("t_embedder" in name and zero_gates):
                    nn.init.normal_(parameter, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
        book = self.encoder.quantizer._codebook.embed
        book.copy_(F.normalize(torch.randn(book.shape, generator=generator), dim=-1))
        self.encoder.pos_embed.copy_(sincos_grid(spec.encoder.grid, spec.encoder.width))
        self.model.context_pos_embed.copy_(context_table(spec.tokens, spec.decoder.width))
        if not self.model.renders:
            self.model.pos_embed.copy_(sincos_grid(spec.decoder.grid, spec.decoder.width))
        if self.vae is not None:
            self.vae.init_weights(generator)
