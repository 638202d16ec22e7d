from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from comit_bench.commands.run import _learning_rates
from comit_bench.data.split import OpenData, Split
from comit_bench.errors import UsageError
from comit_bench.pipeline.jobs import Settings
from comit_bench.probing.fit import FitTask, MessageSource
from comit_bench.probing.pool import fit_seeds
from comit_bench.recipes.kinds import AttributesSpec
from comit_bench.recipes.specs import ProbeSpec, TaskSpec, find_tasks, parse_recipe
from comit_bench.tasks.base import Inputs, Role
from comit_bench.tasks.classification import (
    Classification,
    chance_levels,
    class_parts,
    majority_outcomes,
    score_outputs,
)

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
    split = Split(name, tuple(f"{name}/{i:05d}" for i in range(count)), [Path("x")] * count, labels.numpy())
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
    scores = {k: v.tolist() for k, v in score_outputs(outputs, labels, class_parts(NAMES, PARTS)).items()}
    assert scores["top1"] == [1, 0, 0, 0]
    assert scores["colour"] == [1, 1, 1, 0]  # red-red, red-red, green-green, red-blue
    assert scores["digit"] == [1, 0, 0, 1]  # 0-0, 2-1, 1-0, 3-3
    # Equal outputs rank by class number: two come before class 1, but five before class 4.
    assert scores["top5"] == [1, 1, 0, 0]


def test_ties_do_not_flatter() -> None:
    flat = torch.zeros(12, 12)
    scores = score_outputs(flat, torch.arange(12), {})
    assert int(scores["top1"].sum()) == 1 and int(scores["top5"].sum()) == 5


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
    rows = majority_outcomes(train, report, len(NAMES), class_parts(NAMES, PARTS))
    right = {name: row.int().tolist() for name, row in rows.items()}
    assert right["top1"] == [1, 1, 0, 0, 0]
    assert right["top5"] == [1, 1, 1, 0, 0]  # 3, 7, 5, then 0 and 1 as the lowest unseen
    assert right["colour"] == [0, 0, 1, 0, 1]  # green leads in training (7, 7, 5): images 7 and 6
    assert right["digit"] == [1, 1, 1, 1, 0]  # digit 3 leads: 3, 3, 7, 11
    found = Classification().majority(inputs(seeds=[0, 1]))
    assert found.metrics["top1"].std == 0 and found.metrics["top1"].chance == pytest.approx(100 / 12)
    assert found.outcomes is not None and set(found.outcomes.values) == set(found.metrics)


def test_outcomes_hold_what_every_probe_said_of_every_image() -> None:
    result = Classification().run(inputs(seeds=[0, 1]))
    found = result.outcomes
    assert found is not None and found.values["top1"].shape == (2, 400)
    for name, metric in result.metrics.items():
        assert metric.per_seed == pytest.approx(100 * found.values[name].mean(axis=1))
    right = np.array(found.columns["answer"]) == np.array(found.columns["truth"])[None]
    assert (right == (found.values["top1"] == 1)).all()


def test_several_learning_rates_have_equal_tries_and_the_best_on_early_stop_images_counts() -> None:
    result = Classification().run(inputs(seeds=[0, 1], learning_rates=(1e-6, 1e-2)))
    alone = Classification().run(inputs(seeds=[0, 1], learning_rates=(1e-2,)))
    tries = result.extra["learning_rates"]
    assert set(tries) == {"1e-06", "0.01"} and result.extra["learning_rate"] == 1e-2
    assert tries["0.01"] > tries["1e-06"]
    assert result.metrics == alone.metrics and "learning_rates" not in alone.extra


@pytest.mark.parametrize("rates", [(0.0,), (-1e-3,), (float("inf"),), (float("nan"),), (1e-3, 1e-3)])
def test_learning_rates_that_cannot_be_tried_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"--probe-lr .*different numbers above 0"):
        Settings(probe_lr=rates)


def test_words_are_no_learning_rates() -> None:
    with pytest.raises(UsageError, match=r"--probe-lr fast: expected numbers"):
        _learning_rates("fast")
    assert _learning_rates("1e-4, 3e-4") == (1e-4, 3e-4) and _learning_rates(None) == ()


def test_a_fit_that_was_cut_off_says_so() -> None:
    short = recipe(probe=recipe().probe.model_copy(update={"max_epochs": 1}))
    assert Classification().run(inputs(spec=short, seeds=[3, 4])).unconverged == (3, 4)


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


def test_products_are_rounded_on_cuda_only_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = inputs(device=torch.device("cuda"))
    assert on_cuda.probing["precision"] == "bfloat16" and inputs().probing["precision"] == "float32"
    given: list[str] = []

    def fit(task: FitTask, seeds: list[int], **rest: Any) -> Any:
        given.append(task.precision)
        return fit_seeds(task, seeds, **{**rest, "device": "cpu"})

    monkeypatch.setattr("comit_bench.tasks.base.fit_seeds", fit)
    assert Classification().run(on_cuda).extra["probe_precision"] == "bfloat16"
    assert "probe_precision" not in Classification().run(inputs()).extra
    assert given == ["bfloat16", "float32"]
