"""Codebook use: counts, the yardstick of even ids, mutual information against its null."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from message_inputs import inputs_of, spec_of, write_recipe
from sklearn.metrics import mutual_info_score

import comit_bench
from comit_bench.errors import UsageError
from comit_bench.recipes.kinds import CodebookSpec
from comit_bench.tasks.codebook import (
    Codebook,
    count_use,
    entropy_bits,
    even_entropy,
    even_unused,
    excess_information,
    sample_pairs,
    summary,
)


def even_ids(count: int, length: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (count, length))


@pytest.mark.parametrize(
    ("counts", "bits"), [([4], 0), ([1, 1], 1), ([2, 0, 2, 2, 2], 2), ([3, 1], 0.8112781245)]
)
def test_entropy(counts: list[int], bits: float) -> None:
    assert entropy_bits(np.array(counts)) == pytest.approx(bits)


@pytest.mark.parametrize(("draws", "vocab"), [(1, 3), (4, 2), (5, 3), (3, 1)])
def test_even_ids_by_listing_all_draws(draws: int, vocab: int) -> None:
    every = [np.bincount(draw, minlength=vocab) for draw in product(range(vocab), repeat=draws)]
    assert even_entropy(draws, vocab) == pytest.approx(np.mean([entropy_bits(counts) for counts in every]))
    assert even_unused(draws, vocab) == pytest.approx(np.mean([(counts == 0).mean() for counts in every]))


@pytest.mark.parametrize(("draws", "vocab"), [(1000, 1000), (50_000, 100), (500, 64_000)])
def test_even_ids_by_drawing(draws: int, vocab: int) -> None:
    rng = np.random.default_rng(0)
    drawn = [entropy_bits(np.bincount(rng.integers(0, vocab, draws))) for _ in range(40)]
    spread = np.std(drawn) / np.sqrt(40)
    assert even_entropy(draws, vocab) == pytest.approx(np.mean(drawn), abs=5 * spread + 1e-9)


def test_even_ids_are_at_chance_in_every_metric() -> None:
    result = summary(count_use(even_ids(800, 12, 500), 500, CodebookSpec()))
    for name, slack in (("perplexity", 5.0), ("entropy", 0.02), ("unused", 0.1)):
        assert result.metrics[name].value == pytest.approx(result.metrics[name].chance, abs=slack)
    spread = result.details["pairs"]["null_std"]
    assert abs(result.metrics["mutual_information"].value) < 4 * spread < 5
    assert result.details["pairs"]["determined"] == 64


def test_counts_are_those_of_a_set_and_the_same_for_every_seed() -> None:
    use = count_use(even_ids(50, 3, 7), 7, CodebookSpec())
    thrice, once = summary(use, 3), summary(use)
    assert thrice.outcomes is None
    for name, metric in thrice.metrics.items():
        assert metric.per_seed == once.metrics[name].per_seed * 3 and metric.stderr is None
        assert metric.std == 0 and once.metrics[name].std is None and metric.n == 50


def test_plain_mutual_information_is_that_of_scikit_learn_and_far_from_zero() -> None:
    ids = even_ids(300, 2, 400)
    found = excess_information(ids, np.array([[0, 1]]), shuffles=8, seed=0)
    assert found.plain[0] == pytest.approx(mutual_info_score(ids[:, 0], ids[:, 1]) / np.log(2))
    assert found.plain[0] > 6.5  # although nothing depends on anything
    assert abs(found.share()) < 0.2


@pytest.mark.parametrize("vocab", [4, 100, 1000])
def test_a_copied_position_is_all_redundant(vocab: int) -> None:
    ids = even_ids(500, 2, vocab)
    ids[:, 1] = (vocab - 1) - ids[:, 0]
    found = excess_information(ids, np.array([[0, 1]]), shuffles=8, seed=0)
    assert found.share() == pytest.approx(1)


def test_half_of_a_position_is_partly_redundant() -> None:
    ids = even_ids(4000, 3, 8)
    ids[:, 1] = ids[:, 0] // 2 * 2 + ids[:, 2] % 2  # two of three bits from position 0
    found = excess_information(ids, np.array([[0, 1]]), shuffles=8, seed=0)
    assert found.excess[0] == pytest.approx(2, abs=0.02)
    assert found.share() == pytest.approx(2 / 3, abs=0.01)


def test_constant_and_unique_ids_leave_no_room() -> None:
    ids = np.stack([np.arange(50), np.arange(50)[::-1], np.zeros(50, np.int64)], axis=1)
    use = count_use(ids, 64, CodebookSpec(pairs=3))
    assert not use.information.determined.any()
    result = summary(use)
    assert result.metrics["mutual_information"].value == 0
    assert result.details["pairs"]["determined"] == 0
    assert use.entropy.tolist() == pytest.approx([np.log2(50), np.log2(50), 0])
    assert use.used.tolist() == [50, 50, 1]


def test_unused_ids_over_the_whole_split() -> None:
    ids = np.array([[0, 1], [1, 2], [2, 0]])
    use = count_use(ids, 10, CodebookSpec())
    assert use.unused == 0.7
    assert use.unused_of_possible == 0.5  # six draws could use six ids
    assert use.perplexity == pytest.approx(3)
    assert count_use(ids, 3, CodebookSpec()).unused_of_possible == 0


@given(st.integers(2, 12), st.integers(1, 80), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_pairs_are_different_and_sorted(length: int, count: int, seed: int) -> None:
    pairs = sample_pairs(length, count, seed)
    assert len(pairs) == min(count, length * (length - 1) // 2)
    assert (pairs[:, 0] < pairs[:, 1]).all() and pairs.max() < length
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_one_position_has_no_pairs() -> None:
    result = summary(count_use(even_ids(20, 1, 5), 5, CodebookSpec()))
    assert result.metrics["mutual_information"].value == 0


def test_the_order_of_images_changes_no_count() -> None:
    ids = even_ids(200, 5, 30)
    ids[:, 1] = ids[:, 0] // 3
    one, other = (summary(count_use(x, 30, CodebookSpec(shuffles=64))) for x in (ids, ids[::-1]))
    for name in ("perplexity", "entropy", "unused"):
        assert one.metrics[name].value == pytest.approx(other.metrics[name].value)
    gap = one.metrics["mutual_information"].value - other.metrics["mutual_information"].value
    assert abs(gap) < 0.5  # other images are shuffled onto each other


def test_the_executor_and_what_it_refuses() -> None:
    codes = torch.zeros(40, 6, 2)
    ids = torch.from_numpy(even_ids(40, 6, 9))
    labels, classes = np.zeros(40), ("a",)
    inputs = inputs_of(spec_of("codebook"), codes, labels, classes, ids=ids, vocab=9)
    result = Codebook().run(inputs)
    assert result is not None and set(result.metrics) == {
        "perplexity",
        "entropy",
        "unused",
        "mutual_information",
    }
    assert Codebook().refuses(inputs.spec, inputs.the_tokenizer()) is None
    continuous = inputs_of(spec_of("codebook"), codes, labels, classes)
    assert "continuous" in str(Codebook().refuses(continuous.spec, continuous.the_tokenizer()))
    with pytest.raises(UsageError, match="entropy"):
        Codebook().run(
            inputs_of(spec_of("codebook", main_metric="entropi"), codes, labels, classes, ids=ids, vocab=9)
        )


def test_from_images_to_a_record(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipes", "codebook", "recognition", 60)
    options = {"include": (tmp_path / "recipes",), "cache": tmp_path / "cache", "device": "cpu"}
    found = [
        comit_bench.evaluate(
            ["comit-nano"], ["small"], output=tmp_path / str(batch), batch_size=batch, limit=40, **options
        )[0]
        for batch in (7, 64)
    ]
    assert found[0].metrics == found[1].metrics
    assert found[0].metrics["entropy"].n == 40
    assert 0 < found[0].metrics["entropy"].value <= np.log2(40)
    assert len(found[0].details["entropy_by_position"]) == 16
    assert comit_bench.evaluate(["pixel-oracle"], ["small"], output=tmp_path / "none", **options) == []
    assert not list((tmp_path / "none").rglob("*.json"))
