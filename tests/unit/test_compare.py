"""Comparing rows: what is said, what is refused, what tables set bold, and trainings as the outer level."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rows import put, shares
from scipy import stats

import comit_bench
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.metrics.statistics import difference, holm, mcnemar
from comit_bench.results import compare as module
from comit_bench.results.compare import compare
from comit_bench.results.outcomes import OutcomeFiles, outcomes_path
from comit_bench.results.paired import Side, pair, ranks
from comit_bench.results.power import power_table
from comit_bench.results.records import load_records, record_path
from comit_bench.results.render.comparison import comparison_lines, print_comparison
from comit_bench.results.render.terminal import terminal_lines
from comit_bench.results.render.text import to_csv, to_latex, to_markdown
from comit_bench.results.schema import Metric
from comit_bench.results.table import Table, build_table

N = 400
DIFFICULTY = np.random.default_rng(0).uniform(size=N)


@pytest.fixture(autouse=True)
def no_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reference records are those of a folder of the test."""
    monkeypatch.setattr(module, "recipe_root", lambda kind: tmp_path / "shipped")


def top1(level: float, seed: int, **options: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    return {"top1": shares(np.random.default_rng(seed), level, DIFFICULTY, **options)}


def far(root: Path) -> None:
    """Three rows: two alike, one far below."""
    for name, level, seed in (("a", 0.70, 1), ("b", 0.71, 2), ("c", 0.4, 3)):
        put(root, name, top1(level, seed))


def ranked(table: Table, column: int = 0) -> dict[str, str | None]:
    return {row.label: cell.rank for row in table.rows if (cell := row.cells[column]) is not None}


def table_of(root: Path, **options: Any) -> Table:
    return build_table(load_records(root), outcomes=OutcomeFiles(root), **options)


# ------------------------------------------------------------------------------------ what is said


def test_numbers_are_those_of_the_statistics(tmp_path: Path) -> None:
    values = {name: top1(level, seed) for name, level, seed in (("a", 0.7, 1), ("b", 0.6, 2), ("c", 0.5, 3))}
    for name, value in values.items():
        put(tmp_path, name, value)
    found = compare("a", "b", "c", output=tmp_path)
    assert [(test.a, test.b) for test in found.tests] == [("a", "b"), ("a", "c"), ("b", "c")]
    raw = []
    for test in found.tests:
        one, other = (100 * values[name]["top1"] for name in (test.a, test.b))
        known = difference(one, other)
        raw.append(known.p)
        assert (test.difference, test.low, test.high, test.p, test.smallest) == pytest.approx(
            (known.value, known.low, known.high, known.p, known.smallest)
        )
        assert test.mcnemar == pytest.approx(mcnemar(one, other))
        assert (test.value_a, test.images, test.clusters, test.units_a) == (
            pytest.approx(one.mean()), N, None, "3 probe seeds",
        )  # fmt: skip
    assert [test.corrected for test in found.tests] == pytest.approx(holm(raw))


def test_sentences(tmp_path: Path) -> None:
    far(tmp_path)
    found = compare("a", "b", "c", output=tmp_path)
    alike, better, _ = (test.sentence for test in found.tests)
    assert alike.startswith("a and b cannot be told apart on recognition-scenes: ")
    assert alike.endswith(f"differences below {found.tests[0].smallest:.1f} points would go unnoticed.")
    size, low, high = (getattr(found.tests[1], key) for key in ("difference", "low", "high"))
    assert better == (
        f"a is better than c on recognition-scenes by {size:.1f} points "
        f"(95 % interval {low:.1f} to {high:.1f}; corrected p < .001)."
    )
    assert "a is better than c" in compare("c", "a", output=tmp_path).tests[0].sentence  # whatever the order


def test_lower_can_be_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, level in (("a", 1.0), ("b", 2.0)):
        put(tmp_path, name, {"loss": level + 0.1 * rng.normal(size=(1, 50))}, units={"loss": ""})
    (test,) = compare("a", "b", output=tmp_path).tests
    assert test.difference < 0 and "a is better than b" in test.sentence and "points" not in test.sentence
    assert test.mcnemar is None


def test_every_shared_metric_and_task_with_the_main_metric_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    distance = Metric.from_seeds([3.0], n=40, unit="", higher_is_better=False)
    for name in "ab":
        both = {key: rng.normal(size=(1, 40)) for key in ("ssim", "psnr")}
        put(tmp_path, name, both, task="reconstruction-scenes", kind="reconstruction", whole={"fd": distance})
        put(tmp_path, name, top1(0.6, 1 + (name == "b")))
        put(tmp_path, name, None, task="codebook-scenes", kind="codebook", whole={"perplexity": distance})
    put(tmp_path, "a", top1(0.5, 4), task="alone")
    found = compare("a", "b", output=tmp_path)
    assert [(t.task, t.metric, t.main) for t in found.tests] == [
        ("recognition-scenes", "top1", True),
        ("reconstruction-scenes", "psnr", True),
        ("reconstruction-scenes", "ssim", False),
    ]
    told = {f"{one.task} {one.metric}".strip(): one.why for one in found.untested}
    assert told["reconstruction-scenes fd"].startswith("untestable: a quantity of the whole set")
    assert "quantities of a whole set" in told["codebook-scenes"]
    assert told["alone"] == "b has no record of it"
    chosen = compare("a", "b", output=tmp_path, tasks=["reconstruction-scenes"], metrics=["ssim"])
    assert [test.metric for test in chosen.tests] == ["ssim"] and not chosen.untested


def test_clusters_and_the_order_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names, pairs = [f"image {i}" for i in range(60)], [f"pair {i % 6}" for i in range(60)]
    a, b = rng.normal(size=(2, 60)), rng.normal(size=(2, 60))
    order = rng.permutation(60)
    put(tmp_path, "a", {"mAP": a}, ids=names, clusters=pairs)
    mixed = {"ids": [names[i] for i in order], "clusters": [pairs[i] for i in order]}
    put(tmp_path, "b", {"mAP": b[:, order]}, **mixed)
    (test,) = compare("a", "b", output=tmp_path).tests
    known = difference(100 * a, 100 * b, pairs)
    assert (test.difference, test.p) == pytest.approx((known.value, known.p))
    assert test.clusters == 6 and test.mcnemar is None


def test_images_without_a_value_are_left_out_and_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30)), rng.normal(size=(2, 30))
    a[:, 3] = b[:, 3] = b[:, 5] = np.nan
    put(tmp_path, "a", {"m": a}, units={"m": ""})
    put(tmp_path, "b", {"m": b}, units={"m": ""})
    (test,) = compare("a", "b", output=tmp_path).tests
    assert (test.images, test.left_out) == (28, 1)
    assert test.p == pytest.approx(difference(np.delete(a, [3, 5], 1), np.delete(b, [3, 5], 1)).p)


