"""FlexTok: 256 ordered tokens from a ViT with registers, decoded by rectified flow in VAE latents.

Where things are: variants -> ``PRESETS``; trunk -> ``Encoder``; velocity network
-> ``Decoder``; blocks and positions -> ``blocks.py``; quantizer -> ``fsq.py``;
VAE -> ``vae.py``; encoding, truncation and the sampler -> ``codec.py``; released
names -> the parameter names here.

What is unusual:

- Registers see all patches and the registers before them, never the other way round. A prefix of the
  message is therefore what an encoder with fewer registers would send, and that is how it is computed.
- Positions behind the prefix are replaced by one learned token *without* position. They are identical
  and stay identical, so a single one stands for all n of them; its key gets the logit bias ln(n). The
  unconditional pass is P + 1 tokens, a prefix of k is P + k + 1.
- Modulations depend on the time alone: they are computed for all steps of a sampling run at once, for
  the whole batch and both passes.

Shape legend: ``B`` batch, ``C h w`` latents, ``D`` width, ``K`` registers of the model, ``P`` patches,
``d`` code dimension, ``T`` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from comit_bench.nn.dit import Modulation
from comit_bench.nn.fsq import FSQ
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import DEPTH, TOKENS, WIDTH, check_levels, check_ratio, check_sizes
from comit_bench.nn.vae import KLVae, KLVaeSpec
from comit_bench.tokenizers.flextok.blocks import (
    CausalBlock,
    ModulatedBlock,
    PatchEmbed,
    PositionTable,
    TableSpec,
    TimeEmbed,
    layer_norm,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkSpec:
    """Size of one transformer and its patches."""

    depth: int
    width: int
    head_dim: int = 64
    mlp_ratio: float = 4.0
    patch: tuple[int, int] = (2, 2)
    positions: TableSpec = field(default_factory=lambda: TableSpec(kind="grid", size=(16, 16)))

    def __post_init__(self) -> None:
        check_sizes(self, depth=DEPTH, width=WIDTH, head_dim=WIDTH)
        check_ratio(self.mlp_ratio)
        if self.width % self.head_dim:
            raise ValueError(
                f"a transformer of depth {self.depth} and width {self.width} with heads of {self.head_dim}: "
                "expected at least one block and a whole number of heads"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexTokSpec:
    """Everything that determines a FlexTok network. Defaults are those of the released configs."""

    encoder: TrunkSpec
    decoder: TrunkSpec
    registers: int = 256
    register_positions: int = 256
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    streams: int = 2
    time_features: int = 256
    max_timestep: float = 1000.0
    vae: KLVaeSpec = field(default_factory=lambda: KLVaeSpec(channels=16))

    def __post_init__(self) -> None:
        check_sizes(self, registers=TOKENS, register_positions=TOKENS, time_features=WIDTH)
        check_levels(self.fsq_levels)
        if self.streams not in (1, 2):
            raise ValueError(f"the decoder has 1 or 2 modulation streams, got {self.streams}")
        if not 1 <= self.registers <= self.register_positions:
            raise ValueError(f"{self.registers} registers with {self.register_positions} positions")
        if self.max_timestep <= 0 or self.time_features < 2:
            raise ValueError(
                f"max_timestep {self.max_timestep} and {self.time_features} time features: expected a "
                "positive number and at least 2"
            )

    @property
    def code_dim(self) -> int:
        return len(self.fsq_levels)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the largest latent the encoder's positions cover."""
        (rows, columns), (p, q) = self.encoder.positions.sides, self.encoder.patch
        return (rows * p, columns * q)

    @property
    def image_size(self) -> int:
        """Side of the images: the shorter side of what the positions cover, in pixels."""
        return min(self.latent_size) * self.vae.factor


def _preset(encoder: int, decoder: int) -> FlexTokSpec:
    return FlexTokSpec(
        encoder=TrunkSpec(depth=encoder, width=64 * encoder),
        decoder=TrunkSpec(depth=decoder, width=64 * decoder),
    )


