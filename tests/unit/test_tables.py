"""Tables: what shares a column, what is best, what is a dash, and that every format says the same."""

from __future__ import annotations

import io
import random
import re
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from comit_bench.errors import UsageError
from comit_bench.results.notation import format_number
from comit_bench.results.records import Metric, Record, load_record, protocol_digest
from comit_bench.results.render.layout import DASH, short_count
from comit_bench.results.render.terminal import print_terminal
from comit_bench.results.render.text import to_csv, to_latex, to_markdown
from comit_bench.results.render.write import write_tables
from comit_bench.results.table import Table, build_table

BASE = load_record(Path(__file__).parents[1] / "fixtures" / "records" / "measured-v1.json")
TRAINED = "sha256:" + "1" * 64


def make(
    name: str = "comit-nano",
    scores: dict[str, float | list[float] | Metric] | None = None,
    *,
    kind: str = "learned",
    weights: str = TRAINED,
    trained: bool = True,
    parameters: int = 1000,
    task: str = "recognition",
    version: int = 1,
    suite: str = "scenes",
    limit: int | None = None,
    control: str | None = None,
    origin: str = "measured",
    tokenizer_side: dict[str, Any] | None = None,
    created: datetime = datetime(2026, 1, 1, tzinfo=UTC),
    **protocol: Any,
) -> Record:
    metrics = {}
    for metric, score in (scores or {"top1": [50.0, 51.0, 52.0]}).items():
        values = [score] * 3 if isinstance(score, float) else score
        metrics[metric] = (
            score if isinstance(score, Metric) else Metric.from_seeds(values, n=1000, chance=1.0)
        )
    protocol = {"seeds": [0, 1, 2], "limit": limit, "control": control, **protocol}
    protocol["tokenizer"] = tokenizer_side or {}
    row = {"name": name, "kind": kind, "weights": weights, "trained": trained, "parameters": parameters}
    row = {**BASE.tokenizer.model_dump(), **row, "family": name}
    task_row = {**BASE.task.model_dump(), "name": task, "version": version, "suite": suite}
    return Record.model_validate(
        {
            **dict(BASE), "tokenizer": row, "task": task_row, "metrics": metrics, "protocol": protocol,
            "protocol_digest": protocol_digest(protocol), "limit": limit, "complete": limit is None,
            "control": control, "origin": origin, "created": created,
        }
    )  # fmt: skip


by_rank = partial(build_table, marks="rank")


def lower(value: float, unit: str = "") -> Metric:
    return Metric.from_seeds([value] * 3, n=1000, higher_is_better=False, unit=unit)


def ranks(table: Table, column: int = 0) -> dict[str, str | None]:
    cells = {row.label: row.cells[column] for row in table.rows}
    return {label: cell.rank for label, cell in cells.items() if cell is not None}


def plain(table: Table, width: int = 100) -> str:
    stream = io.StringIO()
    print_terminal(table, Console(file=stream, width=width))
    return stream.getvalue()


def crowd() -> list[Record]:
    """Eight rows, two tasks, every mark, a control and a limited run."""
    return [
        make("majority", {"top1": 1.2, "digit": 10.0}, kind="reference", weights="none", parameters=0),
        make("pixel-oracle", {"top1": 90.0, "digit": 92.0}, kind="reference", weights="none"),
        make("kmeans-patch", {"top1": [44.1, 45.2, 46.1], "digit": 50.0}, kind="baseline"),
        make(scores={"top1": [54.1, 55.2, 56.1], "digit": 60.0}),
        make(scores={"top1": 4.0, "digit": 12.0}, weights="random:0", trained=False),
        make("comit_l", {"top1": 65.0, "digit": 70.0}, parameters=610_850_000),
        make("comit_l", {"fid": lower(3.1), "psnr": [21.3, 21.4, 21.5]}, task="recon"),
        make("kmeans-patch", {"fid": lower(33.2), "psnr": [18.3, 18.2, 18.4]}, kind="baseline", task="recon"),
        make("comit_l", {"top1": 1.0}, control="permute-labels"),
        make("kmeans-patch", {"top1": 35.0}, kind="baseline", limit=100),
        make("comit_l", {"top1": 80.0}, origin="paper", weights="unknown", published="table 1"),
    ]


# ------------------------------------------------------------------------------------- arrangement


def test_rows_are_grouped_and_ordered() -> None:
    table = build_table(crowd())
    names = [row.tokenizer.name for row in table.rows]
    assert names[:3] == ["majority", "pixel-oracle", "kmeans-patch"]
    kinds = [row.tokenizer.kind for row in table.rows]
    assert kinds == sorted(kinds, key=["reference", "baseline", "learned"].index)