def test_equal_rows_are_identical_and_json_has_no_nan(tmp_path: Path) -> None:
    put(tmp_path, "a", top1(0.7, 1))
    put(tmp_path, "b", top1(0.7, 1))
    found = compare("a", "b", output=tmp_path)
    (test,) = found.tests
    assert test.identical and not test.significant
    assert test.sentence == "a and b are identical on every image on recognition-scenes."
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["tests"][0]["p"] == 1.0


def test_a_row_in_the_output_folder_goes_before_one_that_ships(tmp_path: Path) -> None:
    put(tmp_path / "mine" / "records", "own", top1(0.7, 1))
    put(tmp_path / "shipped" / "reference", "known", top1(0.4, 2))
    put(tmp_path / "shipped" / "reference", "own", top1(0.1, 3))
    (test,) = compare("own", "known", output=tmp_path / "mine").tests
    assert test.difference > 20


def test_one_of_two_runs_with_a_limit_does_not_stand_in_the_way(tmp_path: Path) -> None:
    limited = {"protocol": {"limit": 5}, "record": {"limit": 5, "complete": False}}
    for seed, name in enumerate("ab"):
        put(tmp_path, name, top1(0.7, seed))
        put(tmp_path, name, top1(0.1, seed + 5), **limited)
    (test,) = compare("a", "b", output=tmp_path).tests
    assert test.value_a > 50


