"""The paper's tables: the published numbers that ship, the layouts, and that only comparables are ranked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latex import check_latex

from comit_bench.commands.listing import rebuild_table
from comit_bench.errors import MissingError, UsageError
from comit_bench.recipes.specs import find_tasks, recipe_root
from comit_bench.results.records import load_record, load_records, published_records
from comit_bench.results.render.layout import DASH
from comit_bench.results.render.paper import (
    COMPARED,
    LAYOUTS,
    POLICIES,
    TASKS,
    paper_tables,
    policy_words,
    to_paper_latex,
)
from comit_bench.results.render.write import write_tables
from comit_bench.results.schema import Metric, Record, protocol_digest
from comit_bench.results.table import Table, build_table
from comit_bench.tokenizers.registry import tokenizers

FIXTURES = Path(__file__).parents[1] / "fixtures" / "records"
BASE = load_record(FIXTURES / "measured-v1.json")
PUBLISHED = load_records(recipe_root("results") / "paper")
PROBES = ("imagenet100", "mscoco-pairs", "visual-genome")
RECONSTRUCTION = "reconstruction-imagenet1k"

# As printed; parameters in millions, message length, vocabulary (0 where our copy lost it).
TABLE_4 = """
titok-l-32       614  32   0      2.21  15.60 17.26 6.22  26.06
titok-b-64       172  64   0      1.70  16.80 19.43 12.64 27.31
titok-s-128      44   128  0      1.71  17.52 19.47 6.30  26.81
alit-base        229  256  0      7.39  19.76 29.43 8.56  32.14
flextok-d12-d12  254  256  64000  4.20  18.41 80.25 38.17 53.75
flextok-d18-d18  860  256  64000  1.61  18.59 81.54 38.58 54.46
flextok-d18-d28  2500 256  64000  1.45  18.46 80.93 39.14 54.35
selftok-512      2170 512  0      0.70  24.14 40.64 17.91 37.15
selftok-1024     2170 1024 0      0.54  26.30 35.90 17.32 36.69
comit-b          174  256  64000  11.06 17.75 82.91 41.46 52.11
comit-l          610  256  64000  3.67  17.81 85.80 45.31 56.42
comit-xl         900  256  64000  3.50  17.83 84.69 39.45 55.61
"""
TABLE_3 = """
global            yes 1  -           82.91 41.46 52.11
global+random:10  yes 10 random      82.30 40.21 52.12
random:9          no  9  random      74.45 38.92 54.96
global+raster:10  yes 10 raster-scan 82.22 41.83 55.78
raster:9          no  9  raster-scan 80.62 38.61 51.10
global+adaptive:3 yes 3  adaptive    82.09 40.68 55.00
adaptive:3        no  3  adaptive    74.96 32.70 50.22
"""


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


def measured(
    name: str = "one",
    task: str = "imagenet100",
    values: dict[str, float] | None = None,
    *,
    policy: str | None = None,
    version: int = 2,
    recipe: str = "builtin",
    data: str = "builtin",
    limit: int | None = None,
    complete: bool = True,
    kind: str = "learned",
    trained: bool = True,
    length: int = 256,
    weights: str | None = None,
    side: dict[str, Any] | None = None,
    **protocol: Any,
) -> Record:
    """A measured record of a tokenizer on one of the paper's tasks."""
    metrics = {}
    for metric, value in (values or {"top1": 50.0}).items():
        unit, higher = {"rfid": ("", False), "psnr": ("dB", True)}.get(metric, ("%", True))
        metrics[metric] = Metric.from_seeds([value] * 3, n=100, unit=unit, higher_is_better=higher)
    protocol = {"seeds": [0, 1, 2], "task": {"recipe": recipe}, **protocol}
    protocol["tokenizer"] = {"policy": policy, **(side or {})}
    if limit is not None:
        protocol["limit"] = limit
    row = {"name": name, "family": name, "weights": weights or f"fitted:{name}", "kind": kind}
    row |= {"trained": trained, "message_length": length, "parameters": 1000}
    dataset = BASE.task.dataset.model_dump() | {"name": task, "origin": data}
    if task == RECONSTRUCTION:
        dataset["name"] = "imagenet1k-val"
    task_row = {"name": task, "suite": "paper", "version": version, "origin": recipe, "dataset": dataset}
    return Record.model_validate(
        {
            **dict(BASE), "schema_version": 2, "tokenizer": BASE.tokenizer.model_dump() | row,
            "task": BASE.task.model_dump() | task_row, "metrics": metrics, "protocol": protocol,
            "protocol_digest": protocol_digest(protocol), "limit": limit,
            "complete": complete and limit is None, "origin": "measured",
        }
    )  # fmt: skip


