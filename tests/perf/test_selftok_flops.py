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

from comit_bench.commands.cost import encode_gflop
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.selftok.codec import (
    encode_latents,
    render,
    sample,
    time_grid,
    visible_counts,
)
from comit_bench.tokenizers.selftok.config import ASSUMED_1024
from comit_bench.tokenizers.selftok.fast import FastSelftok
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


def kept(network: Selftok) -> FastSelftok:
    """With everything that is kept in place."""
    fast = FastSelftok(network)
    assert fast.query_states and fast.context_states
    if network.model.renders:
        assert fast.render_state.blocks
    return fast


def velocity(name: str, visible: int) -> float:
    fast = kept(model(name))
    context, state = (
        torch.empty(BATCH, visible, 1536, device=META),
        fast.time_states(torch.empty(1, device=META)),
    )
    return gflop(lambda: fast.decode(latents(), context, state))


def near(got: float, limit: float) -> bool:
    return 0.98 * limit < got <= limit


def test_encoder(name: str) -> None:
    network = model(name)
    fast, encoder = kept(network), network.encoder
    spent = gflop(lambda: encode_latents(network, latents(), fast))
    assert near(spent, TABLE[name][0]), spent
    plain = gflop(lambda: encoder.codes(encoder.quantizer.ids(encoder.quantizer.project(encoder(latents())))))
    assert spent < plain


def test_velocity(name: str) -> None:
    tokens = model(name).spec.tokens
    spent = [velocity(name, visible) for visible in (tokens, 20)]
    assert all(near(got, limit) for got, limit in zip(spent, TABLE[name][1:3], strict=True)), spent


def test_sampling_pays_for_visible_tokens_and_once_for_the_rest(name: str) -> None:
    network, steps = model(name), 2
    tokens = network.spec.tokens
    given, fast = (codes(name), latents()), kept(network)
    spent = gflop(lambda: sample(network, *given, schedule=SCHEDULES[name], steps=steps, network=fast))
    counts = visible_counts(time_grid(steps)[:-1], SCHEDULES[name], tokens)
    assert counts[0] == tokens > counts[1]
    times = gflop(lambda: fast.time_states(torch.empty(steps, device=META)))
    embedded = gflop(lambda: network.model.context(codes(name)))
    assert spent == pytest.approx(sum(velocity(name, k) for k in counts) + times + embedded, rel=1e-6)
    plain = steps * (gflop(lambda: network.model(latents(), codes(name), torch.ones(1, device=META))))
    assert spent < 0.85 * (plain + steps * TABLE[name][0])


def test_renderer(name: str) -> None:
    network = model(name, "renderer")
    fast = kept(network)
    spent = gflop(lambda: render(network, codes(name), fast))
    assert near(spent, TABLE[name][3]), spent
    assert spent < gflop(lambda: render(network, codes(name)))


def test_the_adapter_adds_nothing_to_its_parts(name: str) -> None:
    network = model(name)
    assert network.vae is not None
    pixels = gflop(lambda: network.vae.encode(torch.empty(BATCH, 3, 256, 256, device=META)))
    assert pytest.approx(pixels, rel=0.005) == 4.165e6 * 256**2 / 1e9
    tokenizer = load_tokenizer(name, weights="random", device="meta")
    fast = kept(network)
    counted = gflop(lambda: encode_latents(network, latents(), fast)) + pixels
    assert encode_gflop(tokenizer, "global") == pytest.approx(counted, rel=0.01)