# ------------------------------------------------------------------------------------- what is refused


def test_names(tmp_path: Path) -> None:
    far(tmp_path)
    for policy in ("global", "raster:9"):
        put(tmp_path, "comit", top1(0.6, 5), side={"policy": policy})
    with pytest.raises(
        UsageError, match="'comit' names 2 rows: 'comit \\(global\\)', 'comit \\(raster:9\\)'"
    ):
        compare("comit", "a", output=tmp_path)
    assert compare("comit (raster:9)", "a", output=tmp_path).rows == ("comit (raster:9)", "a")
    with pytest.raises(UsageError, match=r"no row is called 'comitt'. Did you mean 'comit"):
        compare("comitt", "a", output=tmp_path)
    with pytest.raises(UsageError, match="at least two rows"):
        compare("a", output=tmp_path)
    with pytest.raises(UsageError, match="'a' is named twice"):
        compare("a", "b", "a", output=tmp_path)
    with pytest.raises(MissingError, match="no records to compare"):
        compare("a", "b", output=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"task 'recognition-scene'. Did you mean 'recognition-scenes'"):
        compare("a", "b", output=tmp_path, tasks=["recognition-scene"])
    with pytest.raises(UsageError, match=r"metric 'top_1'. Did you mean 'top1'"):
        compare("a", "b", output=tmp_path, metrics=["top_1"])


def test_untrained_namesakes_are_named_as_the_table_prints_them(tmp_path: Path) -> None:
    put(tmp_path, "a", top1(0.7, 1))
    put(tmp_path, "a", top1(0.2, 2), tokenizer={"weights": "random:0", "trained": False})
    (test,) = compare("a", "a†", output=tmp_path).tests
    assert test.difference > 20 and test.sentence.startswith("a is better than a† on")


