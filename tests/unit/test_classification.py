from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from comit_bench.data.split import OpenData
from comit_bench.data.split import Split as DataSplit
from comit_bench.errors import UsageError
from comit_bench.probing.fit import MessageSource
from comit_bench.recipes.kinds import AttributesSpec
from comit_bench.recipes.specs import ProbeSpec, TaskSpec, find_tasks, parse_recipe
from comit_bench.tasks.base import Inputs, Role
from comit_bench.tasks.classification import (
    Classification,
    chance_levels,
    class_parts,
    majority_metrics,
    score_outputs,
)
from comit_bench.tasks.result import over_seeds

NAMES = [f"{colour}_{digit}" for colour in ("red", "green", "blue") for digit in range(4)]
PARTS = AttributesSpec(fields=("colour", "digit"))
ROOT = Path(__file__).parents[2]


def recipe(**changes: Any) -> TaskSpec:
    probe = ProbeSpec(
        width=16, depth=1, heads=2, batch_size=32, learning_rate=1e-2, max_epochs=12, patience=4
    )
    settings: dict[str, Any] = dict(name="t", version=1, title="t", kind="classification", suite="scenes")
    return TaskSpec(**(settings | {"dataset": "d", "probe": probe, "attributes": PARTS} | changes))


def role(count: int, seed: int, name: str) -> Role:
    """Codes show colour and digit plainly, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(12, (count,), generator=generator)
    codes = 0.2 * torch.randn(count, 3, 4, generator=generator)
    codes[:, 0, :3] += torch.nn.functional.one_hot(labels // 4, 3)
    codes[:, 1] += torch.nn.functional.one_hot(labels % 4, 4)
    split = DataSplit(
        name, tuple(f"{name}/{i:05d}" for i in range(count)), [Path("x")] * count, labels.numpy()
    )
    rows = np.arange(count)
    return Role(split, rows, rows, MessageSource(codes=codes))


def inputs(names: list[str] = NAMES, **changes: Any) -> Inputs:
    sizes = {"train": 700, "early_stop": 100, "report": 400}
    roles = {name: role(count, seed, name) for seed, (name, count) in enumerate(sizes.items())}
    splits = {name: role.split for name, role in roles.items()}
    data = OpenData("d", 1, tuple(names), splits, "sha256:0", {}, Path("x"))
    given: dict[str, Any] = dict(spec=recipe(), data=data, roles=roles, seeds=[0], cache=Path("x"), workers=1)
    return Inputs(**(given | changes))


def logits(guesses: list[int], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(guesses), classes).float()


def test_learnable_labels_are_learnt_and_permuted_ones_land_at_chance() -> None:
    plain = Classification().run(inputs(seeds=[0, 1]))
    assert list(plain.metrics) == ["top1", "top5", "colour", "digit"]
    for metric in plain.metrics.values():
        assert metric.value > 95 and metric.n == 400 and len(metric.per_seed) == 2
    assert plain.metrics["top1"].chance == pytest.approx(100 / 12)
    assert plain.extra["seeds"] == [0, 1] and min(plain.extra["train_top1"]) > 90
    assert all(
        b <= e <= 12 for b, e in zip(plain.extra["best_epoch"], plain.extra["epochs_run"], strict=True)
    )

    control = Classification().run(inputs(seeds=[0, 1, 2, 3, 4], control="permute-labels"))
    for name, metric in control.metrics.items():
        assert metric.chance is not None
        assert abs(metric.value - metric.chance) < 3 * metric.stderr, name
        assert plain.metrics[name].value > metric.value + 20


def test_scores_of_handmade_outputs() -> None:
    labels = torch.tensor([0, 1, 4, 11])
    outputs = logits([0, 2, 5, 3], 12)
    scores = score_outputs(outputs, labels, class_parts(NAMES, PARTS))
    assert scores["top1"] == 25
    assert scores["colour"] == 75  # red-red, red-red, green-green, red-blue
    assert scores["digit"] == 50  # 0-0, 2-1, 1-0, 3-3
    # Equal outputs rank by class number: two come before class 1, but five before class 4.
    assert scores["top5"] == 50


def test_ties_do_not_flatter() -> None:
    flat = torch.zeros(12, 12)
    scores = score_outputs(flat, torch.arange(12), {})
    assert scores["top1"] == pytest.approx(100 / 12) and scores["top5"] == pytest.approx(500 / 12)


def test_top5_needs_ten_classes() -> None:
    assert set(score_outputs(torch.zeros(2, 9), torch.tensor([0, 1]), {})) == {"top1"}
    assert set(chance_levels(torch.tensor([0]), 9, {})) == {"top1"}


def test_chance_is_exact_for_uneven_parts() -> None:
    parts = class_parts(["a_x", "a_y", "b_x"], AttributesSpec(fields=("first", "second")))
    levels = chance_levels(torch.tensor([0, 0, 2]), 3, parts)
    # A uniform guess says "a" twice in three times: right for two of three images, "b" for one.
    assert levels["first"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert levels["top1"] == pytest.approx(100 / 3)


def test_majority_row_with_ties_to_the_lowest_number() -> None:
    train = torch.tensor([7, 7, 3, 3, 5])
    report = torch.tensor([3, 3, 7, 11, 6])
    metrics = majority_metrics(train, report, NAMES, PARTS)
    assert metrics["top1"].value == 40 and metrics["top1"].std is None
    assert metrics["top5"].value == 60  # 3, 7, 5, then 0 and 1 as the lowest unseen
    assert metrics["colour"].value == 40  # green leads in training (7, 7, 5): images 7 and 6
    assert metrics["digit"].value == 80  # digit 3 leads: 3, 3, 7, 11
    assert metrics["top1"].chance == pytest.approx(100 / 12) and metrics["top1"].n == 5


def test_mean_deviation_and_standard_error_over_seeds() -> None:
    metric = over_seeds([50.0, 52.0, 54.0], 100, chance=10.0)
    assert metric.value == 52 and metric.std == pytest.approx(2.0)
    assert metric.stderr == pytest.approx(100 * math.sqrt(0.52 * 0.48 / 100 + (0.02**2) / 3))
    alone = over_seeds([50.0], 100)
    assert alone.std is None and alone.stderr == pytest.approx(5.0) and alone.chance is None


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"class 'red' has 1 parts between '_'.*colour, digit"):
        Classification().run(inputs(["red", *NAMES[1:]]))
    with pytest.raises(UsageError, match=r"main_metric 'top2' is not measured.*top1"):
        Classification().run(inputs(spec=recipe(main_metric="top2")))
    with pytest.raises(ValueError, match=r"labels must lie in 0..10, found 0..11"):
        Classification().run(inputs(NAMES[:11]))
    roles = inputs().roles
    empty = replace(roles["early_stop"], rows=np.arange(0))
    with pytest.raises(UsageError, match="early-stop set is empty"):
        Classification().run(inputs(roles={**roles, "early_stop": empty}))
    with pytest.raises(UsageError, match=r"unknown control 'permute'.*permute-labels"):
        Classification().run(inputs(control="permute"))


@pytest.mark.parametrize("name", ["recognition-scenes", "imagenet100"])
def test_shipped_recipes(name: str) -> None:
    spec = parse_recipe(ROOT / "probes" / name / "task.yaml", TaskSpec)
    assert find_tasks()[name].spec == spec
    assert spec.seeds >= 3 and spec.main_metric == "top1"
    assert spec.split.early_stop.source == spec.split.train != spec.split.report
    assert 0 < spec.split.early_stop.fraction < 1
    text = (ROOT / "probes" / name / "README.md").read_text(encoding="utf-8")
    for heading in ("Source", "What it measures", "Chance and controls", "Published numbers", "Changes"):
        assert f"\n## {heading}" in text
