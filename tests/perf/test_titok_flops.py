"""FLOPs per image of every TiTok preset, by torch's flop counter on the meta device.

``plain`` counts the same transformer without the savings: every block computes every row. The original
program also builds one-hot matrices of N columns to quantize; here that is a search without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.nn.vq import VectorQuantizer
from comit_bench.tokenizers.titok.model import PRESETS, Titok, VitSize

BATCH = 8  # the tile of the adapters
# GFLOP per image, encode (with quantizer) and decode; measured by the tests below.
LIMITS = {
    "titok-l-32": (177.5, 369.5),
    "titok-b-64": (55.4, 244.8),
    "titok-s-128": (20.5, 208.2),
    "titok-bl-64": (55.5, 201.6),
    "titok-bl-128": (68.0, 243.3),
    "titok-sl-256": (29.1, 328.9),
    "titok-nano": (0.01345, 0.0264),
}


def gflop(run: Callable[[], object]) -> float:
    """GFLOP per image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / BATCH / 1e9


def meta(name: str) -> Titok:
    with torch.device("meta"):
        return Titok(PRESETS[name]).requires_grad_(False)


def plain(size: VitSize, length: int) -> float:
    """GFLOP of a transformer that computes every row of every block."""
    per_block = 24 * length * size.width**2 + 4 * length**2 * size.width
    return size.layers * per_block / 1e9


@pytest.mark.parametrize("name", list(PRESETS))
def test_encode(name: str) -> None:
    """All but the rows of the last block that nobody reads: q, projection, MLP, attention of 1 + G^2 rows."""
    model, spec = meta(name), PRESETS[name]
    images = torch.empty(BATCH, 3, spec.image_size, spec.image_size, device="meta")
    patches, values = (spec.image_size // spec.encoder_patch) ** 2, 3 * spec.encoder_patch**2
    assert 0.95 * LIMITS[name][0] < gflop(lambda: model.encode(images)) <= LIMITS[name][0]
    width, length = spec.encoder.width, 1 + patches + spec.message_length
    unread = (1 + patches) * (20 * width**2 + 4 * length * width) / 1e9
    ends = 2 * (patches * values * width + spec.message_length * width * spec.code_dim) / 1e9
    assert gflop(lambda: model.vectors(images)) == pytest.approx(
        plain(spec.encoder, length) - unread + ends, rel=1e-6
    )


@pytest.mark.parametrize("name", list(PRESETS))
def test_decode(name: str) -> None:
    """Queries are projected once per call, and the last block computes the patches only."""
    model, spec = meta(name), PRESETS[name]
    codes = torch.empty(BATCH, spec.message_length, spec.code_dim, device="meta")
    assert 0.95 * LIMITS[name][1] < gflop(lambda: model.decode(codes)) <= LIMITS[name][1]
    width, rows = spec.decoder.width, 1 + spec.message_length
    patches, values = (spec.image_size // spec.decoder_patch) ** 2, 3 * spec.decoder_patch**2
    length = patches + rows
    unread = rows * (20 * width**2 + 4 * length * width) / 1e9
    shared = (1 + patches) * 6 * width**2 * (1 - 1 / BATCH) / 1e9
    head = 2 * width * (2 * width + 2 * 1024) if spec.legacy else 2 * width * values
    ends = (2 * spec.message_length * width * spec.code_dim + patches * head) / 1e9
    ends += 0 if spec.legacy else 2 * 81 * spec.image_size**2 / 1e9
    assert gflop(lambda: model.decoder(codes)) == pytest.approx(
        plain(spec.decoder, length) - unread - shared + ends, rel=1e-6
    )


def test_quantizer_costs_one_product_per_row() -> None:
    with torch.device("meta"):
        quantizer = VectorQuantizer(8192, 64, l2_norm=False)
    z = torch.empty(BATCH, 256, 64, device="meta")
    assert gflop(lambda: quantizer(z)) == pytest.approx(2 * 256 * 8192 * 64 / 1e9)


@pytest.mark.perf
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_small_time(benchmark: Any, part: str) -> None:
    spec = PRESETS["titok-s-128"]
    model = Titok(spec).requires_grad_(False).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    images, ids = torch.rand(1, 3, 256, 256), torch.zeros(1, 128, dtype=torch.int64)
    codes = model.quantize.codes(ids)
    run = (lambda: model.encode(images)) if part == "encode" else (lambda: model.decode(codes))
    with torch.inference_mode():
        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