OTHER = {
    "version": ({"version": 2}, "different protocols or data \\(version of the task: 3 and 2\\)"),
    "protocol": ({"protocol": {"probe": "wide"}}, "different protocols or data \\(probe: none and wide\\)"),
    "limit": ({"protocol": {"limit": 9}, "record": {"limit": 9, "complete": False}}, "limit: null and 9"),
    "images": ({"ids": [f"x{i}" for i in range(N)]}, "measured on different images \\(400 and 400\\)"),
    "clusters": ({"clusters": ["a", "b"] * (N // 2)}, "clustered in different ways"),
}


@pytest.mark.parametrize("what", sorted(OTHER))
def test_rows_that_were_measured_differently(what: str, tmp_path: Path) -> None:
    options, words = OTHER[what]
    put(tmp_path, "a", top1(0.7, 1))
    put(tmp_path, "b", top1(0.6, 2), **options)
    with pytest.raises(UsageError, match=words):
        compare("a", "b", output=tmp_path)


def test_other_data(tmp_path: Path) -> None:
    put(tmp_path, "a", top1(0.7, 1))
    one = put(tmp_path, "b", top1(0.6, 2))
    data = one.task.dataset.model_copy(update={"fingerprint": "sha256:" + "9" * 64})
    other = one.model_copy(update={"task": one.task.model_copy(update={"dataset": data})})
    record_path(tmp_path, one).write_text(other.to_json())
    with pytest.raises(UsageError, match=r"data.fingerprint: [0-9a-f]+ and 9999"):
        compare("a", "b", output=tmp_path)


def test_incomplete_records(tmp_path: Path) -> None:
    limited: dict[str, Any] = {"protocol": {"limit": 9}, "record": {"limit": 9, "complete": False}}
    put(tmp_path, "a", top1(0.7, 1), **limited)
    put(tmp_path, "b", top1(0.6, 2), **limited)
    with pytest.raises(UsageError, match=r"the record of a is incomplete \(--limit 9\)"):
        compare("a", "b", output=tmp_path)
    broken = {"complete": False, "incomplete": ("3 images are broken",)}
    put(tmp_path / "2", "a", top1(0.7, 1))
    put(tmp_path / "2", "b", top1(0.6, 2), record=broken)
    with pytest.raises(UsageError, match=r"the record of b is incomplete \(3 images are broken\)"):
        compare("a", "b", output=tmp_path / "2")


def test_records_without_outcomes(tmp_path: Path) -> None:
    score = {"top1": Metric.from_seeds([50.0], n=9)}
    put(tmp_path, "a", {"top1": np.ones((1, 9))})
    put(tmp_path, "old", None, whole=score, record={"schema_version": 2})
    put(tmp_path, "paper", None, whole=score, record={"origin": "paper"})
    with pytest.raises(UsageError, match="record of old is of an older version, without outcomes"):
        compare("a", "old", output=tmp_path)
    with pytest.raises(UsageError, match="number of paper is a published one"):
        compare("a", "paper", output=tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.ones((3, 1)), "a single image has a value for both: a comparison needs at least two"),
        (np.where(np.arange(9) == 2, 1.0, np.nan)[None], "a single image has a value"),
    ],
)
def test_one_image(values: np.ndarray[Any, np.dtype[np.float64]], words: str, tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path, name, {"top1": values})
    with pytest.raises(UsageError, match=words):
        compare("a", "b", output=tmp_path)


def test_values_that_are_missing_under_some_seeds() -> None:
    values = np.ones((2, 4))
    values[0, 1] = np.nan
    with pytest.raises(UsageError, match="1 images have a value under some seeds only"):
        Side(list("abcd"), values, None)
    nothing = Side(list("abcd"), np.full((2, 4), np.nan), None)
    with pytest.raises(UsageError, match="no image has a value for both"):
        pair(nothing, nothing)
    one = Side(list("abcd"), np.ones((2, 4)), np.zeros(4, dtype=np.int64))
    with pytest.raises(UsageError, match="a single cluster of images"):
        pair(one, one)
    twice = Side(list("aabc"), np.ones((2, 4)), None)
    with pytest.raises(UsageError, match="different images"):
        pair(twice, Side(list("abca"), np.ones((2, 4)), None))


def test_outcomes_that_are_gone_damaged_or_foreign(tmp_path: Path) -> None:
    put(tmp_path, "a", top1(0.7, 1))
    one = put(tmp_path, "b", top1(0.6, 2))
    file = outcomes_path(record_path(tmp_path, one))
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CorruptFileError, match="does not belong to the record"):
        compare("a", "b", output=tmp_path)
    file.unlink()
    with pytest.raises(MissingError, match="outcomes of this record are not there"):
        compare("a", "b", output=tmp_path)
    text = pa.BufferOutputStream()
    pq.write_table(pq.read_table(pa.BufferReader(kept)).slice(0, 30), text)
    file.write_bytes(text.getvalue().to_pybytes())
    with pytest.raises(CorruptFileError, match="does not belong"):
        compare("a", "b", output=tmp_path)


def test_a_task_that_cannot_be_compared_does_not_hide_the_others(tmp_path: Path) -> None:
    far(tmp_path)
    put(tmp_path, "a", top1(0.7, 1), task="other")
    put(tmp_path, "b", top1(0.7, 1), task="other", version=9)
    found = compare("a", "b", output=tmp_path)
    assert [test.task for test in found.tests] == ["recognition-scenes"]
    assert [(one.task, one.metric) for one in found.untested] == [("other", "")]
    with pytest.raises(UsageError, match="version of the task"):
        compare("a", "b", output=tmp_path, tasks=["other"])


