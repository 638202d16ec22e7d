from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from comit_bench.probing.network import Probe


def make(seed: int = 0, **changes: Any) -> Probe:
    settings: dict[str, Any] = dict(code_dim=6, message_length=5, outputs=7, width=16, depth=2, heads=4)
    settings |= changes
    return Probe(**settings, generator=torch.Generator().manual_seed(seed))


def codes(rows: int = 3, length: int = 5, dim: int = 6) -> Tensor:
    return torch.randn(rows, length, dim, generator=torch.Generator().manual_seed(9))


def full_forward(probe: Probe, x: Tensor, extra: Tensor | None = None) -> Tensor:
    """The plain computation: every block computes every token."""
    states = probe.embed(x, extra)
    for block in probe.blocks:
        states = block(states)
    answer: Tensor = probe.head(probe.norm(states)[:, 0])
    return answer


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_last_block_for_cls_only_equals_the_full_computation(depth: int) -> None:
    probe = make(depth=depth)
    torch.testing.assert_close(probe(codes()), full_forward(probe, codes()), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_full_computation() -> None:
    lean, plain = make(), make()
    lean(codes()).square().sum().backward()
    full_forward(plain, codes()).square().sum().backward()
    for (name, a), b in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        assert a.grad.abs().sum() > 0 or name.endswith("qkv.bias"), name


def test_block_agrees_with_torch_multihead_attention() -> None:
    block = make().blocks[0]
    other = torch.nn.TransformerEncoderLayer(
        16, 4, 64, 0.0, activation="gelu", batch_first=True, norm_first=True
    )
    with torch.no_grad():
        other.self_attn.in_proj_weight.copy_(block.qkv.weight)
        other.self_attn.out_proj.load_state_dict(block.proj.state_dict())
        other.linear1.load_state_dict(block.fc1.state_dict())
        other.linear2.load_state_dict(block.fc2.state_dict())
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


def test_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = make(seed=4)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(123)
    second, third = make(seed=4), make(seed=5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, third.head.weight)


def test_initial_weights() -> None:
    probe = make(width=64, heads=4)
    qkv = probe.blocks[0].qkv
    assert qkv.bias.abs().max() == 0 and qkv.weight.abs().max() <= 2 / 8
    assert qkv.weight.std().item() == pytest.approx(0.88 / 8, rel=0.05)  # two-sided cut at 2 std
    assert probe.position_embed.std().item() == pytest.approx(0.88, rel=0.15)
    assert torch.equal(probe.norm.weight, torch.ones(64))


def test_position_matters() -> None:
    probe = make()
    assert not torch.allclose(probe(codes()), probe(codes().flip(1)), atol=1e-4)


def test_appended_tokens_have_types_of_their_own() -> None:
    probe = make(types=5, extra_dim=4)
    extra = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(2))
    answer = probe(codes(), extra)
    assert answer.shape == (3, 7)
    torch.testing.assert_close(answer, full_forward(probe, codes(), extra), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(answer, probe(codes(), extra.flip(1)), atol=1e-4)


def test_shape_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="reads 5 codes and 0 appended tokens, got 4 and 0"):
        make()(codes(length=4))
    with pytest.raises(ValueError, match="5 codes and 3 appended tokens, got 5 and 0"):
        make(types=5, extra_dim=4)(codes())
    with pytest.raises(ValueError, match="types=5 with extra_dim=None"):
        make(types=5)
    with pytest.raises(ValueError, match="width 16 must be a multiple of heads 3"):
        make(heads=3)


def test_state_dict_keys_are_a_contract() -> None:
    block = ["norm1", "qkv", "proj", "norm2", "fc1", "fc2"]
    expected = {"cls", "position_embed", "type_embed"}
    for module in ["project", "norm", "head", *[f"blocks.{i}.{name}" for i in (0, 1) for name in block]]:
        expected |= {f"{module}.weight", f"{module}.bias"}
    assert set(make().state_dict()) == expected
