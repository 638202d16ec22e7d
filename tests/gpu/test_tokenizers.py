"""Tokenizers on CUDA: nothing on the wrong device, the CPU's tokens, and no waiting where it would cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_maps import gather_attention
from cuda_device import Cuda
from small_tokenizers import ROUNDING, SMALL_TOKENIZERS, pictures, streams

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.precision import exact_products
from comit_bench.tokenizers.base import AttendingTokenizer, autocast
from comit_bench.tokenizers.comit import codec as comit_codec
from comit_bench.tokenizers.flextok import codec as flextok_codec
from comit_bench.tokenizers.selftok import codec as selftok_codec
from comit_bench.tokenizers.selftok.model import Schedule

CPU = torch.device("cpu")
IDS, LEVELS = 0.995, 0.98  # least share of equal ids and of equal bytes on a real device, float32
POLICIES = ("global+raster:3", "random:2", "global+adaptive:2", "adaptive-shared:2", "order:4,0")
DETERMINISTIC = ("comit-nano", "titok-nano", "vq-grid-nano")


@pytest.mark.parametrize("name", SMALL_TOKENIZERS)
def test_tokens_and_images_are_those_of_the_cpu(cuda: Cuda, name: str) -> None:
    plain: Any = SMALL_TOKENIZERS[name](device=CPU)
    images = pictures(plain, 3)
    wanted = plain.encode(images, generators=streams(3))
    tokenizer: Any = SMALL_TOKENIZERS[name](device=cuda.device)
    if name == "comit-nano":
        plain.steps = tokenizer.steps = 2
    given = images if name == "comit-nano" else images.to(cuda.device)
    tokens = tokenizer.encode(given, generators=streams(3))
    if tokens.ids is not None:
        cuda.check(tokens.ids, wanted.ids, share=IDS)
        cuda.check(tokenizer.codes_from_ids(tokens.ids.cpu()), tokens.codes.cpu(), within=1e-6)
    made = tokenizer.decode(wanted, seeds=range(3))  # from the host, as a store on disk hands them over
    cuda.check(made, plain.decode(wanted, seeds=range(3)), share=LEVELS, within=1)
    assert tokenizer.decode(tokens, seeds=range(3)).is_cuda


@pytest.mark.parametrize("name", [n for n in ROUNDING if n in ("comit-sd", "alit-vae", "flextok", "selftok")])
def test_bfloat16_runs_and_its_messages_are_codes(cuda: Cuda, name: str) -> None:
    tokenizer: Any = SMALL_TOKENIZERS[name](device=cuda.device, dtype=torch.bfloat16)
    tokens = tokenizer.encode(pictures(tokenizer, 2), generators=streams(2))
    assert tokens.codes.dtype == torch.float32 and tokens.codes.is_cuda
    assert torch.equal(tokenizer.codes_from_ids(tokens.ids).cpu(), tokens.codes.cpu())
    assert tokenizer.decode(tokens, seeds=range(2)).dtype == torch.uint8


@pytest.mark.parametrize("policy", POLICIES)
def test_cropping_policies_draw_on_the_host(cuda: Cuda, policy: str) -> None:
    """The same generators give the same crops and the same noise on every device."""
    plain: Any = SMALL_TOKENIZERS["comit-nano"](device=CPU)
    images = pictures(plain, 3)
    wanted = plain.encode(images, policy=policy, generators=streams(3))
    tokenizer: Any = SMALL_TOKENIZERS["comit-nano"](device=cuda.device)
    tokens = tokenizer.encode(images, policy=policy, generators=streams(3))
    cuda.check(tokens.ids, wanted.ids, share=0.98)
    cuda.check(tokens.offsets, wanted.offsets, within=1e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ids_do_not_depend_on_the_batch_and_repeat(cuda: Cuda, name: str) -> None:
    tokenizer: Any = SMALL_TOKENIZERS[name](device=cuda.device)
    count = 64 if cuda.real else 3
    images = pictures(tokenizer, count)
    whole = tokenizer.encode(images).ids.cpu()
    for size in (1, 7) if cuda.real else (1,):
        parts = [tokenizer.encode(part).ids.cpu() for part in images.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(tokenizer.encode(images).ids.cpu(), whole)


@pytest.mark.parametrize("name", ["comit-nano", "titok-nano", "alit"])
def test_attention_maps(cuda: Cuda, name: str) -> None:
    plain: Any = SMALL_TOKENIZERS[name](device=CPU)
    tokenizer: Any = SMALL_TOKENIZERS[name](device=cuda.device)
    assert isinstance(tokenizer, AttendingTokenizer)
    tokens = plain.encode(pictures(plain, 2))
    request = AttentionRequest(layers=(1, 0), times=(0.1, 0.0), softmax=True)
    wanted = gather_attention(plain, tokens, request, seeds=range(2))
    found = gather_attention(tokenizer, tokens, request, seeds=range(2))
    torch.testing.assert_close(found, wanted, atol=1e-4 if cuda.real else 1e-5, rtol=0)
    seen: list[bool] = []
    tokenizer.attention(tokens, request, lambda *args: seen.append(args[-1].is_cuda), seeds=range(2))
    assert seen and all(seen)


def test_sampling_does_not_wait_for_the_device(cuda: Cuda) -> None:
    """The loops over solver steps and crops; the first run fills what is kept."""
    comit: Any = SMALL_TOKENIZERS["comit-sd"](device=cuda.device)
    tokens = comit.encode(pictures(comit, 2))
    noise = torch.stack([comit.noise(seed) for seed in range(2)]).to(cuda.device)
    policy = comit.policy("global+raster:3")
    pixels = pictures(comit, 2).to(cuda.device).float().div(127.5).sub(1)
    flextok: Any = SMALL_TOKENIZERS["flextok"](device=cuda.device)
    codes = flextok.encode(pictures(flextok, 2)).codes
    latent = torch.zeros(2, *flextok._latent_shape, device=cuda.device)
    selftok: Any = SMALL_TOKENIZERS["selftok"](device=cuda.device)
    sent = selftok.encode(pictures(selftok, 2)).codes
    assert isinstance(selftok.schedule, Schedule)
    side = selftok.model.spec.latent_side
    start = torch.zeros(2, selftok.model.spec.channels, side, side, device=cuda.device)

    def run() -> None:
        comit_codec.decode(comit.model, tokens.codes, tokens.offsets, noise, steps=3)
        comit_codec.encode(comit.model, pixels, policy)
        flextok.model.vae.decode(latent)

    def loops() -> None:
        flextok_codec.sample(flextok.model.decoder, codes, latent, sampling=flextok.sampling)
        selftok_codec.sample(selftok.model, sent, start, schedule=selftok.schedule, steps=3)

    with torch.inference_mode(), exact_products(cuda.device):
        run()
        with cuda.without_waiting():
            run()
        if cuda.mode is not None:  # their times travel once per run, whatever the number of steps
            cuda.mode.syncs.clear()
            loops()
            assert len(cuda.mode.syncs) == 2
        else:
            loops()


def test_float32_is_exact_and_tf32_is_not(cuda: Cuda) -> None:
    """On a real device the same convolution inside and outside of what adapters open."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 64, 16, 16, generator=g) + 0.5
    w = torch.rand(64, 64, 3, 3, generator=g) + 0.5
    want = torch.nn.functional.conv2d(x.double(), w.double())
    a, b = x.to(cuda.device), w.to(cuda.device)

    def error() -> float:
        got = torch.nn.functional.conv2d(a, b).cpu().double()
        return float(((got - want) / want).abs().max())

    with autocast(cuda.device, torch.float32), torch.inference_mode():
        assert error() < 1e-5
    if cuda.real and torch.cuda.get_device_capability() >= (8, 0):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        try:
            assert error() > 1e-5  # else the test above says nothing
        finally:
            torch.backends.cudnn.allow_tf32 = before