# ------------------------------------------------------------------------------------- marks in tables


def test_bold_is_what_is_not_significantly_worse(tmp_path: Path) -> None:
    far(tmp_path)
    put(tmp_path, "d", top1(0.38, 4))
    put(tmp_path, "e", top1(0.1, 5))
    table = table_of(tmp_path)
    assert ranked(table) == {"a": "best", "b": "best", "c": "second", "d": "second", "e": None}
    (legend,) = table.legend
    for word in ("paired t test", "level .05", "Holm"):
        assert word in legend and word in to_markdown(table) and word in to_latex(table)
    text = to_markdown(table)
    assert text.count("**") == 4 and text.count("<u>") == 2
    assert to_latex(table).count(r"\textbf{") == 2 and to_latex(table).count(r"\underline{") == 2
    lines = terminal_lines(table, 100)
    bold = [line.plain[0] for line in lines if any(span.style == "bold" for span in line.spans)]
    assert [letter for letter in bold if letter in "abcde"] == ["a", "b"]


def test_a_second_place_needs_a_third(tmp_path: Path) -> None:
    """A row that is worse than all others is not underlined, nor are several that share the last place."""
    put(tmp_path, "a", top1(0.8, 1))
    put(tmp_path, "b", top1(0.4, 2))
    assert ranked(table_of(tmp_path)) == {"a": "best", "b": None}
    put(tmp_path, "c", top1(0.41, 3))
    assert ranked(table_of(tmp_path)) == {"a": "best", "b": None, "c": None}
    put(tmp_path, "d", top1(0.1, 4))
    assert ranked(table_of(tmp_path)) == {"a": "best", "b": "second", "c": "second", "d": None}


def test_the_old_habit(tmp_path: Path) -> None:
    far(tmp_path)
    table = table_of(tmp_path, marks="rank")
    assert sorted(map(str, ranked(table).values())) == ["None", "best", "second"] and not ranked(table)["c"]
    assert table.legend[0].startswith("Best bold, second-best underlined")


def test_rows_and_columns_that_are_never_marked(tmp_path: Path) -> None:
    far(tmp_path)
    put(tmp_path, "oracle", top1(0.99, 6), tokenizer={"kind": "reference"})
    put(tmp_path, "old", None, whole={"top1": Metric.from_seeds([99.0, 99.0, 99.0], n=N)},
        record={"schema_version": 2, "seeds": (0, 1, 2)}, protocol={"seeds": [0, 1, 2]})  # fmt: skip
    put(tmp_path, "broken", top1(0.9, 7), record={"complete": False, "incomplete": ("x",)})
    for name in "ab":
        fd = Metric.from_seeds([3.0], n=9, unit="", higher_is_better=False)
        put(
            tmp_path, name, {"psnr": np.random.default_rng(0).normal(size=(1, 9))}, task="r", whole={"fd": fd}
        )
    table = table_of(tmp_path)
    where = {(c.group.task, c.metric): i for i, c in enumerate(table.columns)}
    assert ranked(table, where["recognition-scenes", "top1"]) == {
        "oracle": None, "a": "best", "b": "best", "c": None, "old": None, "broken": None,
    }  # fmt: skip
    assert set(ranked(table, where["r", "fd"]).values()) == {None}
    assert "Untested and unmarked, without outcomes of every image: fd." in table.legend
    assert "Unmarked in tested columns, without outcomes of every image: old." in table.legend
    only = build_table(load_records(tmp_path))  # nobody says where outcomes lie
    assert not any(rank for index in range(len(only.columns)) for rank in ranked(only, index).values())
    assert any(line.startswith("Untested and unmarked") for line in only.legend)


