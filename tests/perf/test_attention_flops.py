"""Cost of reading COMiT-B's attention at 256 px: one guided 10-step decoding, all layers, three times.

FLOPs are counted on the meta device, as in ``test_comit_flops.py``; the benchmark runs the nano network,
which every machine can.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.vae import DctVae, IdentityVae
from comit_bench.tokenizers.comit.codec import decode
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit

BATCH = 2
EVERY = AttentionRequest(layers=tuple(range(12)), times=(0.5, 0.2, 0.8))


def gflop(model: Comit, attention: AttentionRequest | None) -> float:
    """GFLOP per image of the second run."""
    codes = torch.empty(BATCH, 256, 6, device="meta")
    offset = torch.zeros(BATCH, 2, device="meta")
    noise, network = torch.empty(BATCH, 4, 32, 32, device="meta"), FastPredictor(model.predictor)

    def run() -> None:
        decode(
            model, codes, offset, noise, attention=attention, receive=lambda *_: None, finish=False,
            network=network,
        )  # fmt: skip

    with torch.no_grad():
        run()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops() / BATCH / 1e9


def test_reading_maps_costs_little_beside_decoding() -> None:
    with torch.device("meta"):
        model = Comit(replace(PRESETS["comit-b"], mask_mode="hard"), IdentityVae())
    model = model.to("meta").requires_grad_(False)
    whole = gflop(model, None)
    read = gflop(model, EVERY)
    maps = 3 * 12 * 2 * 256 * 256 * 768 / 1e9  # q k' of the message rows, all layers and times
    assert maps < 4
    # nine conditional and eight unconditional evaluations of twenty; the last block reads all rows thrice
    assert 17 / 20 * whole < read < 17 / 20 * whole + maps + 3 * 4
    once = gflop(model, replace(EVERY, times=(0.0,)))
    assert once < 0.06 * whole  # one conditional evaluation of twenty


@pytest.mark.perf
@pytest.mark.parametrize("times", [(0.5,), (0.5, 0.2, 0.8)])
def test_nano_attention_time(benchmark: Any, times: tuple[float, ...]) -> None:
    model = Comit(PRESETS["comit-nano"], DctVae(4)).requires_grad_(False).eval()
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    g = torch.Generator().manual_seed(0)
    codes, offset = torch.randn(8, 16, 4, generator=g), torch.zeros(8, 2)
    noise = torch.randn(8, 12, 8, 8, generator=g)
    request = AttentionRequest(layers=(0, 1, 2, 3), times=times)
    with torch.inference_mode():
        benchmark(
            lambda: decode(
                model, codes, offset, noise, attention=request, receive=lambda *_: None, finish=False
            )
        )


@pytest.mark.perf
def test_overlap_time(benchmark: Any) -> None:
    """All 256 maps of one image against its 256 px mask, four shares."""
    from comit_bench.metrics.overlap import overlaps

    maps = torch.randn(256, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[60:180, 80:200] = True
    benchmark(lambda: overlaps(maps, mask, (10, 20, 30, 40), resize="bilinear"))
