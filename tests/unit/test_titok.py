"""TiTok: the spec's sizes and keys, its oddities against plain formulas, and the adapter's contract."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from comit_bench.nn.vit import PlainBlock, run_blocks
from comit_bench.nn.vq import VectorQuantizer, nearest
from comit_bench.nn.vqgan import VqganBlock, VqganDecoder, VqganSpec
from comit_bench.tokenizers.base import Tokenizer, Tokens
from comit_bench.tokenizers.checkpoints import on_meta
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import builtin
from comit_bench.tokenizers.titok.adapter import (
    TitokTokenizer,
    config_from_spec,
    save,
    spec_from_config,
)
from comit_bench.tokenizers.titok.model import PRESETS, Titok, TitokSpec, VitSize

CASE = Path(__file__).parents[1] / "parity" / "cases" / "titok" / "pixel_vq_k6"
SMALL = VitSize(width=32, layers=2, heads=2)
LEGACY = TitokSpec(
    encoder=SMALL,
    decoder=VitSize(width=48, layers=2, heads=3),
    message_length=6,  # does not divide 32: the re-reading crosses rows
    vocab_size=500,
    code_dim=5,
    image_size=16,
    encoder_patch=4,
    decoder_patch=4,
    pixels=VqganSpec(hidden=32, multipliers=(1, 2, 2), blocks=1, latent_channels=8, codebook_size=1024),
)
PIXEL = replace(LEGACY, pixels=None, l2_norm=False, encoder_patch=8, decoder_patch=8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(spec: TitokSpec) -> Titok:
    """An untrained network in which no bias and no norm is trivial."""
    model = Titok(spec).eval().requires_grad_(False)
    model.init_weights(generator(), spread=True)
    noise = generator(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    return model


def images(count: int, side: int = 16) -> Tensor:
    """Quarters of different colours, and noise."""
    colours = torch.rand(count, 3, 2, 2, generator=generator(5)).repeat_interleave(side - side // 2, -1)
    plain = colours.repeat_interleave(side - side // 2, -2)[..., :side, :side]
    noise = 0.2 * torch.rand(count, 3, side, side, generator=generator(6))
    return (255 * (0.8 * plain + noise)).to(torch.uint8)


@pytest.fixture(params=[LEGACY, PIXEL], ids=["legacy", "pixel"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(network(request.param), tmp_path / "ck")
    return tmp_path / "ck"


@pytest.fixture
def tokenizer(checkpoint: Path) -> TitokTokenizer:
    loaded = load_tokenizer(str(checkpoint), device="cpu")
    assert isinstance(loaded, TitokTokenizer) and isinstance(loaded, Tokenizer)
    return loaded


# ------------------------------------------------------------------ sizes and keys


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "parts"),
    [
        ("titok-l-32", 641_054_735, 692, (303_410_188, 306_822_144, 30_478_339)),
        ("titok-b-64", 204_814_095, 404, (85_904_652, 88_070_656, 30_478_339)),
        ("titok-s-128", 83_674_639, 308, (25_818_636, 27_000_832, 30_478_339)),
        ("titok-bl-64", 390_016_148, 459, None),
        ("titok-bl-128", 390_179_988, 459, None),
        ("titok-sl-256", 330_260_884, 411, None),
    ],
)
def test_published_sizes_on_the_meta_device(
    name: str, parameters: int, tensors: int, parts: tuple[int, ...] | None
) -> None:
    model = on_meta(Titok, PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    if parts:
        found = [model.encoder, model.decoder, model.pixel_decoder]
        assert tuple(sum(p.numel() for p in m.parameters()) for m in found if m is not None) == parts
    entry = builtin()[name].preset
    assert entry.parameters == round(parameters / 1e6, 2)
    assert (entry.message_length, entry.vocab_size) == (
        PRESETS[name].message_length,
        PRESETS[name].vocab_size,
    )
    assert str(entry.source).startswith("hub yucornetto/tokenizer_titok_")


def _vit_keys(prefix: str, width: int, layers: int) -> dict[str, list[int]]:
    keys = {f"{prefix}.{n}.{p}": [width] for n in ("ln_pre", "ln_post") for p in ("weight", "bias")}
    for i in range(layers):
        keys |= {
            f"{prefix}.transformer.{i}.{name}": shape
            for name, shape in {
                "ln_1.weight": [width],
                "ln_1.bias": [width],
                "attn.in_proj_weight": [3 * width, width],
                "attn.in_proj_bias": [3 * width],
                "attn.out_proj.weight": [width, width],
                "attn.out_proj.bias": [width],
                "ln_2.weight": [width],
                "ln_2.bias": [width],
                "mlp.c_fc.weight": [4 * width, width],
                "mlp.c_fc.bias": [4 * width],
                "mlp.c_proj.weight": [width, 4 * width],
                "mlp.c_proj.bias": [width],
            }.items()
        }
    return keys


def _res_keys(prefix: str, a: int, b: int) -> dict[str, list[int]]:
    keys = {
        "norm1.weight": [a],
        "norm1.bias": [a],
        "conv1.weight": [b, a, 3, 3],
        "norm2.weight": [b],
        "norm2.bias": [b],
        "conv2.weight": [b, b, 3, 3],
    }
    keys |= {"nin_shortcut.weight": [b, b, 1, 1]} if a != b else {}
    return {f"{prefix}.{name}": shape for name, shape in keys.items()}


def _pixel_keys() -> dict[str, list[int]]:
    m, a, z = [128, 128, 256, 256, 512], [128, 256, 256, 512, 512], 256
    keys = {
        "pixel_quantize.embedding.weight": [1024, z],
        "pixel_decoder.conv_in.weight": [m[4], z, 3, 3],
        "pixel_decoder.conv_in.bias": [m[4]],
        "pixel_decoder.norm_out.weight": [m[0]],
        "pixel_decoder.norm_out.bias": [m[0]],
        "pixel_decoder.conv_out.weight": [3, m[0], 3, 3],
        "pixel_decoder.conv_out.bias": [3],
    }
    for r in range(2):
        keys |= _res_keys(f"pixel_decoder.mid.{r}", m[4], m[4])
    for k in range(5):
        keys |= _res_keys(f"pixel_decoder.up.{k}.block.0", a[k], m[k])
        keys |= _res_keys(f"pixel_decoder.up.{k}.block.1", m[k], m[k])
        if k:
            keys[f"pixel_decoder.up.{k}.upsample_conv.weight"] = [m[k], m[k], 3, 3]
            keys[f"pixel_decoder.up.{k}.upsample_conv.bias"] = [m[k]]
    return keys


def expected_keys(
    k: int, n: int, d: int, enc: tuple[int, int], dec: tuple[int, int], legacy: bool
) -> dict[str, list[int]]:
    """Section (f) of the spec, expanded."""
    e, w = enc[0], dec[0]
    keys = {
        "latent_tokens": [k, e],
        "encoder.class_embedding": [1, e],
        "encoder.positional_embedding": [257, e],
        "encoder.latent_token_positional_embedding": [k, e],
        "encoder.patch_embed.weight": [e, 3, 16, 16],
        "encoder.patch_embed.bias": [e],
        "encoder.conv_out.weight": [d, e, 1, 1],
        "encoder.conv_out.bias": [d],
        "quantize.embedding.weight": [n, d],
        "decoder.decoder_embed.weight": [w, d],
        "decoder.decoder_embed.bias": [w],
        "decoder.class_embedding": [1, w],
        "decoder.positional_embedding": [257, w],
        "decoder.mask_token": [1, 1, w],
        "decoder.latent_token_positional_embedding": [k, w],
        "decoder.ffn.0.weight": [2 * w if legacy else 768, w, 1, 1],
        "decoder.ffn.0.bias": [2 * w if legacy else 768],
        **_vit_keys("encoder", *enc),
        **_vit_keys("decoder", *dec),
    }
    if legacy:
        keys |= {"decoder.ffn.2.weight": [1024, 2 * w, 1, 1], "decoder.ffn.2.bias": [1024], **_pixel_keys()}
    else:
        keys |= {"decoder.conv_out.weight": [3, 3, 3, 3], "decoder.conv_out.bias": [3]}
    return keys


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("titok-l-32", (32, 4096, 12, (1024, 24), (1024, 24), True)),
        ("titok-b-64", (64, 4096, 12, (768, 12), (768, 12), True)),
        ("titok-s-128", (128, 4096, 12, (512, 8), (512, 8), True)),
        ("titok-bl-64", (64, 8192, 64, (768, 12), (1024, 24), False)),
        ("titok-bl-128", (128, 8192, 64, (768, 12), (1024, 24), False)),
        ("titok-sl-256", (256, 8192, 64, (512, 8), (1024, 24), False)),
    ],
)
def test_key_contract(name: str, numbers: tuple[Any, ...]) -> None:
    state = on_meta(Titok, PRESETS[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected_keys(*numbers)
    assert {value.dtype for value in state.values()} == {torch.float32}


# ------------------------------------------------------------------ oddities


def test_legacy_head_reads_the_memory_of_the_latents_another_way() -> None:
    model = network(LEGACY)
    head = model.encoder.conv_out
    y = torch.randn(3, 6, 32, generator=generator(1))
    want = torch.empty(3, 6, 5)
    for b in range(3):
        for j in range(6):
            s = torch.stack([y[b, (c * 6 + j) // 32, (c * 6 + j) % 32] for c in range(32)])
            want[b, j] = head.weight[:, :, 0, 0] @ s + head.bias
    torch.testing.assert_close(model.encoder.head(y), want, atol=1e-5, rtol=0)
    plain = network(PIXEL).encoder
    want = y @ plain.conv_out.weight[:, :, 0, 0].T + plain.conv_out.bias
    torch.testing.assert_close(plain.head(y), want, atol=1e-5, rtol=0)


def test_pixels_are_a_soft_mixture_of_unnormalised_codes() -> None:
    model = network(LEGACY)
    assert model.pixel_quantize is not None
    logits = torch.randn(2, 1024, 4, 4, generator=generator(2)) * 3
    table = model.state_dict()["pixel_quantize.embedding.weight"]
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    want = torch.stack([(p[:, :, h, w] @ table) for h in range(4) for w in range(4)], -1).view(2, 8, 4, 4)
    torch.testing.assert_close(model.pixel_quantize(logits), want, atol=1e-5, rtol=0)


def test_a_block_that_changes_the_width_does_not_add_its_input() -> None:
    torch.manual_seed(0)
    block = VqganBlock(32, 64)
    assert block.nin_shortcut is not None and block.nin_shortcut.weight.shape == (64, 64, 1, 1)
    x = torch.randn(2, 32, 5, 5, generator=generator(3))
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), h + block.nin_shortcut(h))
    same = VqganBlock(32, 32)
    torch.nn.init.zeros_(same.conv2.weight)
    torch.testing.assert_close(same(x), x)


def test_stages_run_from_the_coarsest_level_down() -> None:
    decoder = VqganDecoder(VqganSpec(hidden=32, multipliers=(1, 2, 2), blocks=1, latent_channels=8))
    order: list[int] = []
    for level, stage in enumerate(decoder.up):
        stage.register_forward_hook(lambda *_, level=level: order.append(level))
    assert decoder(torch.randn(1, 8, 4, 4, generator=generator())).shape == (1, 3, 16, 16)
    assert order == [2, 1, 0]


def test_lean_blocks_change_nothing() -> None:
    blocks = [PlainBlock(32, 4) for _ in range(3)]
    for block in blocks:
        torch.nn.init.normal_(block.attn.in_proj_weight, std=0.3, generator=generator(1))
        torch.nn.init.normal_(block.attn.in_proj_bias, std=0.3, generator=generator(2))
    x = torch.randn(4, 9, 32, generator=generator(3))
    x[:, :3] = x[0, :3]
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    want = x
    with torch.no_grad():
        for block in blocks:
            attention.load_state_dict(block.attn.state_dict())
            h = block.ln_1(want)
            want = want + attention(h, h, h, need_weights=False)[0]
            want = want + block.mlp(block.ln_2(want))
        for read in (slice(None), slice(1, 4), slice(-2, None)):
            for shared in (0, 3):
                for depth in (1, 3):
                    full = run_blocks(blocks[:depth], x)
                    lean = run_blocks(blocks[:depth], x, read=read, shared=shared)
                    torch.testing.assert_close(lean, full[:, read], atol=1e-5, rtol=0)
        torch.testing.assert_close(run_blocks(blocks, x), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("entries", [1, 64, 1 << 20])
def test_nearest_neighbours_in_chunks(entries: int) -> None:
    z, table = torch.randn(37, 5, generator=generator(1)), torch.randn(64, 5, generator=generator(2))
    table[40] = table[7]  # a tie: the first one wins
    z[0] = table[7]
    want = (z.double()[:, None] - table.double()).square().sum(-1).argmin(1)
    found = nearest(z, table, entries=entries)
    assert torch.equal(found, want) and found[0] == 7
    assert nearest(z[:0], table).shape == (0,)


def test_unit_codebooks_compare_directions_and_hand_out_unit_vectors() -> None:
    quantizer = VectorQuantizer(50, 5, l2_norm=True).requires_grad_(False)
    quantizer.embedding.weight.copy_(torch.randn(50, 5, generator=generator(1)) * 4)
    z = torch.randn(3, 7, 5, generator=generator(2))
    ids, codes = quantizer(z)
    cosine = F.cosine_similarity(z[:, :, None], quantizer.embedding.weight, dim=-1)
    assert torch.equal(ids, cosine.argmax(-1))
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(3, 7))
    assert torch.equal(quantizer(z * 1000)[0], ids)
    assert torch.equal(quantizer.ids(codes), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = quantizer(z)
    assert torch.equal(again, ids) and same.dtype == torch.float32


# ------------------------------------------------------------------ adapter


def test_codes_come_back_from_ids_and_decode_to_images(tokenizer: TitokTokenizer) -> None:
    tokens = tokenizer.encode(images(9))
    assert tokens.ids is not None
    assert torch.equal(tokenizer.codes_from_ids(tokens.ids), tokens.codes)
    with pytest.raises(ValueError, match=r"0\.\.499"):
        tokenizer.codes_from_ids(torch.tensor([500]))
    out = tokenizer.decode(tokens, seeds=range(9))
    assert out.dtype == torch.uint8 and out.shape == (9, 3, 16, 16)
    one = Tokens(None, tokens.codes[4:5])
    assert torch.equal(tokenizer.decode(one, seeds=[77])[0], out[4])  # seeds change nothing
    with pytest.raises(ValueError, match=r"\[B, 6, 5\]"):
        tokenizer.decode(Tokens(None, tokens.codes[:, :3]), seeds=range(9))
    raw = tokenizer.model.decode(tokens.codes)
    assert ((raw.clamp(0, 1) * 255 - out.float()).abs() <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("spec", [*PRESETS.values(), LEGACY, PIXEL])
def test_config_round_trip(spec: TitokSpec) -> None:
    text = json.dumps(config_from_spec(spec))
    again = spec_from_config(json.loads(text), Path("x"))
    if spec is LEGACY:
        assert again.pixels == spec.pixels
    assert again == spec


def test_old_configs_omit_what_was_not_invented_yet() -> None:
    config = config_from_spec(PRESETS["titok-b-64"])
    for key in ("finetune_decoder", "is_legacy", "quantize_mode"):
        del config["model"]["vq_model"][key]
    config["model"]["generator"] = {"image_seq_len": "${model.vq_model.num_latent_tokens}"}
    assert spec_from_config(config, Path("x")) == PRESETS["titok-b-64"]


def test_parity_case_saves_what_it_loaded(tmp_path: Path) -> None:
    loaded = load_tokenizer(str(CASE), device="cpu")
    assert isinstance(loaded, TitokTokenizer)
    loaded.save(tmp_path)
    before, after = load_file(CASE / "weights.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_pixel_decoder_that_does_not_match_the_patches() -> None:
    with pytest.raises(ValueError, match="enlarges 4 times"):
        replace(LEGACY, decoder_patch=8)


def test_training_leftovers_are_ignored(checkpoint: Path, tokenizer: TitokTokenizer) -> None:
    path = checkpoint / "model.safetensors"
    extra = {"quantize.embed_prob": torch.zeros(50), "pixel_encoder.conv_in.weight": torch.zeros(2)}
    save_file({**load_file(path), **extra}, path)
    again = load_tokenizer(str(checkpoint), device="cpu")
    assert torch.equal(again.encode(images(2)).ids, tokenizer.encode(images(2)).ids)  # type: ignore[arg-type]


def test_initialisation_follows_the_spec() -> None:
    model = Titok(LEGACY)
    model.init_weights(generator())
    state = model.state_dict()
    assert state["quantize.embedding.weight"].abs().max() <= 1 / 500
    assert state["encoder.transformer.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["encoder.positional_embedding"].std().item() == pytest.approx(32**-0.5, rel=0.15)
    bound = (6 / (96 + 32)) ** 0.5
    assert 0.9 * bound < state["encoder.transformer.0.attn.in_proj_weight"].abs().max() <= bound
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif ".ln_" in name or ".norm" in name:
            assert (value == 1).all(), name
        else:
            assert value.std() > 0, name
