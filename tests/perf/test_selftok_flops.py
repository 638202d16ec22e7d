"""FLOPs of SelfTok at 256 px per image, by torch's flop counter, and the plain form for comparison.

Counted on the meta device: arithmetic is a property of the program, not of the machine. The plain form is
what the released program does in a step: it shows the denoiser all tokens behind a mask, computes the
modulations of all token positions again, and runs the encoder to obtain the mask. ``TABLE`` and the limits
below are what this program needs, in GFLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.tokenizers.selftok.adapter import VAE_ENCODE_FLOPS, SelftokTokenizer, _info
from comit_bench.tokenizers.selftok.codec import (
    constants,
    encode_latents,
    render,
    sample,
    time_grid,
    visible_counts,
)
from comit_bench.tokenizers.selftok.config import ASSUMED_1024
from comit_bench.tokenizers.selftok.model import Schedule, Selftok, variant

BATCH = 2
META = torch.device("meta")
# name: encoder, velocity with all and with 20 visible tokens, renderer
TABLE = {
    "selftok-512": (65.8, 1104.2, 385.5, 1083.9),
    "selftok-1024": (147.5, 1924.8, 385.5, 1886.0),
}
SCHEDULES = {"selftok-512": Schedule(), "selftok-1024": ASSUMED_1024}
pytestmark = pytest.mark.parametrize("name", list(TABLE))


@cache
def model(name: str, decoder: str = "diffusion") -> Selftok:
    with META:
        return Selftok(variant(name, decoder)).to(META).requires_grad_(False)


def latents() -> torch.Tensor:
    return torch.empty(BATCH, 16, 32, 32, device=META)


def codes(name: str) -> torch.Tensor:
    return torch.empty(BATCH, model(name).spec.tokens, 16, device=META)


def gflop(run: Callable[[], object]) -> float:
    """GFLOP per image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / BATCH / 1e9


def velocity(name: str, visible: int) -> float:
    network = model(name).model
    own, state = network.context_states(), network.time_states(torch.empty(1, device=META))
    context = torch.empty(BATCH, visible, 1536, device=META)
    return gflop(lambda: network(latents(), context, own, state))


def near(got: float, limit: float) -> bool:
    return 0.98 * limit < got <= limit


def test_encoder(name: str) -> None:
    network = model(name)
    fixed = constants(network)
    spent = gflop(lambda: encode_latents(network, latents(), fixed))
    assert near(spent, TABLE[name][0]), spent

    def plain() -> None:
        """Every row of the last block, the first queries of every image, modulations for every call."""
        x, q = network.encoder.embed(latents()), network.encoder.query_tokens.expand(BATCH, -1, -1)
        for block, state in zip(network.encoder.blocks, network.encoder.states(), strict=True):
            x, q = block(x, q, state)
        network.encoder.codes(network.encoder.quantizer.ids(network.encoder.quantizer.project(q)))

    assert spent < gflop(plain)


def test_velocity(name: str) -> None:
    tokens = model(name).spec.tokens
    spent = [velocity(name, visible) for visible in (tokens, 20)]
    assert all(near(got, limit) for got, limit in zip(spent, TABLE[name][1:3], strict=True)), spent


def test_sampling_pays_for_visible_tokens_and_once_for_the_rest(name: str) -> None:
    network, steps = model(name), 2
    tokens = network.spec.tokens
    own = network.model.context_states()
    spent = gflop(
        lambda: sample(network.model, codes(name), latents(), schedule=SCHEDULES[name], steps=steps, own=own)
    )
    counts = visible_counts(time_grid(steps)[:-1], SCHEDULES[name], tokens)
    assert counts[0] == tokens > counts[1]
    times = gflop(lambda: network.model.time_states(torch.empty(steps, device=META)))
    embedded = gflop(lambda: network.model.context(codes(name)))
    assert spent == pytest.approx(sum(velocity(name, k) for k in counts) + times + embedded, rel=1e-6)
    again = gflop(lambda: network.model.context_states())
    plain = steps * (velocity(name, tokens) + embedded + again + times / steps + TABLE[name][0])
    assert spent < 0.85 * plain


def test_renderer(name: str) -> None:
    network = model(name, "renderer")
    fixed = constants(network)
    spent = gflop(lambda: render(network.model, codes(name), fixed))
    assert near(spent, TABLE[name][3]), spent
    assert spent < gflop(lambda: render(network.model, codes(name)))


def test_encode_estimate(name: str) -> None:
    """What the plan shows agrees with what is counted."""
    network = model(name)
    assert network.vae is not None
    pixels = gflop(lambda: network.vae.encode(torch.empty(BATCH, 3, 256, 256, device=META)))
    assert pytest.approx(pixels, rel=0.005) == VAE_ENCODE_FLOPS * 256**2 / 1e9
    tokenizer = SelftokTokenizer(network, _info(network, name, "none"), device=META)
    fixed = constants(network)
    counted = gflop(lambda: encode_latents(network, latents(), fixed)) + pixels
    assert tokenizer.encode_flops(None) / 1e9 == pytest.approx(counted, rel=0.01)
