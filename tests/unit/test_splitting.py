"""The pair-disjoint split keeps its promises on any graph, and drops nothing that could have been kept."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comit_bench.data.splitting import Pair, PairSplit, check_pair_disjoint, pair_disjoint
from comit_bench.errors import CorruptFileError, UsageError


@st.composite
def graphs(draw: Any, most: int = 12) -> dict[Pair, int]:
    """Pairs of up to ``most`` categories, each with 1 to 50 images."""
    names = [f"c{i:02d}" for i in range(draw(st.integers(2, most)))]
    pairs = draw(st.sets(st.sampled_from(list(itertools.combinations(names, 2)))))
    return {pair: draw(st.integers(1, 50)) for pair in sorted(pairs)}


def categories(pairs: Any) -> set[str]:
    return {name for pair in pairs for name in pair}


@settings(max_examples=150, deadline=None)
@given(graphs(), st.floats(0.05, 0.95), st.integers(0, 3))
def test_promises(counts: dict[Pair, int], share: float, seed: int) -> None:
    found = pair_disjoint(counts, share, seed=seed)
    assert not found.train & found.val
    assert categories(found.train) == categories(found.val)
    check_pair_disjoint(sorted(found.train), sorted(found.val), "here")
    kept = {pair for pair in counts if not set(pair) & found.dropped.keys()}
    assert found.train | found.val == kept, "every pair of kept categories is somewhere"
    assert categories(counts) == categories(kept) | found.dropped.keys(), "who is not covered is reported"
    total = sum(counts[pair] for pair in kept)
    assert found.target == share
    assert found.share == (sum(counts[pair] for pair in found.val) / total if total else 0.0)


@settings(max_examples=100, deadline=None)
@given(graphs(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_order_does_not_matter(counts: dict[Pair, int], seed: int, shuffler: random.Random) -> None:
    entries = list(counts.items())
    shuffler.shuffle(entries)
    turned = {(b, a) if shuffler.random() < 0.5 else (a, b): n for (a, b), n in entries}
    assert pair_disjoint(turned, 0.2, seed=seed) == pair_disjoint(counts, 0.2, seed=seed)


def coverable(names: frozenset[str], pairs: list[Pair]) -> bool:
    """By trying all divisions: can all of ``names`` be on both sides?"""
    inside = [pair for pair in pairs if set(pair) <= names]
    return any(
        categories(chosen) == names == categories(set(inside) - set(chosen))
        for size in range(len(inside) + 1)
        for chosen in itertools.combinations(inside, size)
    )


@settings(max_examples=80, deadline=None)
@given(graphs(most=5))
def test_no_category_is_dropped_without_need(counts: dict[Pair, int]) -> None:
    found = pair_disjoint(counts, 0.3)
    names, pairs = sorted(categories(counts)), sorted(counts)
    largest = max(
        (size for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)
         if coverable(frozenset(chosen), pairs)),
        default=0,
    )  # fmt: skip
    assert len(categories(found.train)) == largest


@settings(max_examples=60, deadline=None)
@given(graphs(most=5), st.floats(0.1, 0.9))
def test_no_single_move_comes_nearer_to_the_target(counts: dict[Pair, int], share: float) -> None:
    found = pair_disjoint(counts, share)
    kept = found.train | found.val
    total = sum(counts[pair] for pair in kept)
    goal = round(share * total)
    distance = abs(sum(counts[p] for p in found.val) - goal)
    for pair in kept:
        val = found.val ^ {pair}
        if categories(val) == categories(kept) == categories(kept - val):
            assert abs(sum(counts[p] for p in val) - goal) >= min(distance, total // 200 + 1)


def test_like_mscoco_the_target_is_met() -> None:
    """80 categories, one of them in most images, frequencies over four orders of magnitude."""
    draw = random.Random(0)
    names = [f"category {i:02d}" for i in range(80)]
    weights = [1 / (i + 1) for i in range(80)]
    counts = Counter(
        tuple(sorted(pair))
        for pair in (draw.choices(names, weights, k=2) for _ in range(40_000))
        if pair[0] != pair[1]
    )
    found = pair_disjoint(counts, 0.2)
    total = sum(counts.values())
    assert abs(found.share - 0.2) <= 0.005
    assert imbalance(found, counts) < 0.02 * total
    assert not found.dropped
    assert len(categories(found.val)) == 80
    assert pair_disjoint(counts, 0.2, seed=1).val != found.val


def imbalance(found: PairSplit, counts: Mapping[Pair, int]) -> float:
    """By hand: how far each category's val share is from the target."""
    kept = found.train | found.val
    whole = Counter({c: sum(counts[p] for p in kept if c in p) for c in categories(kept)})
    val = Counter({c: sum(counts[p] for p in found.val if c in p) for c in categories(kept)})
    return sum((val[c] - found.target * n) ** 2 / n for c, n in whole.items())


