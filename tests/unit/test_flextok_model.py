"""FlexTok's networks: sizes and keys of the release, and every shortcut against the plain form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flextok_plain import plain_condition, plain_null
from torch import Tensor
from torch.nn import functional as F

from comit_bench.nn.vae import KLVaeSpec
from comit_bench.tokenizers.flextok.blocks import PositionTable, TableSpec, layer_norm, mlp_hidden
from comit_bench.tokenizers.flextok.codec import Sampling, encode, encode_latents, sample, to_uint8
from comit_bench.tokenizers.flextok.model import PRESETS, FlexTok, FlexTokSpec, TrunkSpec
from comit_bench.tokenizers.registry import tokenizers

GRID = TableSpec(kind="grid", size=(2, 2))
SMALL = FlexTokSpec(
    encoder=TrunkSpec(depth=3, width=32, head_dim=16, positions=GRID),
    decoder=TrunkSpec(depth=3, width=48, head_dim=16, positions=GRID),
    registers=8,
    register_positions=8,
    vae=KLVaeSpec(channels=4, widths=(8, 8, 8, 8), layers=1, groups=4, scale=0.7),
)
K, P = 8, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(spec: FlexTokSpec = SMALL, *, zero_gates: bool = False) -> FlexTok:
    model = FlexTok(spec)
    model.init_weights(torch.Generator().manual_seed(0), zero_gates=zero_gates)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> FlexTok:
    return make()


@pytest.fixture(scope="module")
def codes(model: FlexTok) -> Tensor:
    return encode_latents(model, rand(4, 4, 4, 4)).codes


# --------------------------------------------------------------------- the release


def on_meta(name: str) -> FlexTok:
    with torch.device("meta"):
        return FlexTok(PRESETS[name])


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "total"),
    [
        ("flextok-d12-d12", 85.4, 172.4, 342),
        ("flextok-d18-d18", 287.3, 578.6, 950),
        ("flextok-d18-d28", 287.3, 2169.7, 2541),
        ("flextok-d18-d28-dfn", 287.3, 2169.7, 2541),
    ],
)
def test_published_sizes(name: str, encoder: float, decoder: float, total: float) -> None:
    model, entry = on_meta(name), tokenizers()[name].preset
    assert millions(model.encoder) == pytest.approx(encoder, abs=0.05)
    assert millions(model.decoder) == pytest.approx(decoder, abs=0.05)
    assert millions(model.vae) == pytest.approx(83.8, abs=0.05)
    assert millions(model) == pytest.approx(total, abs=0.5)
    assert entry.parameters == pytest.approx(millions(model.encoder) + millions(model.decoder), abs=0.005)
    assert (entry.message_length, entry.vocab_size) == (256, 64000)
    assert (model.spec.registers, model.regularizer.vocab_size, model.spec.image_size) == (256, 64000, 256)


def test_presets_and_registry_name_the_same_models() -> None:
    assert set(PRESETS) == {entry.name for entry in tokenizers().values() if entry.family.name == "flextok"}


def _linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def _conv(name: str, out: int, inputs: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs, side, side), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, inputs: int, out: int) -> dict[str, tuple[int, ...]]:
    keys = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", out, inputs, 3)
    keys |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out, 3)
    return keys | (_conv(f"{name}.conv_shortcut", out, inputs, 1) if inputs != out else {})


def _mid(name: str, width: int) -> dict[str, tuple[int, ...]]:
    keys = _resnet(f"{name}.resnets.0", width, width) | _resnet(f"{name}.resnets.1", width, width)
    keys |= _norm(f"{name}.attentions.0.group_norm", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        keys |= _linear(f"{name}.attentions.0.{part}", width, width)
    return keys


def vae_table(channels: int = 16) -> dict[str, tuple[int, ...]]:
    widths, e, d = (128, 256, 512, 512), "vae.vae.encoder", "vae.vae.decoder"
    keys = _conv(f"{e}.conv_in", 128, 3, 3) | _conv(f"{d}.conv_in", 512, channels, 3)
    before = 128
    for b, width in enumerate(widths):
        for n in range(2):
            keys |= _resnet(f"{e}.down_blocks.{b}.resnets.{n}", before if n == 0 else width, width)
        if b < 3:
            keys |= _conv(f"{e}.down_blocks.{b}.downsamplers.0.conv", width, width, 3)
        before = width
    for b, width in enumerate(reversed(widths)):
        for n in range(3):
            keys |= _resnet(f"{d}.up_blocks.{b}.resnets.{n}", before if n == 0 else width, width)
        if b < 3:
            keys |= _conv(f"{d}.up_blocks.{b}.upsamplers.0.conv", width, width, 3)
        before = width
    keys |= _mid(f"{e}.mid_block", 512) | _mid(f"{d}.mid_block", 512)
    keys |= _norm(f"{e}.conv_norm_out", 512) | _conv(f"{e}.conv_out", 2 * channels, 512, 3)
    keys |= _norm(f"{d}.conv_norm_out", 128) | _conv(f"{d}.conv_out", 3, 128, 3)
    keys |= _conv("vae.vae.quant_conv", 2 * channels, 2 * channels, 1)
    return keys | _conv("vae.vae.post_quant_conv", channels, channels, 1)


def key_table(enc_depth: int, dec_depth: int) -> dict[str, tuple[int, ...]]:
    """Section (f2) of the specification, expanded."""
    e, d = "encoder.module_dict.", "decoder.module_dict."
    de, dd, c = 64 * enc_depth, 64 * dec_depth, 16
    hidden = {768: 2048, 1152: 3072, 1792: 4778}
    keys: dict[str, tuple[int, ...]] = {
        f"{e}enc_posemb_module.posembs": (1, de, 16, 16),
        f"{e}enc_register_module.registers": (256, de),
        f"{d}dec_registers_posemb_module.posembs": (1, 1, dd, 256),
        f"{d}dec_nested_dropout.dropout_mask_token": (dd,),
        f"{d}dec_latent_dropout.nullcond": (dd,),
        f"{d}dec_patches_posemb_module.posembs": (1, dd, 16, 16),
    }
    keys |= _linear(f"{e}enc_patch_emb.patch_proj", de, 4 * c) | _linear(f"{e}enc_to_latents.proj", 6, de)
    keys |= _linear(f"{d}dec_from_latents.proj", dd, 6)
    keys |= _linear(f"{d}dec_noise_patch_emb.patch_proj", dd, 4 * c)
    keys |= _linear(f"{d}dec_time_embedder.mlp.0", dd, 256) | _linear(f"{d}dec_time_embedder.mlp.2", dd, dd)
    keys |= _linear(f"{d}dec_to_patches.adaLN_modulation.1", 2 * dd, dd)
    keys |= _linear(f"{d}dec_to_patches.proj", 4 * c, dd)
    for prefix, depth, width in (
        (f"{e}enc_transformer", enc_depth, de),
        (f"{d}dec_transformer", dec_depth, dd),
    ):
        for i in range(depth):
            block = f"{prefix}.blocks.{i}"
            keys |= {f"{block}.attn.{part}.weight": (width, width) for part in ("wq", "wk", "wv", "proj")}
            keys |= {f"{block}.mlp.{part}.weight": (hidden[width], width) for part in ("fc1", "fc3")}
            keys[f"{block}.mlp.fc2.weight"] = (width, hidden[width])
            if prefix.startswith(d):
                keys |= _linear(f"{block}.adaLN_modulation.1", 12 * width, width)
    return keys | vae_table()


@pytest.mark.parametrize("name", list(PRESETS))
def test_key_contract(name: str) -> None:
    enc, dec = (int(part[1:]) for part in name.split("-")[1:3])
    assert {k: tuple(v.shape) for k, v in on_meta(name).state_dict().items()} == key_table(enc, dec)


# ----------------------------------------------------------------------- the encoder


def plain_encoder(model: FlexTok, latents: Tensor) -> Tensor:
    """The trunk with one mask over all rows, every row computed; returns the registers' z."""
    encoder = model.encoder
    h = encoder.sequence(latents, K)
    n = torch.arange(P + K)
    visible = (n[None, :] < P) | ((n[None, :] <= n[:, None]) & (n[:, None] >= P))
    for block in encoder.module_dict["enc_transformer"].blocks:
        attn, x = block.attn, layer_norm(h)
        q, k, v = (
            w(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for w in (attn.wq, attn.wk, attn.wv)
        )
        logits = layer_norm(q) @ layer_norm(k).transpose(-1, -2) * 8 / attn.head_dim
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        h = h + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        y = layer_norm(h)
        h = h + block.mlp.fc2(F.silu(block.mlp.fc1(y)) * block.mlp.fc3(y))
    return encoder.module_dict["enc_to_latents"].proj(layer_norm(h[:, P:]))


def test_encoder_equals_the_masked_form(model: FlexTok) -> None:
    latents = rand(3, 4, 4, 4)
    want = plain_encoder(model, latents)
    torch.testing.assert_close(model.encoder(latents), want, atol=1e-5, rtol=0)
    for tokens in range(1, K + 1):
        torch.testing.assert_close(model.encoder(latents, tokens), want[:, :tokens], atol=1e-5, rtol=0)


def test_messages_tell_images_apart(model: FlexTok) -> None:
    ids = encode(model, rand(6, 3, 32, 32)).ids
    assert ids.shape == (6, K) and len(ids.unique(dim=0)) == 6
    assert torch.equal(model.regularizer.ids(model.regularizer.codes(ids)), ids)


def test_training_start_sends_one_message() -> None:
    start = make(zero_gates=True)
    done = encode_latents(start, rand(4, 4, 4, 4))
    assert len(done.ids.unique(dim=0)) == 1 and done.prequant.abs().max() == 0
    state = start.decoder.time_states(torch.ones(1)).at(0)
    assert start.decoder(rand(2, 4, 4, 4), start.decoder.null(), state).abs().max() == 0


@pytest.mark.parametrize("tokens", [0, 9])
def test_prefix_must_fit(model: FlexTok, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        model.encoder(rand(1, 4, 4, 4), tokens)


def test_posterior_noise_is_scaled_by_its_deviation(model: FlexTok) -> None:
    images, noise = rand(2, 3, 32, 32), rand(2, 4, 4, 4, seed=1)
    mean, logvar = model.vae.posterior(images)
    want = 0.7 * (mean + (logvar / 2).exp() * noise)
    torch.testing.assert_close(model.vae.encode(images, noise), want)
    torch.testing.assert_close(model.vae.encode(images), 0.7 * mean)


# ----------------------------------------------------------------------- the decoder


def velocities(model: FlexTok, x: Tensor, condition: Any, t: float = 0.6) -> Tensor:
    decoder = model.decoder
    state = decoder.time_states(torch.tensor([t])).at(0)
    h = decoder.trunk(decoder.sequence(x, condition), condition, state, patches_only=False)
    return decoder.module_dict["dec_to_patches"](h[:, :P], state.head, 2)


@pytest.mark.parametrize("keep", [[8] * 4, [3] * 4, [0] * 4, [1, 3, 6, 8], [0, 8, 2, 2], [7, 7, 7, 8], None])
def test_masked_registers_collapse_to_one(model: FlexTok, codes: Tensor, keep: list[int] | None) -> None:
    x, decoder = rand(4, 4, 4, 4, seed=2), model.decoder
    state = decoder.time_states(torch.tensor([0.6])).at(0)
    short, plain = decoder.condition(codes, keep), plain_condition(decoder, codes, keep)
    assert plain.tokens.shape[1] == K and plain.bias is None
    longest = max(keep or [K])
    assert short.tokens.shape[1] == (K if keep in (None, [8] * 4) else longest + 1)
    torch.testing.assert_close(decoder(x, short, state), velocities(model, x, plain), atol=1e-5, rtol=0)


def test_a_short_message_is_a_truncated_one(model: FlexTok, codes: Tensor) -> None:
    decoder = model.decoder
    cut, kept = decoder.condition(codes[:, :3]), decoder.condition(codes, [3] * 4)
    assert torch.equal(cut.tokens, kept.tokens)
    assert cut.bias is not None and kept.bias is not None and torch.equal(cut.bias, kept.bias)
    want = velocities(model, rand(4, 4, 4, 4), plain_condition(decoder, codes, [3] * 4))
    torch.testing.assert_close(
        want, velocities(model, rand(4, 4, 4, 4), plain_condition(decoder, codes[:, :3])), atol=0, rtol=0
    )


def test_null_registers_collapse_to_one(model: FlexTok) -> None:
    x, decoder = rand(4, 4, 4, 4, seed=2), model.decoder
    assert decoder.null().tokens.shape == (1, 1, 48)
    state = decoder.time_states(torch.tensor([0.6])).at(0)
    want = velocities(model, x, plain_null(decoder))
    torch.testing.assert_close(decoder(x, decoder.null(), state), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep", [[9, 1, 1, 1], [-1, 1, 1, 1], [1, 1]])
def test_wrong_keep_is_refused(model: FlexTok, codes: Tensor, keep: list[int]) -> None:
    with pytest.raises(ValueError, match="keep"):
        model.decoder.condition(codes, keep)


def test_one_time_per_image(model: FlexTok, codes: Tensor) -> None:
    x, times = rand(4, 4, 4, 4), torch.tensor([0.1, 0.4, 0.7, 1.0])
    decoder, given = model.decoder, model.decoder.condition(codes)
    together = decoder(x, given, decoder.time_states(times))
    apart = [
        decoder(x[i : i + 1], decoder.condition(codes[i : i + 1]), decoder.time_states(times).at(i))
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)


def test_one_modulation_for_both_groups() -> None:
    shared = make(replace(SMALL, streams=1))
    block = shared.decoder.module_dict["dec_transformer"].blocks[0]
    assert block.adaLN_modulation[1].weight.shape == (6 * 48, 48)
    state = block.modulation(rand(2, 48))
    assert state.shape == (2, 6, 2, 1, 48) and torch.equal(state[0], state[1])
    codes = encode_latents(shared, rand(1, 4, 4, 4)).codes
    assert sample(shared.decoder, codes, rand(1, 4, 4, 4)).isfinite().all()


# ----------------------------------------------------------------------- the sampler


def calls(model: FlexTok, sampling: Sampling, codes: Tensor) -> int:
    seen: list[int] = []
    hook = model.decoder.register_forward_hook(lambda *_: seen.append(1))
    try:
        sample(model.decoder, codes, rand(4, 4, 4, 4), sampling=sampling)
    finally:
        hook.remove()
    return len(seen)


def test_guidance_of_one_skips_the_unconditional_pass(model: FlexTok, codes: Tensor) -> None:
    assert calls(model, Sampling(steps=3, guidance=1.0), codes) == 3
    assert calls(model, Sampling(steps=3, guidance=1), codes) == 3
    assert calls(model, Sampling(steps=3, guidance=2.0), codes) == 6
    assert calls(model, Sampling(steps=3, guidance=lambda t: 1.0), codes) == 6


@pytest.mark.parametrize("projected", [True, False])
def test_guidance_may_depend_on_time(model: FlexTok, codes: Tensor, projected: bool) -> None:
    noise, times = rand(4, 4, 4, 4), []

    def weight(t: float) -> float:
        times.append(t)
        return 5.0 * t

    settings = Sampling(steps=4, guidance=weight, projected=projected)
    got = sample(model.decoder, codes, noise, sampling=settings)
    assert times == [1.0, 0.75, 0.5, 0.25]
    rows = []
    for row in range(4):  # the equations of section (e2), one image at a time
        x, m = noise[row : row + 1], torch.zeros(())
        for i in range(4, 0, -1):
            t = i / 4
            v = velocities(model, x, plain_condition(model.decoder, codes[row : row + 1]), t)
            u = velocities(model, x, plain_null(model.decoder), t)
            g = 5.0 * t
            if projected:
                m = (v - u) - 0.5 * m
                d = m * min(1.0, 2.5 / float(m.norm()))
                n = v / v.norm()
                v = v + (g - 1) * (d - (d * n).sum() * n)
            else:
                v = u + g * (v - u)
            x = x - v / 4
        rows.append(x)
    torch.testing.assert_close(got, torch.cat(rows), atol=1e-4, rtol=0)
    constant = sample(
        model.decoder, codes, noise, sampling=Sampling(steps=4, guidance=lambda t: 3.0, projected=projected)
    )
    same = sample(model.decoder, codes, noise, sampling=Sampling(steps=4, guidance=3.0, projected=projected))
    assert torch.equal(constant, same) and not torch.allclose(constant, got)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 25, 50])
def test_every_step_has_its_time(model: FlexTok, codes: Tensor, steps: int) -> None:
    seen: list[int] = []

    def observe(step: int, x: Tensor, conditional: Tensor, unconditional: Tensor | None) -> None:
        assert unconditional is None
        seen.append(step)

    settings = Sampling(steps=steps, guidance=1.0)
    sample(model.decoder, codes[:1], rand(1, 4, 4, 4), sampling=settings, observe=observe)
    assert seen == list(range(steps))
    with pytest.raises(ValueError, match="at least 1"):
        Sampling(steps=0)


def test_max_timestep_scales_the_arguments() -> None:
    slow, fast = make(), make(replace(SMALL, max_timestep=1.0))
    fast.load_state_dict(slow.state_dict())
    want = slow.decoder.time_vector(torch.tensor([500.0]))
    torch.testing.assert_close(fast.decoder.time_vector(torch.tensor([0.5])), want, atol=1e-4, rtol=0)


def test_uint8_is_the_nearest_level() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 2 * 100.6 / 255 - 1])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 101]


