"""The multilabel executor: metrics by hand, chance by closed form against simulation, a fit, the control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comit_bench.data.split import OpenData, Split
from comit_bench.errors import UsageError
from comit_bench.probing.fit import MessageSource
from comit_bench.recipes.specs import ProbeSpec, TaskSpec
from comit_bench.tasks.base import Inputs, Role
from comit_bench.tasks.multilabel import (
    Multilabel,
    all_within,
    average_precision,
    chance_levels,
    expected_precision,
    folds_of,
    majority_outcomes,
    names_of_sets,
    score_outputs,
)

COLUMNS = 8


def recipe(**changes: Any) -> TaskSpec:
    probe = ProbeSpec(width=16, depth=1, heads=2, batch_size=32, learning_rate=1e-2, max_epochs=8, patience=8)
    settings: dict[str, Any] = dict(name="t", version=1, title="t", kind="multilabel", suite="scenes")
    return TaskSpec(**(settings | {"dataset": "d", "probe": probe} | changes))


def two_hot(count: int, seed: int, columns: int = COLUMNS) -> np.ndarray[Any, np.dtype[np.bool_]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, columns, generator=generator).argsort(dim=1)
    return (order < 2).numpy()


def role(count: int, seed: int, *, name: str) -> Role:
    """One token per true category, and noise; columns 6 and 7 are the last ones in use."""
    labels = two_hot(count, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    codes = 0.1 * torch.randn(count, 2, COLUMNS, generator=generator)
    for row, present in enumerate(labels):
        for token, column in enumerate(np.flatnonzero(present)):
            codes[row, token, column] += 1
    split = Split(name, tuple(f"{name}/{i:05d}" for i in range(count)), [Path("x")] * count, labels)
    rows = np.arange(count)
    return Role(split, rows, rows, MessageSource(codes=codes))


def inputs(tmp_path: Path, **changes: Any) -> Inputs:
    roles = {"train": role(400, 0, name="train"), "early_stop": role(80, 1, name="stop")}
    roles["report"] = role(300, 2, name="val")
    splits = {r.split.name: r.split for r in roles.values()}
    names = tuple(map(str, range(COLUMNS)))
    data = OpenData("d", 1, names, splits, "sha256:0", {}, tmp_path, kind="multilabel")
    given: dict[str, Any] = dict(
        spec=recipe(), data=data, roles=roles, seeds=[0, 1], cache=tmp_path, workers=1
    )
    return Inputs(**(given | changes))


def test_both_categories_must_be_among_the_highest() -> None:
    outputs = torch.tensor([[9.0, 8, 1, 7, 6, 5, 0], [9.0, 8, 1, 7, 6, 5, 0], [1.0, 1, 1, 1, 1, 1, 1]])
    targets = torch.zeros(3, 7, dtype=torch.bool)
    targets[0, [0, 5]] = targets[1, [0, 2]] = targets[2, [3, 4]] = True
    assert all_within(outputs, targets, k=5).tolist() == [
        1,
        0,
        1,
    ]  # ties go by column: 0 to 4 are the top five
    assert all_within(outputs, targets, k=2).tolist() == [0, 0, 0]
    assert set(score_outputs(outputs, targets)) == {"top5", "top2", "mAP"}
    assert set(score_outputs(outputs[:, :5], targets[:, :5])) == {"top2", "mAP"}


def test_average_precision_by_hand_and_against_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    outputs = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    targets = torch.tensor([[True], [False], [True], [False]])
    assert average_precision(outputs[:, 0], targets[:, 0])[0] == pytest.approx((1 + 2 / 3) / 2)
    wide = torch.rand(60, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.from_numpy(two_hot(60, 4, 4))
    for c in range(4):
        hits, scores = labels[:, c].numpy(), wide[:, c].numpy()
        value, left_out = average_precision(wide[:, c], labels[:, c])
        assert value == pytest.approx(average_precision_score(hits, scores))
        rest = [average_precision_score(np.delete(hits, i), np.delete(scores, i)) for i in range(60)]
        assert left_out.tolist() == pytest.approx(rest)


def test_a_single_hit_cannot_be_left_out() -> None:
    value, left_out = average_precision(torch.tensor([3.0, 2, 1]), torch.tensor([False, True, False]))
    assert value == 0.5 and left_out.tolist() == [1.0, 0.5, 0.5]


def test_the_error_of_average_precision_is_that_of_the_bootstrap() -> None:
    """Influences have mAP as their mean, and their standard error is what resampled images show."""
    from sklearn.metrics import average_precision_score

    generator, rng = torch.Generator().manual_seed(5), np.random.default_rng(0)
    targets = torch.from_numpy(two_hot(300, 6, 4))
    outputs = targets + 0.8 * torch.randn(300, 4, generator=generator)
    scores = score_outputs(outputs, targets)["mAP"]
    whole = average_precision_score(targets.numpy(), outputs.numpy())
    assert scores.mean() == pytest.approx(whole)
    drawn = []
    for _ in range(400):
        chosen = rng.integers(0, 300, 300)
        drawn.append(average_precision_score(targets.numpy()[chosen], outputs.numpy()[chosen]))
    assert scores.std(ddof=1) / 300**0.5 == pytest.approx(np.std(drawn), rel=0.15)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_hold_every_category_alike_in_any_order(count: int) -> None:
    """The 45 pairs of ten: a probe that knows only frequencies learns nothing about the part held out."""
    names = [f"{a}+{b}" for a in range(10) for b in range(a)]
    fold = folds_of(names, count)
    held = np.zeros((count, 10), int)
    for name, part in zip(names, fold.tolist(), strict=True):
        held[part, [int(label) for label in name.split("+")]] += 1
    assert held.max() - held.min() <= 1 and np.ptp(np.bincount(fold)) <= 1
    back = folds_of(names[::-1] * 2, count)
    assert (back == np.tile(fold[::-1], 2)).all()


def test_every_set_is_held_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that answer for a set have seen none of its images, and all images are answered."""
    given = inputs(tmp_path, spec=recipe(split={"folds": 3}), seeds=[0])
    seen, fit = [], Inputs.fit

    def watched(self: Inputs, task: Any) -> Any:
        names = {n: set(names_of_sets(getattr(task, n).chosen())) for n in ("train", "early_stop", "report")}
        assert not names["report"] & (names["train"] | names["early_stop"])
        seen.append(names["report"])
        return fit(self, task)

    monkeypatch.setattr(Inputs, "fit", watched)
    result = Multilabel().run(given)
    every = set(names_of_sets(torch.from_numpy(np.asarray(given.roles["report"].split.labels))))
    assert len(seen) == 3 and set.union(*seen) == every and sum(map(len, seen)) == len(every)
    assert result.metrics["top2"].n == 300 and result.metrics["top2"].value > 20
    assert len(result.extra["best_epoch"]) == 3 and result.outcomes is not None
    assert result.outcomes.clusters is not None and set(result.outcomes.clusters) == every