def test_metrics_that_are_not_to_be_ranked_by(tmp_path: Path) -> None:
    for name, level in (("a", 0.7), ("b", 0.3)):
        told = put(tmp_path, name, top1(level, 1))
        unranked = {key: one.model_copy(update={"unranked": True}) for key, one in told.metrics.items()}
        record_path(tmp_path, told).write_text(told.model_copy(update={"metrics": unranked}).to_json())
    for marks in ("significance", "rank"):
        table = table_of(tmp_path, marks=marks)
        assert set(ranked(table).values()) == {None}
    assert table_of(tmp_path).legend == ("Not to be ranked by, and unmarked: top1.",)
    (test,) = compare("a", "b", output=tmp_path).tests
    assert "a is higher than b" in test.sentence and not test.ranked


def test_damaged_outcomes_leave_a_row_unmarked_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far(tmp_path)
    one = put(tmp_path, "b", top1(0.71, 2))
    outcomes_path(record_path(tmp_path, one)).write_bytes(b"nothing")
    assert ranked(table_of(tmp_path)) == {"a": "best", "b": None, "c": None}
    assert "does not belong to the record" in caplog.text


def test_every_file_is_read_once_and_only_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    rng = np.random.default_rng(0)
    for name in "abc":
        put(
            tmp_path,
            name,
            {key: rng.normal(size=(2, 20)) for key in ("x", "y", "z")},
            units=dict.fromkeys("xyz", ""),
        )
    put(tmp_path, "a", top1(0.5, 1), task="alone")
    read: list[Path] = []
    real = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, **rest: read.append(path) or real(path, **rest))
    table_of(tmp_path)
    assert len(read) == len(set(read)) == 3
    table_of(tmp_path, marks="rank")
    assert len(read) == 3


def test_of_equal_file_names_the_one_that_belongs_to_the_record_is_read(tmp_path: Path) -> None:
    one, other = (put(tmp_path / folder, "a", top1(level, 1)) for folder, level in (("x", 0.3), ("y", 0.7)))
    files = OutcomeFiles(tmp_path)
    for record in (one, other):
        found = files(record)
        assert found is not None
        assert 100 * found.values["top1"].mean() == pytest.approx(record.metrics["top1"].value)


def test_unconverged_probes_have_a_mark(tmp_path: Path) -> None:
    put(tmp_path, "a", top1(0.7, 1))
    put(tmp_path, "b", top1(0.7, 2), record={"unconverged": (1,)})
    table = table_of(tmp_path)
    assert [row.label + row.marks for row in table.rows] == ["a", "b¶"]
    assert "¶ the best epoch of a probe was the last one allowed: it may not have finished learning" in (
        to_markdown(table)
    )
    assert r"b$^{\P}$" in to_latex(table)


def test_of_equal_rows_one_is_wrongly_told_apart_in_at_most_5_of_100_columns() -> None:
    """Five rows that differ in nothing, the best picked by its score: all stay bold but for the level."""
    rng, times = np.random.default_rng(0), 400
    wrong = 0
    for _ in range(times):
        common = rng.normal(size=60)
        values = [
            common
            + 0.7 * rng.normal(size=60)
            + 0.05 * rng.normal(size=(3, 1))
            + 0.3 * rng.normal(size=(3, 60))
            for _ in range(5)
        ]
        sides = {i: Side(list(map(str, range(60))), value, None) for i, value in enumerate(values)}
        means = {i: float(value.mean()) for i, value in enumerate(values)}
        wrong += set(ranks(sides, means, higher=True).values()) != {"best"}
    assert wrong / times <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / times)


def test_of_equal_rows_a_comparison_is_wrongly_significant_in_at_most_5_of_100() -> None:
    """Three rows, two metrics: six tests, corrected together."""
    rng, times, n = np.random.default_rng(1), 400, 60
    wrong = 0
    for _ in range(times):
        p = []
        for _ in range(2):
            rows = [
                rng.normal(size=n) + 0.05 * rng.normal(size=(3, 1)) + rng.normal(size=(3, n))
                for _ in range(3)
            ]
            p += [difference(rows[i], rows[j]).p for i, j in ((0, 1), (0, 2), (1, 2))]
        wrong += min(holm(p)) <= 0.05
    assert wrong / times <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / times)