def table(name: str, records: list[Record]) -> Table:
    (found,) = paper_tables(records, names=[name], marks="rank")
    return found


def shown(found: Table) -> dict[str, dict[tuple[str, str], tuple[float, str | None]]]:
    """Row label -> (header of the group, metric) -> value and rank."""
    return {
        row.label: {
            (f"{column.group.task} {column.group.subtitle}", column.metric): (cell.metric.value, cell.rank)
            for column, cell in zip(found.columns, row.cells, strict=True)
            if cell is not None
        }
        for row in found.rows
    }


def ranks(found: Table) -> dict[str, list[str | None]]:
    return {row.label: [cell.rank for cell in row.cells if cell is not None] for row in found.rows}


# ------------------------------------------------------------------------------- published numbers


def published(task: str, metric: str, name: str, policy: str | None = None) -> float:
    """The number of the COMiT paper; exactly one record has it."""
    (value,) = [
        record.metrics[metric].value
        for record in PUBLISHED
        if record.protocol["source"] == "COMiT paper"
        and (record.task.name, record.tokenizer.name) == (task, name)
        and (policy is None or record.tokenizer_protocol.get("policy") == policy)
    ]
    return value


@pytest.mark.parametrize("row", rows_of(TABLE_4), ids=lambda row: row[0])
def test_table_4_is_entered_as_printed(row: list[str]) -> None:
    name, parameters, length, vocabulary, *scores = row
    policy = "global" if name.startswith("comit") else None
    where = [
        (RECONSTRUCTION, "rfid"),
        (RECONSTRUCTION, "psnr"),
        *zip(PROBES, ("top1", "top5", "top1"), strict=True),
    ]
    assert [published(task, metric, name, policy) for task, metric in where] == [float(s) for s in scores]
    for record in PUBLISHED:
        if record.tokenizer.name == name and "Table" in str(record.protocol["published"]):
            printed = record.tokenizer
            assert printed.parameters == int(parameters) * 10**6 and printed.message_length == int(length)
            assert printed.vocab_size == (int(vocabulary) or None)
    assert name in tokenizers()


@pytest.mark.parametrize("row", rows_of(TABLE_3), ids=lambda row: row[0])
def test_table_3_is_entered_as_printed(row: list[str]) -> None:
    policy, has_global, crops, order, *scores = row
    assert [
        published(t, m, "comit-b", policy) for t, m in zip(PROBES, ("top1", "top5", "top1"), strict=True)
    ] == [float(score) for score in scores]
    assert policy_words(policy) == (has_global, crops, order.replace("-", DASH) if order == "-" else order)


def test_tables_1_and_2_and_objectness_are_entered_as_printed() -> None:
    assert published("imagenet100", "top1", "comit-b-no-srepa") == 72.26
    assert published("imagenet100", "top1", "comit-b-no-local-crops") == 80.94
    names = ("comit-b", "comit-b-no-local-crops", "comit-xl")
    assert [published("objectness-cssd", "miou", name) for name in names] == [0.53, 0.34, 0.58]


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda r: f"{r.tokenizer.name}-{r.task.name}")
def test_published_records_say_where_they_are_from(record: Record) -> None:
    assert record.origin == "paper" and not record.seeds
    assert record.protocol["published"] and record.protocol["source"]
    assert all(m.n is None and m.std is None and m.stderr is None for m in record.metrics.values())
    assert record.task.version <= find_tasks()[record.task.name].spec.version