def test_chance_is_what_random_orders_score() -> None:
    targets = torch.from_numpy(two_hot(200, 7))
    levels = chance_levels(targets, COLUMNS, COLUMNS)
    assert levels["top5"] == pytest.approx(100 * 20 / 56) and levels["top2"] == pytest.approx(100 / 28)
    generator = torch.Generator().manual_seed(0)
    runs = [score_outputs(torch.rand(200, COLUMNS, generator=generator), targets) for _ in range(300)]
    for name, level in levels.items():
        values = 100 * torch.tensor([float(run[name].mean()) for run in runs])
        assert abs(values.mean() - level) < 4 * values.std() / 300**0.5, name
    assert expected_precision(5, 5) == pytest.approx(1.0)  # all have it: every order is right
    assert expected_precision(2, 1) == pytest.approx(0.75)


def test_columns_without_a_category_do_not_lower_chance() -> None:
    targets = torch.zeros(10, 90, dtype=torch.bool)
    targets[:, :2] = True
    assert chance_levels(targets, 80, 90)["top5"] == pytest.approx(100 * 76076 / 24040016)


def test_majority_row() -> None:
    train, report = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    train[:3, 0] = train[:2, 3] = train[3, 5] = True
    report[0, [0, 3]] = report[1, [0, 7]] = True
    rows = majority_outcomes(train, report, 8)
    assert rows["top2"].tolist() == [1, 0] and rows["top5"].tolist() == [1, 0]
    assert 100 * rows["mAP"].mean() == pytest.approx(chance_levels(report, 8, 8)["mAP"])


def test_plain_signs_are_read_and_the_control_lands_at_chance(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    result = Multilabel().run(given)
    assert list(result.metrics) == ["top5", "top2", "mAP"]
    assert result.metrics["top2"].value > 95 and result.metrics["mAP"].value > 95
    assert result.metrics["top5"].n == 300 and result.metrics["mAP"].stderr is not None
    assert result.extra["seeds"] == [0, 1] and len(result.extra["early_stop_top5"]) == 2
    control = Multilabel().run(replace(given, control="permute-labels", seeds=[0, 1, 2, 3]))
    for name, metric in control.metrics.items():
        assert metric.chance is not None
        # a probe that knows nothing names one pair for all images, so clusters of pairs count for little
        assert abs(metric.value - metric.chance) < 3 * (metric.stderr or 0) + 1, name
    majority = Multilabel().majority(given).metrics["top5"]
    assert majority.per_seed[0] == majority.value


def test_mistakes_are_named(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    with pytest.raises(UsageError, match=r"main_metric 'top3' is not measured.*top"):
        Multilabel().run(replace(given, spec=recipe(main_metric="top3")))
    with pytest.raises(UsageError, match="unknown control"):
        Multilabel().run(replace(given, control="permute"))
    empty = replace(given.roles["train"], rows=np.zeros(0, np.int64))
    with pytest.raises(UsageError, match="training set of t is empty"):
        Multilabel().run(replace(given, roles={**given.roles, "train": empty}))
    with pytest.raises(ValueError, match="section 'negatives' means nothing to kind 'multilabel'"):
        recipe(negatives={"train": 3})
    with pytest.raises(ValueError, match=r"no such kind.*multilabel"):
        recipe(kind="multi-label")
    assert recipe().main_metric == "top5"