@settings(max_examples=60, deadline=None)
@given(graphs(most=6), st.floats(0.1, 0.9))
def test_no_exchange_balances_categories_better(counts: dict[Pair, int], share: float) -> None:
    found = pair_disjoint(counts, share)
    kept = found.train | found.val
    goal = round(share * sum(counts[pair] for pair in kept))
    distance, level = abs(sum(counts[p] for p in found.val) - goal), imbalance(found, counts)
    for leaving, entering in itertools.product(found.val, found.train):
        val = (found.val - {leaving}) | {entering}
        if not categories(val) == categories(kept) == categories(kept - val):
            continue
        if abs(sum(counts[p] for p in val) - goal) <= max(distance, sum(counts[p] for p in kept) // 200):
            assert imbalance(replace(found, val=val, train=kept - val), counts) >= level - 1e-6


def nearest(counts: Mapping[Pair, int], pairs: list[Pair], goal: int) -> int:
    """By trying all divisions: how near to ``goal`` val images one can come."""
    number = np.arange(1 << len(pairs))
    covered = np.ones(len(number), dtype=bool)
    for name in categories(pairs):
        own = sum(1 << i for i, pair in enumerate(pairs) if name in pair)
        covered &= ((number & own) != 0) & ((number & own) != own)
    images = sum(((number >> i) & 1) * counts[pair] for i, pair in enumerate(pairs))
    return int(np.abs(images[covered] - goal).min())


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_few_pairs_come_as_near_to_the_target_as_any_split(share: float, equal: bool) -> None:
    draw, far = random.Random(0), []
    for _ in range(20):
        names = [f"c{i}" for i in range(draw.randint(6, 9))]
        every = list(itertools.combinations(names, 2))
        chosen = draw.sample(every, min(len(every), draw.randint(len(names) + 2, 17)))
        counts = {pair: 1 if equal else draw.randint(1, 30) for pair in chosen}
        found = pair_disjoint(counts, share)
        kept = sorted(found.train | found.val)
        if not kept:
            continue
        total = sum(counts[pair] for pair in kept)
        gap = abs(sum(counts[pair] for pair in found.val) - round(share * total))
        if gap > max(nearest(counts, kept, round(share * total)), total // 200):
            far.append(counts)
    assert not far


def test_equal_counts_give_every_category_the_same_share() -> None:
    """Ten categories, all 45 pairs alike, ten pairs to val: each category is in exactly two of them."""
    names = [str(i) for i in range(10)]
    counts = dict.fromkeys(itertools.combinations(names, 2), 20)
    for seed in range(5):
        found = pair_disjoint(counts, 10 / 45, seed=seed)
        assert set(Counter(c for pair in found.val for c in pair).values()) == {2}


@pytest.mark.parametrize(
    ("pairs", "dropped"),
    [
        (["ab"], {"a", "b"}),  # one pair
        (["ab", "bc"], {"a", "b", "c"}),  # a chain falls apart from its ends
        (["ab", "bc", "ac"], {"a", "b", "c"}),  # a triangle: sides cannot alternate
        (["ab", "bc", "cd", "ad"], set()),  # a square: they can
        (["ab", "bc", "ac", "ad", "de", "ae"], set()),  # two triangles that share a corner
        (["ab", "bc", "cd", "ad", "ax"], {"x"}),  # a square with a tail
        (["ab", "bc", "ac", "wx", "xy", "yz", "wz"], {"a", "b", "c"}),  # a triangle beside a square
        (["ab", "ac", "ad", "bc", "bd", "cd"], set()),  # all odd
    ],
)
def test_what_can_be_covered(pairs: list[str], dropped: set[str]) -> None:
    found = pair_disjoint({(p[0], p[1]): 10 for p in pairs}, 0.5)
    assert found.dropped.keys() == dropped
    assert all(len(why) > 10 for why in found.dropped.values())


def test_the_share_that_cover_demands_is_reported() -> None:
    """Half of a square must be on each side, whatever was asked for."""
    found = pair_disjoint({("a", "b"): 10, ("b", "c"): 10, ("c", "d"): 10, ("a", "d"): 10}, 0.1)
    assert (found.target, found.share) == (0.1, 0.5)


def test_wrong_input() -> None:
    with pytest.raises(UsageError, match="no pair"):
        pair_disjoint({("a", "a"): 1}, 0.2)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            pair_disjoint({("a", "b"): 1}, share)
    assert pair_disjoint({("a", "b"): 0}, 0.2).dropped == {}


def test_the_check_finds_what_is_wrong() -> None:
    square = [("a", "b"), ("c", "d")], [("b", "c"), ("a", "d")]
    check_pair_disjoint(*square, "here")
    with pytest.raises(CorruptFileError, match="in train and in val"):
        check_pair_disjoint([*square[0], ("b", "c")], square[1], "here")
    with pytest.raises(CorruptFileError, match="one side only"):
        check_pair_disjoint([*square[0], ("a", "x")], square[1], "here")
