"""Figures that the paper needed: maps of single tokens, size of the bottleneck, images of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import MissingError, UnsupportedOperation, UsageError
from comit_bench.figures import bottleneck, maps
from comit_bench.figures.inputs import load_inputs
from comit_bench.results.records import load_record, load_records
from comit_bench.results.schema import Metric, Record, protocol_digest
from comit_bench.tokenizers.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BASE = load_record(ROOT / "tests" / "fixtures" / "records" / "measured-v1.json")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["figure", *(str(one) for one in arguments)])


# -------------------------------------------------------------------------------------------- maps


def blobs(*boxes: tuple[int, int, int, int], side: int = 16) -> torch.Tensor:
    kept = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for number, (top, left, height, width) in enumerate(boxes):
        kept[number, top : top + height, left : left + width] = True
    return kept


def test_spread_is_the_mean_squared_distance_from_the_centre() -> None:
    kept = blobs((0, 0, 1, 1), (3, 4, 1, 3), (5, 5, 2, 2))
    assert maps.spread(kept).tolist() == pytest.approx([0.0, 2 / 3, 0.5])


def test_compact_tokens_that_differ_are_chosen_by_position() -> None:
    kept = blobs((0, 0, 2, 8), (4, 4, 4, 4), (4, 4, 4, 4), (4, 5, 4, 4), (12, 12, 4, 4))
    assert maps.choose(kept, 5) == [1, 4, 0]  # 2 is 1 again, 3 overlaps it by more than half
    assert maps.choose(kept, 1) == [1]


def test_maps_need_no_masks_and_say_which_tokens(tmp_path: Path) -> None:
    nano = load_tokenizer("comit-nano", device="cpu")
    inputs = load_inputs("scenes", nano.info, 2, 0)
    data = maps.compute(nano, inputs, tokens=3)
    assert data.tokens.shape == (2, 3) and data.binary.shape == (2, 3, 32, 32)
    share = data.binary[data.tokens >= 0].mean(axis=(1, 2))
    assert share == pytest.approx(maps.SHARE / 100, abs=0.01)
    again = maps.compute(nano, inputs, tokens=3)
    assert np.array_equal(data.tokens, again.tokens)
    figure = maps.draw(data)
    words = [text.get_text() for text in figure.texts]
    assert all(f"token {token}" in words for token in data.tokens[data.tokens >= 0])
    with pytest.raises(UsageError, match="--tokens 0"):
        maps.compute(nano, inputs, tokens=0)
    with pytest.raises(UnsupportedOperation, match="pixel-oracle"):
        oracle = load_tokenizer("pixel-oracle", device="cpu")
        maps.compute(oracle, load_inputs("scenes", oracle.info, 1, 0))
    done = run("maps", "--count", 1, "--tokens", 2, "--quiet", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "maps-comit-nano.pdf").is_file()


# -------------------------------------------------------------------------------------- bottleneck


def measured(name: str, tokens: int, vocabulary: int, kind: str, value: float, **more: Any) -> Record:
    unit = "%" if kind == "classification" else "dB"
    metric = Metric.from_seeds([value, value + 1, value + 2], n=10, unit=unit)
    protocol = {"tokenizer": {"policy": more.pop("policy", None)}, **more.pop("protocol", {})}
    row = {"name": name, "message_length": tokens, "vocab_size": vocabulary, "kind": "learned"}
    row |= {"weights": f"sha256:{name}", "trained": more.pop("trained", True)}
    return Record.model_validate(
        {
            **dict(BASE), "schema_version": 2, "tokenizer": BASE.tokenizer.model_dump() | row,
            "task": BASE.task.model_dump() | {"kind": kind, "name": kind},
            "metrics": {"top1" if kind == "classification" else "psnr": metric},
            "protocol": protocol, "protocol_digest": protocol_digest(protocol), **more,
        }
    )  # fmt: skip


def sizes(**more: Any) -> list[Record]:
    return [
        measured(f"b-{size}", tokens, vocabulary, kind, tokens / 8 + (kind == "reconstruction"), **more)
        for size, tokens, vocabulary in (("l", 256, 64_000), ("s", 64, 1000), ("m", 128, 16_000))
        for kind in ("classification", "reconstruction")
    ]


def test_points_stand_in_order_of_their_bits_with_both_numbers() -> None:
    data = bottleneck.compute(sizes())
    assert [point.name for point in data.points] == ["b-s", "b-m", "b-l"]
    assert data.points[0].bits == pytest.approx(64 * np.log2(1000))
    for point in data.points:
        assert point.accuracy is not None and point.accuracy.value == pytest.approx(point.tokens / 8 + 1)
        assert point.psnr is not None and point.psnr.value == pytest.approx(point.tokens / 8 + 2)
    figure = bottleneck.draw(data)
    legend = [
        text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().texts
    ]
    assert legend[1] == "b-m\n128 tokens of 16,000"
    assert [axes.get_title() for axes in figure.axes[:2]] == ["classification v1", "reconstruction v1"]


def test_two_protocols_are_never_in_one_panel_and_other_settings_are_no_points() -> None:
    others = [
        measured("odd", 8, 8, "classification", 5.0, protocol={"limit": 5}, limit=5, complete=False),
        measured("crops", 8, 8, "classification", 5.0, policy="raster:9"),
        measured(
            "steps", 8, 8, "reconstruction", 5.0, protocol={"tokenizer": {"decode": {"default": False}}}
        ),
        measured("control", 8, 8, "classification", 5.0, control="c", protocol={"control": "c"}),
    ]
    found = bottleneck.compute([*sizes(), *others])
    assert {point.name for point in found.points} == {"b-s", "b-m", "b-l"}
    half = bottleneck.compute([record for record in sizes() if record.task.kind == "classification"])
    assert all(point.psnr is None for point in half.points)
    assert "not measured" in [axes.get_title() for axes in bottleneck.draw(half).axes]


def test_untrained_and_incomplete_points_are_said() -> None:
    data = bottleneck.compute(sizes(trained=False, complete=False))
    assert "untrained" in data.about.warnings[0] and "incomplete" in data.about.warnings[1]
    assert data.points[0].name == "b-s (untrained)"


def test_one_size_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="comit-bench paper --only figure-5c"):
        bottleneck.compute(sizes()[:2])
    reference = ROOT / "results" / "reference"
    done = run(
        "bottleneck", "--results", reference, "-t", "titok-nano", "-t", "comit-nano", "--output", tmp_path
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bottleneck.pdf", "bottleneck.png"]
    rows = {r.tokenizer.name for r in load_records(reference) if r.tokenizer.kind != "reference"}
    assert len(bottleneck.compute(load_records(reference)).points) == len(rows)


# ------------------------------------------------------------------------------- images of data sets


def test_images_may_be_those_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        for folder, suffix, mode in (("images", "jpg", "RGB"), ("ground_truth_mask", "png", "L")):
            (tmp_path / "cssd" / folder).mkdir(parents=True, exist_ok=True)
            Image.new(mode, (40, 40), "white").save(tmp_path / "cssd" / folder / f"000{number}.{suffix}")
    info = load_tokenizer("comit-nano", device="cpu").info
    monkeypatch.setenv("COMIT_BENCH_DATA", str(tmp_path))
    inputs = load_inputs("cssd", info, 2, 0)
    assert len(inputs) == 2 and inputs.masks is not None and inputs.of_reader
    assert inputs.source == "cssd val"
    monkeypatch.delenv("COMIT_BENCH_DATA")
    with pytest.raises(MissingError, match="data root"):
        load_inputs("cssd", info, 2, 0)
    monkeypatch.chdir(tmp_path)
    assert load_inputs("cssd", info, 1, 0).masks is None  # a folder of that name wins
    assert not load_inputs("scenes-pairs", info, 1, 0).of_reader
