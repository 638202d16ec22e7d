"""SelfTok's networks: sizes and keys of the release, and every shortcut against the plain form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from selftok_sizes import LATENTS, RENDERER, SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.dit import ScalarEmbed
from comit_bench.nn.vq import most_similar
from comit_bench.tokenizers.registry import tokenizers
from comit_bench.tokenizers.selftok.codec import (
    decode_latents,
    encode,
    encode_latents,
    render,
    sample,
    time_grid,
    to_uint8,
    visible_counts,
)
from comit_bench.tokenizers.selftok.fast import FastSelftok
from comit_bench.tokenizers.selftok.model import (
    PRESETS,
    DecoderSpec,
    EncoderSpec,
    Schedule,
    Selftok,
    SelftokSpec,
    central_crop,
    context_table,
    token_positions,
    variant,
)

FLOAT = 2e-5


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(spec: SelftokSpec) -> Selftok:
    """Every parameter drawn, so that every path matters."""
    model = Selftok(spec).requires_grad_(False).eval()
    g = torch.Generator().manual_seed(0)
    model.init_weights(g, zero_gates=False)
    for name, value in model.own_state().items():
        if name.endswith(("bias", "pos_embed", "positional_embedding", "norm3.weight", "token", "tokens")):
            value.add_(0.3 * torch.randn(value.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def diffusion() -> Selftok:
    return make(replace(SMALL, vae=None))


@pytest.fixture(scope="module")
def renderer() -> Selftok:
    return make(replace(RENDERER, vae=None))


# --------------------------------------------------------------------- the release


def on_meta(name: str, decoder: str = "diffusion") -> Selftok:
    with torch.device("meta"):
        return Selftok(variant(name, decoder))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def _mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return _linear(f"{name}.fc1", 4 * width, width) | _linear(f"{name}.fc2", width, 4 * width)


def _embedder(name: str, width: int, inputs: int = 256) -> dict[str, tuple[int, ...]]:
    return _linear(f"{name}.mlp.0", width, inputs) | _linear(f"{name}.mlp.2", width, width)


def key_table(k: int, decoder: str) -> dict[str, tuple[int, ...]]:
    """Keys of a released file that are read."""
    keys: dict[str, tuple[int, ...]] = {
        "encoder.pos_embed": (1, 4096, 64),
        "encoder.query_tokens": (1, k, 512),
        "encoder.x_embedder.proj.weight": (64, 16, 2, 2),
        "encoder.x_embedder.proj.bias": (64,),
        "encoder.final_layer_norm3.weight": (16,),
        "encoder.final_layer_norm3.bias": (16,),
        "encoder.quantizer._codebook.embed": (1, 32768, 16),
        "model.context_pos_embed": (1, k, 1536),
    }
    keys |= _linear("encoder.quantizer.project_in", 16, 512)
    for i in range(16):
        b = f"encoder.blocks.{i}"
        keys |= _linear(f"{b}.attn.qkv", 192, 64) | _linear(f"{b}.attn.proj", 64, 64)
        keys |= _linear(f"{b}.attn.to_query_kv", 1024, 64) | _linear(f"{b}.attn.query_linear", 1536, 512)
        keys |= _linear(f"{b}.attn.query_proj", 512, 512) | _mlp(f"{b}.mlp", 64) | _mlp(f"{b}.q_mlp", 512)
        keys |= _linear(f"{b}.adaLN_modulation.1", 3072, 512) | _embedder(f"{b}.t_embedder", 512)
    if decoder == "renderer":
        keys |= {"model.mask_token": (1, 1, 1536), "model.positional_embedding": (256, 1536)}
    else:
        keys |= {"model.x_embedder.proj.weight": (1536, 16, 2, 2), "model.x_embedder.proj.bias": (1536,)}
        keys["model.pos_embed"] = (1, 36864, 1536)
    keys |= _embedder("model.t_embedder", 1536) | _linear("model.context_embedder", 1536, 16)
    for i in range(24):
        for stream in ("context_block", "x_block"):
            b, last = f"model.joint_blocks.{i}.{stream}", stream == "context_block" and i == 23
            keys |= _linear(f"{b}.attn.qkv", 4608, 1536)
            keys |= _linear(f"{b}.adaLN_modulation.1", 3072 if last else 9216, 1536)
            if not last:
                keys |= _linear(f"{b}.attn.proj", 1536, 1536) | _mlp(f"{b}.mlp", 1536)
                keys |= {} if stream == "x_block" else _embedder(f"{b}.t_embedder", 1536)
    keys |= _linear("model.final_layer.adaLN_modulation.1", 3072, 1536)
    return keys | _linear("model.final_layer.linear", 64, 1536)


def ignored_table(k: int, decoder: str) -> dict[str, tuple[int, ...]]:
    """Keys that are in the released files and never read."""
    book = "encoder.quantizer._codebook"
    keys: dict[str, tuple[int, ...]] = {
        f"diffusion.{part}": (100,)
        for part in ("timestep_map", "scheduled_t", "scheduled_t_prev", "one_minus_scheduled_t")
    }
    for part, width in (("final_layer_norm", 512), ("final_layer_norm2", 16)):
        keys |= {f"encoder.{part}.weight": (width,), f"encoder.{part}.bias": (width,)}
    keys |= {f"encoder.quantizer.{part}": (1,) for part in ("continuous", "steps")}
    keys |= {f"{book}.{part}": (1,) for part in ("initted", "tpc_initted")}
    keys |= {f"{book}.{part}": (1, 32768) for part in ("cluster_size", "cluster_size_wo_react")}
    keys |= {f"{book}.embed_avg": (1, 32768, 16), f"{book}.timestep_p_over_c": (1, k, 32768)}
    keys |= {"encoder.quantizer.count": (1, 32768)}
    keys |= _embedder("model.y_embedder", 1536, 16)
    keys |= _embedder("model.joint_blocks.23.context_block.t_embedder", 1536)
    return keys | ({"model.pos_embed": (1, 36864, 1536)} if decoder == "renderer" else {})


@pytest.mark.parametrize("decoder", ["diffusion", "renderer"])
@pytest.mark.parametrize("k", [512, 1024])
def test_key_contract_and_published_sizes(k: int, decoder: str) -> None:
    from comit_bench.tokenizers.selftok.config import used

    model, ignored = on_meta(f"selftok-{k}", decoder), ignored_table(k, decoder)
    found = {key: tuple(value.shape) for key, value in model.own_state().items()}
    assert found == key_table(k, decoder)
    every = found | ignored
    assert len(every) == len(found) + len(ignored) == 998
    numbers = {
        part: sum(key.startswith(part) for key in every) for part in ("diffusion.", "encoder.", "model.")
    }
    assert list(numbers.values()) == [4, 406, 588]
    assert (
        used({key: torch.empty(shape, device="meta") for key, shape in every.items()}).keys() == found.keys()
    )
    unread = {"encoder": 2 * (512 + 16), "model": 2 * 1536**2 + (256 + 16) * 1536 + 4 * 1536}  # parameters
    assert sum(torch.Size(s).numel() for n, s in ignored.items() if ".final_layer" in n) == unread["encoder"]
    encoder, network = count(model.encoder) + unread["encoder"], count(model.model) + unread["model"]
    assert round(encoder / 1e6, 2) == {512: 84.33, 1024: 84.59}[k]
    assert round(network / 1e6, 2) == {"diffusion": 2085.07, "renderer": 2085.37}[decoder]
    assert model.vae is not None and round(count(model.vae) / 1e6, 2) == 83.82
    entry = tokenizers()[f"selftok-{k}"].preset
    if decoder == "diffusion":
        assert entry.parameters == pytest.approx(round(encoder / 1e6, 2) + round(network / 1e6, 2), abs=1e-6)
    assert (entry.message_length, entry.vocab_size) == (k, 32768)
    spec = model.spec
    assert (spec.tokens, spec.vocab_size, spec.image_size, spec.code_dim) == (k, 32768, 256, 16)


def test_presets_and_registry_name_the_same_models() -> None:
    assert set(PRESETS) == {entry.name for entry in tokenizers().values() if entry.family.name == "selftok"}


# --------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("size", [(8, 8), (4, 6)])
def test_encoder_equals_its_equations(diffusion: Selftok, size: tuple[int, int]) -> None:
    latents = rand(3, 16, *size)
    done = encode_latents(diffusion, latents)
    want = diffusion.encoder(latents)
    torch.testing.assert_close(done.queries, want, atol=FLOAT, rtol=0)
    network = FastSelftok(diffusion)
    for _ in range(2):  # what the first call keeps changes nothing in the second
        again = encode_latents(diffusion, latents, network)
        assert torch.equal(again.queries, done.queries) and torch.equal(again.ids, done.ids)
    state = diffusion.state_dict()
    z = want @ state["encoder.quantizer.project_in.weight"].T + state["encoder.quantizer.project_in.bias"]
    table = state["encoder.quantizer._codebook.embed"][0]
    similarity = (z / z.norm(dim=-1, keepdim=True)) @ table.T
    top = similarity.topk(2, dim=-1).values
    sure = top[..., 0] - top[..., 1] > 1e-4
    assert torch.equal(done.ids[sure], similarity.argmax(-1)[sure]) and sure.float().mean() > 0.9
    rows = table[done.ids]
    gain, bias = state["encoder.final_layer_norm3.weight"], state["encoder.final_layer_norm3.bias"]
    codes = F.layer_norm(rows, (16,), gain, bias, eps=1e-6)
    torch.testing.assert_close(done.codes, codes, atol=1e-6, rtol=0)


def test_codebook_is_used_as_stored_and_searched_in_chunks() -> None:
    table = rand(50, 8) * torch.linspace(0.2, 3, 50)[:, None]
    z = rand(33, 8, seed=1)
    want = (z @ table.T).argmax(1)
    assert not torch.equal(want, (z @ F.normalize(table, dim=1).T).argmax(1))
    for entries in (1, 50, 200, 1 << 20):
        assert torch.equal(most_similar(z, table, entries=entries), want)
    assert most_similar(z[:0], table).shape == (0,)


def test_projected_codes() -> None:
    model = make(replace(SMALL, vae=None, output_dim=24))
    assert "encoder.quantizer.project_out.weight" in model.own_state()
    done = encode_latents(model, rand(2, 16, 8, 8))
    assert done.codes.shape == (2, SMALL.tokens, 24) and done.prequant.shape[-1] == 16
    assert sample(model, done.codes, rand(2, 16, 8, 8), schedule=LATENTS, steps=1).isfinite().all()


def test_positions() -> None:
    assert token_positions(512, torch.device("cpu"))[[0, 1, 511]].tolist() == [1000, 1008, 5088]
    table = torch.arange(25.0).view(1, 25, 1)
    assert central_crop(table, 2, 3).flatten().tolist() == [6, 7, 8, 11, 12, 13]  # floor of (5 - 2) / 2
    with pytest.raises(ValueError, match="6 x 2 patches"):
        central_crop(table, 6, 2)
    context = context_table(3, 8).double()
    w = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(
        context[0, 2], torch.cat([(1016 * w).sin(), (1016 * w).cos()]), atol=1e-6, rtol=0
    )
    embed = ScalarEmbed(8)
    seen: list[Tensor] = []
    embed.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embed(torch.tensor([9184.0]))
    f = torch.exp((-9.210340371976184 * torch.arange(128, dtype=torch.float32)) / 128)
    assert torch.equal(seen[0][0], torch.cat([(9184.0 * f).cos(), (9184.0 * f).sin()]))


def test_fixed_tables_have_columns_before_rows() -> None:
    model = Selftok(replace(SMALL, vae=None))
    model.init_weights(torch.Generator().manual_seed(0))
    grid, width = SMALL.encoder.grid, SMALL.encoder.width
    w = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    want = torch.cat([(3 * w).sin(), (3 * w).cos(), (2 * w).sin(), (2 * w).cos()])
    cell = model.encoder.pos_embed[0, 2 * grid + 3].double()
    torch.testing.assert_close(cell, want, atol=1e-6, rtol=0)


# -------------------------------------------------------------------- the decoders


@pytest.mark.parametrize("visible", [1, 5, 12])
@pytest.mark.parametrize("size", [(8, 8), (4, 6)])
def test_a_cut_context_equals_a_masked_one(diffusion: Selftok, visible: int, size: tuple[int, int]) -> None:
    decoder, codes, x = diffusion.model, rand(3, 12, 16), rand(3, 16, *size, seed=1)
    t, network = torch.tensor([0.62]), FastSelftok(diffusion)
    got = network.decode(x, decoder.context(codes)[:, :visible], network.time_states(t))
    want = decoder(x, codes, t, visible)
    torch.testing.assert_close(got, want, atol=FLOAT, rtol=0)
    changed = codes.clone()
    changed[:, visible:] = 7.0
    torch.testing.assert_close(decoder(x, changed, t, visible), want, atol=1e-6, rtol=0)


def test_a_time_per_image(diffusion: Selftok) -> None:
    decoder, codes, x = diffusion.model, rand(2, 12, 16), rand(2, 16, 8, 8, seed=1)
    times, network = torch.tensor([0.9, 0.2]), FastSelftok(diffusion)
    both = network.decode(x, decoder.context(codes), network.time_states(times))
    torch.testing.assert_close(both, decoder(x, codes, times), atol=FLOAT, rtol=0)
    for row in range(2):
        one = network.time_states(times).at(row)
        alone = network.decode(x[row : row + 1], decoder.context(codes[row : row + 1]), one)
        torch.testing.assert_close(both[row : row + 1], alone, atol=FLOAT, rtol=0)


def test_context_may_be_blind_to_the_image() -> None:
    blind = make(replace(SMALL, vae=None, sees_image=False))
    decoder, codes, x, t = blind.model, rand(2, 12, 16), rand(2, 16, 8, 8), torch.tensor([0.5])
    network = FastSelftok(blind)
    got = network.decode(x, decoder.context(codes), network.time_states(t))
    torch.testing.assert_close(got, decoder(x, codes, t), atol=FLOAT, rtol=0)
    seeing = make(replace(SMALL, vae=None))
    assert not torch.allclose(seeing.model(x, codes, t), got, atol=1e-3)


@pytest.mark.parametrize("sees_image", [None, True])
@pytest.mark.parametrize("positional", [False, True])
def test_renderer_equals_its_equations(positional: bool, sees_image: bool | None) -> None:
    model = make(replace(RENDERER, vae=None, positional_mask=positional, sees_image=sees_image))
    codes = rand(3, 12, 16)
    assert model.model.mask_token.shape[1] == (16 if positional else 1)
    got, network = render(model, codes), FastSelftok(model)
    torch.testing.assert_close(got, model.model(None, codes, torch.ones(1)), atol=FLOAT, rtol=0)
    assert all(torch.equal(render(model, codes, network), got) for _ in range(2))


PINNED = {  # of an implementation that read the state dict only and shared no line with this one
    ("diffusion", None, 5): [0.69801086, 0.55308402, -2.14826679, -0.67057920],
    ("diffusion", None, 12): [0.69768089, 0.52247792, -2.21286249, -0.52704024],
    ("diffusion", False, 5): [0.72247183, 0.54089630, -2.15734386, -0.71847105],
    ("renderer", None, 12): [1.17036319, -0.15857956, -0.22755483, 0.81129009],
}


@pytest.mark.parametrize(("kind", "sees_image", "visible"), PINNED)
def test_decoders_keep_their_numbers(kind: str, sees_image: bool | None, visible: int) -> None:
    renders = kind == "renderer"
    decoder = make(replace(RENDERER if renders else SMALL, vae=None, sees_image=sees_image)).model
    time = torch.ones(1) if renders else torch.tensor([0.62])
    out = decoder(None if renders else rand(3, 16, 8, 8, seed=1), rand(3, 12, 16), time, visible)
    pinned = torch.tensor(PINNED[kind, sees_image, visible])
    torch.testing.assert_close(out[1, ::5, 3, 4], pinned, atol=FLOAT, rtol=0)


def test_sampler_equals_its_equations_and_never_encodes(diffusion: Selftok) -> None:
    codes, noise, steps = rand(2, 12, 16), rand(2, 16, 8, 8, seed=1), 7
    calls: list[str] = []
    hooks = [
        diffusion.encoder.register_forward_hook(lambda *_: calls.append("encoder")),
        diffusion.model.context_embedder.register_forward_hook(lambda *_: calls.append("context")),
        diffusion.model.t_embedder.register_forward_hook(lambda *_: calls.append("time")),
        diffusion.encoder.x_embedder.register_forward_hook(lambda *_: calls.append("encoder")),
        diffusion.model.x_embedder.register_forward_hook(lambda *_: calls.append("velocity")),
    ]
    seen: list[tuple[int, int]] = []
    got = sample(
        diffusion,
        codes,
        noise,
        schedule=LATENTS,
        steps=steps,
        observe=lambda step, visible, x, velocity: seen.append((step, visible)),
    )
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["context", "time", *["velocity"] * steps]
    grid = time_grid(steps)
    counts = visible_counts(grid[:-1], LATENTS, 12)
    assert seen == list(enumerate(counts)) and counts[0] == 12 and len(set(counts)) > 3
    x = noise
    for i, visible in enumerate(counts):
        x = x - (grid[i] - grid[i + 1]) * diffusion.model(x, codes, grid[i : i + 1], visible)
    torch.testing.assert_close(got, x, atol=FLOAT, rtol=0)
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(0)


# -------------------------------------------------------------------- the schedule

VISIBLE = [
    512, 511, 509, 508, 506, 505, 503, 501, 500, 498, 497, 492, 487, 482, 477, 473, 468, 463, 458, 453, 449,
    441, 434, 427, 420, 413, 405, 398, 391, 384, 376, 358, 339, 321, 303, 284, 266, 248, 229, 211, 192, 172,
    154, 135, 116, 96, 77, 58, 39, 20,
]  # fmt: skip


def test_released_schedule() -> None:
    grid = time_grid(50)
    assert grid.dtype == torch.float32 and (grid[0], grid[50]) == (1, 0)
    t = (1000 * grid[:-1]).to(torch.int64)
    dropped = {27: 459, 30: 399, 32: 359, 35: 299, 40: 199, 41: 179, 45: 99}
    assert t.tolist() == [dropped.get(i, 1000 - 20 * i) for i in range(50)]
    assert visible_counts(grid[:-1], Schedule(), 512) == VISIBLE
    assert PRESETS["selftok-512"].schedule == Schedule() and PRESETS["selftok-1024"].schedule is None


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 64, 200])
def test_grid_is_rounded_once(steps: int) -> None:
    import struct
    from fractions import Fraction

    def f32(value: Fraction) -> Fraction:
        """Nearest float32, through the double that holds these values exactly."""
        assert Fraction(float(value)) == value
        return Fraction(struct.unpack("f", struct.pack("f", float(value)))[0])

    delta = Fraction(struct.unpack("f", struct.pack("f", -1 / steps))[0])
    want = [
        f32(1 + i * delta) if i < (steps + 1) // 2 else f32(-(steps - i) * delta) for i in range(steps + 1)
    ]
    assert [Fraction(s) for s in time_grid(steps).tolist()] == want


def test_other_schedules() -> None:
    times = torch.tensor([1.0, 0.9995, 0.5, 0.4999, 0.0])
    assert visible_counts(times, Schedule(ends=(500, 1000), counts=(4, 2)), 6) == [6, 6, 5, 4, 1]
    assert visible_counts(times, Schedule(ends=(1000,), counts=(6,)), 6) == [6, 6, 4, 3, 1]
    bad: list[dict[str, Any]] = [
        {"ends": (500,), "counts": (1, 2)},
        {"ends": (500, 400), "counts": (1, 2)},
        {"ends": (), "counts": ()},
        {"ends": (0, 5), "counts": (1, 2)},
        {"ends": (500,), "counts": (-1,)},
    ]
    for wrong in bad:
        with pytest.raises(ValueError, match="rising ends"):
            Schedule(**wrong)


# ------------------------------------------------------------------ pixels, sizes


def test_pixels() -> None:
    model = make(SMALL)
    images = rand(2, 3, 64, 64).clamp(-1, 1)
    assert model.vae is not None
    mode = model.vae.vae.encode(images).latent_dist.mode()
    latents = (mode - 0.0609) * 1.5305
    torch.testing.assert_close(model.vae.encode(images), latents, atol=1e-6, rtol=0)
    assert torch.equal(encode(model, images).ids, encode_latents(model, model.vae.encode(images)).ids)
    shown = model.vae.vae.decode(latents / 1.5305 + 0.0609).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(model, latents), (shown + 1) / 2, atol=1e-6, rtol=0)
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0, 100.6 / 255])).tolist() == [0, 128, 255, 101]
    bare = Selftok(replace(SMALL, vae=None))
    for call in (lambda: encode(bare, images), lambda: decode_latents(bare, latents)):
        with pytest.raises(ValueError, match="no VAE"):
            call()


def test_half_precision_vae_is_the_released_arithmetic() -> None:
    model = make(SMALL)
    assert model.vae is not None
    images, latents = rand(1, 3, 64, 64).clamp(-1, 1), rand(1, 16, 8, 8)
    model.vae.set_dtype(torch.bfloat16)
    mode = model.vae.vae.encode(images.bfloat16()).latent_dist.mode()
    assert torch.equal(model.vae.encode(images), (mode - 0.0609) * 1.5305)
    shown = model.vae.vae.decode((latents / 1.5305 + 0.0609).bfloat16()).sample.clamp(-1, 1)
    assert torch.equal(decode_latents(model, latents), (shown.float() + 1) / 2)


def test_wrong_sizes(diffusion: Selftok, renderer: Selftok) -> None:
    with pytest.raises(ValueError, match="patches of 2 x 2"):
        encode_latents(diffusion, rand(1, 16, 7, 8))
    with pytest.raises(ValueError, match="position table"):
        encode_latents(diffusion, rand(1, 16, 8, 64))
    assert render(renderer, rand(1, 12, 16)).shape == (1, 16, 8, 8)
    for bad in (
        lambda: EncoderSpec(width=10, heads=4),
        lambda: DecoderSpec(depth=0),
        lambda: replace(SMALL, kind="other"),  # type: ignore[arg-type]
        lambda: replace(SMALL, image_size=40),
    ):
        with pytest.raises(ValueError):
            bad()
