"""Optimizers, schedules and the start of small networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from comit_bench.errors import UsageError
from comit_bench.nn.vae import DctVae, build_vae
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.objectives.comit import TrainingModule
from comit_bench.train.optimizers import Together, is_hidden_matrix, make_optimizer
from comit_bench.train.schedule import learning_rate
from comit_bench.train.setup import make_model

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
CPU = torch.device("cpu")


def config(*overrides: str) -> TrainConfig:
    return load_config(
        "comit-nano-no-srepa", ("model.depth=1", "model.width=16", "model.representation_layer=0", *overrides)
    )


def module(run: TrainConfig) -> TrainingModule:
    return TrainingModule(make_model(run), run, None)


def fill_gradients(net: TrainingModule, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


@needs_muon
def test_muon_takes_the_matrices_inside_the_blocks_and_adam_the_rest() -> None:
    net = module(config())
    optimizer = make_optimizer(net, config(), CPU)
    named = {id(p): n for n, p in net.named_parameters()}
    adam, muon = ({named[id(p)] for g in part.param_groups for p in g["params"]} for part in optimizer.parts)
    assert muon == {
        f"model.predictor.blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert adam | muon == {n for n, p in net.named_parameters() if p.requires_grad} and not adam & muon
    assert [g.get("factor", 1.0) for g in optimizer.param_groups] == [1.0, 0.02 / 2e-3]


@needs_muon
def test_a_muon_step_is_orthogonal() -> None:
    """Singular values of the update of a matrix are near each other, whatever the gradient's are."""
    run = config("optim.clip=1e9")
    net = module(run)
    weight = net.model.predictor.blocks[0].attn.proj.weight
    before = weight.detach().clone()
    optimizer = make_optimizer(net, run, CPU)
    fill_gradients(net, 0)
    left, _, right = torch.linalg.svd(weight.grad)  # type: ignore[arg-type]
    weight.grad = left @ torch.diag(torch.logspace(0, -1, 16)) @ right
    optimizer.step()
    values = torch.linalg.svdvals(before - weight.detach())
    assert values[0] / values[-1] < 2.5  # of the gradient: 10
    assert 0.5 * 0.02 < values.mean() < 1.5 * 0.02


@needs_muon
def test_state_goes_through_a_dict_and_back() -> None:
    run = config()
    nets = [module(run), module(run)]
    optimizers = [make_optimizer(net, run, CPU) for net in nets]
    for seed in (1, 2):
        fill_gradients(nets[0], seed)
        optimizers[0].step()
    nets[1].load_state_dict(nets[0].state_dict())
    state = copy.deepcopy(optimizers[0].state_dict())
    assert sorted(state["state"]) == list(range(sum(p.requires_grad for p in nets[0].parameters())))
    optimizers[1].load_state_dict(state)
    for net, optimizer in zip(nets, optimizers, strict=True):
        fill_gradients(net, 3)
        optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_without_a_torch_that_has_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UsageError, match=r"torch 2\.9.*optim\.name=adam"):
        make_optimizer(module(config()), config(), CPU)
    assert len(make_optimizer(module(config()), config("optim.name=adam"), CPU).parts) == 1


def test_modulations_and_embeddings_are_no_hidden_matrices() -> None:
    two, one = torch.zeros(2, 2), torch.zeros(2)
    assert is_hidden_matrix("model.predictor.blocks.3.mlp.fc1.weight", two)
    assert not is_hidden_matrix("model.predictor.blocks.3.mlp.fc1.bias", one)
    assert not is_hidden_matrix("model.predictor.blocks.3.x_adaLN_modulation.1.weight", two)
    assert not is_hidden_matrix("model.predictor.r_embedder.0.weight", two)


def test_together_is_plain_adam_for_one_part() -> None:
    """Numbers and values of the saved state are torch's own, so older checkpoints load."""
    layer = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    both = Together(adam)
    both.step()
    assert both.state_dict()["state"].keys() == adam.state_dict()["state"].keys()
    both.zero_grad()
    assert layer.weight.grad is None


def test_the_cosine_warms_up_falls_and_stays() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, warmup=10, cosine_steps=100)

    assert rate(0) == pytest.approx(0.2 * 1.0, rel=1e-3)
    assert rate(50) == pytest.approx(2.0 * (0.05 + 0.95 * 0.5))
    assert rate(100) == rate(5000) == pytest.approx(0.1)
    assert learning_rate(0, peak=2.0, warmup=0, cosine_steps=100) == 2.0
    assert learning_rate(39, peak=2.0, warmup=10) == pytest.approx(2.0 * math.sqrt(10 / 40))


def test_codes_start_as_strong_as_their_positions() -> None:
    """After ``init: message`` the embedded codes vary as much as the positions; before, a tenth."""

    def ratio(init: str) -> float:
        predictor = make_model(config(f"model.init={init}", "model.width=64")).predictor
        codes = torch.rand(256, 16, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            return float(predictor.r_embedder(codes).std(0).mean() / predictor.r_pos_embed.std())

    assert ratio("released") < 0.15
    assert 0.7 < ratio("message") < 5


# ------------------------------------------------------------------------------------------- DCT


def test_the_dct_keeps_what_lies_in_its_space_and_is_orthonormal() -> None:
    vae = DctVae(4)
    rows = vae.basis.flatten(1)
    assert rows.shape == (12, 48)
    assert torch.allclose(rows @ rows.T, torch.eye(12), atol=1e-6)
    latents = torch.randn(3, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(vae.encode(vae.decode(latents)), latents, atol=1e-5)
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert (vae.decode(vae.encode(ramp)) - ramp).abs().max() < 0.01  # a grey ramp is nearly in it
    grey = torch.full((1, 3, 32, 32), -0.6)
    assert vae.encode(grey).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [12, 22, 35])
def test_blocks_of_another_size_have_latents_of_the_same_spread(channels: int) -> None:
    vae = DctVae(8, channels, mean=0.0)
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(vae.encode(vae.decode(latents)), latents, atol=1e-5)
    white = vae.encode(torch.ones(1, 3, 64, 64))  # orthonormal blocks of 8 px, scaled by a half
    assert torch.allclose(white[:, 0], torch.full((1, 8, 8), 4 * 3**0.5), atol=1e-5)
    assert white[:, 1:].abs().max() < 1e-5


def test_crops_of_the_image_have_the_latents_of_their_place() -> None:
    vae = DctVae(4)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = vae.encode(image)
    assert torch.allclose(vae.encode(image[..., 8:20, 4:16]), whole[..., 2:5, 1:4], atol=1e-6)


def test_the_dct_has_no_weights_and_small_blocks_are_refused() -> None:
    assert not build_vae("dct", 4).state_dict()
    assert not list(DctVae(8).parameters())
    with pytest.raises(ValueError, match="3 pixels"):
        DctVae(2)
    with pytest.raises(ValueError, match="12, 22, 35 channels, got 13"):
        DctVae(8, 13)
