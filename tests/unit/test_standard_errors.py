"""Standard errors: the join of images and seeds against simulations with known truth, up to the record."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comit_bench.seeding import binomial_error, over_seeds
from comit_bench.tasks.result import over_images, over_set, same_for_all
from comit_bench.tasks.result import over_seeds as share_over_seeds

# (spread of seeds, of images, of both together)
WORLDS = [(0.0, 1.0, 0.0), (0.3, 1.0, 0.0), (1.0, 0.2, 0.5), (0.1, 1.0, 1.0)]


@pytest.mark.parametrize(("of_seeds", "of_images", "of_both"), WORLDS)
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_means_over_images_vary_as_the_standard_error_says(
    of_seeds: float, of_images: float, of_both: float, seeds: int
) -> None:
    """Other seeds and other images, 3000 times: the variance of the mean is what the records say."""
    rng, n, times = np.random.default_rng(1), 40, 3000
    found, claimed = [], []
    for _ in range(times):
        values = of_seeds * rng.normal(size=(seeds, 1)) + of_images * rng.normal(size=(1, n))
        metric = over_images(values + of_both * rng.normal(size=(seeds, n)), unit="dB")
        assert metric.stderr is not None
        found.append(metric.value)
        claimed.append(metric.stderr**2)
    truth = of_seeds**2 / seeds + of_images**2 / n + of_both**2 / (seeds * n)
    assert np.var(found) == pytest.approx(truth, rel=0.1)
    assert np.mean(claimed) == pytest.approx(truth + of_both**2 / (seeds * n), rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_shares_vary_as_the_standard_error_says(seeds: int) -> None:
    """Probes of different skill on one report set: a probe is right where its skill suffices."""
    rng, n, skill = np.random.default_rng(2), 200, 0.1
    found, claimed, images_only = [], [], []
    for _ in range(3000):
        good = np.clip(0.6 + skill * rng.uniform(-1, 1, size=(seeds, 1)), 0, 1)
        right = 100 * (rng.uniform(size=(1, n)) < good).mean(axis=1)
        metric = share_over_seeds(right.tolist(), n)
        assert metric.stderr is not None
        found.append(metric.value)
        claimed.append(metric.stderr**2)
        images_only.append(binomial_error(metric.value, n) ** 2)
    assert np.mean(claimed) == pytest.approx(np.var(found), rel=0.15)
    assert np.mean(images_only) < 0.85 * np.var(found)  # what the records said before


def test_the_error_of_noise_that_is_new_for_every_image_is_never_too_small() -> None:
    """Seeds that guess on their own: too large by sqrt(1 + S), as the docstring says."""
    rng, n, seeds = np.random.default_rng(3), 100, 3
    right = 100 * rng.integers(0, 2, size=(3000, seeds, n)).mean(axis=2)
    claimed = [share_over_seeds(row.tolist(), n).stderr or 0.0 for row in right]
    ratio = np.sqrt(np.mean(np.square(claimed))) / np.std(right.mean(axis=1))
    assert ratio == pytest.approx(math.sqrt(1 + seeds), rel=0.05)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=6),
    st.integers(1, 10_000),
    st.sampled_from(["share", "mAP", "images", "set", "jackknife"]),
)
def test_the_error_is_that_of_the_images_and_of_the_seeds(values: list[float], n: int, kind: str) -> None:
    there = {
        "share": lambda: share_over_seeds(values, n),
        "mAP": lambda: share_over_seeds(values, n, share=False),
        "images": lambda: over_images(np.array(values)[:, None] + np.arange(n)[None] % 7, unit="dB"),
        "set": lambda: over_set(values, n, higher_is_better=False),
        "jackknife": lambda: over_set(values, n, unit="%", sampling=1.5),
    }[kind]()
    if kind in ("set", "mAP") or (kind == "images" and n == 1):
        assert there.stderr is None
        return
    assert there.stderr is not None
    variance = 0.0 if len(values) == 1 else float(np.var(values, ddof=1)) / len(values)
    rest = there.stderr**2 - variance
    expected = {"share": there.value * (100 - there.value) / n, "jackknife": 2.25}
    if kind in expected:
        assert rest == pytest.approx(expected[kind], abs=1e-6)
    else:
        assert rest == pytest.approx(float(np.var(np.arange(n) % 7, ddof=1)) / n, abs=1e-6)


def test_what_fits_nothing_has_the_error_of_its_images() -> None:
    once = {
        "top1": share_over_seeds([20.0], 100, chance=5.0),
        "mAP": share_over_seeds([7.0], 100, share=False),
    }
    found = same_for_all([0, 1, 2], once).metrics
    assert found["top1"].per_seed == (20.0,) * 3 and found["top1"].std == 0
    assert found["top1"].stderr == pytest.approx(4.0) and found["top1"].chance == 5.0
    assert found["mAP"].stderr is None


def test_the_join_by_hand() -> None:
    assert over_seeds([50.0, 52.0, 54.0], 3.0) == (52.0, 2.0, pytest.approx(math.sqrt(9 + 4 / 3)))
    assert over_seeds([50.0], 3.0) == (50.0, None, 3.0)
    assert over_seeds([50.0, 52.0], None).stderr is None
    assert binomial_error(0, 9) == binomial_error(100, 9) == 0
    nothing: list[Any] = []
    with pytest.raises(ValueError, match="at least one value"):
        over_seeds(nothing, None)