def test_published_numbers_stand_beside_measured_ones_of_the_same_task() -> None:
    own = measured(task=RECONSTRUCTION, values={"rfid": 3.0})
    found = published_records([own])
    assert {r.task.name for r in found} == {RECONSTRUCTION} and len(found) == 10 + 12
    assert published_records([measured(task="retrieval-imagenet100")]) == []


# ----------------------------------------------------------------------------------------- layouts


def test_without_measured_records_the_tables_are_those_of_the_paper() -> None:
    tables = paper_tables(PUBLISHED)
    assert [t.title.split(":")[0].split(" (")[0] for t in tables] == [
        *("Table 1", "Table 2", "Table 3", "Table 4"), "Objectness of token attention"
    ]  # fmt: skip
    one, two, three, four, _ = tables
    assert [(row.label, row.details) for row in one.rows] == [
        ("comit-b", ("yes",)),
        ("comit-b-no-srepa", ("no",)),
    ]
    assert [row.label for row in two.rows] == ["comit-b", "comit-b-no-local-crops"]
    expected = [[f"comit-b ({row[0]})", *row[1:3]] for row in rows_of(TABLE_3)]
    assert [[row.label, *row.details[:2]] for row in three.rows] == expected
    assert [row.label for row in four.rows] == [row[0] for row in rows_of(TABLE_4)] == list(COMPARED)
    assert [column.metric for column in four.columns] == ["rfid", "psnr", "top1", "top5", "top1"]
    for name, text, start in (("table-3", TABLE_3, 4), ("table-4", TABLE_4, 4)):
        values = [[f"{c.metric.value:.2f}" for c in row.cells if c] for row in table(name, PUBLISHED).rows]
        assert values == [row[start:] for row in rows_of(text)]
    assert all(rank is None for t in tables for row in ranks(t).values() for rank in row)


def test_a_measured_number_stands_beside_the_published_one_in_a_column_of_its_own() -> None:
    own = measured("comit-b", values={"top1": 81.0}, policy="global")
    (row,) = [row for row in table("table-4", [*PUBLISHED, own]).rows if row.label == "comit-b"]
    cells = [(cell.metric.value, cell.marks) for cell in row.cells if cell is not None]
    assert (81.0, "") in cells and (82.91, "§") in cells and len(cells) == 6
    assert row.details == ("1.00k (174M§)", "256", "512 (64000§)")
    three = shown(table("table-3", [*PUBLISHED, own]))
    assert set(three["comit-b (global)"]) > {
        ("imagenet100 v2, published", "top1"),
        ("imagenet100 v2", "top1"),
    }


@pytest.mark.parametrize(
    "changes",
    [{"length": 32}, {"policy": "raster:3"}, {"trained": False}, {"name": "comit-b-mine"}],
    ids=["tokens", "policy", "untrained", "name"],
)
def test_a_published_number_joins_no_row_that_it_is_not_about(changes: dict[str, Any]) -> None:
    own = measured(**{"name": "comit-b", "policy": "global", **changes})
    for found in paper_tables([*PUBLISHED, own], names=["table-3", "table-4"]):
        for row in found.rows:
            origins = {cell.record.origin for cell in row.cells if cell is not None}
            assert len(origins) == 1, row.label


def test_published_relations_stand_beside_those_among_four() -> None:
    own = measured("comit-b", "visual-genome", {"top1@4": 51.0, "top1@16": 20.0}, policy="global", version=3)
    four = shown(table("table-4", [*PUBLISHED, own]))["comit-b"]
    relations = {head: value for head, (value, _) in four.items() if head[0].startswith("visual-genome")}
    assert relations == {
        ("visual-genome v2, published", "top1"): 52.11,
        ("visual-genome v3", "top1@4"): 51.0,
    }


