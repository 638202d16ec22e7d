"""The ALIT network: key contract, sizes, what is not computed, halting, length selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alit_sizes import TINY, TINY_VAE
from torch import Tensor
from torch.nn import functional as F

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.vqgan import VqganSpec
from comit_bench.tokenizers.alit.base_model import Vae, Vqgan
from comit_bench.tokenizers.alit.config import VARIANTS, config_from_spec, spec_from_config
from comit_bench.tokenizers.alit.model import PRESETS, Alit, AlitSpec, select_length, variant
from comit_bench.tokenizers.registry import tokenizers

WIDTH, LAYERS = {"small": 1024, "base": 768, "semilarge": 1024}, {"small": 8, "base": 12, "semilarge": 16}
PUBLISHED = {  # spec (a): inference parameters; spec (f): tensors without the losses
    "alit-small": (262_048_399, 391),
    "alit-small-in100": (262_048_399, 391),
    "alit-base": (228_689_551, 487),
    "alit-semilarge": (463_587_983, 583),
    "alit-small-continuous": (261_999_247, 390),
    "alit-small-vae": (272_107_999, 535),
    "alit-small-vae-continuous": (272_058_847, 534),
}


def on_meta(spec: AlitSpec) -> Alit:
    with torch.device("meta"):
        return Alit(spec)


def tiny(spec: AlitSpec = TINY) -> Alit:
    model = Alit(spec).requires_grad_(False).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # every path must matter: no zero bias, no unit norm
        parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    return model


def images(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------- keys and sizes


def _transformers(w: int, layers: int) -> dict[str, list[int]]:
    keys: dict[str, list[int]] = {}
    for part in ("encoder", "decoder"):
        for i in range(layers):
            stem = f"{part}.transformer.{i}"
            keys |= {f"{stem}.{ln}.{p}": [w] for ln in ("ln_1", "ln_2") for p in ("weight", "bias")}
            keys |= {f"{stem}.attn.in_proj_weight": [3 * w, w], f"{stem}.attn.in_proj_bias": [3 * w]}
            keys |= {f"{stem}.attn.out_proj.weight": [w, w], f"{stem}.attn.out_proj.bias": [w]}
            keys |= {f"{stem}.mlp.c_fc.weight": [4 * w, w], f"{stem}.mlp.c_fc.bias": [4 * w]}
            keys |= {f"{stem}.mlp.c_proj.weight": [w, 4 * w], f"{stem}.mlp.c_proj.bias": [w]}
    return keys


def _adaptive(w: int, layers: int, channels: int, outputs: int, quantized: bool) -> dict[str, list[int]]:
    keys = _transformers(w, layers)
    for part in ("encoder", "decoder"):
        keys |= {f"{part}_positional_embedding": [257, w], f"{part}_class_embedding": [1, w]}
        keys |= {f"{part}_mask_token": [1, 1, w]}
    keys |= {"latent_tokens": [32, w], "latent_token_positional_embedding": [32, w]}
    keys |= {"timestep_embedding": [8, 32, w]}
    norms = ("encoder_ln_pre", "encoder_ln_post", "encoder_ln_recursive", "decoder.ln_pre", "decoder.ln_post")
    keys |= {f"{norm}.{p}": [w] for norm in norms for p in ("weight", "bias")}
    keys |= {"pre_quantizer_mlp.weight": [12, w], "pre_quantizer_mlp.bias": [12]}
    keys |= {"patch_embed.weight": [w - channels, 3, 16, 16], "patch_embed.bias": [w - channels]}
    keys |= {"decoder.latent_token_positional_embedding": [256, w]}
    keys |= {"decoder.decoder_embed.weight": [w, 12], "decoder.decoder_embed.bias": [w]}
    keys |= {"decoder.ffn.0.weight": [2 * w, w], "decoder.ffn.0.bias": [2 * w]}
    keys |= {"decoder.ffn.2.weight": [outputs, 2 * w], "decoder.ffn.2.bias": [outputs]}
    return keys | ({"quantize.embedding.weight": [4096, 12]} if quantized else {})


def _residual(stem: str, a: int, b: int, *, vae: bool) -> dict[str, list[int]]:
    keys = {f"{stem}.norm1.{p}": [a] for p in ("weight", "bias")}
    keys |= {f"{stem}.norm2.{p}": [b] for p in ("weight", "bias")}
    keys |= {f"{stem}.conv1.weight": [b, a, 3, 3], f"{stem}.conv2.weight": [b, b, 3, 3]}
    if a != b:
        keys[f"{stem}.nin_shortcut.weight"] = [b, a if vae else b, 1, 1]
    if vae:
        keys |= {f"{stem}.{c}.bias": [b] for c in ("conv1", "conv2")}
        keys |= {f"{stem}.nin_shortcut.bias": [b]} if a != b else {}
    return keys


def _conv(stem: str, shape: list[int], *, bias: bool = True) -> dict[str, list[int]]:
    return {f"{stem}.weight": shape} | ({f"{stem}.bias": shape[:1]} if bias else {})


def _base(kind: str) -> dict[str, list[int]]:
    vae, root = kind == "vae", f"base_tokenizer.{kind}"
    channels = [128, 128, 256, 256, 512]
    z = 16 if vae else 256
    keys = _conv(f"{root}.encoder.conv_in", [128, 3, 3, 3], bias=vae)
    keys |= _conv(f"{root}.encoder.conv_out", [32, 512, 3, 3] if vae else [256, 512, 1, 1])
    keys |= _conv(f"{root}.decoder.conv_in", [512, z, 3, 3]) | _conv(
        f"{root}.decoder.conv_out", [3, 128, 3, 3]
    )
    for part, width in (("encoder", 512), ("decoder", 128)):
        keys |= {f"{root}.{part}.norm_out.{p}": [width] for p in ("weight", "bias")}
        for r in (1, 2):
            keys |= _residual(f"{root}.{part}.mid.block_{r}", 512, 512, vae=vae)
    attended = [f"{root}.{part}.mid.attn_1" for part in ("encoder", "decoder")]
    attended += [f"{root}.encoder.down.4.attn.{j}" for j in (0, 1)]
    for stem in attended if vae else []:
        keys |= {f"{stem}.norm.{p}": [512] for p in ("weight", "bias")}
        for part in ("q", "k", "v", "proj_out"):
            keys |= _conv(f"{stem}.{part}", [512, 512, 1, 1])
    for i, c in enumerate(channels):
        before, above = channels[max(i - 1, 0)], channels[min(i + 1, 4)]
        for j in range(2):
            keys |= _residual(f"{root}.encoder.down.{i}.block.{j}", c if j else before, c, vae=vae)
        for j in range(3 if vae else 2):
            keys |= _residual(f"{root}.decoder.up.{i}.block.{j}", c if j else above, c, vae=vae)
        if vae and i < 4:
            keys |= _conv(f"{root}.encoder.down.{i}.downsample.conv", [c, c, 3, 3])
        if i > 0:
            keys |= _conv(f"{root}.decoder.up.{i}.upsample.conv", [c, c, 3, 3])
    if vae:
        return (
            keys
            | _conv(f"{root}.quant_conv", [32, 32, 1, 1])
            | _conv(f"{root}.post_quant_conv", [16, 16, 1, 1])
        )
    return keys | {f"{root}.quantize.embedding.weight": [1024, 256]}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_key_contract(name: str) -> None:
    """Section (f), written out here from the text, equals the state dict."""
    known = VARIANTS[name]
    size = name.split("-")[1]
    channels, outputs = (256, 1024) if known.base == "vqgan" else (16, 16)
    want = _adaptive(WIDTH[size], LAYERS[size], channels, outputs, known.quantized) | _base(known.base)
    got = {key: list(value.shape) for key, value in on_meta(known.spec).state_dict().items()}
    assert got == want


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes(name: str) -> None:
    model = on_meta(VARIANTS[name].spec)
    count, tensors = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.state_dict()) == tensors
    entry = tokenizers()[name].preset
    assert entry.parameters == round(count / 1e6, 2)
    spec = VARIANTS[name].spec
    assert entry.message_length == spec.message_length == 256
    assert entry.vocab_size == (spec.codebook_size if spec.quantized else None)


def test_every_variant_is_published_and_released() -> None:
    entries = {name for name, entry in tokenizers().items() if entry.family.name == "alit"}
    assert set(VARIANTS) == set(PUBLISHED) == entries
    assert PRESETS["alit-tiny"].width == 512
    with pytest.raises(ValueError, match="'vqgan' or 'vae'"):
        variant("alit-small", base="taming")


@pytest.mark.parametrize("spec", [TINY, TINY_VAE, *(v.spec for v in VARIANTS.values())])
def test_config_round_trip(spec: AlitSpec) -> None:
    from pathlib import Path

    assert spec_from_config(config_from_spec(spec), Path("config.json")) == spec


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 64}, "grid"),
        ({"patch_size": 4, "image_size": 64}, "shrinks by 2"),
        ({"heads": 3}, "multiple of its 3 heads"),
        ({"first_tokens": 128}, "1 to 256 are possible"),
        ({"iterations": 0}, "0 iterations"),
        ({"width": 12, "heads": 4}, "exceed the 12 base channels"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TINY, **changes)


# ---------------------------------------------------------------- the base, written out from the text


def _gn(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6))


def _block(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    u = F.conv2d(_gn(w, f"{name}.norm1", x), w[f"{name}.conv1.weight"], padding=1)
    u = F.conv2d(_gn(w, f"{name}.norm2", u), w[f"{name}.conv2.weight"], padding=1)
    shortcut = w.get(f"{name}.nin_shortcut.weight")
    return u + (x if shortcut is None else F.conv2d(u, shortcut))


def test_vqgan_follows_the_text_level_by_level() -> None:
    spec = VqganSpec(hidden=32, multipliers=(1, 2, 2), blocks=2, latent_channels=6, codebook_size=9)
    base = Vqgan(spec).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    w = base.state_dict()
    x = F.conv2d(images(2), w["encoder.conv_in.weight"], padding=1)
    for i in range(3):
        for j in range(2):
            x = _block(w, f"encoder.down.{i}.block.{j}", x)
        x = F.avg_pool2d(x, 2) if i < 2 else x
    x = _block(w, "encoder.mid.block_2", _block(w, "encoder.mid.block_1", x))
    h = F.conv2d(_gn(w, "encoder.norm_out", x), w["encoder.conv_out.weight"], w["encoder.conv_out.bias"])
    torch.testing.assert_close(base.encode(images(2)), h, atol=1e-5, rtol=1e-5)

    x = F.conv2d(h, w["decoder.conv_in.weight"], w["decoder.conv_in.bias"], padding=1)
    x = _block(w, "decoder.mid.block_2", _block(w, "decoder.mid.block_1", x))
    for i in (2, 1, 0):
        for j in range(2):
            x = _block(w, f"decoder.up.{i}.block.{j}", x)
        if i:
            name = f"decoder.up.{i}.upsample.conv"
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
    x = F.conv2d(
        _gn(w, "decoder.norm_out", x), w["decoder.conv_out.weight"], w["decoder.conv_out.bias"], padding=1
    )
    torch.testing.assert_close(base.decode(h), x, atol=1e-5, rtol=1e-5)

    distance = (h.flatten(2).transpose(1, 2)[:, :, None] - w["quantize.embedding.weight"]).square().sum(-1)
    assert torch.equal(base.indices(h), distance.argmin(-1))


def test_vae_takes_the_mean_unless_noise_is_given() -> None:
    base = tiny(TINY_VAE).base
    assert isinstance(base, Vae)
    mean, logvar = base.moments(images(2)).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(base.encode(images(2)), 0.2325 * mean)
    want = 0.2325 * (mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(base.encode(images(2), noise), want)


# ---------------------------------------------------------------- iterations and halting


def test_fewer_iterations_give_the_same_messages() -> None:
    model = tiny()
    whole = list(model.iterate(images(2)))
    assert [s.codes.shape[1] for s in whole] == [4, 8, 12]
    assert all(s.predicted is None for s in whole)
    for count in (1, 2):
        short = list(model.iterate(images(2), iterations=count))
        assert len(short) == count
        assert torch.equal(short[-1].ids, whole[count - 1].ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 3"):
        model.iterate(images(1), iterations=4)
    with pytest.raises(ValueError, match="side 32"):
        model.iterate(images(1, 64))


def test_halting_replaces_image_rows_by_mask_and_position() -> None:
    model = tiny()
    x = images(2)
    uniforms = [torch.zeros(2, 256), torch.zeros(2, 256)]  # every token above the threshold is dropped
    first, second, _ = model.iterate(x, uniforms=uniforms)
    free_first, free_second, _ = model.iterate(x)
    assert torch.equal(first.codes, free_first.codes)
    assert first.dropped is not None and first.halt_probability is not None
    assert torch.equal(first.dropped, first.halt_probability >= 0.05)
    assert 0 < int(first.dropped.sum()) < first.dropped.numel()
    assert not torch.equal(second.latents, free_second.latents)
    base = model.base
    assert isinstance(base, Vqgan)
    known = base.indices(base.encode(x))
    p = model.predict(first.codes).softmax(-1).gather(-1, known[..., None])[..., 0]
    torch.testing.assert_close(first.halt_probability, p)
    rows = torch.ones(2, 256, 40)
    mask = model.masked(rows, first.dropped)
    want = (model.encoder_mask_token + model.encoder_positional_embedding[1:]).expand(2, -1, -1)
    assert torch.equal(mask[first.dropped], want[first.dropped])
    assert torch.equal(mask[~first.dropped], rows[~first.dropped])


def test_noise_that_never_drops_equals_no_halting() -> None:
    model = tiny()
    ones = [torch.ones(2, 256)] * 2
    for ours, free in zip(model.iterate(images(2), uniforms=ones), model.iterate(images(2)), strict=True):
        assert torch.equal(ours.latents, free.latents)
    with pytest.raises(ValueError, match="needs 2 noise tensors"):
        model.iterate(images(2), uniforms=ones[:1])
    with pytest.raises(ValueError, match="no halting"):
        tiny(TINY_VAE).iterate(images(2), uniforms=ones)


def test_continuous_models_hand_out_what_they_computed() -> None:
    model = tiny(replace(TINY, quantized=False))
    step = list(model.iterate(images(1)))[-1]
    assert step.ids is None and torch.equal(step.codes, step.prequant)
    assert "quantize.embedding.weight" not in model.state_dict()


def test_attention_is_a_share_of_all_keys() -> None:
    model = tiny()
    codes = next(model.iterate(images(2))).codes
    found: dict[int, torch.Tensor] = {}
    model.attention(
        codes, AttentionRequest(layers=(0, 2)), lambda layer, _, maps: found.update({layer: maps})
    )
    assert [found[layer].shape for layer in (0, 1)] == [(2, 2, 4, 16, 16)] * 2
    maps = torch.stack([found[0], found[1]])
    assert float(maps.min()) > 0 and float(maps.sum(dim=3).max()) < 1  # class and image keys have the rest
    with pytest.raises(ValueError, match=r"0\.\.2"):
        model.attention(codes, AttentionRequest(layers=(3,)), lambda *_: None)


# ---------------------------------------------------------------- length selection


class _Steps:
    """Steps whose reconstruction error is known; counts how many were asked for."""

    def __init__(self, errors: list[list[float]]) -> None:
        self.errors, self.asked = errors, 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        for row in self.errors:
            self.asked += 1
            yield type("Step", (), {"codes": torch.tensor(row).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)})


@pytest.mark.parametrize(
    ("errors", "per_image", "chosen", "asked"),
    [
        ([[0.2, 0.05], [0.06, 0.3], [0.0, 0.0]], True, [1, 0], 2),
        ([[0.2, 0.3], [0.1, 0.5], [0.3, 0.2]], True, [1, 2], 3),  # none below: the smallest, not the last
        ([[0.2, 0.05], [0.06, 0.06], [0.0, 0.0]], False, [1, 1], 2),
        ([[0.2, 0.1], [0.1, 0.1], [0.3, 0.1]], False, [1, 1], 3),
    ],
)
def test_length_selection(errors: list[list[float]], per_image: bool, chosen: list[int], asked: int) -> None:
    steps = _Steps(errors)
    got, seen = select_length(iter(steps), lambda codes: codes, torch.zeros(2, 3, 2, 2), per_image=per_image)
    assert (got.tolist(), steps.asked, len(seen)) == (chosen, asked, asked)
