"""Random numbers of training: the published generator, evenly distributed, a function of their place."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from comit_bench.errors import UsageError
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.draws import _GAMMA, _mixed, below, normals, normals_on, uniforms, words
from comit_bench.train.sampling import ABSENT, WHOLE, crop_counts, flips, plan_step

MANY = np.arange(4096)


def config(*overrides: str) -> TrainConfig:
    return load_config("comit-nano-no-srepa", ("curriculum=[]", *overrides))


def test_words_are_those_of_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published with the generator in many languages."""
    start = np.uint64(1234567) + _GAMMA * np.arange(1, 4, dtype=np.uint64)
    assert _mixed(start).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_words_are_even_and_strangers_to_each_other() -> None:
    drawn = words(0, "a", MANY, 16)
    assert len(np.unique(drawn)) == drawn.size
    bits = np.unpackbits(drawn.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float64)  # [65536, 64]
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / len(bits) ** 0.5
    flat = uniforms(drawn)
    assert flat.min() >= 0 and flat.max() < 1
    assert stats.kstest(flat.ravel(), "uniform").pvalue > 1e-3
    limit = 5 / len(bits) ** 0.5  # standard errors of a correlation
    for name, one, other in (
        ("words of a sample", flat[:, :-1], flat[:, 1:]),
        ("neighbouring samples", flat[:-1], flat[1:]),
        ("neighbouring steps", uniforms(words(0, "a/1", MANY, 16)), uniforms(words(0, "a/2", MANY, 16))),
        ("seeds", flat, uniforms(words(1, "a", MANY, 16))),
        ("streams", flat, uniforms(words(0, "b", MANY, 16))),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < limit, name
    together = np.histogram2d(flat[:, 0], flat[:, 1], bins=8)[0].ravel()
    assert stats.chisquare(together).pvalue > 1e-3


def test_integers_and_normals_have_their_distributions() -> None:
    drawn = below(words(0, "i", MANY, 8), 21)
    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=21)).pvalue > 1e-3
    noise = normals(0, "n", MANY, 33)
    assert noise.shape == (4096, 33) and noise.dtype == np.float32 and np.isfinite(noise).all()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    pair = np.corrcoef(noise[:, 0], noise[:, 1])[0, 1], np.corrcoef(noise[:, 0] ** 2, noise[:, 1] ** 2)[0, 1]
    assert max(map(abs, pair)) < 5 / 64  # the two numbers of one word


def test_a_device_draws_the_same_normals() -> None:
    numbers = np.array([0, 5, 2**40], np.int64)
    drawn = normals_on(torch.device("cpu"), 3, "n/7", numbers, 33)
    assert drawn.shape == (3, 33) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, torch.from_numpy(normals(3, "n/7", numbers, 33)), rtol=1e-4, atol=1e-5)


def test_numbers_depend_on_their_place_alone() -> None:
    """Bit for bit, whatever else is drawn and however many."""
    whole = normals(3, "n", MANY[:300], 50)
    picked = np.array([7, 299, 0, 150])
    for count in (1, 2, 13, 50):
        assert np.array_equal(normals(3, "n", picked, count), whole[picked, :count])
    for start in range(0, 40, 3):
        rows = MANY[start : start + 1 + start % 5]
        assert np.array_equal(normals(3, "n", rows, 50), whole[rows])
    assert np.array_equal(words(3, "n", MANY[5:6], 4), words(3, "n", MANY, 9)[5:6, :4])


# ---------------------------------------------------------------------- places