def test_of_two_sets_of_weights_neither_takes_the_published_number() -> None:
    twins = [measured("comit-b", policy="global", weights=f"sha256:{n}") for n in ("1" * 64, "2" * 64)]
    rows = [row for row in table("table-4", [*PUBLISHED, *twins]).rows if row.tokenizer.name == "comit-b"]
    assert len(rows) == 3 and sum(row.origin == "paper" for row in rows) == 1


def test_ablations_and_policies_stay_in_their_tables() -> None:
    records = [
        measured("mine", policy="global"),
        measured("mine", policy="raster:3"),
        measured("mine-no-srepa", policy="global"),
        measured("mine-no-local-crops", policy="global"),
        measured("other"),
        measured("oracle", kind="reference"),
    ]
    labels = {name: [row.label for row in table(name, records).rows] for name in list(LAYOUTS)[:4]}
    assert labels["table-1"] == ["mine", "mine-no-srepa"]
    assert labels["table-2"] == ["mine", "mine-no-local-crops"]
    assert labels["table-3"] == ["mine (global)", "mine (raster:3)"]
    assert labels["table-4"] == ["oracle", "mine", "other"]


def test_controls_and_other_publications_stay_out() -> None:
    control = measured().model_copy(update={"control": "permute-labels"})
    assert paper_tables([control]) == []
    assert to_paper_latex([control]) is None
    assert "titok-bl-64" not in shown(table("table-4", PUBLISHED))


def test_layouts_name_tasks_and_metrics_that_exist() -> None:
    known = find_tasks()
    for suite, tasks in TASKS.items():
        for task, metrics in tasks.values():
            spec = known[task].spec
            assert spec.suite == suite
            assert spec.kind in ("reconstruction", "objectness") or spec.main_metric == metrics[0]
    assert set(COMPARED) <= set(tokenizers())


# ------------------------------------------------------------------------------------------- ranks

DIFFERENT: dict[str, dict[str, Any]] = {
    "resolution": {"column": "32 px, 500 images"},
    "images": {"column": "256 px, 48 images"},
    "limit": {"limit": 16},
    "recipe": {"recipe": "my-recipes"},
    "version": {"version": 1},
    "seeds": {"seeds": [0]},
    "probe": {"probe": {"width": 64}},
}


@pytest.mark.parametrize("difference", DIFFERENT.values(), ids=DIFFERENT)
@pytest.mark.parametrize("task", ["imagenet100", RECONSTRUCTION])
def test_other_protocols_are_other_columns_and_never_ranked_together(
    difference: dict[str, Any], task: str
) -> None:
    values = {"rfid": 1.0, "psnr": 99.0} if task == RECONSTRUCTION else {"top1": 99.0}
    worse = {"rfid": 9.0, "psnr": 9.0} if task == RECONSTRUCTION else {"top1": 9.0}
    same: dict[str, Any] = {"column": "256 px, 500 images"}
    records = [
        measured("best", task, values, **{**same, **difference}),
        *(measured(name, task, worse, **same) for name in ("a", "b")),
    ]
    found = table("table-4", records)
    assert len(found.groups) == 2 and len({group.subtitle for group in found.groups}) == 2
    assert ranks(found) == {"best": [None] * len(values), **{n: ["best"] * len(values) for n in ("a", "b")}}
    latex = to_paper_latex(records)
    assert latex is not None and "textbf{99" not in latex and "textbf{1.0" not in latex


def test_incomplete_records_of_one_protocol_are_marked_and_not_ranked() -> None:
    records = [measured("lost", values={"top1": 99.0}, complete=False), measured("a"), measured("b")]
    found = table("table-4", records)
    assert len(found.groups) == 1 and ranks(found)["lost"] == [None]
    assert any("incomplete" in text for _, text in found.footnotes)