def test_table_does_not_depend_on_the_order_of_records() -> None:
    records = crowd()
    table = build_table(records)
    outputs = (to_csv(table), to_markdown(table), to_latex(table), plain(table))
    for seed in range(5):
        random.Random(seed).shuffle(records)
        again = build_table(records)
        assert again == table
        assert (to_csv(again), to_markdown(again), to_latex(again), plain(again)) == outputs


def test_missing_cells_are_dashes_and_nothing_is_averaged() -> None:
    table = build_table([make("a", {"x": 10.0}), make("b", {"y": 20.0}), make("b", {"z": 1.0}, task="t2")])
    assert [column.metric for column in table.columns] == ["x", "y", "z"]
    assert [[cell is None for cell in row.cells] for row in table.rows] == [
        [False, True, True],
        [True, False, False],
    ]
    body = [line for line in plain(table).splitlines() if line.startswith(("a ", "b "))]
    assert [line.split()[4:] for line in body] == [
        ["10.0", "±", "0.0", DASH, DASH],
        [DASH, "20.0", "±", "0.0", "1.0", "±", "0.0"],
    ]
    assert "mean" not in plain(table).lower()


def test_two_protocols_never_share_a_column() -> None:
    table = build_table([make("a", width=64), make("b", width=128), make("c", width=64, limit=7)])
    assert len(table.columns) == 3
    for column in range(3):
        assert sum(row.cells[column] is not None for row in table.rows) == 1
    subtitles = [group.subtitle for group in table.groups]
    assert sorted(subtitles) == ["v1, limit=7, width=64", "v1, width=128", "v1, width=64"]
    assert subtitles[-1] == "v1, limit=7, width=64"  # complete runs come first
    assert any("differ in limit, width" in note for note in table.notes)


def test_protocol_is_not_in_the_header_when_there_is_only_one() -> None:
    assert [group.subtitle for group in build_table([make("a"), make("b")]).groups] == ["v1"]


def test_other_data_or_task_version_or_control_opens_columns() -> None:
    other_data = BASE.task.dataset.model_dump() | {"fingerprint": "sha256:" + "9" * 64}
    record = make("d")
    moved = record.model_copy(
        update={"task": type(record.task).model_validate(record.task.model_dump() | {"dataset": other_data})}
    )
    table = build_table([make("a"), make("b", version=2), make("c", control="permute-labels"), moved])
    assert [group.subtitle for group in table.groups] == [
        "v2",
        "v1, data.fingerprint=5d5d5d5d",
        "v1, data.fingerprint=99999999",
        "v1, control permute-labels",
    ]


def test_long_protocol_differences_become_a_digest() -> None:
    table = build_table([make("a", text="x" * 50), make("b", text="y" * 50)])
    subtitles = [group.subtitle for group in table.groups]
    assert all(re.fullmatch(r"v1, [0-9a-f]{8}", subtitle) for subtitle in subtitles)
    assert len(set(subtitles)) == 2


def test_tokenizer_side_of_the_protocol_opens_rows_not_columns() -> None:
    records = [make(tokenizer_side={"policy": p, "pre": "crop"}) for p in ("global", "raster:9")]
    table = build_table(records)
    assert len(table.columns) == 1
    assert sorted(row.label for row in table.rows) == [
        "comit-nano (global)",
        "comit-nano (raster:9)",
    ]


def test_same_name_with_other_weights_is_another_row() -> None:
    table = build_table([make(), make(weights="sha256:" + "2" * 64), make(weights="random:0", trained=False)])
    assert sorted(row.label + row.marks for row in table.rows) == [
        "comit-nano (weights=11111111)",
        "comit-nano (weights=22222222)",
        "comit-nano†",
    ]


def test_newest_of_two_records_for_a_cell_is_shown_and_said() -> None:
    old = make(scores={"top1": 10.0, "dropped": 1.0})
    new = make(scores={"top1": 20.0}, created=datetime(2026, 2, 1, tzinfo=UTC))
    for records in ([old, new], [new, old], [new, old, new]):
        table = build_table(records)
        cell = table.rows[0].cells[0]
        assert cell is not None and cell.metric.value == 20.0
        assert any("older record" in note for note in table.notes)
        assert [column.metric for column in table.columns] == ["top1"]
    assert not any("older record" in note for note in build_table([new, new]).notes)


