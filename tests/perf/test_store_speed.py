"""How long a random training batch takes out of the token store (no limits: machines differ)."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from comit_bench.data.tokens.store import TokenStore
from comit_bench.pipeline.tokenize import SHARD_SIZE

ROWS, LENGTH = 512, 256


@pytest.mark.perf
@pytest.mark.parametrize("shards", [16, 256])
def test_random_batch(benchmark: BenchmarkFixture, tmp_path: Path, shards: int) -> None:
    store = TokenStore.open(
        tmp_path,
        {"perf": shards},
        count=shards * 256,
        message_length=LENGTH,
        vocab_size=64000,
        code_dim=6,
        shard_size=256,
    )
    random = np.random.default_rng(0)
    ids = random.integers(0, 64000, (store.count, LENGTH))
    for shard in store.missing_shards():
        rows = store.shard_range(shard)
        store.write_shard(shard, ids=ids[rows.start : rows.stop])
    store.ids(range(store.count))  # warm
    batches = cycle([random.integers(0, store.count, ROWS) for _ in range(64)])

    out = benchmark(lambda: store.ids(next(batches)))
    assert out.shape == (ROWS, LENGTH)
    assert np.array_equal(store.ids(range(ROWS)), ids[:ROWS])


@pytest.mark.perf
def test_random_batch_of_imagenet_train(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """1,281,167 messages in shards as the benchmark cuts them; 660 MB are written."""
    store = TokenStore.open(
        tmp_path,
        {"perf": "imagenet"},
        count=1_281_167,
        message_length=LENGTH,
        vocab_size=64000,
        code_dim=6,
        shard_size=SHARD_SIZE,
    )
    random = np.random.default_rng(0)
    for shard in store.missing_shards():
        store.write_shard(shard, ids=random.integers(0, 64000, (len(store.shard_range(shard)), LENGTH)))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    benchmark.extra_info["overhead"] = size / (2 * store.count * LENGTH) - 1
    assert size < 1.05 * 2 * store.count * LENGTH
    for start in range(0, store.count, 20_000):  # warm
        store.ids(range(start, min(start + 20_000, store.count)))
    batches = cycle([random.integers(0, store.count, ROWS) for _ in range(256)])
    assert benchmark(lambda: store.ids(next(batches))).shape == (ROWS, LENGTH)
