"""ALIT: adaptive length image tokenization by recurrent allocation of tokens (arXiv 2411.02393).

Where things are: variants -> ``PRESETS``; base tokenizers -> ``base_model.py``;
encoder -> ``Alit.iterate``; quantizer -> ``vq.py``; decoder and halting ->
``Alit.predict``, ``Alit.halt``, ``select_length``; released names -> the parameter names here.

What is unusual:

- One encoder runs T times with shared weights; every iteration appends K0 latents and re-encodes the old
  ones, so a short message is the message of an early iteration, never the beginning of a longer one.
- With a VQGAN base the released program *draws*, between iterations, which image tokens are replaced by a
  mask token ("halting"). The noise comes from outside; without halting nothing is random, and the
  distillation decoder is not needed for encoding.
- With a VAE base the released halting rule changes nothing, so there is none here.
- The last encoder block of the last iteration computes the latent rows only, the last decoder block the
  image rows only.

Shape legend: ``B`` batch, ``N`` = 256 image tokens, ``W`` width, ``H`` heads, ``K0`` latents per iteration,
``K`` = K0 (t + 1) latents at iteration t (from 0), ``T`` iterations, ``d`` code dimension, ``C`` base latent
channels, ``V`` base codebook size, ``O`` = V (VQGAN) or C (VAE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.attention import AttentionRequest, MapReceiver
from comit_bench.nn.precision import full_precision
from comit_bench.nn.sizes import CHANNELS, DEPTH, ENTRIES, HEADS, WIDTH, check_sizes
from comit_bench.nn.vit import EVERY_ROW, AttentionProbe, PlainBlock, grid_probe, run_blocks
from comit_bench.nn.vq import VectorQuantizer
from comit_bench.nn.vqgan import VqganSpec
from comit_bench.tokenizers.alit.base_model import Vae, VaeSpec, Vqgan, build_base

GRID = 16  # hard-coded in the released program
POSITIONS = 256  # latent positions of the distillation decoder, whatever T and K0 are


@dataclass(frozen=True, kw_only=True, slots=True)
class AlitSpec:
    """Everything that determines an ALIT network. Defaults are those of all released files.

    ``base`` is the 2D tokenizer; ``quantized`` is False for the continuous models, which keep the
    factorisation to ``code_dim`` but have no codebook; ``halting`` says whether the released program
    halts (``threshold`` is used with a VQGAN base only).
    """

    width: int
    layers: int
    heads: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    base: VqganSpec | VaeSpec
    quantized: bool = True
    codebook_size: int = 4096
    code_dim: int = 12
    l2_norm: bool = True
    first_tokens: int = 32
    iterations: int = 8
    image_size: int = 256
    patch_size: int = 16
    halting: bool = True
    threshold: float = 0.55

    def __post_init__(self) -> None:
        check_sizes(self, width=WIDTH, layers=DEPTH, heads=HEADS)
        check_sizes(self, decoder_width=WIDTH, decoder_layers=DEPTH, decoder_heads=HEADS)
        check_sizes(self, codebook_size=ENTRIES, code_dim=CHANNELS)
        if self.image_size != GRID * self.patch_size:
            raise ValueError(
                f"image size {self.image_size} over patch size {self.patch_size} must give a grid of "
                f"{GRID}: the grid is fixed in ALIT"
            )
        factor = 2 ** (len(self.base.multipliers) - 1)
        if factor != self.patch_size:
            raise ValueError(
                f"the base tokenizer shrinks by {factor}, but the patch size is {self.patch_size}"
            )
        for name, width, heads in (
            ("encoder", self.width, self.heads),
            ("decoder", self.decoder_width, self.decoder_heads),
        ):
            if width % heads:
                raise ValueError(f"{name} width {width} must be a multiple of its {heads} heads")
        if self.width <= self.base.latent_channels:
            raise ValueError(
                f"encoder width {self.width} must exceed the {self.base.latent_channels} base channels"
            )
        if min(self.first_tokens, self.iterations) < 1 or self.message_length > POSITIONS:
            raise ValueError(
                f"{self.iterations} iterations of {self.first_tokens} tokens: 1 to {POSITIONS} are possible"
            )

    @property
    def message_length(self) -> int:
        """Latent tokens after the last iteration."""
        return self.first_tokens * self.iterations


def _preset(width: int, layers: int, heads: int) -> AlitSpec:
    return AlitSpec(
        width=width,
        layers=layers,
        heads=heads,
        decoder_width=width,
        decoder_layers=layers,
        decoder_heads=heads,
        base=VqganSpec(),
    )


PRESETS: dict[str, AlitSpec] = {
    "alit-tiny": _preset(512, 8, 8),  # no weights were released
    "alit-small": _preset(1024, 8, 8),
    "alit-base": _preset(768, 12, 12),
    "alit-semilarge": _preset(1024, 16, 16),
}


def variant(preset: str, *, base: str = "vqgan", quantized: bool = True) -> AlitSpec:
    """A preset with another base tokenizer or without the codebook."""
    if base not in ("vqgan", "vae"):
        raise ValueError(f"base must be 'vqgan' or 'vae', got {base!r}")
    spec = replace(PRESETS[preset], quantized=quantized)
    return spec if base == "vqgan" else replace(spec, base=VaeSpec(), threshold=0.025)


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration leaves behind.

    Attributes:
        latents: [B, K, W], the latent rows of the encoder.
        prequant: [B, K, d], before quantization.
        codes: float32 [B, K, d], what enters the distillation decoder.
        ids: int64 [B, K], or None for a continuous model.
        entered: Input of the encoder [B, 1 + N + K, W].
        predicted: [B, N, O] when halting needed it, else None.
        halt_probability: [B, N] and ``dropped`` bool [B, N] when this iteration ended with halting.
    """

    latents: Tensor
    prequant: Tensor
    codes: Tensor
    ids: Tensor | None
    entered: Tensor
    predicted: Tensor | None = None
    halt_probability: Tensor | None = None
    dropped: Tensor | None = None


