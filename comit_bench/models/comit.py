"""COMiT: communication-inspired tokenization. One transformer encodes and decodes.

Sections of ``spec/comit.md``: variants (a) -> ``PRESETS``; backbone (c) -> ``Predictor``; messages (d)
-> ``Comit.encode``; sampling (e) -> ``Comit.decode``. The cropping policies (b) are in ``crops.py`` and
are driven by ``comit_codec.py``.

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
from torch.nn import functional as F

from comit_bench.models.crops import CropGeometry
from comit_bench.models.fsq import FSQ

MaskMode = Literal["additive", "hard"]
Read = Literal["velocity", "message", "both"]
TIME_FEATURES = 256
TIMES_KEPT = 16  # at COMiT-XL about 10 MB each


@dataclass(frozen=True, kw_only=True, slots=True)
class ComitSpec:
    """Everything that determines a COMiT network. Defaults are those of the released configs.

    ``vae`` is ``sd-mse``, ``sd-ema``, ``none`` or ``stand-in``; ``image_size`` follows from it.
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
    # 32 px scenes, pixels as latents, 8 x 8 image tokens, 3 x 3 per local crop (design notes on scale)
    "comit-nano": ComitSpec(
        depth=4,
        width=96,
        heads=4,
        message_length=16,
        fsq_levels=(8, 5, 5, 5),
        patch_size=4,
        in_channels=3,
        out_channels=3,
        representation_layer=2,
        mask_mode="hard",
        vae="none",
        vae_factor=1,
        geometry=CropGeometry(crop=12, half=16),
    ),
}


def sincos_grid(side: int, width: int) -> Tensor:
    """Fixed 2D positions, float32 [1, side^2, width]: first half encodes the column, then the row."""
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D/2]
    column = line[None, :, :].expand(side, -1, -1)
    row = line[:, None, :].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch, flattened row-major."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, X, D]."""
        tokens: Tensor = rearrange(self.proj(x), "b d h w -> b (h w) d")
        return tokens


class TimeEmbed(nn.Module):
    """Cosine-first sinusoidal features of 1000 t, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        half = TIME_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")  # real even on the meta device
        frequencies = torch.exp(-math.log(10000.0) * steps / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        angle = 1000.0 * time.float()[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return embedded


class Modulation(nn.Sequential):
    """SiLU then a Linear to ``parts`` vectors per time; keys ``1.weight``, ``1.bias``."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, time_vector: Tensor) -> Tensor:
        """[T, D] -> [parts, T, 1, D]."""
        out: Tensor = self[1](self[0](time_vector))
        return rearrange(out, "t (p d) -> p t 1 d", p=self.parts)


@dataclass(frozen=True, slots=True)
class BlockState:
    """What one block derives from the time: image and message modulations, [6, T, 1, D] each.

    ``buffer_qkv`` [1, M, 3D] is set for the first block when there is one time for the batch.
    """

    image: Tensor
    message: Tensor
    buffer_qkv: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TimeState:
    """All modulations of one time (or of one per image)."""

    blocks: list[BlockState]
    final: Tensor  # [2, T, 1, D]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the token groups lie in the sequence, and which rows the last block must compute."""

    image: int
    message: int
    has_buffer: bool
    read: slice

    @property
    def total(self) -> int:
        return 1 + self.image + self.message * (1 + int(self.has_buffer))

    @property
    def conditioned(self) -> int:
        """Offset, image and message rows; the buffer follows."""
        return 1 + self.image + self.message


