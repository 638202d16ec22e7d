"""Cost of reconstruction: FLOPs of one guided decoding of COMiT-B at 256 px, and the time of nano's.

Arithmetic is counted on the meta device, as in ``test_comit_flops.py``; the VAE is not part of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.commands.cost import count
from comit_bench.nn.flow import Guidance
from comit_bench.nn.vae import IdentityVae
from comit_bench.tokenizers.comit.adapter import ComitTokenizer
from comit_bench.tokenizers.comit.codec import decode
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import find_tokenizer

BATCH = 2
META = torch.device("meta")


def guided_gflop(steps: int, weight: float) -> float:
    """GFLOP per image of the second decoding (modulations of known times are kept)."""
    with META:
        model = Comit(replace(PRESETS["comit-b"], mask_mode="additive"), IdentityVae())
    model = model.to(META).requires_grad_(False)
    codes = torch.empty(BATCH, 256, 6, device=META)
    y = torch.empty(BATCH, 4, 32, 32, device=META)
    offset, network = torch.zeros(BATCH, 2, device=META), FastPredictor(model.predictor)

    def run() -> None:
        decode(model, codes, offset, y, steps=steps, guidance=Guidance(weight=weight), network=network)

    with torch.no_grad():
        run()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops() / BATCH / 1e9


def test_ten_guided_steps_of_b_cost_ten_pairs_of_passes_and_nothing_twice() -> None:
    guided, one_pass = guided_gflop(10, 7.5), guided_gflop(1, 0.0)
    assert guided == pytest.approx(20 * one_pass, rel=0.01)
    assert 1700 < guided <= 2 * 10 * 145  # the bound of one evaluation in test_comit_flops.py


def test_the_cost_table_counts_what_the_network_does() -> None:
    tokenizer = load_tokenizer("comit-nano", device="cpu")
    assert isinstance(tokenizer, ComitTokenizer)
    model, spec = tokenizer.model, tokenizer.model.spec
    codes = torch.zeros(1, spec.message_length, spec.code_dim)
    y = torch.zeros(1, spec.in_channels, spec.max_input_size, spec.max_input_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decode(model, codes, torch.zeros(1, 2), y)
    cost = count(find_tokenizer("comit-nano"), {}).decode
    assert 1e9 * cost == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.perf
def test_nano_decode_time(benchmark: Any) -> None:
    tokenizer = load_tokenizer("comit-nano", device="cpu")
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    benchmark(lambda: tokenizer.decode(tokens, seeds=range(8)))
