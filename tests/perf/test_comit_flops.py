"""FLOPs of COMiT-B at 256 px per image, predictor only, by torch's flop counter.

Counted on the meta device: arithmetic is a property of the program, not of the machine. Modulations of
times that were seen before are kept (a solver grid, a whole data set), so every count is the second call.
Original program, for comparison (spec): 153 GFLOP per call, 2053 for global + 2 adaptive crops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comit_plain import noise_from_tensors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.nn.flow import Guidance
from comit_bench.nn.vae import DctVae, IdentityVae
from comit_bench.tokenizers.comit.codec import (
    decode,
    encode,
    one_step_decode,
    update,
)
from comit_bench.tokenizers.comit.crops import parse_policy
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit

BATCH = 2
META = torch.device("meta")


def comit_b(mask_mode: str = "additive") -> Comit:
    with META:
        model = Comit(replace(PRESETS["comit-b"], mask_mode=mask_mode), IdentityVae())
    return model.to(META).requires_grad_(False)


def gflop(run: Callable[[], object]) -> float:
    """GFLOP per image of the second run."""
    with torch.no_grad():
        run()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops() / BATCH / 1e9


def encode_call(model: Comit, side: int, *, prior: bool) -> float:
    images = torch.arange(BATCH, device=META)
    latents = {side: (images, torch.empty(BATCH, 4, side, side, device=META))}
    message = model.prior(BATCH, META)
    message = message[:1, :1] if prior else message
    network = FastPredictor(model.predictor)
    return gflop(lambda: update(network, latents, message, torch.zeros(BATCH, 2, device=META)))


def onestep_call(model: Comit) -> float:
    codes = torch.empty(BATCH, 256, 6, device=META)
    y = torch.empty(BATCH, 4, 32, 32, device=META)
    offset, network = torch.zeros(BATCH, 2, device=META), FastPredictor(model.predictor)
    return gflop(lambda: one_step_decode(model, codes, offset, y, network=network))


def test_global_encode() -> None:
    assert 100 < encode_call(comit_b(), 32, prior=True) <= 145


def test_global_and_two_adaptive_crops_need_five_calls_of_640_gflop() -> None:
    model = comit_b()
    total = encode_call(model, 32, prior=True) + 2 * encode_call(model, 12, prior=False)
    assert 500 < total + 2 * onestep_call(model) <= 640

    nano = Comit(PRESETS["comit-nano"], DctVae(4)).requires_grad_(False)
    nano.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    calls: list[Any] = []
    nano.predictor.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    noise = noise_from_tensors(adaptive=torch.randn(3, 2, 12, 8, 8))
    encode(nano, torch.rand(2, 3, 32, 32), parse_policy("global+adaptive:3"), noise=noise)
    assert len(calls) == 5


@pytest.mark.parametrize(("mask_mode", "limit"), [("additive", 145.0), ("hard", 94.0)])
@pytest.mark.parametrize(("weight", "passes"), [(0.0, 1), (1.0, 1), (7.5, 2)])
def test_decode_evaluation(mask_mode: str, limit: float, weight: float, passes: int) -> None:
    model = comit_b(mask_mode)
    codes = torch.empty(BATCH, 256, 6, device=META)
    y = torch.empty(BATCH, 4, 32, 32, device=META)

    offset, network = torch.zeros(BATCH, 2, device=META), FastPredictor(model.predictor)

    def run() -> Tensor:
        settings = Guidance(weight=weight)
        return decode(model, codes, offset, y, steps=4, guidance=settings, network=network).latents

    per_evaluation = gflop(run) / passes / 4
    assert 0.6 * limit < per_evaluation <= limit


@pytest.mark.perf
@pytest.mark.parametrize("policy", ["global", "raster:9", "global+adaptive:3"])
def test_nano_encode_time(benchmark: Any, policy: str) -> None:
    model = Comit(PRESETS["comit-nano"], DctVae(4)).requires_grad_(False).eval()
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    images = torch.rand(8, 3, 32, 32)
    noise = noise_from_tensors(adaptive=torch.randn(3, 8, 12, 8, 8))
    with torch.inference_mode():
        network = FastPredictor(model.predictor)
        benchmark(lambda: encode(model, images, parse_policy(policy), noise=noise, network=network))