# --------------------------------------------------------------------- positions, sizes


def table(kind: Any, size: tuple[int, ...], *, interpolate: bool = False) -> PositionTable:
    made = PositionTable(TableSpec(kind=kind, size=size, interpolate=interpolate), 8).requires_grad_(False)
    made.posembs.copy_(rand(*made.posembs.shape))
    return made


def test_grids_are_cropped_from_the_top_left() -> None:
    grid, line = table("grid", (4, 3)), table("sum", (4,))
    assert torch.equal(grid.grid(2, 3), grid.posembs[0, :, :2, :3].flatten(1).T)
    cell = line.grid(2, 3)[1 * 3 + 2]
    assert torch.equal(cell, line.posembs[0, 0, :, 1] + line.posembs[1, 0, :, 2])
    product = table("prod", (4,))
    want = product.posembs[0, 0, :, 1] * product.posembs[1, 0, :, 2]
    assert torch.equal(product.grid(2, 3)[5], want)
    for made, size in ((grid, (5, 2)), (grid, (2, 4)), (line, (5, 1)), (product, (1, 5))):
        with pytest.raises(ValueError, match="larger than"):
            made.grid(*size)
    with pytest.raises(ValueError, match="4 positions"):
        table("line", (4,)).line(5)


@pytest.mark.parametrize("kind", ["grid", "sum", "prod"])
@pytest.mark.parametrize("size", [(6, 5), (3, 2), (4, 4)])
def test_interpolated_tables_are_stretched_as_a_whole(kind: Any, size: tuple[int, int]) -> None:
    made = table(kind, (4, 4) if kind == "grid" else (4,), interpolate=True)
    whole = replace(made.spec, interpolate=False)
    plain = PositionTable(whole, 8).requires_grad_(False)
    plain.posembs.copy_(made.posembs)
    full = plain.grid(4, 4).T.reshape(1, 8, 4, 4)
    want = F.interpolate(full, size=size, mode="bilinear", align_corners=True)[0].flatten(1).T
    torch.testing.assert_close(made.grid(*size), want)


