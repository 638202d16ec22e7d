"""COMiT: communication-inspired tokenization. One transformer encodes and decodes.

Sections of the specification: variants (a) -> ``PRESETS``; backbone (c) -> ``Predictor``, its blocks in
``comit_blocks.py``; quantizer (d) -> ``fsq.py``; cropping policies (b), messages (d) and sampling (e) ->
``comit_codec.py`` with ``crops.py`` and ``flow.py``; released names (f) -> the parameter names here.

What is unusual:

- The causal mask of the buffer is *added* to the logits as 0/1 in the released program, so nothing is
  masked (``mask_mode="additive"``). ``"hard"`` is the mask of the paper's text; then decoding can drop
  the buffer altogether, exactly.
- Image tokens and message+buffer tokens have their own modulations; the offset token has none.
- The message is read from the *buffer* rows, the velocity from the image rows, so the last block
  computes only those rows.
- Modulations depend on the time alone, and so do the buffer's queries, keys and values in the first
  block: both are computed once per time and kept (``TimeState``) while the weights stay the same.

Shape legend: ``B`` batch, ``D`` width, ``H`` heads, ``M`` message length, ``d`` code dimension,
``X`` image tokens, ``N`` = 1 + X + 2M (order: offset, image, message, buffer), ``T`` = 1 or B times.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from comit_bench.nn.dit import PatchEmbed, sincos_grid
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
from comit_bench.tokenizers.comit.blocks import (
    AttentionProbe,
    Block,
    BlockRunner,
    BlockState,
    FinalLayer,
    Rows,
    TimeEmbed,
    TimeState,
)
from comit_bench.tokenizers.comit.crops import CropGeometry

MaskMode = Literal["additive", "hard"]
Read = Literal["velocity", "message", "both"]
TIMES_KEPT = 16  # at COMiT-XL about 10 MB each


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


@dataclass(frozen=True, slots=True)
class Condition:
    """Embedded message [B or 1, M, D] and offset [B, 1, D]: the same for every solver step."""

    message: Tensor
    offset: Tensor


@dataclass(frozen=True, slots=True)
class Prediction:
    """Output of one backbone call; parts that were not asked for are None."""

    velocity: Tensor | None = None  # [B, C, h, w]
    message: Tensor | None = None  # [B, M, d] before quantization
    hidden: tuple[Tensor, Tensor] | None = None  # image [B, X, D] and message [B, M, D] tokens


class Predictor(nn.Module):
    """The backbone (released class ``RuledDiT``); parameter names are those of the released files."""

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
        self.t_embedder = TimeEmbed(width)
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.final_layer = FinalLayer(width, spec.out_channels * spec.patch_size**2, modulated=True)
        self.r_final_layer = FinalLayer(width, spec.code_dim, modulated=False)
        self.c_final_layer = FinalLayer(width, 2, modulated=False)  # in the files, never used
        self.runner: BlockRunner | None = None  # how training calls a block; set by train/scaling.py
        self._times: OrderedDict[float, TimeState] = OrderedDict()
        self._times_stamp: tuple[object, ...] = ()
        self._masks: dict[tuple[object, ...], Tensor] = {}

    @staticmethod
    def _embedder(inputs: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, zero_gates: bool = True) -> None:
        """Initialise as the spec's section (c) says, from an explicit generator.

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

    # ------------------------------------------------------------------ time

    def time_state(self, time: Tensor) -> TimeState:
        """Modulations for times [T], T = 1 or the batch size; not cached."""
        vector = self.t_embedder(time)
        states = [
            BlockState(b.x_adaLN_modulation(vector), b.r_adaLN_modulation(vector)) for b in self._blocks()
        ]
        if time.shape[0] == 1:
            first, block = states[0], self._blocks()[0]
            h = block.norm(self.buffer_tokens())
            h = h * (1 + first.message[1]) + first.message[0]
            states[0] = BlockState(first.image, first.message, block.attn.qkv(h))
        return TimeState(states, self.final_layer.adaLN_modulation(vector))

    def state_at(self, time: float, device: torch.device) -> TimeState:
        """Modulations for one time, kept for the next call as long as no weight changes."""
        if torch.is_grad_enabled():
            return self.time_state(torch.full((1,), time, device=device))
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())
        stamp = (weights, torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu"))
        if stamp != self._times_stamp:
            self._times.clear()
            self._times_stamp = stamp
        if time in self._times:
            self._times.move_to_end(time)
            return self._times[time]
        with torch.no_grad():
            state = self.time_state(torch.full((1,), time, device=device))
        self._times[time] = state
        while len(self._times) > TIMES_KEPT:
            self._times.popitem(last=False)
        return state

    def forget_times(self) -> None:
        """Drop what is kept per time. Needed after a fused optimizer step, which leaves no trace."""
        self._times.clear()

    def _blocks(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]

    # ---------------------------------------------------------------- tokens

    def image_tokens(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, X, D] with the top-left part of the position grid."""
        side = self.spec.max_input_size // self.spec.patch_size
        rows, columns = (n // self.spec.patch_size for n in latents.shape[-2:])
        grid = self.pos_embed.view(1, side, side, -1)[:, :rows, :columns].flatten(1, 2)
        tokens: Tensor = self.x_embedder(latents) + grid
        return tokens

    def condition(self, message: Tensor, offset: Tensor) -> Condition:
        """Embed codes [B, M, d] (or [1, 1, d], one code for all) and offsets [B, 2]."""
        embedded = self.r_embedder(message) + self.r_pos_embed
        place = self.c_embedder(offset)[:, None] + self.c_pos_embed
        return Condition(embedded, place)

    def buffer_tokens(self) -> Tensor:
        """[1, M, D]; they do not depend on the input."""
        return self.r_to_token + self.r_to_pos_embed

    def mask(self, rows: Rows, mode: MaskMode, read: slice, like: Tensor) -> Tensor | None:
        """The bias on the attention logits for the rows that are computed, [rows, N]; built once."""
        if not rows.has_buffer:
            if mode == "additive":
                raise ValueError("additive masks need the buffer tokens")
            return None
        key = (rows.image, mode, read.start, read.stop, like.device, like.dtype)
        if key not in self._masks:
            total, edge = rows.total, rows.conditioned
            allowed = torch.zeros(total, total, dtype=torch.bool)
            allowed[:, :edge] = True
            allowed[edge:, edge:] = torch.ones(total - edge, total - edge, dtype=torch.bool).tril()
            bias = allowed.float() if mode == "additive" else torch.zeros(total, total)
            if mode == "hard":
                bias = bias.masked_fill(~allowed, float("-inf"))
            with torch.inference_mode(False):  # kept for later calls, which may be training
                self._masks[key] = torch.empty(bias[read].shape, device=like.device, dtype=like.dtype)
                self._masks[key].copy_(bias[read])
        return self._masks[key]

    # --------------------------------------------------------------- forward

    def forward(
        self,
        latents: Tensor,
        condition: Condition,
        time: TimeState,
        *,
        read: Read,
        mask_mode: MaskMode | None = None,
        probe: AttentionProbe | None = None,
        hidden_layer: int | None = None,
    ) -> Prediction:
        """One call of the backbone.

        Args:
            latents: [B, C, h, w], h = w, multiples of the patch size.
            condition: From :meth:`condition`.
            time: From :meth:`time_state` or :meth:`state_at`.
            read: Which heads are wanted; the others are not computed.
            mask_mode: Overrides the spec's.
            probe: Records attention of some blocks (which then compute all rows, even the last).
            hidden_layer: Zero-based block after which image and message tokens are returned.
        """
        mode = mask_mode or self.spec.mask_mode
        x = self.image_tokens(latents)
        batch, length = x.shape[0], self.spec.message_length
        needs_buffer = read != "velocity" or mode == "additive" or (probe is not None and probe.rows == "all")
        rows = self._rows(x.shape[1], needs_buffer, read)
        u = torch.cat([condition.offset, x, condition.message.expand(batch, -1, -1)], dim=1)
        if needs_buffer:
            u = torch.cat([u, self.buffer_tokens().expand(batch, -1, -1)], dim=1)
        hidden = None
        blocks = self._blocks()
        for index, (block, state) in enumerate(zip(blocks, time.blocks, strict=True)):
            asked = None if probe is None else probe.at(index)
            last = index == len(blocks) - 1 and asked is None and hidden_layer != index
            part = rows.read if last else slice(0, rows.total)
            if not needs_buffer and state.buffer_qkv is not None:
                state = BlockState(state.image, state.message)
            bias = self.mask(rows, mode, part, u)
            if self.runner is None or asked is not None or not self.training:
                u = block(u, state, rows, part, bias, asked)
            else:
                u = self.runner(block, u, state, rows, part, bias)
            if index == hidden_layer:
                hidden = (u[:, 1 : 1 + rows.image], u[:, 1 + rows.image : rows.conditioned])
        if u.shape[1] == rows.total:
            u = u[:, rows.read]
        velocity = message = None
        if read != "message":
            start = 1 if read == "both" else 0
            patches = self.final_layer(u[:, start : start + rows.image], time.final)
            velocity = self.unpatchify(patches, latents.shape[-2], latents.shape[-1])
        if read != "velocity":
            with full_precision(u.device):  # a flipped rounding is a flipped token
                message = self.r_final_layer(u[:, -length:].float())
        return Prediction(velocity, message, hidden)

    def _rows(self, image: int, has_buffer: bool, read: Read) -> Rows:
        length = self.spec.message_length
        edge = 1 + image + length
        total = edge + (length if has_buffer else 0)
        chosen = {"velocity": slice(1, 1 + image), "message": slice(edge, total), "both": slice(0, total)}
        return Rows(image, length, has_buffer, chosen[read])

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """[B, X, P*P*C] -> [B, C, h, w]; feature index = (p*P + q)*C + channel."""
        p = self.spec.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, w=width // p, p=p, q=p)


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

    def prior(self, batch: int, device: torch.device) -> Tensor:
        """The empty message: codes [B, M, d] of id vocabulary // 2 everywhere."""
        ids = torch.full((batch, self.spec.message_length), self.quantizer.prior_id, device=device)
        return self.quantizer.codes(ids)