@pytest.mark.parametrize(
    ("where", "says"),
    [({"recipe": "/home/x/my-recipes"}, "recipe of my-recipes"), ({"data": "my-data"}, "recipe of my-data")],
    ids=["task", "data"],
)
def test_a_recipe_that_replaces_a_built_in_one_is_marked_in_every_table(
    where: dict[str, Any], says: str, tmp_path: Path
) -> None:
    records = [measured("a", **where), measured("b", **where)]
    for found in (build_table(records), table("table-4", records)):
        assert [group.subtitle for group in found.groups] == [f"v2, {says}"]
    write_tables(build_table(records), tmp_path, records)
    for name in ("table.csv", "table.md", "table.tex", "table-paper.tex"):
        assert says in (tmp_path / name).read_text(encoding="utf-8")
    own = measured("a", "my-own-task", **where)
    own = own.model_copy(
        update={
            "task": own.task.model_copy(update={"dataset": own.task.dataset.model_copy(update={"name": "x"})})
        }
    )
    assert says not in build_table([own]).groups[0].subtitle  # it replaces nothing


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["comit-b", "a", "b", "c"]),
                "policy": st.sampled_from([None, "global", "raster:9"]),
                "values": st.sampled_from([{"top1": float(v)} for v in (1, 50, 99)]),
                "limit": st.sampled_from([None, 16]),
                "complete": st.booleans(),
                "recipe": st.sampled_from(["builtin", "mine"]),
                "version": st.sampled_from([1, 2]),
                "kind": st.sampled_from(["learned", "reference"]),
                "probe": st.sampled_from([{"width": 64}, {"width": 768}]),
            }
        ),
        max_size=12,
    )
)
def test_whatever_was_measured_a_column_has_one_protocol_and_ranks_only_comparables(
    drawn: list[dict[str, Any]],
) -> None:
    for found in paper_tables([*PUBLISHED, *(measured(**one) for one in drawn)]):
        for index in range(len(found.columns)):
            cells = [cell for row in found.rows if (cell := row.cells[index]) is not None]
            sides = {(c.record.task.version, str(c.record.task_protocol), c.record.origin) for c in cells}
            assert len(sides) == 1
            for cell in (cell for cell in cells if cell.rank):
                assert cell.record.complete and cell.record.origin != "paper"
                assert cell.record.tokenizer.kind != "reference"


# ------------------------------------------------------------------------------------------- output


def test_latex_holds_all_tables_and_compiles_in_form() -> None:
    records = [*PUBLISHED, measured("comit-b", policy="global"), measured("a_b", limit=5)]
    text = to_paper_latex(records)
    assert text is not None
    parts = text.split("% needs \\usepackage{booktabs}\n")[1:]
    assert len(parts) == len(LAYOUTS)
    for part, name in zip(parts, LAYOUTS, strict=True):
        check_latex("% needs \\usepackage{booktabs}\n" + part)
        assert f"\\label{{tab:comit-bench-paper-{name}}}" in part
    assert "published number, not measured here" in text and "comit-b (global+adaptive:3)" in text


def test_files_are_written_beside_the_other_tables(tmp_path: Path) -> None:
    records = [measured()]
    paths = write_tables(build_table(records), tmp_path, records)
    assert (tmp_path / "table-paper.tex") in paths
    scenes = [load_record(FIXTURES / "limited-untrained-v1.json")]
    assert len(write_tables(build_table(scenes), tmp_path / "b", scenes)) == 3


def test_the_command_prints_the_four_tables_and_any_of_them_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: dict[str, Any] = {"tasks": None, "metrics": None, "output": tmp_path}
    rebuild_table([tmp_path / "none"], suite="paper", **nothing)
    out = capsys.readouterr().out
    assert [n for n in range(1, 5) if f"Table {n}: " in out] == [1, 2, 3, 4]
    assert (tmp_path / "table-paper.tex").is_file()
    rebuild_table([tmp_path / "none"], suite=None, layouts=["table-3"], **nothing)
    out = capsys.readouterr().out
    assert out.count("Table ") == 1 and all(re.search(rf"{re.escape(f'({p})')}", out) for p in POLICIES)
    with pytest.raises(UsageError, match="Did you mean 'table-3'"):
        rebuild_table([tmp_path], suite=None, layouts=["table-33"], **nothing)
    with pytest.raises(MissingError, match="comit-bench paper --suite scenes"):
        rebuild_table([FIXTURES], suite="scenes", layouts=["table-3"], **nothing)