def test_filters() -> None:
    records = [*crowd(), make("a", task="other", suite="paper")]
    assert [g.task for g in build_table(records, suite="paper").groups] == ["other"]
    table = build_table(records, tasks=["recon", "other"], metrics=["psnr", "top1"])
    assert [(c.group.task, c.metric) for c in table.columns] == [("recon", "psnr"), ("other", "top1")]
    assert {row.label for row in table.rows} == {"comit_l", "kmeans-patch", "a"}
    table = build_table(records, tasks=["recon"], metrics=["psnr", "fid"])
    assert [column.metric for column in table.columns] == ["psnr", "fid"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metrics": ["top_1"]}, "metric 'top_1'. Did you mean 'top1'"),
        ({"tasks": ["recognitoin"]}, "task 'recognitoin'. Did you mean 'recognition'"),
        ({"suite": "scene"}, "suite 'scene'. Did you mean 'scenes'"),
    ],
)
def test_unknown_filters_suggest_the_nearest(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        build_table(crowd(), **arguments)


def test_records_that_disagree_on_a_metric_are_refused() -> None:
    with pytest.raises(UsageError, match="a and b disagree on the unit or direction of 'm'"):
        build_table([make("a", {"m": 5.0}), make("b", {"m": lower(5.0, "%")})])


def test_empty_table_is_written_in_every_format(tmp_path: Path) -> None:
    table = build_table([])
    assert [path.name for path in write_tables(table, tmp_path)] == ["table.csv", "table.md", "table.tex"]
    assert "No records." in plain(table)
    assert "No records." in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "No records." in to_latex(table)


# ------------------------------------------------------------------------------------------- ranks


def test_best_and_second_best() -> None:
    table = by_rank([make("a", {"m": 10.0}), make("b", {"m": 30.0}), make("c", {"m": 20.0})])
    assert ranks(table) == {"a": None, "b": "best", "c": "second"}


def test_lower_is_better() -> None:
    table = by_rank([make("a", {"m": lower(10)}), make("b", {"m": lower(30)}), make("c", {"m": lower(20)})])
    assert ranks(table) == {"a": "best", "b": None, "c": "second"}


def test_what_prints_equal_shares_its_rank() -> None:
    scores = {"a": 30.04, "b": 29.96, "c": 20.0, "d": 20.01, "e": 10.0}
    table = by_rank([make(name, {"m": score}) for name, score in scores.items()])
    assert ranks(table) == {"a": "best", "b": "best", "c": "second", "d": "second", "e": None}


def test_reference_and_incomplete_rows_are_never_ranked() -> None:
    records = [make("oracle", {"m": 99.0}, kind="reference"), make("a", {"m": 10.0}), make("b", {"m": 20.0})]
    partial = make("part", {"m": 50.0}).model_copy(update={"complete": False})
    table = by_rank([*records, partial])
    assert len(table.columns) == 1
    assert ranks(table) == {"oracle": None, "part": None, "a": "second", "b": "best"}


def test_nothing_is_best_alone_or_in_a_control() -> None:
    assert ranks(by_rank([make("a"), make("oracle", kind="reference")])) == {"oracle": None, "a": None}
    table = by_rank([make("a", {"m": 1.0}, control="c"), make("b", {"m": 2.0}, control="c")])
    assert ranks(table) == {"a": None, "b": None}


# ------------------------------------------------------------------------------------------- marks


def test_marks_and_their_footnotes() -> None:
    table = build_table(crowd())
    marked = {row.label + row.marks for row in table.rows}
    assert {"comit-nano†", "comit-nano", "comit_l§"} <= marked
    limited = [c for row in table.rows for c in row.cells if c is not None and not c.record.complete]
    assert [cell.marks for cell in limited] == ["‡"]  # the same row has complete cells
    assert [mark for mark, _ in table.footnotes] == ["†", "‡", "§"]
    text = plain(table)
    assert "35.0 ± 0.0‡" in text
    assert "† untrained" in text and "‡ incomplete" in text and "§ published" in text


def test_mark_of_all_cells_moves_to_the_label() -> None:
    table = build_table([make("a", {"x": 1.0, "y": 2.0}, limit=5), make("b", {"x": 1.0}, limit=5)])
    assert [row.label + row.marks for row in table.rows] == ["a‡", "b‡"]
    assert all(not cell.marks for row in table.rows for cell in row.cells if cell)


def test_no_footnotes_without_marks() -> None:
    assert build_table([make("a"), make("b")]).footnotes == ()


def test_published_numbers_have_their_own_column() -> None:
    table = build_table([make("comit_l"), make("comit_l", origin="paper", weights="unknown", source="t")])
    assert [group.subtitle for group in table.groups] == ["v1", "v1, published"]
    assert [row.label + row.marks for row in table.rows] == ["comit_l", "comit_l§"]


# ----------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(45.25, 1, "45.2"), (-0.04, 1, "0.0"), (0.0, 2, "0.00"), (-3.14, 1, "-3.1"), (1e12, 1, "1.00e+12")],
)
def test_format_number(value: float, decimals: int, text: str) -> None:
    assert format_number(value, decimals) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, DASH), (0, "0"), (999, "999"), (1000, "1.00k"), (24576, "24.6k"), (999_999, "1.00M"),
     (173_840_000, "174M"), (1_000_000_000, "1.00G")],
)  # fmt: skip
def test_short_count(count: int | None, text: str) -> None:
    assert short_count(count) == text


