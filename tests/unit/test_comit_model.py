"""Properties of the COMiT implementation that hold for any weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from comit_plain import noise_from_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_nano import PIXEL_NANO
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.flow import Guidance, ProjectedGuidance, integrate
from comit_bench.nn.fsq import FSQ
from comit_bench.nn.vae import IdentityVae
from comit_bench.tokenizers.comit.codec import (
    decode,
    encode,
    encode_crops,
    noise_from_generators,
)
from comit_bench.tokenizers.comit.crops import CropPolicy, parse_policy
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit, ComitSpec, Predictor, attention_bias

CPU = torch.device("cpu")


def nano(**changes: object) -> Comit:
    spec = replace(PIXEL_NANO, **{"depth": 2, "width": 32, **changes})  # type: ignore[arg-type]
    model = Comit(spec, IdentityVae())
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    return model.eval().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "millions"), [("comit-b", 173.84), ("comit-l", 610.85), ("comit-xl", 900.38)]
)
def test_published_sizes_on_the_meta_device(name: str, millions: float) -> None:
    with torch.device("meta"):
        predictor = Predictor(PRESETS[name])
    assert round(sum(p.numel() for p in predictor.parameters()) / 1e6, 2) == millions
    assert len(predictor.state_dict()) == 28 + 12 * PRESETS[name].depth


def test_key_contract() -> None:
    """The keys of the released files, for one depth, are exactly ours."""
    spec = replace(PRESETS["comit-b"], depth=1)
    with torch.device("meta"):
        keys = {k: list(v.shape) for k, v in Predictor(spec).state_dict().items()}
    d, m, p, c = spec.width, spec.message_length, spec.patch_size, spec.code_dim
    pairs = {
        "x_embedder.proj": [d, 4, p, p],
        "r_embedder.0": [d, c],
        "r_embedder.2": [d, d],
        "c_embedder.0": [d, 2],
        "c_embedder.2": [d, d],
        "t_embedder.mlp.0": [d, 256],
        "t_embedder.mlp.2": [d, d],
        "blocks.0.attn.qkv": [3 * d, d],
        "blocks.0.attn.proj": [d, d],
        "blocks.0.mlp.fc1": [4 * d, d],
        "blocks.0.mlp.fc2": [d, 4 * d],
        "blocks.0.x_adaLN_modulation.1": [6 * d, d],
        "blocks.0.r_adaLN_modulation.1": [6 * d, d],
        "final_layer.linear": [4 * p * p, d],
        "final_layer.adaLN_modulation.1": [2 * d, d],
        "r_final_layer.linear": [c, d],
        "c_final_layer.linear": [2, d],
    }
    single = {
        "pos_embed": [1, (32 // p) ** 2, d],
        "y_pos_offset": [1, 1, d],
        "r_pos_embed": [1, m, d],
        "r_to_pos_embed": [1, m, d],
        "c_pos_embed": [1, 1, d],
        "r_to_token": [1, 1, d],
    }
    expected = (
        single | {f"{k}.weight": v for k, v in pairs.items()} | {f"{k}.bias": v[:1] for k, v in pairs.items()}
    )
    assert keys == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_fsq_ids_and_codes_are_inverse_for_any_levels(levels: list[int]) -> None:
    fsq = FSQ(levels)
    ids = torch.randint(0, fsq.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(fsq.ids(fsq.codes(ids)), ids)
    assert fsq.codes(torch.arange(min(fsq.vocab_size, 4096))).unique(dim=0).shape[0] == min(
        fsq.vocab_size, 4096
    )


def test_fsq_values_of_the_spec() -> None:
    fsq = FSQ((8, 8, 8, 5, 5, 5))
    assert fsq.vocab_size == 64000 and fsq.prior_id == 32000
    assert fsq.codes(torch.tensor(32000)).tolist() == [-1, -1, 0, 0, 0, 0]
    assert fsq.basis.tolist() == [1, 8, 64, 512, 2560, 12800]
    reached = {i: set() for i in range(6)}  # type: ignore[var-annotated]
    for value in torch.linspace(-6, 6, 400):
        for i, code in enumerate(fsq(value.expand(6)).tolist()):
            reached[i].add(code)
    assert reached[0] == {k / 4 for k in range(-4, 4)} and reached[3] == {-1, -0.5, 0, 0.5, 1}


def test_fsq_gradient_passes_straight_through() -> None:
    fsq, z = FSQ((8, 5)), torch.tensor([[0.3, -0.2]], requires_grad=True)
    assert torch.equal(fsq(z).detach(), fsq(z.detach()))
    fsq(z).sum().backward()
    relaxed = z.detach().clone().requires_grad_()
    fsq.relaxed(relaxed).sum().backward()
    assert z.grad is not None and torch.equal(z.grad, relaxed.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [[], [8, 1]])
def test_fsq_refuses_impossible_levels(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FSQ(levels)


def test_dropping_the_buffer_is_exact_only_with_the_hard_mask() -> None:
    soft = nano(mask_mode="additive")
    network = FastPredictor(soft.predictor)
    condition = network.condition(soft.prior(3, CPU), torch.zeros(3, 2))
    state = network.time_state(torch.tensor([0.5]))
    with_buffer = network.velocity(images(), condition, state)
    without = network.velocity(images(), condition, state, mask_mode="hard")
    assert (with_buffer - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    "policy", ["global", "raster:4", "random:5", "global+adaptive:4", "global+order:0,3,3,9"]
)
def test_message_of_an_image_does_not_depend_on_its_batch(policy: str) -> None:
    model, parsed = nano(), parse_policy(policy)
    together = encode(model, images(), parsed, generators=generators(3))
    for i in range(3):
        alone = encode(model, images()[i : i + 1], parsed, generators=generators(3)[i : i + 1])
        assert torch.equal(alone.ids[0], together.ids[i])
        assert torch.equal(alone.offset[0], together.offset[i])


def test_explicit_order_may_mix_global_and_local_at_one_step() -> None:
    model = nano()
    mixed = CropPolicy(order=((0, 2, 0), (3, 0, 5)), global_crop=True)
    together = encode(model, images(), mixed)
    for i, order in enumerate([(0, 3), (2, 0), (0, 5)]):
        alone = encode(model, images()[i : i + 1], CropPolicy(order=order, global_crop=True))
        torch.testing.assert_close(
            alone.steps[-1].prequant[0], together.steps[-1].prequant[i], atol=1e-5, rtol=0
        )
        assert torch.equal(alone.offset[0], together.offset[i])


def test_extracted_crops_equal_cutting_them_here() -> None:
    model = nano()
    x, geometry = images(), model.spec.geometry
    crops = [x, *geometry.local_crops(x).unbind(1)]
    places = [torch.zeros(3, 2), *geometry.locations(32)[:, None].expand(-1, 3, -1)]
    for policy in (CropPolicy(global_crop=True, num_crops=4), CropPolicy(order=(4, 0, 9), global_crop=True)):
        direct = encode(model, x, policy)
        given = encode_crops(model, crops, places, policy)
        assert torch.equal(direct.ids, given.ids) and torch.equal(direct.offset, given.offset)
    with pytest.raises(ValueError, match="names crop 9"):
        encode_crops(model, crops[:3], places[:3], CropPolicy(order=(9,), global_crop=True))


def test_adaptive_never_repeats_a_cell_until_all_are_used() -> None:
    done = encode(nano(), images(2), parse_policy("adaptive:10"), generators=generators(2))
    cells = torch.stack([s.cells for s in done.steps], 1)
    assert cells[:, 0].tolist() == [4, 4]
    for row in cells.tolist():
        assert len(set(row[:9])) == 9 and row[9] == 0


def test_shared_adaptive_forbids_for_the_whole_batch() -> None:
    x = images(3)
    noise = noise_from_tensors(
        adaptive=torch.randn(5, 3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    )
    shared = encode(nano(), x, parse_policy("global+adaptive-shared:5"), noise=noise)
    cells = torch.stack([s.cells for s in shared.steps])[1:]  # [4, 3]
    seen: set[int] = set()
    for row in cells.tolist():
        if len(seen) < 9:
            assert not seen & set(row)
        seen |= set(row)


def test_noise_of_an_image_is_its_own() -> None:
    draw = noise_from_generators(generators(3))
    many = draw("adaptive", 0, range(3), (2, 4))
    assert torch.equal(noise_from_generators(generators(3)[1:2])("adaptive", 0, [0], (2, 4))[0], many[1])


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("global", "global"),
        ("Global+Raster:10", "global+raster:10"),
        ("raster:9", "raster:9"),
        ("random:9", "random:9"),
        ("adaptive:3", "adaptive:3"),
        ("global+adaptive-shared:3", "global+adaptive-shared:3"),
        ("order:5,6,8", "order:5,6,8"),
        ("global+raster:1", "global"),
    ],
)
def test_policy_names_round_trip(text: str, canonical: str) -> None:
    assert str(parse_policy(text)) == canonical
    assert parse_policy(canonical) == parse_policy(text)


@pytest.mark.parametrize(
    "text", ["", "raster", "raster:0", "raster:10", "spiral:3", "order:9", "adaptive:1,2", "order:1,,2"]
)
def test_bad_policies_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_policy(text)


def test_locations_are_x_first() -> None:
    places = PRESETS["comit-b"].geometry.locations(256)
    assert places[1].tolist() == [0.0, -0.625] and places[3].tolist() == [-0.625, 0.0]
    assert PIXEL_NANO.geometry.locations(32).tolist() == places.tolist()


def test_midpoint_is_second_order_and_euler_first() -> None:
    y0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = {
        (solver, n): (integrate(lambda t, y: y, y0, steps=n, solver=solver) - math.e).abs().item()
        for solver, n in itertools.product(("euler", "midpoint"), (8, 16))
    }
    assert 1.7 < errors["euler", 8] / errors["euler", 16] < 2.3
    assert 3.4 < errors["midpoint", 8] / errors["midpoint", 16] < 4.6
    with pytest.raises(ValueError, match="heun"):
        integrate(lambda t, y: y, y0, steps=2, solver="heun")
    with pytest.raises(ValueError, match="at least 1"):
        integrate(lambda t, y: y, y0, steps=0)


def test_guidance_weights_zero_and_one_are_the_conditional_velocity() -> None:
    model = nano()
    codes, offset, noise = encode(model, images(), parse_policy("global")).codes, torch.zeros(3, 2), images()
    plain = decode(model, codes, offset, noise, guidance=Guidance(weight=0.0)).latents
    assert torch.equal(plain, decode(model, codes, offset, noise, guidance=Guidance(weight=1.0)).latents)
    guided = decode(model, codes, offset, noise, guidance=Guidance(weight=7.5)).latents
    assert (plain - guided).abs().max() > 1e-3


def test_projected_guidance_is_orthogonal_and_bounded() -> None:
    g = torch.Generator().manual_seed(0)
    v, u = torch.randn(4, 3, 8, 8, generator=g), torch.randn(4, 3, 8, 8, generator=g)
    update = ProjectedGuidance(Guidance(weight=2.0))(v, u) - v
    inner = (update * v).flatten(1).sum(1) / v.flatten(1).norm(dim=1)
    assert inner.abs().max() < 1e-4 and update.flatten(1).norm(dim=1).max() <= 2.5 + 1e-4


def test_attention_maps_of_both_paths() -> None:
    model = nano(mask_mode="additive")
    done = encode(model, images(), parse_policy("global"))
    hard = decode(model, done.codes, done.offset, images(), steps=4, attention=AttentionRequest(layers=(1,)))
    soft = decode(
        model,
        done.codes,
        done.offset,
        images(),
        steps=4,
        guidance=Guidance(weight=0.0),
        attention=AttentionRequest(layers=(1,), path="model", softmax=True),
    )
    assert hard.attention[0, 0].shape == (3, 4, 16, 8, 8)
    mass = soft.attention[0, 0].sum((-2, -1))
    assert mass.min() > 0 and mass.max() < 1
    as_always = decode(
        model, done.codes, done.offset, images(), steps=4, guidance=Guidance(weight=0.0)
    ).latents
    torch.testing.assert_close(soft.latents, as_always, atol=1e-5, rtol=0)
    late = AttentionRequest(layers=(1,), times=(0.99,))
    assert not decode(model, done.codes, done.offset, images(), steps=4, attention=late).attention
    with pytest.raises(ValueError, match=r"0\.\.1"):
        decode(model, done.codes, done.offset, images(), attention=AttentionRequest(layers=(7,)))


def test_full_attention_rows_sum_to_one() -> None:
    """With the image's columns and all others, of which the maps that are handed out show a part."""
    model = nano(mask_mode="additive")
    out = model.predictor(images(), model.prior(3, CPU), torch.zeros(3, 2), torch.tensor([0.5]))
    weights = (out.logits[0] + attention_bias(64, 16, "additive")).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 97), atol=1e-5, rtol=0)
    request = AttentionRequest(layers=(0,), times=(0.0,), path="model", softmax=True)
    codes = model.prior(3, CPU)
    maps = decode(model, codes, torch.zeros(3, 2), images(), steps=1, attention=request).attention[0, 0]
    assert (maps.flatten(-2).sum(-1) < 1).all()


