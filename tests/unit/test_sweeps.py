"""``comit-bench sweep``: a record per point, shared points once, killed sweeps go on; the figure's curves."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_images, write_recipes
from torch import Tensor

from comit_bench.commands import app as cli
from comit_bench.errors import MissingError, UnsupportedOperation, UsageError
from comit_bench.pipeline.sweep import check_point, sweep, sweep_points
from comit_bench.results.records import load_records
from comit_bench.results.schema import Record, protocol_digest
from comit_bench.results.table import build_table
from comit_bench.tokenizers.comit.adapter import ComitTokenizer


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "data", train=1, val=2)
    write_recipes(tmp_path / "recipes")
    task = {
        "name": "tiny-back",
        "version": 1,
        "title": "Pixels there and back",
        "kind": "reconstruction",
        "suite": "extra",
        "dataset": "tiny",
        "split": {"report": "val"},
        "seeds": 1,
        "reconstruction": {"features": "scenes-teacher", "lpips": None},
    }
    folder = tmp_path / "recipes" / "probes" / "tiny-back"
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return tmp_path


def run(root: Path, *tokenizers: str, **changes: Any) -> list[Record]:
    places = {"data_root": root / "data", "include": (root / "recipes",), "output": root / "out"}
    chosen = {"task": "tiny-back", "cache": root / "cache", "device": "cpu", **places, **changes}
    return sweep(list(tokenizers) or ["comit-nano"], **chosen)


def settings_of(records: Sequence[Record]) -> list[tuple[float | None, float | None]]:
    return [(r.decoder_setting("steps"), r.decoder_setting("guidance")) for r in records]


def test_points_are_lists_beside_each_other_not_their_product() -> None:
    points = list(sweep_points([1, 5, 5], [0.0, 2.0], {"momentum": 0}))
    assert points == [
        {"momentum": 0, "steps": 1},
        {"momentum": 0, "steps": 5},
        {"momentum": 0, "guidance": 0.0},
        {"momentum": 0, "guidance": 2.0},
    ]
    assert list(sweep_points([], [], {})) == [{}]
    for wrong in ({"steps": [0]}, {"guidance": [-1.0]}, {"guidance": [float("nan")]}):
        with pytest.raises(UsageError, match="no value for it"):
            list(sweep_points(**{"steps": [], "guidance": [], "options": {}, **wrong}))  # type: ignore[arg-type]


def test_every_point_is_a_record_with_a_row_of_its_own(root: Path) -> None:
    records = run(root, steps=[1, 2, 10], guidance=[1.0, 7.5])
    # 10 steps at 7.5 are the tokenizer's own settings, which both lists hold: measured once
    assert settings_of(records) == [(1, 7.5), (2, 7.5), (10, 7.5), (10, 1.0)]
    stored = load_records(root / "out" / "records")
    assert sorted(r.protocol_digest for r in stored) == sorted(r.protocol_digest for r in records)
    table = build_table(records)
    assert len(table.groups) == 1 and len(table.rows) == 4
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == 4 and all(re.search(r"steps=\d+", label) for label in labels[1:])
    psnrs = {r.decoder_setting("steps"): r.metrics["psnr"].value for r in records[:3]}
    assert len(set(psnrs.values())) == 3


def test_a_killed_sweep_goes_on_and_messages_are_made_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"encode": 0, "decode": 0}
    encode, decode = ComitTokenizer.encode, ComitTokenizer.decode

    def encoding(self: ComitTokenizer, images: Tensor, **rest: Any) -> Any:
        calls["encode"] += 1
        return encode(self, images, **rest)

    def decoding(self: ComitTokenizer, tokens: Any, **rest: Any) -> Tensor:
        calls["decode"] += 1
        if calls["decode"] == 3:
            raise KeyboardInterrupt
        return decode(self, tokens, **rest)

    monkeypatch.setattr(ComitTokenizer, "encode", encoding)
    monkeypatch.setattr(ComitTokenizer, "decode", decoding)
    with pytest.raises(KeyboardInterrupt):
        run(root, steps=[1, 2, 3, 4])
    assert len(load_records(root / "out" / "records")) == 2
    before = {path: path.read_bytes() for path in (root / "out" / "records").rglob("*.json")}
    records = run(root, steps=[1, 2, 3, 4])
    assert settings_of(records) == [(step, 7.5) for step in (1, 2, 3, 4)]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert calls == {"encode": 1, "decode": 2 + 1 + 2}


def test_policies_and_tokenizers_multiply_points(root: Path) -> None:
    records = run(root, "comit-nano", "vq-grid-nano", policy=["global", "raster:3"])
    seen = [(r.tokenizer.name, r.tokenizer_protocol["policy"]) for r in records]
    assert seen == [("comit-nano", "global"), ("comit-nano", "raster:3"), ("vq-grid-nano", None)]


def test_wrong_requests_are_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match="classification"):
        run(root, task="tiny-colours")
    with pytest.raises(UsageError, match="by name"):
        from comit_bench.tokenizers.pixels import PixelOracleTokenizer

        sweep([PixelOracleTokenizer(device="cpu")], task="tiny-back", steps=[1], include=(root / "recipes",))
    with pytest.raises(UsageError, match="steps"):
        run(root, "vq-grid-nano", steps=[1])


def test_a_tokenizer_that_hides_its_settings_cannot_be_swept(root: Path) -> None:
    (record,) = run(root)
    check_point(record, {"steps": 10, "guidance": 7.5})
    with pytest.raises(UnsupportedOperation, match="steps=5"):
        check_point(record, {"steps": 5})


def test_command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, str]:
        places = ["--data-root", root / "data", "--include-path", root / "recipes", "--output", root / "out"]
        fixed = ["sweep", *places, "--task", "tiny-back", "--device", "cpu", "-q"]
        monkeypatch.setattr(sys, "argv", ["comit-bench", *(str(word) for word in [*fixed, *words])])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out + said.err

    code, said = command("--steps", "1,2", "--guidance", "0")
    assert code == 0 and "steps=1" in said and "comit-bench figure sweeps" in said
    assert (root / "out" / "tables-sweep" / "table.csv").is_file()
    assert len(load_records(root / "out" / "records")) == 3
    code, said = command("--steps", "one")
    assert code == 2 and "--steps 'one'" in said
    code, said = command("--guidance", "-1")
    assert code == 2 and "no value" in said


# ----------------------------------------------------------------------- figure


def changed(record: Record, psnr: float, distance: float, name: str = "", **decode: Any) -> Record:
    """A record as if measured at other settings."""
    data = record.model_dump(by_alias=True)
    side = data["protocol"]["tokenizer"]
    side["decode"] = {**side["decode"], **decode, "default": False} if decode else side["decode"]
    data["protocol_digest"] = protocol_digest(data["protocol"])
    for metric, value in (("psnr", psnr), ("fd_scenes_teacher", distance)):
        data["metrics"][metric] |= {"value": value, "per_seed": (value,)}
    if name:
        data["tokenizer"] |= {"name": name, "message_length": 32}
    return Record.model_validate(data)


def test_curves_hold_what_differs_in_the_axis_alone(root: Path) -> None:
    from comit_bench.figures.sweeps import compute

    (base,) = run(root)
    records = [
        changed(base, 20.0, 5.0),
        changed(base, 15.0, 9.0, steps=1),
        changed(base, 18.0, 7.0, steps=5),
        changed(base, 19.0, 6.0, guidance=0.0),
        changed(base, 10.0, 8.0, steps=3, guidance=3.0),  # alone on its curve: drawn nowhere
        changed(base, 12.0, 4.0, steps=5, solver="midpoint"),
        changed(base, 21.0, 3.0, name="longer"),
    ]
    (data,) = compute(records)
    panels = {panel.axis: panel for panel in data.panels}
    assert set(panels) == {"steps", "guidance", "bits"} and data.metric == "fd_scenes_teacher"
    (curve,) = panels["steps"].curves
    assert curve.x.tolist() == [1, 5, 10] and curve.psnr.tolist() == [15, 18, 20]
    assert curve.distance.tolist() == [9, 7, 5]
    (curve,) = panels["guidance"].curves
    assert curve.x.tolist() == [0, 7.5] and curve.psnr.tolist() == [19, 20]
    (points,) = panels["bits"].curves
    assert points.names == ("comit-nano", "longer") and points.x[1] == 2 * points.x[0]
    assert points.psnr.tolist() == [20, 21]


def test_two_columns_are_two_figures_and_nothing_is_an_error(root: Path) -> None:
    from comit_bench.figures.sweeps import compute

    (base,) = run(root)
    with pytest.raises(MissingError, match="nothing to draw"):
        compute([base])
    with pytest.raises(MissingError, match="no records"):
        compute([])
    records = [base, changed(base, 15.0, 9.0, steps=1)]
    other = []
    for record in records:
        data = record.model_dump(by_alias=True)
        data["protocol"] |= {"resolution": 64, "column": "64 px, 8 images"}
        data["protocol_digest"] = protocol_digest(data["protocol"])
        other.append(Record.model_validate(data))
    assert [sweeps.column for sweeps in compute([*records, *other])] == ["32 px, 8 images", "64 px, 8 images"]


def test_the_figure_is_drawn_from_records(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from comit_bench.figures.style import save
    from comit_bench.figures.sweeps import compute, draw

    run(root, steps=[1, 2], guidance=[1.0, 3.0])
    (data,) = compute(load_records(root / "out" / "records"))
    figure = draw(data)
    assert len(figure.axes) == 2 * len(data.panels) == 4
    lines = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) > 1]  # type: ignore[arg-type]
    drawn = [sorted(line.get_ydata().tolist()) for line in lines]  # type: ignore[union-attr]
    for panel in data.panels:
        assert sorted(panel.curves[0].psnr.tolist()) in drawn
    monkeypatch.setattr(
        sys,
        "argv",
        ["comit-bench", "figure", "sweeps", "--results", str(root / "out"), "--output", str(root)],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    named = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in named] == [
        f"sweeps-tiny-back-32-px-8-images.{kind}" for kind in ("pdf", "png")
    ]
    assert all(path.is_file() for path in named)
    one, two = save(figure, tmp_path / "a"), save(draw(data), tmp_path / "b")
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True)] == [True, True]


def test_the_figure_says_what_its_points_are_not(root: Path) -> None:
    from comit_bench.figures.sweeps import compute, draw

    (base,) = run(root)
    data = base.model_dump(by_alias=True)
    data["protocol"] |= {"limit": 4}
    data |= {"limit": 4, "complete": False, "protocol_digest": protocol_digest(data["protocol"])}
    short = Record.model_validate(data)
    blank = Record.model_validate(data | {"tokenizer": data["tokenizer"] | {"trained": False}})

    def said(*records: Record) -> tuple[str, tuple[str, ...]]:
        (found,) = compute(records)
        texts = " ".join(text.get_text() for text in draw(found).texts)
        return texts, found.about.file_parts

    text, parts = said(base, changed(base, 15.0, 9.0, steps=1))
    assert "incomplete" not in text and "untrained" not in text and parts == ()
    assert (
        "comit-nano, policy global, guidance 7.5" in text
        and "of one flat colour" in text
        and "tiny-back v1" in text
    )
    text, parts = said(short, changed(short, 15.0, 9.0, steps=1))
    assert "incomplete: only part of the data was used (--limit 4)" in text and parts == ("incomplete",)
    (found,) = compute([blank, changed(blank, 15.0, 9.0, steps=1)])
    assert found.about.file_parts == ("untrained", "incomplete")
    assert found.panels[0].curves[0].label == "comit-nano (untrained)"
    assert "untrained, random weights: comit-nano" in " ".join(t.get_text() for t in draw(found).texts)
    (found,) = compute([blank, changed(short, 15.0, 9.0, name="longer")])  # one of two
    assert found.about.file_parts == ("incomplete",)


def test_columns_that_are_called_alike_are_two_files(root: Path) -> None:
    from comit_bench.figures.sweeps import compute

    (base,) = run(root)
    data = base.model_dump(by_alias=True)
    data["task"] |= {"version": 2}
    other = Record.model_validate(data)
    one, two = compute([r for b in (base, other) for r in (b, changed(b, 15.0, 9.0, steps=1))])
    assert (one.task, one.column) == (two.task, two.column)
    assert one.about.file_parts != two.about.file_parts
