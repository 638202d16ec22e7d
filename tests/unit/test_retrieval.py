"""Retrieval: neighbours against plain loops, ties, chunks, chance in closed form and by counting."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from message_inputs import inputs_of, spec_of, write_recipe

import comit_bench
from comit_bench.errors import UsageError
from comit_bench.probing.fit import moments
from comit_bench.results.records import load_records
from comit_bench.tasks.result import Result
from comit_bench.tasks.retrieval import Retrieval, chance_of_hit, chance_of_share, nearest


def some_codes(count: int = 37, length: int = 4, dim: int = 3, seed: int = 0) -> torch.Tensor:
    """Few distinct levels, so that equal messages and equal distances are common."""
    return torch.randint(-1, 2, (count, length, dim), generator=torch.Generator().manual_seed(seed)).float()


def plain(codes: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    flat = codes.flatten(1).double().numpy()
    index, distance = [], []
    for i, mine in enumerate(flat):
        entries = []
        for j, other in enumerate(flat):
            scale = np.linalg.norm(mine) * np.linalg.norm(other)
            gap = 1.0 - (float(mine @ other) / scale if scale else 0.0)
            if i != j:
                entries.append((round(gap, 9), j))
        entries.sort()
        index.append([j for _, j in entries[:k]])
        distance.append([gap for gap, _ in entries[:k]])
    return np.array(index), np.array(distance)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 500])
def test_neighbours_are_those_of_a_plain_loop_for_any_chunk(chunk: int) -> None:
    codes = some_codes()
    codes[7] = 0  # no direction: at distance 1 from all
    codes[20] = codes[3]
    found = nearest(lambda rows: codes[rows], len(codes), 6, chunk=chunk)
    index, distance = plain(codes, 6)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, atol=2e-9)
    assert not (found.index == np.arange(37)[:, None]).any()


def test_the_scale_of_a_message_does_not_matter() -> None:
    codes = torch.randn(30, 4, 5, generator=torch.Generator().manual_seed(1))
    scaled = codes * torch.rand(30, 1, 1, generator=torch.Generator().manual_seed(2)).add(0.1)
    one, other = (nearest(lambda rows, c=c: c[rows], 30, 5) for c in (codes, scaled))
    np.testing.assert_array_equal(one.index, other.index)


def test_equal_messages_go_by_position() -> None:
    codes = torch.ones(6, 2, 2)
    found = nearest(lambda rows: codes[rows], 6, 3, chunk=2)
    assert found.index.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert (found.distance == 0).all()


@pytest.mark.parametrize(("count", "k"), [(5, 5), (1, 1), (4, 0)])
def test_too_few_images_are_refused(count: int, k: int) -> None:
    with pytest.raises(UsageError, match="neighbours were asked for"):
        nearest(lambda rows: some_codes(count)[rows], count, k)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_chance_is_the_mean_over_all_orders(k: int) -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    hits, shares = [], []
    for i, mine in enumerate(labels):
        others = [label for j, label in enumerate(labels) if j != i]
        orders = list(permutations(others))
        hits.append(np.mean([mine in order[:k] for order in orders]))
        shares.append(np.mean([np.mean(np.array(order[:k]) == mine) for order in orders]))
    assert chance_of_hit(labels, k) == pytest.approx(np.mean(hits))
    assert chance_of_share(labels) == pytest.approx(np.mean(shares))


def clusters(count: int = 60) -> tuple[torch.Tensor, np.ndarray]:
    """Four classes, colour x digit: the first half of a message is the colour, the rest mostly noise."""
    generator = torch.Generator().manual_seed(3)
    labels = np.arange(count) % 4
    codes = 0.2 * torch.randn(count, 4, 3, generator=generator)
    codes[:, 0] += torch.where(torch.from_numpy(labels < 2), 3.0, -3.0)[:, None]
    return codes, labels


def colours_and_letters(codes: torch.Tensor, labels: np.ndarray, **more: Any) -> Result:
    spec = spec_of("retrieval", retrieval={"k": [1, 5]}, attributes={"fields": ["colour", "digit"]}, **more)
    result = Retrieval().run(inputs_of(spec, codes, labels, ("red_a", "red_b", "blue_a", "blue_b")))
    assert result is not None
    return result


def test_metrics_details_and_outcomes() -> None:
    codes, labels = clusters()
    result = colours_and_letters(codes, labels)
    raw = {"recall@1", "recall@5", "colour@1", "digit@1"}
    assert set(result.metrics) == raw | {f"{name}_std" for name in raw}
    assert result.metrics["colour@1"].value == 100
    assert result.metrics["colour@1"].chance == pytest.approx(100 * 29 / 59)
    assert result.metrics["recall@1"].value < 90 < result.metrics["recall@5"].value
    assert result.metrics["recall@1"].chance == pytest.approx(100 * 14 / 59)
    precision = result.details["precision"]
    assert precision["precision@1"]["value"] == pytest.approx(result.metrics["recall@1"].value)
    assert precision["precision@5_std"]["chance"] == pytest.approx(100 * 14 / 59)
    parts = result.details["parts"]
    assert set(parts) == {"colour", "digit"}
    assert set(parts["digit"]) == {"recall@1", "recall@5", "recall@1_std", "recall@5_std"}
    assert parts["digit"]["recall@1_std"]["value"] == result.metrics["digit@1_std"].value
    outcomes = result.outcomes
    assert outcomes is not None and set(outcomes.values) == set(result.metrics)
    index, distance = plain(codes, 5)
    hits = (labels[index] == labels[:, None]).any(axis=1)
    np.testing.assert_array_equal(outcomes.values["recall@5"], hits[None])
    assert result.metrics["recall@5"].stderr == pytest.approx(100 * hits.std(ddof=1) / np.sqrt(60))
    assert outcomes.columns["nearest"] == [f"{i:05d}" for i in index[:, 0]]
    np.testing.assert_allclose(outcomes.columns["distance"], distance[:, 0], atol=2e-9)


def test_standardised_neighbours_are_those_of_standardised_codes() -> None:
    codes, labels = clusters()
    codes[:, 3, 2] = 7.0  # never changes
    mean, deviation = moments(codes.split(7))
    np.testing.assert_allclose(mean, codes.double().mean(dim=0))
    assert deviation[3, 2] == 1
    np.testing.assert_allclose(deviation[:3], codes.double().std(dim=0, correction=0)[:3])
    result = colours_and_letters(codes, labels)
    assert result.outcomes is not None
    index, _ = plain(((codes.double() - mean) / deviation), 1)
    assert result.outcomes.columns["nearest_std"] == [f"{i:05d}" for i in index[:, 0]]


def test_origin_and_width_of_a_dimension_do_not_matter_once_it_is_standardised() -> None:
    """One dimension far from 0 and wide: the raw neighbours follow it, the standardised ones do not."""
    codes, labels = clusters()
    moved = codes * torch.tensor([1.0, 50.0, 1.0]) + torch.tensor([0.0, 9.0, 20.0])
    one, other = (colours_and_letters(c, labels) for c in (codes, moved))
    assert one.outcomes is not None and other.outcomes is not None
    assert one.outcomes.columns["nearest_std"] == other.outcomes.columns["nearest_std"]
    assert one.metrics["recall@1_std"] == other.metrics["recall@1_std"]
    assert one.outcomes.columns["nearest"] != other.outcomes.columns["nearest"]


def test_every_seed_of_a_recipe_has_the_same() -> None:
    codes, labels = clusters(12)
    spec = spec_of("retrieval", retrieval={"k": [1]})
    given = replace(inputs_of(spec, codes, labels, ("a", "b", "c", "d")), seeds=[0, 1, 2])
    result = Retrieval().run(given)
    assert result is not None and result.outcomes is not None
    once = Retrieval().run(replace(given, seeds=[0]))
    assert once is not None
    metric, alone = result.metrics["recall@1"], once.metrics["recall@1"]
    assert metric.per_seed == alone.per_seed * 3 and metric.std == 0 and alone.std is None
    assert metric.stderr == pytest.approx(alone.stderr)


def test_messages_without_content_are_at_chance() -> None:
    generator = torch.Generator().manual_seed(4)
    labels = np.arange(600) % 10
    names = tuple(f"c{i}" for i in range(10))
    result = Retrieval().run(
        inputs_of(spec_of("retrieval"), torch.randn(600, 2, 8, generator=generator), labels, names)
    )
    assert result is not None
    for metric in result.metrics.values():
        assert metric.chance is not None and metric.stderr is not None
        assert abs(metric.value - metric.chance) < 4 * metric.stderr


def test_a_main_metric_that_is_not_there() -> None:
    codes, labels = clusters(8)
    spec = spec_of("retrieval", retrieval={"k": [1]}, main_metric="recall@5")
    with pytest.raises(UsageError, match="recall@1"):
        Retrieval().run(inputs_of(spec, codes, labels, ("a", "b", "c", "d")))


def test_from_images_to_a_record(tmp_path: Path) -> None:
    write_recipe(
        tmp_path / "recipes", "retrieval", "recognition", 60, retrieval={"k": [1, 3]},
        attributes={"fields": ["colour", "digit"]},
    )  # fmt: skip
    found = {}
    for name, batch in (("a", 7), ("b", 64)):
        records = comit_bench.evaluate(
            ["comit-nano", "pixel-oracle"], ["small"], include=(tmp_path / "recipes",), cache=tmp_path / name,
            output=tmp_path / name, batch_size=batch, device="cpu",
        )  # fmt: skip
        found[name] = {r.tokenizer.name: r.metrics for r in records}
    assert found["a"] == found["b"]
    assert set(found["a"]) == {"comit-nano", "pixel-oracle"}
    (comit,) = (
        r for r in load_records(tmp_path / "a" / "records", strict=True) if "nano" in r.tokenizer.name
    )
    assert comit.metrics["recall@1"].n == 60
    (path,) = (tmp_path / "a" / "records").rglob("comit-nano*/*.parquet")
    table = pq.read_table(path).to_pydict()
    assert 100 * np.mean(table["recall@1"]) == pytest.approx(comit.metrics["recall@1"].value)
    assert set(table["nearest"]) <= set(table["id"])
