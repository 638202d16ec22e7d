"""FLOPs of ALIT at 256 px per image, by torch's flop counter on the meta device.

Arithmetic is a property of the program, not of the machine. What is held here: with halting off nothing is
decoded while encoding, later iterations and unread rows are not computed, decoding costs one iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.tokenizers.alit.config import VARIANTS
from comit_bench.tokenizers.alit.model import Alit, AlitSpec

BATCH, N = 2, 256
META = torch.device("meta")


@cache
def network(name: str) -> Alit:
    with META:
        return Alit(VARIANTS[name].spec).requires_grad_(False)


def gflop(run: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / BATCH / 1e9


def images() -> Tensor:
    return torch.empty(BATCH, 3, 256, 256, device=META)


def encode(model: Alit, iterations: int, *, halting: bool = False) -> float:
    uniforms = [torch.empty(BATCH, N, device=META)] * 7 if halting else None
    return gflop(lambda: list(model.iterate(images(), iterations=iterations, uniforms=uniforms)))


def block(n: int, read: int, width: int) -> float:
    """One block that reads ``read`` of ``n`` rows."""
    linear = 2 * width**2 * (2 * n + 2 * read + 8 * read)
    return (linear + 4 * n * read * width) / 1e9


def encoder(spec: AlitSpec, iterations: int) -> float:
    total = 0.0
    for t in range(iterations):
        latents = spec.first_tokens * (t + 1)
        n = 1 + N + latents
        last = latents if t + 1 == iterations else n
        total += (spec.layers - 1) * block(n, n, spec.width) + block(n, last, spec.width)
    return total


@cache
def base_encode(name: str) -> float:
    model = network(name)
    patches = gflop(lambda: model.patch_embed(images()))
    return gflop(lambda: model.base.encode(images())) + patches


@pytest.mark.parametrize("name", ["alit-small", "alit-base", "alit-semilarge", "alit-small-vae"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_encoding_computes_what_is_read_and_decodes_nothing(name: str, iterations: int) -> None:
    model = network(name)
    got = encode(model, iterations)
    want = base_encode(name) + encoder(model.spec, iterations)
    heads = got - want  # projections to codes and the search in the codebook
    assert 0 < heads < 0.01 * want


def test_halting_adds_one_decoder_per_halt_and_no_pixels() -> None:
    model = network("alit-small")
    spec = model.spec
    plain, halted = encode(model, 3), encode(model, 3, halting=True)
    decoders = 0.0
    for t in range(2):
        n = 1 + N + 32 * (t + 1)
        decoders += (spec.layers - 1) * block(n, n, spec.width) + block(n, N, spec.width)
    shared = 6 * spec.width**2 * (1 + N) / 1e9 * (1 - 1 / BATCH) * 2  # rows equal for all images
    logits = 2 * (2 * N * (2 * spec.width) * (spec.width + 1024)) / 1e9
    known = 2 * N * 1024 * 256 / 1e9
    assert halted - plain == pytest.approx(decoders - shared + logits + known, rel=2e-3)


@pytest.mark.parametrize("iterations", [1, 8])
def test_decoding_costs_the_asked_iteration_only(iterations: int) -> None:
    model = network("alit-small")
    spec, latents = model.spec, 32 * iterations
    codes = torch.empty(BATCH, latents, 12, device=META)
    pixels = gflop(lambda: model.render(torch.empty(BATCH, N, 256, device=META)))
    got = gflop(lambda: model.reconstruct(codes)) - pixels
    n = 1 + N + latents
    blocks = (spec.layers - 1) * block(n, n, spec.width) + block(n, N, spec.width)
    shared = 6 * spec.width**2 * (1 + N) / 1e9 * (1 - 1 / BATCH)
    head = 2 * N * (2 * spec.width) * (spec.width + 1024) / 1e9 + 2 * N * 1024 * 256 / 1e9
    assert got == pytest.approx(blocks - shared + head, rel=2e-3)


def test_nearest_neighbours_hold_no_one_hot_matrix() -> None:
    """The search holds a bounded number of distances, whatever the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from comit_bench.nn.vq import CHUNK_ENTRIES, VectorQuantizer

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    quantizer = VectorQuantizer(4096, 12, l2_norm=True)
    vectors = torch.randn(8000, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Watch():
        quantizer.ids(vectors)
    assert largest <= CHUNK_ENTRIES < vectors.shape[0] * 4096
