"""Standard errors, intervals and tests: against known truths, scipy, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from comit_bench.metrics.statistics import difference, estimate, holm, influences, mcnemar

Floats = NDArray[np.float64]
# (spread of units, of images, of both together)
WORLDS = [(0.0, 1.0, 0.0), (0.3, 1.0, 0.0), (1.0, 0.2, 0.5), (0.1, 1.0, 1.0)]


def row(
    rng: np.random.Generator, units: int, n: int, spreads: tuple[float, float, float], clusters: int = 0
) -> Floats:
    """[units, n]; with ``clusters``, half of the images' variance is common to the images of one."""
    of_units, of_images, of_both = spreads
    images = of_images * rng.normal(size=n)
    if clusters:
        images = math.sqrt(0.5) * (images + of_images * rng.normal(size=clusters)[np.arange(n) % clusters])
    noise = of_both * rng.normal(size=(units, n))
    found: Floats = of_units * rng.normal(size=(units, 1)) + images + noise
    return found


@pytest.mark.parametrize("spreads", WORLDS)
@pytest.mark.parametrize("units", [2, 3, 5])
def test_means_vary_as_the_standard_error_says(spreads: tuple[float, float, float], units: int) -> None:
    """Other units and other images, 3000 times: the variance of the mean is the mean claimed variance."""
    rng, n = np.random.default_rng(1), 40
    found = [estimate(row(rng, units, n, spreads)) for _ in range(3000)]
    of_units, of_images, of_both = spreads
    truth = of_units**2 / units + of_images**2 / n + of_both**2 / (units * n)
    assert np.var([one.value for one in found]) == pytest.approx(truth, rel=0.1)
    claimed = np.mean([one.stderr**2 for one in found if one.stderr is not None])
    assert claimed == pytest.approx(truth, rel=0.15)  # no variance is ever negative: a little too large


def test_images_of_one_cluster_are_not_independent() -> None:
    """100 images of 10 clusters: without the clusters the error would be a third of the truth."""
    rng, names = np.random.default_rng(2), [str(i % 10) for i in range(100)]
    found, blind, values = [], [], []
    for _ in range(2000):
        one = rng.normal(size=10)[np.arange(100) % 10] + 0.3 * rng.normal(size=100)
        values.append(one.mean())
        found.append(estimate(one[None], names).stderr or 0.0)
        blind.append(estimate(one[None]).stderr or 0.0)
    assert np.mean(np.square(found)) == pytest.approx(np.var(values), rel=0.1)
    assert np.mean(np.square(blind)) < 0.2 * np.var(values)


def test_shares_vary_as_the_standard_error_says() -> None:
    """Probes of different skill on one report set; images alone would not be enough."""
    rng, n, units = np.random.default_rng(3), 200, 3
    found, alone = [], []
    for _ in range(2000):
        skill = np.clip(0.6 + 0.1 * rng.uniform(-1, 1, size=(units, 1)), 0, 1)
        right = (rng.uniform(size=(1, n)) < skill).astype(np.float64)
        found.append(estimate(right))
        alone.append(estimate(right.mean(axis=0)[None]).stderr or 0.0)
    variance = np.var([one.value for one in found])
    assert np.mean([(one.stderr or 0.0) ** 2 for one in found]) == pytest.approx(variance, rel=0.15)
    assert np.mean(np.square(alone)) < 0.85 * variance


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.integers(2, 50))
def test_units_that_differ_by_a_constant(levels: list[float], n: int) -> None:
    """No rest: the squared error is that of the images plus that of the units."""
    values = np.array(levels)[:, None] + np.arange(n)[None] % 7
    found = estimate(values)
    of_units = float(np.var(levels, ddof=1)) / len(levels) if len(levels) > 1 else 0.0
    of_images = float(np.var(np.arange(n) % 7, ddof=1)) / n
    assert found.stderr is not None
    assert found.stderr**2 == pytest.approx(of_units + of_images, rel=1e-6, abs=1e-9)
    assert found.value == pytest.approx(values.mean())
    assert (found.std is None) == (len(levels) == 1)