def test_csv_holds_the_numbers_of_the_records() -> None:
    records = crowd()
    frame = pd.read_csv(io.StringIO(to_csv(build_table(records))))
    seen = 0
    for record in records:
        line = frame[
            (frame["name"] == record.tokenizer.name) & (frame["weights"] == record.tokenizer.weights)
        ]
        assert len(line) == 1
        stems = [
            column.removesuffix("_protocol")
            for column in frame.columns
            if re.fullmatch(rf"{record.task.name}-v1(?!\d)[^:]*_protocol", column)
            and line[column].item() == record.protocol_digest
        ]
        assert len(stems) == 1
        assert line[f"{stems[0]}_complete"].item() == record.complete
        for name, metric in record.metrics.items():
            expected = {"mean": metric.value, "std": metric.std, "stderr": metric.stderr, "n": metric.n}
            expected |= {"seeds": len(metric.per_seed), "chance": metric.chance}
            for part, wanted in expected.items():
                found = line[f"{stems[0]}:{name}_{part}"].item()
                assert pd.isna(found) if wanted is None else found == pytest.approx(wanted, rel=1e-14)
                seen += 1
    assert seen == 6 * sum(len(record.metrics) for record in records)
    assert frame.filter(regex="_mean$").notna().sum().sum() == seen / 6
    assert frame.columns.is_unique


def test_csv_columns_keep_their_names_beside_a_limited_run() -> None:
    alone = to_csv(build_table([make("a")])).splitlines()[0].split(",")
    beside = to_csv(build_table([make("a"), make("a", limit=5)])).splitlines()[0].split(",")
    assert "recognition-v1:top1_mean" in alone
    assert beside[: len(alone)] == alone
    assert any(re.fullmatch(r"recognition-v1@[0-9a-f]{8}:top1_mean", name) for name in beside)


def test_csv_quotes_awkward_names() -> None:
    name = 'a,"b"; c|d'
    frame = pd.read_csv(io.StringIO(to_csv(build_table([make(name)]))))
    assert frame["name"].tolist() == [name]


def test_markdown_is_rectangular_and_marks_ranks() -> None:
    table = by_rank([*crowd(), make("pipe|name_*", {"top1": 20.0})])
    text = to_markdown(table)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(lines) == 3 + len(table.rows)
    assert r"pipe\|name\_\*" in text
    assert "**65.0 ± 0.0**" in text and "<u>55.1 ± 1.0</u>" in text
    assert "† untrained" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_terminal_output_fits_and_loses_nothing(width: int) -> None:
    table = build_table(crowd())
    text = plain(table, width)
    assert max(map(len, text.splitlines())) <= max(width, 56)
    assert all(group.subtitle in text and group.task in text for group in table.groups)
    for row in table.rows:
        assert row.label in text
        for cell, column in zip(row.cells, table.columns, strict=True):
            assert cell is None or format_number(cell.metric.value, column.decimals) in text
    assert "\x1b" not in text


def test_terminal_sets_ranks_in_bold_and_underlined() -> None:
    stream = io.StringIO()
    console = Console(
        file=stream, width=120, force_terminal=True, color_system="standard", legacy_windows=False
    )
    print_terminal(by_rank(crowd()), console)
    text = stream.getvalue()
    assert re.search(r"\x1b\[1m65\.0 ± 0\.0\x1b\[0m", text)
    assert re.search(r"\x1b\[4m55\.1 ± 1\.0\x1b\[0m", text)
    assert not re.search(r"\x1b\[[14]m35\.0", text)
    assert "second-best underlined" in text


def test_names_are_data_not_markup() -> None:
    assert "[red]x[/red]" in plain(build_table([make("[red]x[/red]")]))


def test_long_names_are_cut_in_the_middle_but_keep_their_mark() -> None:
    name = "organisation/" + "x" * 60 + "-final"
    text = plain(build_table([make(name, weights="random:0", trained=False)]), 80)
    line = next(line for line in text.splitlines() if line.startswith("organisation"))
    assert "…" in line and "-final†" in line and len(line) <= 80


def test_output_survives_an_ascii_terminal() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    print_terminal(build_table(crowd()), Console(file=stream, width=100))
    text = raw.getvalue().decode("ascii")
    assert "65.0 + 0.0" in text and "top1 % ^" in text and "comit-nano+" in text


def test_print_table_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_terminal(build_table([make("a")]))
    captured = capsys.readouterr()
    assert "51.0 ± 1.0" in captured.out
    assert captured.err == ""


def test_write_tables_replaces_whole_files(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "tables"
    paths = write_tables(build_table(crowd()), directory)
    before = [path.read_bytes() for path in paths]
    assert write_tables(build_table(crowd()[::-1]), directory) == paths
    assert [path.read_bytes() for path in paths] == before
    assert sorted(directory.iterdir()) == sorted(paths)
