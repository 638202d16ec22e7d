"""Attention maps of several layers and times: one pass, streamed, the numbers of a single request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_maps import gather_attention
from live_memory import LiveMemory
from pixel_nano import PIXEL_NANO
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.flow import Guidance, evaluation_times, integrate
from comit_bench.nn.vae import IdentityVae
from comit_bench.tokenizers.base import AttendingTokenizer, Tokens
from comit_bench.tokenizers.comit.codec import decode
from comit_bench.tokenizers.comit.fast import MessageProbe
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.titok.model import PRESETS as TITOK
from comit_bench.tokenizers.titok.model import Titok

EVERY = (0, 1, 2)
TIMES = (0.7, 0.0, 0.3)


def additive() -> Comit:
    model = Comit(replace(PIXEL_NANO, depth=3, width=32, mask_mode="additive"), IdentityVae())
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    return model.requires_grad_(False).eval()


def given(model: Comit, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    codes = model.quantizer(torch.randn(batch, 16, 4, generator=g))
    return codes, torch.randn(batch, 2, generator=g), torch.randn(batch, 3, 32, 32, generator=g)


@pytest.mark.parametrize("path", ["hard", "model"])
@pytest.mark.parametrize("softmax", [False, True])
def test_one_pass_gives_what_single_requests_give(path: str, softmax: bool) -> None:
    model = additive()
    request = AttentionRequest(layers=EVERY, times=TIMES, path=path, softmax=softmax)  # type: ignore[arg-type]
    calls: list[int] = []
    hook = model.predictor.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    maps = decode(model, *given(model), attention=request, finish=False).attention
    hook.remove()
    assert sorted(maps) == [(a, b) for a in range(3) for b in range(3)]
    assert len(calls) == 8 + 7  # the first time at 0.7 or later is the eighth; its unconditional half is idle
    for (a, b), found in maps.items():
        single = replace(request, layers=(EVERY[a],), times=(TIMES[b],))
        alone = decode(model, *given(model), attention=single).attention
        assert list(alone) == [(0, 0)] and torch.equal(alone[0, 0], found)
    assert not torch.equal(maps[0, 0], maps[1, 0]) and not torch.equal(maps[0, 0], maps[0, 1])


def test_maps_are_handed_out_as_they_are_computed() -> None:
    model = additive()
    seen: list[tuple[int, int]] = []
    request = AttentionRequest(layers=(2, 0), times=(0.5, 0.1))
    done = decode(
        model, *given(model), attention=request, receive=lambda layer, time, _: seen.append((layer, time))
    )
    assert seen == [(1, 1), (0, 1), (1, 0), (0, 0)] and not done.attention
    whole = decode(model, *given(model), attention=AttentionRequest(layers=(1,))).latents
    assert torch.equal(done.latents, whole)  # asking does not change what is sampled, and finish=True goes on


def test_two_times_may_fall_on_one_evaluation() -> None:
    model = additive()
    request = AttentionRequest(layers=(1,), times=(0.1, 0.2, 0.9))
    maps = decode(model, *given(model), steps=4, guidance=Guidance(weight=0.0), attention=request).attention
    assert sorted(maps) == [(0, 0), (0, 1)]  # 0, 1/4, 1/2, 3/4: nothing from 0.9 on
    assert torch.equal(maps[0, 0], maps[0, 1])


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (AttentionRequest(layers=(3,)), r"0\.\.2, got \[3\]"),
        (AttentionRequest(layers=(-1,)), r"0\.\.2"),
        (AttentionRequest(layers=()), r"0\.\.2"),
        (AttentionRequest(layers=(1, 1)), "layer is asked for twice"),
        (AttentionRequest(layers=(1,), times=(0.5, 0.5)), "time is asked for twice"),
        (AttentionRequest(layers=(1,), times=()), "at least one time"),
    ],
)
def test_impossible_requests_are_refused(wanted: AttentionRequest, says: str) -> None:
    model = additive()
    with pytest.raises(ValueError, match=says):
        decode(model, *given(model), attention=wanted)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_evaluation_times_are_those_of_the_solver(solver: str) -> None:
    asked: list[float] = []

    def velocity(time: float, y: Tensor) -> Tensor:
        asked.append(time)
        return y

    integrate(velocity, torch.ones(1), steps=7, solver=solver)
    assert evaluation_times(7, solver) == tuple(asked)


def test_integration_ends_when_the_velocity_says_so() -> None:
    out = integrate(lambda t, y: y if t < 0.5 else None, torch.ones(1, dtype=torch.float64), steps=4)
    assert out.item() == 1.25**2
    half = integrate(lambda t, y: y if t < 0.1 else None, torch.ones(1), steps=4, solver="midpoint")
    assert half.item() == 1.0


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize(("name", "shape"), [("comit-nano", (2, 2)), ("titok-nano", (2, 1))])
def test_maps_of_an_image_do_not_depend_on_the_batch(name: str, shape: tuple[int, int]) -> None:
    tokenizer = load_tokenizer(name, device="cpu")
    assert isinstance(tokenizer, AttendingTokenizer)
    images = torch.randint(0, 256, (21, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    tokens = tokenizer.encode(images.to(torch.uint8))
    request = AttentionRequest(layers=(2, 0), times=(0.1, 0.0))
    whole = gather_attention(tokenizer, tokens, request, seeds=range(21))
    assert whole.shape == (*shape, 21, 2, 16, 8, 8)
    parts = []
    for start in range(0, 21, 7):
        rows = slice(start, start + 7)
        offsets = None if tokens.offsets is None else tokens.offsets[rows]
        part = Tokens(None, tokens.codes[rows], offsets)
        parts.append(gather_attention(tokenizer, part, request, seeds=range(start, start + 7)))
    assert torch.equal(torch.cat(parts, dim=2), whole)
    with pytest.raises(ValueError, match=r"layers must be"):
        gather_attention(tokenizer, tokens, AttentionRequest(layers=(9,)), seeds=range(21))


def test_comit_says_when_it_reads() -> None:
    tokenizer = load_tokenizer("comit-nano", device="cpu")
    assert isinstance(tokenizer, AttendingTokenizer) and tokenizer.attention_layers == 4
    assert tokenizer.attention_times((0.7, 0.05)) == pytest.approx((0.7, 0.1), abs=1e-6)
    with pytest.raises(ValueError, match=r"no evaluation has t >= 0\.95 with 10 euler steps"):
        tokenizer.attention_times((0.5, 0.95))
    with pytest.raises(ValueError, match="offsets"):
        tokenizer.attention(
            Tokens(None, torch.zeros(1, 16, 4)), AttentionRequest(layers=(0,)), lambda *_: None, seeds=[0]
        )
    assert not isinstance(load_tokenizer("pixel-oracle", device="cpu"), AttendingTokenizer)


def test_titok_gives_the_weights_of_its_decoder() -> None:
    model = Titok(TITOK["titok-nano"])
    model.init_weights(torch.Generator().manual_seed(0), spread=True)
    codes = model.quantize.codes(torch.arange(32).reshape(2, 16))
    found: list[Tensor] = []
    with torch.no_grad():
        model.decoder.attention(
            codes, AttentionRequest(layers=(1, 0)), lambda layer, time, maps: found.append(maps)
        )
        block = model.decoder.transformer[0]
        x = model.decoder.sequence(codes)
        check = torch.nn.MultiheadAttention(64, 2, batch_first=True)
        check.in_proj_weight.copy_(block.attn.in_proj_weight)  # type: ignore[union-attr, arg-type]
        check.in_proj_bias.copy_(block.attn.in_proj_bias)  # type: ignore[union-attr, arg-type]
        h = block.ln_1(x)  # type: ignore[union-attr, operator]
        weights = check(h, h, h, average_attn_weights=False)[1]  # [B, H, queries, keys]
    wanted = weights[:, :, 1:65, 65:].transpose(-2, -1).reshape(2, 2, 16, 8, 8)
    torch.testing.assert_close(found[0], wanted, atol=1e-6, rtol=1e-4)
    assert len(found) == 2 and float(found[1].sum(dim=2).max()) < 1


# ---------------------------------------------------------------- memory

BATCH = 8


def test_the_counter_counts() -> None:
    with LiveMemory() as memory:
        kept = [torch.zeros(1000, device="meta") for _ in range(3)]
        view = kept[0][:10]
        assert (memory.live, memory.largest) == (12000, 4000)
        del kept
        assert memory.live == 4000 and view.numel() == 10
        del view
    assert (memory.live, memory.peak) == (0, 12000)


def test_only_message_rows_are_formed() -> None:
    """The largest tensor the probe makes is [B, H, M, X] for logits, [B, H, M, N] with the softmax."""
    q = torch.empty(BATCH, 2, 1 + 64 + 16 + 16, 32, device="meta")
    for softmax, columns in ((False, 64), (True, 97)):
        probe = MessageProbe((0,), softmax=softmax, receive=lambda *_: None)
        with LiveMemory() as memory:
            probe.record(0, slice(1, 65), slice(65, 81), q, q, None)
        assert memory.largest == 4 * BATCH * 2 * 16 * columns


def test_xl_at_batch_8_stays_within_8_gb() -> None:
    """All 28 layers at two times, float32, weights included; nothing is kept by the receiver.

    By arithmetic: one layer's logits are 8 x 16 heads x 256 x 256 x 4 B = 34 MB (28 layers at 2 times
    would be 1.9 GB); the widest activations are the MLP's 8 x 769 x 4608 x 4 B = 113 MB and q, k, v at 85 MB.
    """
    with torch.device("meta"):
        model = Comit(PRESETS["comit-xl"], IdentityVae()).requires_grad_(False).eval()
    model = model.to("meta")  # its time frequencies are real even so
    weights = 4 * sum(p.numel() for p in model.parameters())
    codes, offset = torch.empty(BATCH, 256, 6, device="meta"), torch.zeros(BATCH, 2, device="meta")
    noise = torch.empty(BATCH, 4, 32, 32, device="meta")
    seen: list[tuple[int, ...]] = []
    request = AttentionRequest(layers=tuple(range(28)), times=(0.2, 0.0), path="model", softmax=True)
    with LiveMemory() as memory:
        decode(
            model,
            codes,
            offset,
            noise,
            attention=request,
            receive=lambda layer, time, maps: seen.append(tuple(maps.shape)),
            finish=False,
        )
    assert seen == [(BATCH, 16, 256, 16, 16)] * 28 * 2
    assert 3e9 < weights < 4e9
    assert 0.1e9 < memory.peak < 2.5e9 and weights + memory.peak < 8e9
    every = 28 * 2 * 4 * BATCH * 16 * 256 * 256  # what keeping all maps would need
    assert memory.peak < every