PRESETS: dict[str, FlexTokSpec] = {
    "flextok-d12-d12": _preset(12, 12),
    "flextok-d18-d18": _preset(18, 18),
    "flextok-d18-d28": _preset(18, 28),
    "flextok-d18-d28-dfn": _preset(18, 28),
}


class _Registers(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(count, width))


class _Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)


class _MaskToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dropout_mask_token = nn.Parameter(torch.zeros(width))


class _NullToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.nullcond = nn.Parameter(torch.zeros(width))


class _Trunk(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class _VelocityHead(nn.Module):
    """Modulated LayerNorm and Linear back to patches."""

    def __init__(self, width: int, channels: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.adaLN_modulation = Modulation(width, 2)
        self.proj = nn.Linear(width, channels * patch[0] * patch[1])

    def forward(self, h: Tensor, modulation: Tensor, rows: int) -> Tensor:
        """[B, P, D] -> [B, C, h, w]; ``modulation`` [2, T, 1, D] is shift, scale."""
        y = self.proj(layer_norm(h) * (1 + modulation[1]) + modulation[0])
        p, q = self.patch
        out: Tensor = rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=q)
        return out


class Encoder(nn.Module):
    """Latents -> registers before quantization."""

    def __init__(self, spec: FlexTokSpec) -> None:
        super().__init__()
        self.spec = spec
        trunk, width = spec.encoder, spec.encoder.width
        blocks = [CausalBlock(width, trunk.head_dim, trunk.mlp_ratio) for _ in range(trunk.depth)]
        self.module_dict = nn.ModuleDict(
            {
                "enc_patch_emb": PatchEmbed(spec.vae.channels, width, trunk.patch),
                "enc_posemb_module": PositionTable(trunk.positions, width),
                "enc_register_module": _Registers(spec.registers, width),
                "enc_transformer": _Trunk(blocks),
                "enc_to_latents": _Projection(width, spec.code_dim),
            }
        )

    def sequence(self, latents: Tensor, tokens: int) -> Tensor:
        """[B, C, h, w] -> [B, P + tokens, D], the trunk's input."""
        if not 1 <= tokens <= self.spec.registers:
            raise ValueError(f"tokens must be 1..{self.spec.registers}, got {tokens}")
        names, (p, q) = self.module_dict, self.spec.encoder.patch
        rows, columns = latents.shape[-2] // p, latents.shape[-1] // q
        table = cast(PositionTable, names["enc_posemb_module"])
        patches = names["enc_patch_emb"](latents) + table.grid(rows, columns)
        registers = cast(_Registers, names["enc_register_module"]).registers[:tokens]
        return torch.cat([patches, registers.expand(latents.shape[0], -1, -1).to(patches.dtype)], dim=1)

    def trunk(self, h: Tensor, tokens: int, *, registers_only: bool = True) -> Tensor:
        """[B, P + tokens, D] -> [B, tokens, D], or all rows."""
        total = h.shape[1]
        patches = total - tokens
        mask = torch.ones(tokens, total, dtype=torch.bool, device=h.device).tril(patches)
        blocks = cast(_Trunk, self.module_dict["enc_transformer"]).blocks
        for index, block in enumerate(blocks):
            last = index == len(blocks) - 1
            h = block(h, patches, mask, registers_only=registers_only and last)
        return h

    def head(self, registers: Tensor) -> Tensor:
        """[B, tokens, D] -> [B, tokens, d]."""
        with full_precision(registers.device):
            h = layer_norm(registers.float())
            z: Tensor = cast(_Projection, self.module_dict["enc_to_latents"]).proj(h)
        return z

    def forward(self, latents: Tensor, tokens: int | None = None) -> Tensor:
        """[B, C, h, w] -> [B, tokens, d]; None is all registers."""
        count = self.spec.registers if tokens is None else tokens
        return self.head(self.trunk(self.sequence(latents, count), count))


@dataclass(frozen=True, slots=True)
class Condition:
    """Register tokens [B or 1, n, D] and what is added to the logits of their keys, [B or 1, n] or None."""

    tokens: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TimeStates:
    """Modulations of T times: per block [2, 6, T, 1, D], of the head [2, T, 1, D]."""

    blocks: list[Tensor]
    head: Tensor

    def at(self, index: int) -> TimeStates:
        """One of the times, for the whole batch."""
        one = slice(index, index + 1)
        return TimeStates([block[:, :, one] for block in self.blocks], self.head[:, one])


class Decoder(nn.Module):
    """The velocity network."""

    def __init__(self, spec: FlexTokSpec) -> None:
        super().__init__()
        self.spec = spec
        trunk, width, channels = spec.decoder, spec.decoder.width, spec.vae.channels
        line = TableSpec(kind="line", size=(spec.register_positions,))
        blocks = [
            ModulatedBlock(width, trunk.head_dim, trunk.mlp_ratio, spec.streams) for _ in range(trunk.depth)
        ]
        self.module_dict = nn.ModuleDict(
            {
                "dec_from_latents": _Projection(spec.code_dim, width),
                "dec_registers_posemb_module": PositionTable(line, width),
                "dec_nested_dropout": _MaskToken(width),
                "dec_latent_dropout": _NullToken(width),
                "dec_noise_patch_emb": PatchEmbed(channels, width, trunk.patch),
                "dec_patches_posemb_module": PositionTable(trunk.positions, width),
                "dec_time_embedder": TimeEmbed(width, spec.time_features, spec.max_timestep),
                "dec_transformer": _Trunk(blocks),
                "dec_to_patches": _VelocityHead(width, channels, trunk.patch),
            }
        )

    # ------------------------------------------------------------ conditions

    @property
    def mask_token(self) -> Tensor:
        return cast(_MaskToken, self.module_dict["dec_nested_dropout"]).dropout_mask_token

    @property
    def null_token(self) -> Tensor:
        return cast(_NullToken, self.module_dict["dec_latent_dropout"]).nullcond

    def registers(self, codes: Tensor) -> Tensor:
        """Codes [B, n, d] with their positions, [B, n, D]."""
        table = cast(PositionTable, self.module_dict["dec_registers_posemb_module"])
        projected = cast(_Projection, self.module_dict["dec_from_latents"]).proj(codes)
        return cast(Tensor, projected + table.line(codes.shape[1]))

    def _checked(self, codes: Tensor, keep: Sequence[int] | None) -> list[int]:
        given, total = codes.shape[1], self.spec.registers
        counts = [given] * codes.shape[0] if keep is None else [int(k) for k in keep]
        if given > total or len(counts) != codes.shape[0] or any(not 0 <= k <= given for k in counts):
            raise ValueError(
                f"keep {counts} with codes {list(codes.shape)}: expected one number per image, from 0 to "
                f"the {given} codes given, of which there are at most {total}"
            )
        return counts

    def condition(self, codes: Tensor, keep: Sequence[int] | None = None) -> Condition:
        """Registers for a prefix of the message; the masked positions become one token.

        Args:
            codes: [B, n, d], n at most K; positions from n on are masked.
            keep: Tokens kept per image, at most n each; None keeps all n.

        Raises:
            ValueError: ``keep`` does not fit the codes.
        """
        counts = self._checked(codes, keep)
        total, longest, shortest = self.spec.registers, max(counts), min(counts)
        r = self.registers(codes[:, :longest])
        if shortest == total:
            return Condition(r)
        mask = self.mask_token.to(r.dtype).expand(r.shape[0], 1, -1)
        left = torch.tensor([[float(total - k)] for k in counts], device=r.device)
        position = torch.arange(longest, device=r.device)
        kept = position < torch.tensor(counts, device=r.device).unsqueeze(1)
        bias = torch.zeros_like(kept, dtype=torch.float32).masked_fill(~kept, float("-inf"))
        if longest == shortest:  # one row serves the batch
            bias, left = bias[:1], left[:1]
        return Condition(torch.cat([r, mask], dim=1), torch.cat([bias, left.log()], dim=1))

    def null(self) -> Condition:
        """The unconditional pass: one token that stands for all K."""
        count = torch.full((1, 1), float(self.spec.registers), device=self.null_token.device)
        return Condition(self.null_token.view(1, 1, -1), count.log())

    # ------------------------------------------------------------------ time

    def time_vector(self, times: Tensor) -> Tensor:
        """[T] in (0, 1] -> [T, D]."""
        vector: Tensor = self.module_dict["dec_time_embedder"](times)
        return vector

    def time_states(self, times: Tensor) -> TimeStates:
        """Modulations of times [T]; index them with :meth:`TimeStates.at` unless T is the batch size."""
        vector = self.time_vector(times)
        head = cast(_VelocityHead, self.module_dict["dec_to_patches"])
        blocks = [block.modulation(vector) for block in self._blocks()]
        return TimeStates(blocks, head.adaLN_modulation(vector))

    def _blocks(self) -> list[ModulatedBlock]:
        trunk = cast(_Trunk, self.module_dict["dec_transformer"])
        return [block for block in trunk.blocks if isinstance(block, ModulatedBlock)]

    # --------------------------------------------------------------- forward

    def sequence(self, x: Tensor, condition: Condition) -> Tensor:
        """Noised latents [B, C, h, w] and registers -> [B, P + n, D], the trunk's input."""
        p, q = self.spec.decoder.patch
        table = cast(PositionTable, self.module_dict["dec_patches_posemb_module"])
        grid = table.grid(x.shape[-2] // p, x.shape[-1] // q)
        patches = self.module_dict["dec_noise_patch_emb"](x) + grid
        registers = condition.tokens.to(patches.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([patches, registers], dim=1)

    def trunk(
        self, h: Tensor, condition: Condition, state: TimeStates, *, patches_only: bool = True
    ) -> Tensor:
        """[B, P + n, D] -> [B, P, D], or all rows."""
        patches = h.shape[1] - condition.tokens.shape[1]
        bias = None
        if condition.bias is not None:
            ahead = condition.bias.new_zeros(condition.bias.shape[0], patches)
            bias = torch.cat([ahead, condition.bias], dim=1)[:, None, None].to(h.dtype)
        blocks = self._blocks()
        for index, (block, own) in enumerate(zip(blocks, state.blocks, strict=True)):
            last = index == len(blocks) - 1
            h = block(h, own, patches, bias, patches_only=patches_only and last)
        return h

    def forward(self, x: Tensor, condition: Condition, state: TimeStates) -> Tensor:
        """Velocity [B, C, h, w] at the state's time (or times, one per image)."""
        h = self.trunk(self.sequence(x, condition), condition, state)
        rows = x.shape[-2] // self.spec.decoder.patch[0]
        return cast(Tensor, self.module_dict["dec_to_patches"](h, state.head, rows))


class FlexTok(nn.Module):
    """Encoder, quantizer, decoder and VAE under the released top-level names."""

    def __init__(self, spec: FlexTokSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.regularizer = FSQ(spec.fsq_levels)
        self.vae = KLVae(spec.vae)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, zero_gates: bool = True) -> None:
        """Initialise, and the VAE, from an explicit CPU generator.

        Args:
            generator: CPU generator.
            zero_gates: Both heads and the modulations start at zero (for training). An untrained network
                then sends one constant message, so the untrained baseline draws them too.
        """
        zero = ("enc_to_latents.", "adaLN_modulation", "dec_to_patches.proj.")
        for module in (self.encoder, self.decoder):
            for part in module.modules():
                if isinstance(part, PositionTable):
                    part.init_weights(generator)
            for name, parameter in module.named_parameters():
                if name.endswith("posembs"):
                    continue
                gate = any(part in name for part in zero)
                if gate and zero_gates:
                    nn.init.zeros_(parameter)
                elif name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.5 if gate else 0.0, generator=generator)
                elif name.endswith("weight"):
                    nn.init.xavier_uniform_(parameter, generator=generator)
                else:
                    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=generator)
        self.vae.init_weights(generator)