def test_by_hand() -> None:
    values = np.array([[50.0, 54.0], [52.0, 52.0], [57.0, 53.0]])
    means, images = values.mean(axis=1), values.mean(axis=0)
    rest = values - means[:, None] - images + values.mean()
    of_rest = (rest**2).sum() / (2 * 1) / 6
    of_units, of_images = means.var(ddof=1) / 3, images.var(ddof=1) / 2
    found = estimate(values)
    assert found.std == pytest.approx(means.std(ddof=1))
    assert found.stderr == pytest.approx(math.sqrt(of_images + max(of_units - of_rest, 0)))
    assert estimate(np.full((3, 5), 2.0)) == (2.0, 0.0, 0.0)
    assert estimate(np.ones((3, 1))).stderr is None
    assert estimate(np.arange(4.0)[None], ["a"] * 4).stderr is None  # one cluster
    share = (np.arange(100) < 20).astype(np.float64)[None]
    assert estimate(share).stderr == pytest.approx(math.sqrt(0.2 * 0.8 / 99))
    assert estimate(np.tile(share, (3, 1))).stderr == pytest.approx(math.sqrt(0.2 * 0.8 / 99))


@pytest.mark.parametrize("values", [np.empty((0, 3)), np.empty((2, 0)), np.ones(3)])
def test_nothing_has_no_mean(values: Floats) -> None:
    with pytest.raises(ValueError, match=r"\[units, images\]"):
        estimate(values)


# ------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("spreads", "units", "clusters"),
    [
        *((spreads, units, 0) for spreads in [*WORLDS, (0.1, 1.0, 0.5)] for units in (3, 5)),
        ((0.0, 1.0, 0.0), 1, 0),
        ((0.0, 1.0, 0.5), 3, 20),
        ((0.2, 1.0, 1.0), 3, 20),
        ((0.1, 1.0, 0.3), 2, 45),
    ],
)
def test_intervals_hold_the_truth_in_95_of_100_cases(
    spreads: tuple[float, float, float], units: int, clusters: int
) -> None:
    rng, n, times, truth = np.random.default_rng(4), 90, 1500, 0.3
    names = [str(i % clusters) for i in range(n)] if clusters else None
    inside = 0
    for _ in range(times):
        common = 2 * rng.normal(size=n)  # how difficult the images are, for both
        a, b = (common + row(rng, units, n, spreads, clusters) for _ in range(2))
        found = difference(a + truth, b, names)
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / times <= 0.97


def test_a_bootstrap_over_three_seeds_is_too_short() -> None:
    """Why there is none: images and seeds drawn again, as percentiles, hold the truth far less often."""
    rng, n, units, times = np.random.default_rng(5), 60, 3, 300
    inside = analytic = 0
    for _ in range(times):
        a, b = (row(rng, units, n, (0.3, 1.0, 0.3)) for _ in range(2))
        images = rng.integers(n, size=(300, n))
        means = []
        for side in (a, b):
            chosen = rng.integers(units, size=(300, units))
            weights = np.zeros((300, units))
            np.add.at(weights, (np.arange(300)[:, None], chosen), 1 / units)
            of_images = np.zeros((300, n))
            np.add.at(of_images, (np.arange(300)[:, None], images), 1 / n)
            means.append(np.einsum("bu,un,bn->b", weights, side, of_images))
        low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
        inside += low <= 0 <= high
        found = difference(a, b)
        analytic += found.low <= 0 <= found.high
    assert inside / times < 0.91 < 0.92 < analytic / times