def test_masks() -> None:
    """Offset, image and message are seen by all; the buffer by itself, backwards."""
    added, hard = attention_bias(1, 2, "additive"), attention_bias(1, 2, "hard")
    assert added.tolist() == [[1, 1, 1, 1, 0, 0]] * 4 + [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert torch.equal(hard == 0, added == 1) and torch.equal(hard.isneginf(), added == 0)


def test_training_gradients_reach_every_used_parameter() -> None:
    model = Comit(replace(PIXEL_NANO, depth=2, width=32), IdentityVae()).train()
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    z = encode(model, images(), parse_policy("raster:2")).codes
    predictor, network = model.predictor, FastPredictor(model.predictor)
    velocity = network.velocity(
        images(), network.condition(z, torch.zeros(3, 2)), network.time_state(torch.rand(3))
    )
    velocity.square().sum().backward()
    idle = {n for n, p in predictor.named_parameters() if p.grad is None}
    assert idle == {"pos_embed", "y_pos_offset", "c_final_layer.linear.weight", "c_final_layer.linear.bias"}


def test_inference_leaves_nothing_that_breaks_training() -> None:
    model = Comit(replace(PIXEL_NANO, depth=2, width=32, mask_mode="additive"), IdentityVae())
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    with torch.inference_mode():
        encode(model, images(), parse_policy("global"))
    encode(model, images(), parse_policy("global")).steps[-1].prequant.sum().backward()
    assert model.predictor.blocks[0].attn.qkv.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes", [{"width": 30}, {"max_input_size": 33}, {"mask_mode": "soft"}, {"fsq_levels": (8, 1)}]
)
def test_impossible_specs_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Comit(replace(PIXEL_NANO, **changes), IdentityVae())  # type: ignore[arg-type]


def test_untrained_gates() -> None:
    spec: ComitSpec = replace(PIXEL_NANO, depth=2)
    model = Comit(spec, IdentityVae())
    model.predictor.init_weights(torch.Generator().manual_seed(0))
    constant = encode(model, images(), parse_policy("global")).ids
    assert torch.equal(constant[0], constant[1])  # zero gates: every image gets the same message
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    varied = encode(model, images(), parse_policy("global")).ids
    assert not torch.equal(varied[0], varied[1])
