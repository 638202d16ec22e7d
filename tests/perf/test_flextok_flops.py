"""FLOPs of FlexTok at 256 px per image, by torch's flop counter, and the plain form for comparison.

Counted on the meta device: arithmetic is a property of the program, not of the machine. The plain form
computes every row of all P + 256 tokens, as the released program does; ``TABLE`` and the limits below are
what this program needs: GFLOP for the encoder with 256 / 64 / 1 tokens, for one conditional velocity with as
many, and for one unconditional velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from flextok_plain import plain_condition
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.commands.cost import encode_gflop
from comit_bench.tokenizers.flextok.codec import Sampling, encode_latents, sample
from comit_bench.tokenizers.flextok.model import PRESETS, FlexTok
from comit_bench.tokenizers.load import load_tokenizer

BATCH = 2
META = torch.device("meta")
TOKENS = (256, 64, 1)
# name: encoder per number of tokens, conditional velocity per number of tokens, unconditional velocity
TABLE = {
    "flextok-d12-d12": ((91.1, 54.4, 42.9), (93.3, 57.6, 46.4), 46.2),
    "flextok-d18-d18": ((302.8, 183.6, 145.8), (308.0, 190.9, 153.5), 152.9),
    "flextok-d18-d28": ((302.8, 183.6, 145.8), (1140.2, 709.2, 570.1), 567.9),
}
PLAIN = {
    "flextok-d12-d12": (94.2, 96.6),
    "flextok-d18-d18": (309.8, 315.3),
    "flextok-d18-d28": (309.8, 1157.4),
}
pytestmark = pytest.mark.parametrize("name", list(TABLE))


@cache
def model(name: str) -> FlexTok:
    with META:
        return FlexTok(PRESETS[name]).to(META).requires_grad_(False)


@cache
def vae_encoder() -> float:
    """The VAE is the same for all."""
    network = model("flextok-d12-d12")
    return gflop(lambda: network.vae.encode(torch.empty(BATCH, 3, 256, 256, device=META)))


def latents() -> torch.Tensor:
    return torch.empty(BATCH, 16, 32, 32, device=META)


def codes(tokens: int) -> torch.Tensor:
    return torch.empty(BATCH, tokens, 6, device=META)


def gflop(run: Callable[[], object]) -> float:
    """GFLOP per image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / BATCH / 1e9


def test_encoder(name: str) -> None:
    network, (limits, _, _) = model(name), TABLE[name]
    spent = [gflop(lambda k=k: encode_latents(network, latents(), k)) for k in TOKENS]
    assert all(0.98 * limit < got <= limit for got, limit in zip(spent, limits, strict=True)), spent

    def plain() -> None:
        h = network.encoder.sequence(latents(), 256)
        network.encoder.head(network.encoder.trunk(h, 256, registers_only=False)[:, -256:])

    assert spent[0] < PLAIN[name][0] <= gflop(plain)


def test_velocity(name: str) -> None:
    network, (_, limits, null_limit) = model(name), TABLE[name]
    decoder, x = network.decoder, latents()
    state = decoder.time_states(torch.empty(25, device=META)).at(0)
    spent = [gflop(lambda k=k: decoder(x, decoder.condition(codes(k)), state)) for k in TOKENS]
    assert all(0.98 * limit < got <= limit for got, limit in zip(spent, limits, strict=True)), spent
    null = gflop(lambda: decoder(x, decoder.null(), state))
    assert 0.98 * null_limit < null <= null_limit

    def plain() -> None:
        given = plain_condition(decoder, codes(256))
        h = decoder.trunk(decoder.sequence(x, given), given, state, patches_only=False)
        decoder.module_dict["dec_to_patches"](h[:, :256], state.head, 16)

    assert max(spent[0], 2 * null) < PLAIN[name][1] <= gflop(plain)


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (7.5, 2)])
def test_sampling_pays_for_velocities_and_once_for_times(name: str, guidance: float, passes: int) -> None:
    network, (_, limits, null_limit) = model(name), TABLE[name]
    decoder, steps, tokens = network.decoder, 2, TOKENS[1]
    settings = Sampling(steps=steps, guidance=guidance)
    spent = gflop(lambda: sample(decoder, codes(tokens), latents(), sampling=settings))
    times = gflop(lambda: decoder.time_states(torch.empty(steps, device=META)))
    registers = gflop(lambda: decoder.condition(codes(tokens)))
    assert times < 0.01 * spent  # for the whole batch, not per image
    assert spent <= times + registers + steps * (limits[1] + (passes - 1) * null_limit)


def test_the_adapter_adds_nothing_to_its_parts(name: str) -> None:
    """For every length."""
    network = model(name)
    assert pytest.approx(vae_encoder(), rel=0.005) == 4.165e6 * 256**2 / 1e9
    for tokens in TOKENS:
        tokenizer = load_tokenizer(name, weights="random", device="meta", tokens=tokens)
        counted = gflop(lambda k=tokens: encode_latents(network, latents(), k)) + vae_encoder()
        assert encode_gflop(tokenizer, "global") == pytest.approx(counted, rel=0.01)