def test_one_seed_agrees_with_the_bootstrap_over_images() -> None:
    rng = np.random.default_rng(6)
    common = rng.normal(size=400)
    a, b = common + 0.2 + 0.5 * rng.normal(size=400), common + 0.5 * rng.normal(size=400)
    found = difference(a[None], b[None])
    again = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        rng=np.random.default_rng(0),
    )
    width = found.high - found.low
    assert found.low == pytest.approx(again.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(again.confidence_interval.high, abs=0.05 * width)
    assert found.stderr == pytest.approx(again.standard_error, rel=0.05)


def test_one_seed_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=50) + 0.3, rng.normal(size=50)
    found, known = difference(a[None], b[None]), stats.ttest_rel(a, b)
    ends = known.confidence_interval(0.95)
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    swapped = difference(b[None], a[None])
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
    assert swapped.p == pytest.approx(found.p)


def test_the_smallest_difference_is_found_in_80_of_100_cases() -> None:
    rng, n = np.random.default_rng(8), 80
    spreads = (0.1, 1.0, 0.5)
    size = float(np.median([difference(row(rng, 3, n, spreads), row(rng, 3, n, spreads)).smallest
                            for _ in range(300)]))  # fmt: skip
    found = [
        difference(size + row(rng, 3, n, spreads), row(rng, 3, n, spreads)).p <= 0.05 for _ in range(1500)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_equal_and_constant_differences() -> None:
    same = np.tile(np.arange(10.0), (3, 1))
    assert difference(same, same) == (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    found = difference(same + 1, same)
    assert found[:3] == (1.0, 1.0, 1.0) and found.p == pytest.approx(2 / 2**10)
    assert all(math.isfinite(value) for value in found)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="3 and 4 images"):
        difference(np.ones((1, 3)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="at least two images"):
        difference(np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="at least two images"):
        difference(np.ones((1, 3)), np.ones((1, 3)), ["a"] * 3)


# ------------------------------------------------------------------------------------------- tests


def test_mcnemar_is_the_binomial_test_of_those_who_disagree() -> None:
    rng = np.random.default_rng(9)
    for _ in range(20):
        a, b = (rng.uniform(size=(1, 60)) < share for share in (0.7, 0.5))
        wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
        known = stats.binomtest(wins, wins + losses).pvalue
        assert mcnemar(a.astype(np.float64), b.astype(np.float64)) == pytest.approx(known)
    assert mcnemar(np.ones((1, 5)), np.ones((1, 5))) == 1.0


def test_mcnemar_with_seeds_counts_the_images_that_a_side_wins() -> None:
    a = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    b = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(2, 3).pvalue)


def test_holm_by_hand() -> None:
    """Holm's own example of steps: 4 x .01, 3 x .0133, 2 x .03, and never less than the one before."""
    assert holm([0.03, 0.01, 0.04, 0.0133]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_textbook_procedure_does(values: list[float]) -> None:
    """Step down: reject while the k-th smallest p is at most .05 / (m - k + 1), until one is not."""
    rejected, left = set(), len(values)
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        if values[index] * left > 0.05:
            break
        rejected.add(index)
        left -= 1
    assert {i for i, p in enumerate(holm(values)) if p <= 0.05} == rejected


def test_influences_have_the_value_for_a_mean_and_the_jackknifes_error() -> None:
    """Of a mean they are the values themselves; of a ratio their error is that of the jackknife."""
    rng = np.random.default_rng(10)
    x, y = rng.normal(5, 1, size=40), rng.normal(3, 1, size=40)
    left_out = np.array([np.delete(x, i).mean() for i in range(40)])
    assert influences(float(x.mean()), left_out) == pytest.approx(x)
    ratio = np.array([np.delete(x, i).mean() / np.delete(y, i).mean() for i in range(40)])
    found = influences(float(x.mean() / y.mean()), ratio)
    assert found.mean() == pytest.approx(x.mean() / y.mean())
    jackknife = math.sqrt(39 / 40 * ((ratio - ratio.mean()) ** 2).sum())
    assert estimate(found[None]).stderr == pytest.approx(jackknife)
