"""SelfTok: 512 or 1024 tokens from a two-stream encoder, decoded by a diffusion model or in one step.

Sections of the specification: variants (a) -> ``PRESETS``, ``variant``; encoder (c) -> ``Encoder``;
quantizer (d) -> ``Quantizer``; decoders (e) -> ``Decoder``; blocks -> ``selftok_blocks.py``; VAE (b) ->
``vae.py``; the sampler, its grid and which tokens it sees (e) -> ``selftok_codec.py``; released names (f)
-> the parameter names here.

What is unusual:

- A code is a row of the codebook, as stored, after a LayerNorm with weights. Nothing projects it back.
- The noisier the image, the more tokens the denoiser sees: all at the first step, twenty at the last. Those
  it does not see are left out of the context.
- Both decoders are one trunk. The renderer has a learned image instead of a noisy one, the constant time
  1000, and its context does not look at the image.
- Everything that no image enters is computed once: ``Encoder.states``, ``Decoder.context_states``,
  ``Decoder.time_states``.

Shape legend: ``B`` batch, ``C h w`` latents, ``K`` tokens, ``d`` code dimension, ``D`` width of the latent
stream, ``Q`` of the queries, ``H`` of the decoder, ``P`` image tokens, ``T`` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.dit import Modulation, PatchEmbed, sincos_grid
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import CHANNELS, DEPTH, HEADS, PATCH, SIDE, TOKENS, WIDTH, check_sizes
from comit_bench.nn.vae import KLVae, KLVaeSpec
from comit_bench.nn.vq import most_similar, unit
from comit_bench.tokenizers.selftok.blocks import (
    EPS,
    DualBlock,
    JointBlock,
    ScalarEmbed,
    central_crop,
    context_table,
    modulated,
    token_positions,
)

TIME_SCALE = 1000.0
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

    def _blocks(self) -> list[DualBlock]:
        return [cast(DualBlock, block) for block in self.blocks]

    def states(self) -> list[Tensor]:
        """Modulations of the blocks, [6, 1, K, Q] each: constants of the model."""
        positions = token_positions(self.tokens, self.query_tokens.device)
        return [block.modulation(positions) for block in self._blocks()]

    def embed(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, N, D].

        Raises:
            ValueError: Latents that are no whole patches, or more of them than positions.
        """
        rows, columns = _patches(latents, self.patch)
        x: Tensor = self.x_embedder(latents) + central_crop(self.pos_embed, rows, columns)
        return x

    def trunk(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Embedded latents [B, N, D] -> queries [B, K, Q]."""
        q: Tensor = self.query_tokens
        blocks = self._blocks()
        for index, (block, state) in enumerate(zip(blocks, states, strict=True)):
            x, q = block(x, q, state, queries_only=index == len(blocks) - 1)
        return q

    def codes(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., d], what enters a decoder."""
        rows = self.quantizer.rows(ids)
        with full_precision(ids.device):
            codes: Tensor = self.final_layer_norm3(rows)
        return codes

    def forward(self, latents: Tensor, states: Sequence[Tensor] | None = None) -> Tensor:
        """[B, C, h, w] -> queries [B, K, Q] before ``quantizer.project``."""
        return self.trunk(self.embed(latents), self.states() if states is None else states)


def _patches(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: Not a whole number of them.
    """
    high, wide = latents.shape[-2:]
    if high % patch or wide % patch:
        raise ValueError(f"latents of {high} x {wide} cannot be cut into patches of {patch} x {patch}")
    return high // patch, wide // patch


class _Head(nn.Module):
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


@dataclass(frozen=True, slots=True)
class TimeStates:
    """Modulations of T times: image per block [6, T, 1, H], last context and head [2, T, 1, H]."""

    blocks: list[Tensor]
    last_context: Tensor
    head: Tensor

    def at(self, index: int) -> TimeStates:
        """One of the times, for the whole batch."""
        one = slice(index, index + 1)
        return TimeStates([b[:, one] for b in self.blocks], self.last_context[:, one], self.head[:, one])


class Decoder(nn.Module):
    """The velocity network, or the renderer."""

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
        self.t_embedder = ScalarEmbed(width)
        self.context_embedder = nn.Linear(spec.code_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, size.heads, size.mlp_ratio, last=index == size.depth - 1)
            for index in range(size.depth)
        )
        self.final_layer = _Head(width, spec.channels, spec.patch)

    def _blocks(self) -> list[JointBlock]:
        return [cast(JointBlock, block) for block in self.joint_blocks]

    # ------------------------------------------------------------------ constants

    def context_states(self) -> list[Tensor]:
        """Modulations of the context for all blocks but the last, [6, 1, K, H] each."""
        positions = token_positions(self.tokens, self.context_pos_embed.device)
        found = []
        for block in self._blocks()[:-1]:
            own = block.context_block
            parts: Tensor = own.adaLN_modulation(own.t_embedder(positions))
            found.append(parts.transpose(1, 2))
        return found

    def time_states(self, times: Tensor) -> TimeStates:
        """Modulations of times [T] in 0..1."""
        c = self.t_embedder(TIME_SCALE * times.float())
        blocks = self._blocks()
        images = [block.x_block.adaLN_modulation(c) for block in blocks]
        return TimeStates(
            images, blocks[-1].context_block.adaLN_modulation(c), self.final_layer.adaLN_modulation(c)
        )

    # -------------------------------------------------------------------- forward

    def context(self, codes: Tensor) -> Tensor:
        """Codes of the first k tokens [B, k, d] -> [B, k, H]."""
        embedded: Tensor = self.context_embedder(codes) + self.context_pos_embed[:, : codes.shape[1]]
        return embedded

    def trunk(self, image: Tensor, context: Tensor, own: Sequence[Tensor], state: TimeStates) -> Tensor:
        """Image [B or 1, P, H] and visible context [B, k, H] -> [B, P, H]."""
        visible = context.shape[1]
        for index, block in enumerate(self._blocks()):
            mine = state.last_context if block.last else own[index][:, :, :visible]
            context, image = block(context, image, mine, state.blocks[index], sees_image=self.sees_image)
        return image

    def forward(self, x: Tensor, context: Tensor, own: Sequence[Tensor], state: TimeStates) -> Tensor:
        """Velocity (noise - data) at x [B, C, h, w].

        Args:
            x: Noisy latents.
            context: From :meth:`context`, the visible tokens only.
            own: From :meth:`context_states`.
            state: Of one time, or of one time per image.

        Raises:
            ValueError: Latents that are no whole patches, or more of them than positions.
        """
        rows, columns = _patches(x, self.patch)
        image = self.x_embedder(x) + central_crop(self.pos_embed, rows, columns)
        return self.final_layer(self.trunk(image, context, own, state), state.head, rows)  # type: ignore[no-any-return]

    def render(self, context: Tensor, own: Sequence[Tensor], state: TimeStates) -> Tensor:
        """Context of all tokens [B, K, H] -> predicted latents [B, C, h, w]; ``state`` is that of time 1."""
        image = self.mask_token + self.positional_embedding
        return self.final_layer(self.trunk(image, context, own, state), state.head, self.side)  # type: ignore[no-any-return]


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