def test_fixed_positions_are_sines_of_rows_then_columns() -> None:
    grid = PositionTable(TableSpec(kind="grid", size=(5, 5)), 12).requires_grad_(False)
    grid.init_weights(torch.Generator())
    w = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    want = torch.cat([(3 * w).sin(), (3 * w).cos(), (2 * w).sin(), (2 * w).cos()])
    torch.testing.assert_close(grid.posembs[0, :, 3, 2].double(), want, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="stored"):
        PositionTable(TableSpec(kind="grid", size=(5, 4)), 12).init_weights(torch.Generator())


def test_other_latent_sizes(model: FlexTok) -> None:
    assert model.encoder(rand(1, 4, 2, 4)).shape == (1, K, 6)
    codes = encode_latents(model, rand(1, 4, 2, 4)).codes
    assert sample(model.decoder, codes, rand(1, 4, 4, 2)).shape == (1, 4, 4, 2)
    with pytest.raises(ValueError, match="larger than"):
        model.encoder(rand(1, 4, 6, 4))
    with pytest.raises(ValueError, match="patches of 2 x 2"):
        model.encoder(rand(1, 4, 3, 4))


def test_sizes() -> None:
    assert [mlp_hidden(d, 4.0) for d in (768, 1152, 1792)] == [2048, 3072, 4778]
    for bad in (
        lambda: TrunkSpec(depth=0, width=64),
        lambda: TrunkSpec(depth=1, width=65),
        lambda: replace(SMALL, streams=3),
        lambda: replace(SMALL, registers=9),
        lambda: replace(SMALL, max_timestep=0.0),
        lambda: TableSpec(kind="grid", size=(4,)),
        lambda: TableSpec(kind="round", size=(4,)),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError):
            bad()
