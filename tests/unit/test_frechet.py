"""Distances between sets of features against closed forms, scipy and torch-fidelity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comit_bench.metrics import frechet
from comit_bench.metrics.frechet import (
    Statistics,
    distance_to_point,
    frechet_distance,
    kernel_distance,
    precision_recall,
    statistics_of,
)


def features(seed: int, count: int, dim: int, *, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + shift
    return mixed.astype(np.float32)


def gaussian(mean: list[float], covariance: np.ndarray) -> Statistics:
    return Statistics(101, np.array(mean), covariance * 100)


def test_two_gaussians_with_a_known_distance() -> None:
    # commuting covariances: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, in a rotated basis
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    one = gaussian([1.0, 2.0], turn @ np.diag([4.0, 9.0]) @ turn.T)
    two = gaussian([4.0, -2.0], turn @ np.diag([1.0, 16.0]) @ turn.T)
    assert frechet_distance(one, two) == pytest.approx(9 + 16 + 1 + 1, rel=1e-12)
    assert frechet_distance(two, one) == pytest.approx(27, rel=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(200, 12), (9, 12)])  # the second: singular covariances
def test_agrees_with_the_textbook_formula_and_torch_fidelity(count: int, dim: int) -> None:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    one, two = features(0, count, dim), features(1, count, dim, shift=0.3)
    a, b = Statistics.of(one), Statistics.of(two)
    np.testing.assert_allclose(
        a.covariance, np.cov(one.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-10
    )
    ours = frechet_distance(a, b)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    step = a.mean - b.mean
    textbook = step @ step + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    assert ours == pytest.approx(textbook, rel=1e-5 if count < dim else 1e-9)
    theirs = fid_statistics_to_metric(
        {"mu": a.mean, "sigma": a.covariance}, {"mu": b.mean, "sigma": b.covariance}, verbose=False
    )
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_a_set_is_at_no_distance_from_itself() -> None:
    for count in (5, 300):
        a = Statistics.of(features(2, count, 40))
        assert 0 <= frechet_distance(a, a) < 1e-9 * np.trace(a.covariance)


def test_distance_to_a_point_is_the_limit_of_narrow_sets() -> None:
    a, point = Statistics.of(features(3, 50, 6)), np.arange(6.0)
    narrow = Statistics(50, point, np.eye(6) * 1e-18)
    assert distance_to_point(a, point) == pytest.approx(frechet_distance(a, narrow), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_pieces_in_any_order_give_the_statistics_of_the_whole(sizes: list[int], seed: int) -> None:
    whole = features(seed, sum(sizes), 5, shift=100.0)  # a large mean: sums of squares would lose digits
    pieces = np.split(whole, np.cumsum(sizes)[:-1])
    expected = Statistics.of(whole)
    again = statistics_of(pieces)
    for order in itertools.islice(itertools.permutations(pieces), 6):
        merged = statistics_of(order)
        assert merged.count == expected.count
        np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-13)
        np.testing.assert_allclose(
            merged.scatter, expected.scatter, rtol=1e-9, atol=1e-9 * np.trace(expected.scatter)
        )
    twice = statistics_of([piece.copy() for piece in pieces])  # the same order: the same bits
    assert np.array_equal(twice.mean, again.mean) and np.array_equal(twice.scatter, again.scatter)


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no features"):
        statistics_of([])
    with pytest.raises(ValueError, match="n >= 1"):
        Statistics.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="two images"):
        _ = Statistics.of(np.zeros((1, 3))).covariance


def brute_force_kernel(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within = [
        sum(kernel(s[i], s[j]) for i in range(k) for j in range(k) if i != j) / (k * (k - 1))
        for s, k in ((x, n), (y, m))
    ]
    return sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_by_brute_force_and_as_torch_fidelity_has_it() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    one, two = features(4, 12, 4).astype(np.float64), features(5, 12, 4, shift=0.5).astype(np.float64)
    value, spread = kernel_distance(one, two)
    assert value == pytest.approx(brute_force_kernel(one, two), rel=1e-10) and spread == 0
    theirs = kid_features_to_metric(
        torch.from_numpy(one), torch.from_numpy(two), kid_subsets=1, kid_subset_size=12, verbose=False
    )
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_kernel_distance_of_one_distribution_is_zero_on_average_and_its_subsets_are_fixed() -> None:
    rng = np.random.default_rng(6)
    values = [kernel_distance(rng.normal(size=(40, 3)), rng.normal(size=(40, 3)))[0] for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert min(values) < 0  # unbiased estimates fall on both sides
    one, two = features(7, 50, 3), features(8, 50, 3)
    first = kernel_distance(one, two, subsets=5, size=20)
    assert first == kernel_distance(one, two, subsets=5, size=20)
    assert first != kernel_distance(one, two, subsets=5, size=20, seed=1) and first[1] > 0


def test_precision_and_recall_by_hand() -> None:
    reference = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    # the balls to the first neighbour: [-1, 1], [0, 2], [1, 3], [9, 11], [10, 12]
    other = np.array([[0.5], [2.9], [3.1], [12.0], [-5.0]])
    precision, _ = precision_recall(reference, other, neighbours=1)
    assert precision == pytest.approx(60.0)
    # around the others: radii 2.4, 0.2, 0.2, 8.9, 5.5 cover 0, 1, 2 (from 0.5), 10, 11 (from 12)
    _, recall = precision_recall(reference, other, neighbours=1)
    assert recall == pytest.approx(100.0)
    far = precision_recall(reference, other + 1000, neighbours=1)
    assert far == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 5"):
        precision_recall(reference, other, neighbours=5)


def test_precision_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = features(9, 40, 3), features(10, 40, 3, shift=0.2)
    whole = precision_recall(one, two)
    monkeypatch.setattr(frechet, "CHUNK", 7)
    assert precision_recall(one, two) == whole