class Transformer(nn.Module):
    """A stack of blocks, keys ``transformer.{i}.…``; no norm before or after."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))

    def run(
        self, x: Tensor, *, read: slice = EVERY_ROW, shared: int = 0, probe: AttentionProbe | None = None
    ) -> Tensor:
        """[B, n, W] -> [B, read rows, W].

        Args:
            x: The sequence.
            read: Rows of the output that are wanted; the last block computes no others.
            shared: That many leading rows are equal for all images; the first block projects them once.
            probe: Records attention.
        """
        return run_blocks(self.transformer, x, read=read, shared=shared, probe=probe)


class DistillationDecoder(Transformer):
    """Codes -> predictions on the 2D grid; its class, mask and position tokens belong to :class:`Alit`."""

    def __init__(self, spec: AlitSpec, outputs: int) -> None:
        width = spec.decoder_width
        super().__init__(width, spec.decoder_layers, spec.decoder_heads)
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(POSITIONS, width))
        self.decoder_embed = nn.Linear(spec.code_dim, width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, outputs))

    def forward(self, queries: Tensor, codes: Tensor, probe: AttentionProbe | None = None) -> Tensor:
        """Queries [1, 1 + N, W] and codes [B, K, d] -> [B, N, O]."""
        latents = self.decoder_embed(codes) + self.latent_token_positional_embedding[: codes.shape[1]]
        x = torch.cat([queries.expand(codes.shape[0], -1, -1), latents], dim=1)
        edge = queries.shape[1]
        x = self.run(self.ln_pre(x), read=slice(1, edge), shared=edge, probe=probe)
        out: Tensor = self.ffn(self.ln_post(x))
        return out


class Base(nn.Module):
    """Holds the 2D tokenizer under its released name, ``vqgan`` or ``vae``."""

    def __init__(self, spec: VqganSpec | VaeSpec) -> None:
        super().__init__()
        self.kind = "vqgan" if isinstance(spec, VqganSpec) else "vae"
        self.add_module(self.kind, build_base(spec))

    @property
    def model(self) -> Vqgan | Vae:
        """The network itself."""
        network = getattr(self, self.kind)
        assert isinstance(network, Vqgan | Vae)
        return network


class Alit(nn.Module):
    """The whole tokenizer; parameter names are those of the released files."""

    def __init__(self, spec: AlitSpec) -> None:
        super().__init__()
        self.spec = spec
        width, inner, tokens = spec.width, spec.decoder_width, GRID * GRID
        self.encoder_positional_embedding = nn.Parameter(torch.zeros(tokens + 1, width))
        self.encoder_class_embedding = nn.Parameter(torch.zeros(1, width))
        self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_positional_embedding = nn.Parameter(torch.zeros(tokens + 1, inner))
        self.decoder_class_embedding = nn.Parameter(torch.zeros(1, inner))
        self.decoder_mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.latent_tokens = nn.Parameter(torch.zeros(spec.first_tokens, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(spec.first_tokens, width))
        self.timestep_embedding = nn.Parameter(torch.zeros(spec.iterations, spec.first_tokens, width))
        self.encoder_ln_pre, self.encoder_ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.encoder_ln_recursive = nn.LayerNorm(width)
        self.pre_quantizer_mlp = nn.Linear(width, spec.code_dim)
        channels = width - spec.base.latent_channels
        self.patch_embed = nn.Conv2d(3, channels, spec.patch_size, stride=spec.patch_size)
        self.encoder = Transformer(width, spec.layers, spec.heads)
        self.base_tokenizer = Base(spec.base)
        self.decoder = DistillationDecoder(spec, self.base.outputs)
        self.quantize: VectorQuantizer | None = None
        if spec.quantized:
            self.quantize = VectorQuantizer(spec.codebook_size, spec.code_dim, l2_norm=spec.l2_norm)

    @property
    def base(self) -> Vqgan | Vae:
        """The 2D tokenizer."""
        return self.base_tokenizer.model

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise, from an explicit CPU generator."""
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape)
            if "norm" in name or ".ln_" in name or "_ln_" in name:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("quantize.embedding.weight"):
                value.uniform_(-1 / value.shape[0], 1 / value.shape[0], generator=generator)
            elif name.endswith("bias"):
                value.zero_()
            elif name.endswith("in_proj_weight"):
                bound = math.sqrt(6 / (value.shape[0] + value.shape[1]))
                value.uniform_(-bound, bound, generator=generator)
            elif name.endswith("weight"):
                nn.init.trunc_normal_(value, std=0.02, generator=generator)
            else:
                value.normal_(generator=generator).mul_(value.shape[-1] ** -0.5)
            parameter.copy_(value)

    # ---------------------------------------------------------------- encoder

    def image_tokens(self, images: Tensor, features: Tensor) -> Tensor:
        """Images [B, 3, S, S] and base features [B, C, 16, 16] -> unit vectors [B, N, W]."""
        joined = torch.cat([features, self.patch_embed(images)], dim=1)
        return F.normalize(rearrange(joined, "b c h w -> b (h w) c"), dim=-1, eps=1e-12)

    def fresh_latents(self, t: int) -> Tensor:
        """The latents that iteration ``t`` appends, [K0, W]."""
        return self.latent_tokens + self.latent_token_positional_embedding + self.timestep_embedding[t]

    def codes_of(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latent rows [B, K, W] -> before quantization [B, K, d], codes [B, K, d] and ids [B, K] or None."""
        with full_precision(latents.device):
            prequant: Tensor = self.pre_quantizer_mlp(self.encoder_ln_post(latents.float()))
        return prequant, *self.quantized(prequant)

    def quantized(self, prequant: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, K, d] -> codes and ids; a continuous model returns what came and None."""
        if self.quantize is None:
            return prequant, None
        ids = self.quantize.ids(prequant)
        return self.quantize.codes(ids), ids

    def iterate(
        self,
        images: Tensor,
        *,
        iterations: int | None = None,
        features: Tensor | None = None,
        noise: Tensor | None = None,
        uniforms: Sequence[Tensor] | None = None,
    ) -> Iterator[Iteration]:
        """Encode; one :class:`Iteration` per iteration, computed when it is asked for.

        Args:
            images: [B, 3, S, S] in [0, 1].
            iterations: How many; None is all T. Later ones are not computed, and the last block of the
                last one leaves out the image rows.
            features: Base features [B, C, 16, 16], if they are known already.
            noise: [B, C, 16, 16] of the VAE's posterior; None takes its mean.
            uniforms: Halting noise in [0, 1), at least ``iterations - 1`` times [B, N]. None is no halting.
        """
        spec, base = self.spec, self.base
        count = spec.iterations if iterations is None else iterations
        if not 1 <= count <= spec.iterations:
            raise ValueError(f"iterations must be 1 to {spec.iterations}, got {count}")
        if images.shape[-2:] != (spec.image_size, spec.image_size):
            raise ValueError(f"ALIT takes images of side {spec.image_size}, got {list(images.shape)}")
        if uniforms is not None and not isinstance(base, Vqgan):
            raise ValueError("a VAE base has no halting")
        if uniforms is not None and len(uniforms) < count - 1:
            raise ValueError(f"halting between {count} iterations needs {count - 1} noise tensors")
        if features is None:
            features = base.encode(images, noise)
        wanted = base.indices(features) if uniforms is not None and isinstance(base, Vqgan) else None
        return self._iterate(self.image_tokens(images, features), count, uniforms, wanted)

    def _iterate(
        self, tokens: Tensor, count: int, uniforms: Sequence[Tensor] | None, wanted: Tensor | None
    ) -> Iterator[Iteration]:
        batch, edge = tokens.shape[0], 1 + tokens.shape[1]
        first = self.encoder_class_embedding.expand(batch, 1, -1)
        x = torch.cat([first, tokens], dim=1) + self.encoder_positional_embedding
        x = self.encoder_ln_pre(torch.cat([x, self.fresh_latents(0).expand(batch, -1, -1)], dim=1))
        for t in range(count):
            entered = x
            last = t + 1 == count
            x = self.encoder.run(x, read=slice(edge, x.shape[1]) if last else EVERY_ROW)
            latents = x if last else x[:, edge:]
            step = Iteration(latents, *self.codes_of(latents), entered)
            if not last:
                if uniforms is not None and wanted is not None:
                    step = self.halt(step, wanted, uniforms[t])
                    assert step.dropped is not None
                    x = torch.cat([x[:, :1], self.masked(x[:, 1:edge], step.dropped), x[:, edge:]], dim=1)
                x = torch.cat([x, self.fresh_latents(t + 1).expand(batch, -1, -1)], dim=1)
                x = self.encoder_ln_recursive(x)
            yield step

    def halt(self, step: Iteration, wanted: Tensor, uniform: Tensor) -> Iteration:
        """Decide which image tokens the decoder already knows (VQGAN base).

        Args:
            step: The iteration that has just been computed.
            wanted: Base codebook index of every image token, [B, N].
            uniform: Noise in [0, 1), [B, N].

        Returns:
            The step with ``predicted``, ``halt_probability`` and ``dropped``.
        """
        predicted = self.predict(step.codes)
        logits = predicted.float()
        probability = (logits.gather(-1, wanted[..., None])[..., 0] - logits.logsumexp(dim=-1)).exp()
        dropped = (uniform < probability) & (probability >= self.spec.threshold)
        return replace(step, predicted=predicted, halt_probability=probability, dropped=dropped)

    def masked(self, tokens: Tensor, dropped: Tensor) -> Tensor:
        """Replace the dropped image rows [B, N, W] by the mask token and their position."""
        mask = self.encoder_mask_token[0] + self.encoder_positional_embedding[1:]
        return torch.where(dropped[..., None], mask.to(tokens.dtype), tokens)

    # ---------------------------------------------------------------- decoder

    def predict(self, codes: Tensor, probe: AttentionProbe | None = None) -> Tensor:
        """Codes [B, K, d] -> predictions on the grid [B, N, O]; ``probe`` records attention."""
        masks = self.decoder_mask_token[0].expand(GRID * GRID, -1)
        queries = torch.cat([self.decoder_class_embedding, masks]) + self.decoder_positional_embedding
        out: Tensor = self.decoder(queries[None], codes, probe)
        return out

    def grid_code(self, predicted: Tensor) -> Tensor:
        """Predictions [B, N, O] -> the 2D code [B, N, C] that the base decoder renders."""
        return self.base.mix(predicted)

    def render(self, code: Tensor) -> Tensor:
        """2D code [B, N, C] -> [B, 3, S, S] in the scale of the input, not clamped."""
        return self.base.decode(rearrange(code, "b (h w) c -> b c h w", h=GRID))

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes [B, K, d] of one iteration -> [B, 3, S, S], not clamped. Deterministic."""
        return self.render(self.grid_code(self.predict(codes)))

    def attention(self, codes: Tensor, request: AttentionRequest, receive: MapReceiver) -> None:
        """Maps [B, H, K, 16, 16] of codes [B, K, d]; see :func:`~comit_bench.nn.vit.grid_probe`."""
        depth, tokens = self.spec.decoder_layers, codes.shape[1]
        self.predict(codes, grid_probe(request, receive, depth=depth, side=GRID, tokens=tokens))


def select_length(
    steps: Iterator[Iteration],
    reconstruct: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    threshold: float = 0.07,
    per_image: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """The first iteration whose mean absolute error falls below a threshold, else the best one.

    Args:
        steps: From :meth:`Alit.iterate`; no further step is asked for once every image has its length.
        reconstruct: Codes -> images.
        images: [B, 3, S, S] in [0, 1].
        threshold: Of the mean absolute difference of pixels; the released demos use 0.05.
        per_image: False is the released program's rule for batches: one error, the mean over the batch.

    Returns:
        The chosen iterations, int64 [B] from 0, and the errors [B] of every iteration that was computed.
    """
    errors: list[Tensor] = []
    for step in steps:
        error = (reconstruct(step.codes) - images).abs().mean(dim=(1, 2, 3))
        errors.append(error if per_image else error.mean().expand_as(error))
        if bool((torch.stack(errors) < threshold).any(dim=0).all()):
            break
    stacked = torch.stack(errors)
    below = stacked < threshold
    chosen = torch.where(below.any(dim=0), below.int().argmax(dim=0), stacked.argmin(dim=0))
    return chosen, errors