def local_cells(corners: torch.Tensor) -> list[list[int]]:
    """Cells of the local crops of every image, for a stride of 10 px."""
    assert bool(((corners % 10 == 0) | (corners < 0)).all()) and int(corners.max()) <= 20
    return [[int(t // 10 * 3 + x // 10) for t, x in own.tolist() if t >= 0] for own in corners.unbind(1)]


@pytest.mark.parametrize("counted", ["true", "false"])
def test_on_the_grid_an_image_sees_no_cell_twice(counted: str) -> None:
    run = config("crops.places=grid", "crops.count=uniform", "crops.per=image", "crops.max_crops=9",
                 f"crops.count_global={counted}")  # fmt: skip
    seen: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    for step in range(12):
        plan = plan_step(run, step=step, samples=range(step * 100, step * 100 + 100))
        for cells in local_cells(plan.corners):
            assert len(set(cells)) == len(cells)
            seen.update(cells)
            lengths[len(cells)] += 1
    assert set(seen) == set(range(9)) and set(lengths) == set(range(10))  # 9: all, without a global one
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3
    first = [cells[0] for cells in local_cells(plan_step(run, step=0, samples=MANY).corners) if cells]
    assert stats.chisquare(np.bincount(first, minlength=9)).pvalue > 1e-3


def test_only_places_change_with_the_places() -> None:
    grid, anywhere = (
        plan_step(config(f"crops.places={places}"), step=5, samples=range(40))
        for places in ("grid", "uniform")
    )
    assert grid.crops == anywhere.crops and torch.equal(grid.noise, anywhere.noise)
    assert torch.equal(grid.corners == WHOLE, anywhere.corners == WHOLE)
    assert not torch.equal(grid.corners, anywhere.corners)


# ------------------------------------------------------------ number, curriculum


def test_uniform_numbers_of_crops_really_reach_nine() -> None:
    crops = config("crops.count=uniform", "crops.max_crops=9", "crops.per=image").crops
    counts = np.bincount(crop_counts(crops, seed=0, step=0, samples=MANY), minlength=10)
    assert counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > 1e-3
    batch = crops.model_copy(update={"per": "batch"})
    assert {int(n) for s in range(60) for n in crop_counts(batch, seed=0, step=s)} == set(range(1, 10))


def test_poisson_numbers_are_poisson() -> None:
    crops = config("crops.per=image", "crops.max_crops=9", "crops.mean=2", "crops.sigma=0").crops
    counts = np.bincount(crop_counts(crops, seed=0, step=0, samples=MANY), minlength=10)[1:]
    expected = stats.poisson(2).pmf(np.arange(9))
    expected[-1] = 1 - expected[:-1].sum()  # clipped
    assert stats.chisquare(counts, expected * len(MANY)).pvalue > 1e-3


PHASES = "curriculum=[{until: 3, max_crops: 1, global_first: 1.0}, {until: 6, max_crops: 4, count: uniform}]"


def test_phases_follow_each_other() -> None:
    run = config(PHASES, "crops.max_crops=9", "crops.mean=60", "crops.sigma=0.1", "crops.global_first=0",
                 "crops.places=grid")  # fmt: skip
    plans = [plan_step(run, step=step, samples=range(8)) for step in range(9)]
    assert [plan.crops for plan in plans[:3]] == [1] * 3
    assert all(bool((plan.corners == WHOLE).all()) for plan in plans[:3])
    assert all(1 <= plan.crops <= 4 for plan in plans[3:6]) and [plan.crops for plan in plans[6:]] == [9] * 3
    assert all(bool((plan.corners != WHOLE).all()) for plan in plans[3:])
    whole = plan_step(config("crops.max_crops=9", "crops.mean=60"), step=6, samples=range(8))
    assert torch.equal(whole.noise, plans[6].noise)  # phases move no other draw
    assert not bool((plans[6].corners == ABSENT).any())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("curriculum=[{until: 5}, {until: 5}]", r"end one after another, but `until` is \[5, 5\]"),
        ("curriculum=[{max_crops: 2}]", "until"),
        ("curriculum=[{until: 5, max_crops: 12}]", "max_crops"),
        ("curriculum=[{until: 5, skip: 0.5}]", "skip: unknown key"),
        ("curriculum=5", "curriculum"),
        ("crops.places=gird", r"crops\.places"),
        ("crops.count=some", r"crops\.count"),
        ("crops.warmup_steps=5", "warmup_steps"),
        ("objective.backprop_updates=some", "backprop_updates"),
    ],
)
def test_bad_phases_and_crops_are_refused(override: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config("comit-nano", (override,))


def test_mirroring_is_a_sample_s_own_draw() -> None:
    one = flips(0, MANY, 0.3)
    assert 0.27 < float(one.float().mean()) < 0.33
    assert torch.equal(flips(0, MANY[9:12], 0.3), one[9:12]) and not bool(flips(0, MANY, 0.0).any())