def split_groups(u: Tensor, rows: Rows, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cut rows that begin at sequence position ``start`` into offset, image and message+buffer."""
    a = max(1 - start, 0)
    b = max(1 + rows.image - start, 0)
    return u[:, :a], u[:, a:b], u[:, b:]


class Attention(nn.Module):
    """Multi-head attention with one packed projection; the bias or mask comes from outside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, h: Tensor, read: slice, extra_qkv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the read rows, keys and values of all rows, [B, H, ., D/H] each.

        ``extra_qkv`` [1, M, 3D] are ready-made rows that follow ``h`` in the sequence.
        """
        width = h.shape[-1]
        total = h.shape[1] + (0 if extra_qkv is None else extra_qkv.shape[1])
        if read == slice(0, total):
            qkv = self.qkv(h)
            if extra_qkv is not None:
                qkv = torch.cat([qkv, extra_qkv.expand(h.shape[0], -1, -1)], dim=1)
            q, k, v = rearrange(qkv, "b n (three h c) -> three b h n c", three=3, h=self.heads)
            return q, k, v
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(h[:, read], weight[:width], bias[:width])
        kv = F.linear(h, weight[width:], bias[width:])
        if extra_qkv is not None:  # first block is also the last one: all rows are at hand
            extra = extra_qkv.expand(h.shape[0], -1, -1)
            every_q = torch.cat([F.linear(h, weight[:width], bias[:width]), extra[..., :width]], dim=1)
            q, kv = every_q[:, read], torch.cat([kv, extra[..., width:]], dim=1)
        q = rearrange(q, "b n (h c) -> b h n c", h=self.heads)
        k, v = rearrange(kv, "b n (two h c) -> two b h n c", two=2, h=self.heads)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k / sqrt(D/H) + bias) v -> [B, rows, D]."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed: Tensor = self.proj(rearrange(out, "b h n c -> b n (h c)"))
        return mixed


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Pre-norm transformer block with one modulation for image rows and one for message rows."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.x_adaLN_modulation = Modulation(width, 6)
        self.r_adaLN_modulation = Modulation(width, 6)

    def shift_scale(self, u: Tensor, state: BlockState, part: int, rows: Rows, start: int) -> Tensor:
        """LayerNorm, then scale and shift every group by its own modulation."""
        offset, image, message = split_groups(self.norm(u), rows, start)
        (xs, xc), (rs, rc) = state.image[part : part + 2], state.message[part : part + 2]
        return torch.cat([offset, image * (1 + xc) + xs, message * (1 + rc) + rs], dim=1)

    def gate(self, u: Tensor, state: BlockState, part: int, rows: Rows, start: int) -> Tensor:
        """Scale a residual branch by its gate; the offset row has none."""
        offset, image, message = split_groups(u, rows, start)
        return torch.cat([offset, image * state.image[part], message * state.message[part]], dim=1)

    def forward(
        self,
        u: Tensor,
        state: BlockState,
        rows: Rows,
        read: slice,
        bias: Tensor | None,
        probe: AttentionProbe | None,
    ) -> Tensor:
        """[B, N, D] -> [B, read rows, D]."""
        # In the first block the buffer rows are the same for every image: their q, k, v are ready.
        shared = state.buffer_qkv
        h = u if shared is None else u[:, : rows.conditioned]
        q, k, v = self.attn.project(self.shift_scale(h, state, 0, rows, 0), read, shared)
        if probe is not None:
            probe.record(q, k, bias, rows)
        start = read.start
        u = u[:, read] + self.gate(self.attn.attend(q, k, v, bias), state, 2, rows, start)
        return u + self.gate(self.mlp(self.shift_scale(u, state, 3, rows, start)), state, 5, rows, start)


class AttentionProbe:
    """Asks one block for its attention logits; holds them after the call.

    Args:
        layer: Zero-based block.
        rows: ``message`` or ``all``; columns follow: image columns for ``message``, all for ``all``.
        softmax: Keep attention weights (softmax of logits and mask over *all* columns) instead of
            the logits before mask and softmax, which is what the released program returns.
    """

    def __init__(
        self, layer: int, rows: Literal["message", "all"] = "message", *, softmax: bool = False
    ) -> None:
        self.layer = layer
        self.rows = rows
        self.softmax = softmax
        self.maps: Tensor | None = None  # [B, H, M, X] or [B, H, N, N]

    def record(self, q: Tensor, k: Tensor, bias: Tensor | None, rows: Rows) -> None:
        """Compute the rows that were asked for, and only those. ``q`` and ``k`` hold all rows."""
        wanted = slice(0, rows.total)
        columns = wanted
        if self.rows == "message":
            wanted, columns = slice(1 + rows.image, rows.conditioned), slice(1, 1 + rows.image)
        q = q[:, :, wanted] * q.shape[-1] ** -0.5
        if not self.softmax:
            self.maps = q @ k[:, :, columns].transpose(-2, -1)
            return
        logits = q @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[wanted]
        self.maps = logits.softmax(dim=-1)[..., columns]


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
            return self.time_state(torch.tensor([time], device=device))
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())
        stamp = (weights, torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu"))
        if stamp != self._times_stamp:
            self._times.clear()
            self._times_stamp = stamp
        if time in self._times:
            self._times.move_to_end(time)
            return self._times[time]
        with torch.no_grad():
            state = self.time_state(torch.tensor([time], device=device))
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
            probe: Records attention of one block (which then computes all rows, even the last).
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
            asked = probe if probe is not None and probe.layer == index else None
            last = index == len(blocks) - 1 and asked is None and hidden_layer != index
            part = rows.read if last else slice(0, rows.total)
            if not needs_buffer and state.buffer_qkv is not None:
                state = BlockState(state.image, state.message)
            u = block(u, state, rows, part, self.mask(rows, mode, part, u), asked)
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
            message = self.r_final_layer(u[:, -length:])
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
