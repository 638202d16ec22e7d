"""A record is complete when the whole data set was used, and the data say whether it was."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from official import opened, picture, write_small_coco, write_small_vg
from tiny import write_images, write_recipes

import comit_bench
from comit_bench.data.labels import read_class_list
from comit_bench.errors import UsageError
from comit_bench.pipeline.plan import data_state
from comit_bench.recipes.specs import find_datasets
from comit_bench.results.records import load_record
from comit_bench.results.render.write import write_tables
from comit_bench.results.schema import Record
from comit_bench.results.table import build_table

OFFICIAL = {"imagenet100", "imagenet1k-val", "mscoco-pairs", "visual-genome", "cssd", "ecssd"}


def write(root: Path, expected: dict[str, int] | None, *, max_broken: float = 0.05) -> None:
    write_images(root, train=10, val=10)  # of four classes each
    write_recipes(root)
    path = root / "datasets" / "tiny" / "dataset.yaml"
    content = yaml.safe_load(path.read_text())
    content |= {"max_broken": max_broken} | ({"expected": expected} if expected else {})
    path.write_text(yaml.safe_dump(content))
    task = {
        "name": "copy", "version": 1, "title": "Copies", "kind": "reconstruction", "suite": "extra",
        "dataset": "tiny", "split": {"report": "val"}, "seeds": 1,
        "reconstruction": {"features": None, "kid": False},
    }  # fmt: skip
    (root / "probes" / "copy").mkdir()
    (root / "probes" / "copy" / "task.yaml").write_text(yaml.safe_dump(task))


def measure(root: Path, task: str = "copy", output: str = "out", **settings: Any) -> Record:
    (record,) = comit_bench.evaluate(
        ["pixel-oracle"], [task], suite="scenes", references=False, data_root=root, include=(root,),
        cache=root / "cache", output=root / output, progress=False, **settings,
    )  # fmt: skip
    return record


def test_every_official_data_set_says_how_many_images_it_has() -> None:
    found = find_datasets()
    assert {name for name, recipe in found.items() if recipe.spec.generator is None} == OFFICIAL
    for name in OFFICIAL:
        assert found[name].spec.expected, name


def test_the_whole_is_complete_and_a_part_is_not(tmp_path: Path) -> None:
    write(tmp_path, {"train": 40, "val": 40})
    whole = measure(tmp_path)
    assert whole.complete and not whole.incomplete
    assert whole.counts is not None and whole.counts.expected == whole.counts.seen == {"val": 40}
    folder = tmp_path / "tiny" / "val" / "red_a"
    for number in (0, 1):  # 2 of 40 are the 5 % that may be missing
        (folder / f"{number:04d}.png").unlink()
    assert measure(tmp_path).complete
    (folder / "0002.png").unlink()
    part = measure(tmp_path)
    assert not part.complete and part.limit is None
    assert part.incomplete == ("val: 37 images, the whole has 40",)
    assert part.counts is not None and part.counts.seen == {"val": 37}
    assert load_record(next(p for p in (tmp_path / "out" / "records").rglob("*.json")
                            if part.protocol_digest[7:19] in p.name)) == part  # fmt: skip


def test_broken_images_count_as_missing(tmp_path: Path) -> None:
    write(tmp_path, {"train": 40, "val": 40})
    folder = tmp_path / "tiny" / "val" / "red_a"
    (folder / "0000.png").unlink()
    (folder / "0001.png").unlink()
    (folder / "0002.png").write_bytes(b"nothing")
    part = measure(tmp_path)
    assert part.counts is not None and (part.counts.broken, part.counts.seen) == (1, {"val": 37})
    assert not part.complete


def test_more_than_the_whole_is_not_the_whole(tmp_path: Path) -> None:
    write(tmp_path, {"train": 40, "val": 20})
    assert measure(tmp_path).incomplete == ("val: 40 images, the whole has 20",)


def test_only_the_splits_that_are_used_matter(tmp_path: Path) -> None:
    write(tmp_path, {"train": 4000, "val": 40})
    assert measure(tmp_path).complete
    assert measure(tmp_path, "tiny-colours").incomplete == ("train: 40 images, the whole has 4,000",)


def test_a_set_of_ones_own_is_complete_without_limit(tmp_path: Path) -> None:
    write(tmp_path, None)
    assert measure(tmp_path).complete
    limited = measure(tmp_path, limit=8)
    assert not limited.complete and limited.limit == 8 and not limited.incomplete
    write(tmp_path / "b", {"val": 40})
    limited = measure(tmp_path / "b", limit=8)
    assert limited.counts is not None and (limited.counts.expected, limited.counts.seen) == (
        {"val": 40},
        {"val": 8},
    )


def test_tables_mark_a_part_and_do_not_rank_it(tmp_path: Path) -> None:
    write(tmp_path, {"val": 4000})
    record = measure(tmp_path)
    table = build_table([record])
    (row,) = table.rows
    assert "‡" in row.marks + "".join(cell.marks for cell in row.cells if cell is not None)
    assert all(cell is None or cell.rank is None for cell in row.cells)
    assert any("images are missing" in text for _, text in table.footnotes)
    write_tables(table, tmp_path / "tables")
    assert "ddagger" in (tmp_path / "tables" / "table.tex").read_text()
    assert "‡" in (tmp_path / "tables" / "table.md").read_text()
    (line,) = csv.DictReader((tmp_path / "tables" / "table.csv").read_text().splitlines())
    assert [value for key, value in line.items() if key.endswith("_complete")] == ["False"]


def test_the_plan_says_it_before_anything_is_done(tmp_path: Path) -> None:
    from comit_bench.pipeline.jobs import Settings
    from comit_bench.pipeline.session import Session

    write(tmp_path, {"train": 40, "val": 4000})
    session = Session(
        Settings(data_root=tmp_path, cache=tmp_path / "cache", include=(tmp_path,), progress=False)
    )
    text, _ = data_state(find_datasets((tmp_path,))["tiny"], session)
    assert "records will be marked incomplete (val: 40 images, the whole has 4,000)" in text


def used(name: str, root: Path, **changes: Any) -> list[str]:
    data = opened(name, root, **changes)
    return data.shortcomings(dict.fromkeys(data.splits, 0))


def test_parts_of_the_official_sets_are_parts(tmp_path: Path) -> None:
    """133 of 126,689 training images of ImageNet100, or 12 of 50,000 of ImageNet."""
    for split, count in (("train", 133), ("val", 100)):
        names = read_class_list(find_datasets()["imagenet100"].sibling("imagenet100.txt"))
        for i in range(count):
            picture(tmp_path / "imagenet" / split / names[i % 100] / f"{split}{i}.JPEG")
    assert used("imagenet100", tmp_path) == [
        "train: 133 images, the whole has 126,689", "val: 100 images, the whole has 5,000",
    ]  # fmt: skip
    assert used("imagenet1k-val", tmp_path) == ["val: 100 images, the whole has 50,000"]
    write_small_coco(tmp_path)
    assert used("mscoco-pairs", tmp_path) == [
        "train: 18 images, the whole has 118,287", "val: 0 images, the whole has 5,000",
    ]  # fmt: skip
    base = write_small_vg(tmp_path)
    assert used("visual-genome", tmp_path) == ["images: 40 images, the whole has 108,077"]
    assert used("visual-genome", tmp_path, expected={"images": 40}) == []
    (base / "image_data.json").write_text(
        (base / "image_data.json").read_text()[:-1]
        + "".join(
            f', {{"image_id": {n}, "width": 9, "height": 9, "url": "a/VG_100K/{n}.jpg"}}'
            for n in range(90, 190)
        )
        + "]"
    )
    assert used("visual-genome", tmp_path, expected={"images": 140}) == [
        "images: 40 images, the whole has 140"
    ]
    for i in range(3):
        picture(tmp_path / "cssd" / "images" / f"{i}.jpg")
        picture(tmp_path / "cssd" / "ground_truth" / f"{i}.png", "1", kind="PNG")
    assert used("cssd", tmp_path) == ["val: 3 images, the whole has 200"]
    shutil.rmtree(tmp_path / "imagenet")


def test_a_part_within_the_tolerance_is_the_whole(tmp_path: Path) -> None:
    for i in range(1000):
        path = tmp_path / "imagenet" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % i)
    assert used("imagenet1k-val", tmp_path, expected={"val": 1001}, max_broken=0.001) == []
    assert used("imagenet1k-val", tmp_path, expected={"val": 1002}, max_broken=0.001) != []
    assert used("imagenet1k-val", tmp_path, expected={"val": 1001}) != []


def test_expected_counts_are_of_something(tmp_path: Path) -> None:
    write(tmp_path, {"vall": 40})
    with pytest.raises(UsageError, match=r"counted as 'vall'.*'val'"):
        find_datasets((tmp_path,))
