"""The table with the columns of the paper's Table 4, and the published records that ship."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from comit_bench.recipes import recipe_root
from comit_bench.results.paper_table import HEADINGS, paper_rows, to_paper_latex
from comit_bench.results.records import load_record, load_records, published_records
from comit_bench.results.schema import Metric, Record, protocol_digest
from comit_bench.results.tables import build_table, write_tables

FIXTURES = Path(__file__).parents[1] / "fixtures" / "records"


def measured(name: str, task: str, metric: str, value: float, **changes: Any) -> Record:
    """A measured record of a tokenizer on one of the paper's tasks."""
    base = load_record(FIXTURES / "measured-v1.json").model_dump()
    one = Metric.from_seeds([value] * len(base["seeds"]), n=100)
    base["tokenizer"] |= {"name": name, "weights": f"fitted:{name}", "trained": True, "kind": "learned"}
    base["task"] |= {"name": task, "suite": "paper"}
    base["metrics"] = {metric: one}
    base |= changes
    base["protocol_digest"] = protocol_digest(base["protocol"])
    return Record.model_validate(base)


def line(text: str, start: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return [cell.strip() for cell in found.removesuffix("\\\\").split("&")]


def test_columns_are_those_of_the_paper_and_published_rows_are_marked_and_not_ranked() -> None:
    records = [
        measured("one", "imagenet100", "top1", 70.0),
        measured("one", "visual-genome", "top1", 40.0),
        measured("two", "imagenet100", "top1", 60.0),
        *load_records(recipe_root("results") / "paper"),
    ]
    text = to_paper_latex(records)
    assert text is not None
    head = line(text, "Tokenizer")
    assert [cell.split()[0] for cell in head] == [
        *("Tokenizer", "Params", "Length", "Vocab", "rFID", "PSNR", "IN100", "MSCOCO", "VG")
    ]
    assert line(text, "one")[6:] == ["\\textbf{70.00}", "\\textendash{}", "40.00"]
    assert line(text, "two")[6] == "\\underline{60.00}"
    titok = line(text, "titok-l-32")
    assert titok[0] == "titok-l-32$^{\\S}$" and titok[2:5] == ["32", "4096", "2.21"]
    assert line(text, "selftok-512-renderer")[5] == "24.14"
    assert "published number, not measured here" in text
    assert (
        text.count("\\textbf{") == 1 and len({row.count("&") for row in text.splitlines() if "&" in row}) == 1
    )


def test_a_published_and_a_measured_number_stay_two_rows() -> None:
    paper = load_record(FIXTURES / "paper-v1.json")
    own = measured(paper.tokenizer.name, "imagenet100", "top1", 70.0)
    rows = paper_rows([own, paper])
    assert len(rows) == 2
    values = {row.origin: cells[2].metrics["top1"].value for _, row, cells in rows if cells[2] is not None}
    assert values == {"measured": 70.0, "paper": 81.5}


def test_controls_stay_out_and_complete_records_win() -> None:
    base = measured("one", "imagenet100", "top1", 70.0)
    control = measured("one", "imagenet100", "top1", 1.0, control="permute-labels",
                       protocol={**base.protocol, "control": "permute-labels"})  # fmt: skip
    limited = measured("one", "imagenet100", "top1", 50.0, limit=5, complete=False,
                       protocol={**base.protocol, "limit": 5})  # fmt: skip
    (row,) = paper_rows([limited, base, control])
    assert row[2][2] == base
    assert to_paper_latex([control]) is None


def test_files_are_written_beside_the_other_tables(tmp_path: Path) -> None:
    records = [measured("one", "imagenet100", "top1", 70.0)]
    paths = write_tables(build_table(records), tmp_path, records)
    assert (tmp_path / "table-paper.tex") in paths
    scenes = [load_record(FIXTURES / "limited-untrained-v1.json")]
    assert len(write_tables(build_table(scenes), tmp_path / "b", scenes)) == 3


def test_published_numbers_stand_beside_measured_ones_of_the_same_task() -> None:
    own = measured("one", "reconstruction-imagenet1k", "rfid", 3.0)
    found = published_records([own])
    assert {r.task.name for r in found} == {"reconstruction-imagenet1k"} and len(found) >= 9
    assert published_records([measured("one", "imagenet100", "top1", 3.0)]) == []
    assert {r.task.name for r in published_records([], suite="paper")} >= {"objectness-cssd"}


@pytest.mark.parametrize(
    "record", load_records(recipe_root("results") / "paper"), ids=lambda r: r.tokenizer.name
)
def test_published_records_say_where_they_are_from(record: Record) -> None:
    assert record.origin == "paper" and not record.seeds
    assert record.protocol["published"] and record.protocol["source"]
    assert all(m.n is None and m.std is None and m.stderr is None for m in record.metrics.values())


def test_headings_name_tasks_that_exist_and_what_they_measure() -> None:
    from comit_bench.recipes import find_tasks

    known = {**find_tasks()}
    for heading in HEADINGS:
        spec = known[heading.task].spec
        if spec.kind == "reconstruction":  # two headings of one task
            assert spec.reconstruction.features == "inception" and heading.metric in ("rfid", "psnr")
        else:
            assert spec.main_metric == heading.metric
        assert re.fullmatch(r"[A-Za-z0-9]+", heading.title)
