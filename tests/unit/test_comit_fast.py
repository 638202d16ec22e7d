"""What makes COMiT fast changes no number: ``fast.py`` against the equations of ``model.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comit_plain import PlainPredictor
from pixel_nano import PIXEL_NANO
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.flow import Guidance
from comit_bench.nn.vae import IdentityVae
from comit_bench.tokenizers.comit.codec import decode, encode, one_step_decode
from comit_bench.tokenizers.comit.crops import CropPolicy, parse_policy
from comit_bench.tokenizers.comit.fast import TIMES_KEPT, FastPredictor
from comit_bench.tokenizers.comit.model import Comit, Predictor

CPU = torch.device("cpu")
FLOAT = 1e-5
SIZES: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1},
    "two blocks": {"depth": 2},
    "wide": {"depth": 2, "width": 48, "heads": 3, "mlp_ratio": 2.0},
    "deep, few tokens": {"depth": 4, "message_length": 3, "fsq_levels": (8, 5)},
}


def make(mask_mode: str, **changes: Any) -> Comit:
    """Every parameter drawn, attention sharp, so that every path matters."""
    model = Comit(replace(PIXEL_NANO, **{"width": 32, "mask_mode": mask_mode, **changes}), IdentityVae())
    generator = torch.Generator().manual_seed(0)
    model.predictor.init_weights(generator, zero_gates=False)
    with torch.no_grad():
        for name, parameter in model.predictor.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            if "qkv.weight" in name:
                parameter.mul_(2.0)
    return model.eval()


@pytest.fixture(params=[(mode, size) for mode in ("additive", "hard") for size in SIZES], ids=" ".join)
def model(request: Any) -> Comit:
    mode, size = request.param
    return make(mode, **SIZES[size]).requires_grad_(False)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def close(got: Tensor, want: Tensor, tolerance: float = FLOAT) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


def plain(model: Comit) -> Any:
    return PlainPredictor(model.predictor)


@pytest.mark.parametrize("policy", ["global", "raster:3", "global+random:3", "global+adaptive:3", "mixed"])
def test_encoding(model: Comit, policy: str) -> None:
    mixed = CropPolicy(order=((0, 2, 0), (3, 0, 5)), global_crop=True)
    parsed = mixed if policy == "mixed" else parse_policy(policy)
    runs = [
        encode(
            model,
            rand(3, 3, 32, 32),
            parsed,
            generators=[torch.Generator().manual_seed(i) for i in range(3)],
            network=network,
        )
        for network in (None, plain(model))
    ]
    assert torch.equal(runs[0].ids, runs[1].ids) and torch.equal(runs[0].offset, runs[1].offset)
    for fast, slow in zip(runs[0].steps, runs[1].steps, strict=True):
        close(fast.prequant, slow.prequant)
        assert torch.equal(fast.cells, slow.cells)


def given(model: Comit) -> tuple[Tensor, Tensor, Tensor]:
    spec = model.spec
    codes = model.quantizer(2 * rand(3, spec.message_length, spec.code_dim))
    return codes, rand(3, 2, seed=2), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("weight", "solver"), [(0.0, "euler"), (7.5, "euler"), (3.0, "midpoint")])
def test_decoding(model: Comit, weight: float, solver: str) -> None:
    fast, slow = (
        decode(
            model, *given(model), steps=3, solver=solver, guidance=Guidance(weight=weight), network=network
        )
        for network in (None, plain(model))
    )
    close(fast.latents, slow.latents, 1e-4)
    close(one_step_decode(model, *given(model)), one_step_decode(model, *given(model), network=plain(model)))


@pytest.mark.parametrize("path", ["hard", "model"])
@pytest.mark.parametrize("softmax", [False, True])
def test_attention_maps(model: Comit, path: Any, softmax: bool) -> None:
    layers = tuple(range(model.spec.depth))
    request = AttentionRequest(layers=layers, times=(0.0, 0.4), path=path, softmax=softmax)
    fast, slow = (
        decode(model, *given(model), steps=3, attention=request, network=network)
        for network in (None, plain(model))
    )
    assert sorted(fast.attention) == sorted(slow.attention) and len(fast.attention) == 2 * len(layers)
    for key, maps in fast.attention.items():
        close(maps, slow.attention[key], 1e-4)
    close(fast.latents, slow.latents, 1e-4)


def losses(network: Any, model: Comit) -> list[Tensor]:
    """Velocity with a time per image, hidden tokens and a message: what training reads."""
    codes, offset, noise = given(model)
    velocity, hidden = network.velocity_and_hidden(
        noise, network.condition(codes, offset), network.time_state(torch.tensor([0.2, 0.5, 0.9])), 0
    )
    message = network.message(
        rand(3, 3, 12, 12), network.condition(codes, offset), network.state_at(1.0, CPU)
    )
    return [velocity, *hidden, message]


@pytest.mark.parametrize("mask_mode", ["additive", "hard"])
@pytest.mark.parametrize("depth", [1, 3])
def test_what_training_reads_and_its_gradients(mask_mode: str, depth: int) -> None:
    model = make(mask_mode, depth=depth).train()
    found = []
    for network in (FastPredictor(model.predictor), plain(model)):
        model.zero_grad()
        parts = losses(network, model)
        sum(part.square().mean() for part in parts).backward()  # type: ignore[union-attr]
        gradients = {n: p.grad.clone() for n, p in model.predictor.named_parameters() if p.grad is not None}
        found.append((parts, gradients))
    for fast, slow in zip(found[0][0], found[1][0], strict=True):
        close(fast.detach(), slow.detach())
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        close(gradient, found[1][1][name], 1e-4)


def test_times_are_kept_without_gradients_only() -> None:
    network = FastPredictor(make("hard", depth=2).predictor)
    with torch.no_grad():
        kept = network.state_at(0.5, CPU)
        assert network.state_at(0.5, CPU) is kept
    assert network.state_at(0.5, CPU) is not kept and network.state_at(0.5, CPU).final.requires_grad
    with torch.no_grad():
        assert network.state_at(0.5, CPU) is kept
        for number in range(TIMES_KEPT):
            network.state_at(number / 100, CPU)
        assert network.state_at(0.5, CPU) is not kept and len(network._times) == TIMES_KEPT


def test_nothing_outlives_a_call_that_was_given_no_network() -> None:
    """Weights may change without a trace, as a fused optimizer does it."""
    model = make("additive", depth=2).requires_grad_(False)
    image = rand(1, 3, 32, 32)
    before = encode(model, image, parse_policy("global")).steps[-1].prequant
    for parameter in model.predictor.parameters():
        parameter.data.mul_(1.1)
    after = encode(model, image, parse_policy("global")).steps[-1].prequant
    assert (before - after).abs().max() > 1e-3
    close(after, encode(model, image, parse_policy("global"), network=plain(model)).steps[-1].prequant)


def test_one_time_for_the_batch_is_computed_once() -> None:
    predictor: Predictor = make("additive", depth=2).predictor
    network = FastPredictor(predictor)
    shared, each = network.time_state(torch.tensor([1.0])), network.time_state(torch.ones(3))
    assert shared.blocks[0].buffer_qkv is not None and each.blocks[0].buffer_qkv is None
    assert shared.final.shape[1] == 1 and each.final.shape[1] == 3
    condition = network.condition(torch.zeros(1, 1, 4), torch.zeros(3, 2))
    a, b = (network.message(rand(3, 3, 32, 32), condition, state) for state in (shared, each))
    close(a.detach(), b.detach())