# --------------------------------------------------------------------------------------- trainings


def trained(root: Path, group: str, levels: list[float], **options: Any) -> None:
    for number, level in enumerate(levels):
        weights = "sha256:" + format(sum(map(ord, group)) + number, "x").rjust(64, "0")
        put(root, f"{group}-{number}", top1(level, number + len(group)), **options,
            tokenizer={"group": group, "weights": weights})  # fmt: skip


def test_trainings_are_the_outer_level(tmp_path: Path) -> None:
    trained(tmp_path, "big", [0.68, 0.74, 0.71])
    trained(tmp_path, "small", [0.50, 0.55, 0.45])
    found = compare("big", "small", output=tmp_path)
    (test,) = found.tests
    assert found.rows == ("big (3 trainings)", "small (3 trainings)")
    assert (test.units_a, test.units_b) == ("3 trainings", "3 trainings")
    files = OutcomeFiles(tmp_path)
    sides = [
        100 * np.stack([o.values["top1"].mean(axis=0) for r in load_records(tmp_path)
                        if r.tokenizer.group == group and (o := files(r))])
        for group in ("big", "small")
    ]  # fmt: skip
    known = difference(*sides)
    assert (test.difference, test.p, test.low) == pytest.approx((known.value, known.p, known.low))
    assert compare("big (3 trainings)", "small", output=tmp_path).tests == found.tests
    one = compare("big-0", "small", output=tmp_path)
    assert (one.tests[0].units_a, one.tests[0].units_b) == ("3 probe seeds", "3 trainings")
    assert any("Trainings are the outer level" in line.plain for line in comparison_lines(one, 200))


def test_trainings_that_vary_are_not_taken_for_certain(tmp_path: Path) -> None:
    """Trainings 10 points apart: their probes tell any two apart, the recipes stay undecided."""
    trained(tmp_path, "one", [0.5, 0.6, 0.7])
    trained(tmp_path, "other", [0.55, 0.66, 0.75])
    assert compare("one-0", "other-2", output=tmp_path).tests[0].significant
    assert not compare("one", "other", output=tmp_path).tests[0].significant


def test_tables_join_trainings(tmp_path: Path) -> None:
    trained(tmp_path, "big", [0.6, 0.7, 0.8])
    put(tmp_path, "alone", top1(0.3, 9), tokenizer={"group": "lonely"})
    plain = table_of(tmp_path)
    assert len(plain.rows) == 4
    table = table_of(tmp_path, trainings="mean")
    by_label = {row.label: row.cells[0] for row in table.rows}
    assert set(by_label) == {"big (3 trainings)", "alone"}
    cell = by_label["big (3 trainings)"]
    values = [c.metric.value for row in plain.rows if "big" in row.label and (c := row.cells[0])]
    assert cell is not None and cell.metric.value == pytest.approx(np.mean(values))
    assert cell.metric.std == pytest.approx(np.std(values, ddof=1)) and cell.rank == "best"
    assert (
        "Rows of trainings: mean ± sample standard deviation over 3 trainings (3 probe seeds each)."
        in table.notes
    )
    assert "± is the sample standard deviation over 3 seeds." in table.notes  # of the other row
    for text in (to_markdown(table), to_latex(table), to_csv(table)):
        assert "big (3 trainings)" in text


def test_trainings_on_different_images(tmp_path: Path) -> None:
    trained(tmp_path, "big", [0.6])
    put(tmp_path, "big-9", top1(0.6, 1), ids=[f"x{i}" for i in range(N)],
        tokenizer={"group": "big", "weights": "sha256:" + "f" * 64})  # fmt: skip
    put(tmp_path, "a", top1(0.6, 1))
    with pytest.raises(UsageError, match="trainings of this group were measured on different images"):
        compare("big", "a", output=tmp_path)


# ------------------------------------------------------------------------------------ power and command


def test_power(tmp_path: Path) -> None:
    far(tmp_path)
    put(tmp_path, "oracle", top1(0.99, 6), tokenizer={"kind": "reference"})
    text = power_table(tmp_path)
    found = compare("a", "b", "c", output=tmp_path)
    sizes = sorted(test.smallest for test in found.tests)
    line = next(line for line in text.splitlines() if line.startswith("| recognition-scenes"))
    assert line.split(" | ")[1:6] == ["top1 %", "400", "", "3 probe seeds", "3"]
    assert line.rstrip(" |").split(" | ")[6:] == [f"{sizes[1]:.1f}", f"{sizes[0]:.1f}", f"{sizes[2]:.1f}"]
    scaled = next(line for line in text.splitlines() if "scaled from recognition-scenes" in line)
    assert scaled.startswith("| imagenet100") and float(scaled.split(" | ")[6]) < sizes[1]
    with pytest.raises(MissingError, match="no records to look at"):
        power_table(tmp_path / "nowhere")
    put(tmp_path / "one", "a", top1(0.7, 1))
    with pytest.raises(MissingError, match="no two measured rows"):
        power_table(tmp_path / "one")


def test_scaling_is_right_where_nothing_but_images_varies(tmp_path: Path) -> None:
    """One seed: four times the images find half the difference."""
    from comit_bench.results.compare import rows_of
    from comit_bench.results.power import powers

    rng = np.random.default_rng(0)
    for name in "ab":
        put(tmp_path, name, {"top1": rng.normal(size=(1, 100))})
    (one,) = powers(rows_of(load_records(tmp_path), OutcomeFiles(tmp_path)))["recognition-scenes"]
    assert one.at(400) == pytest.approx(one.test.smallest / 2)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_printed_fits_80_columns(encoding: str, tmp_path: Path) -> None:
    long = "a-tokenizer-with-quite-a-long-name-of-its-own"
    put(tmp_path, long, top1(0.7, 1))
    put(tmp_path, "b" * 60, {"top1": top1(0.3, 2)["top1"]})
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, write_through=True)
    print_comparison(compare(long, "b" * 60, output=tmp_path), Console(file=stream, width=80))
    lines = buffer.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= 80 and any("95 % interval" in line for line in lines)


def test_the_public_name() -> None:
    assert comit_bench.compare is compare and "compare" in comit_bench.__all__


def test_the_command(tmp_path: Path) -> None:
    far(tmp_path / "records")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "comit_bench.commands.app", "compare", *arguments]
        return subprocess.run(
            [*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False
        )

    done = call("a", "c")
    assert done.returncode == 0 and "a is better than c on recognition-scenes" in " ".join(
        done.stdout.split()
    )
    done = call("a", "b", "--json", "--metrics", "top1")
    assert json.loads(done.stdout)["rows"] == ["a", "b"]
    done = call("a", "aa")
    assert done.returncode == 2 and done.stderr.startswith("error: no row is called 'aa'")
    done = call("--power")
    assert done.stdout.splitlines()[2].startswith("| task | metric") and done.returncode == 0
    assert call("a", "--power").returncode == 2


def test_the_interval_agrees_with_the_bootstrap_over_images(tmp_path: Path) -> None:
    a, b = (top1(level, seed, seeds=1) for level, seed in ((0.7, 1), (0.6, 2)))
    put(tmp_path, "a", a)
    put(tmp_path, "b", b)
    (test,) = compare("a", "b", output=tmp_path).tests
    again = stats.bootstrap(
        (100 * a["top1"][0], 100 * b["top1"][0]),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True, vectorized=True, n_resamples=4000, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    width = test.high - test.low
    assert (test.low, test.high) == pytest.approx((again.low, again.high), abs=0.05 * width)
