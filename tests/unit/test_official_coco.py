"""MSCOCO in the layout its owners publish, with the quirks of the original."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official import opened, pairs_of, picture
from pycocotools import mask as rle

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.recipes.specs import find_datasets

NAMES = {1: "person", 3: "car", 18: "dog", 44: "bottle", 90: "toothbrush"}  # with the gaps of the original
VAL = "annotations/instances_val2017.json"
# (annotation file, image, category ids); the second file repeats pairs of the first.
COCO_IMAGES = [
    ("train", 9, [1, 3]), ("train", 25, [1, 3, 3]), ("train", 30, [3, 18]), ("train", 34, [18, 44]),
    ("train", 36, [1, 44]), ("train", 42, [1]), ("train", 49, []), ("train", 61, [1, 3, 18]),
    ("train", 64, [90, 1]), ("train", 71, [18, 90]), ("train", 72, [44, 90]),
    ("val", 139, [1, 3]), ("val", 285, [18, 3]), ("val", 632, []), ("val", 724, [44, 18]),
    ("val", 776, [1, 44]),
]  # fmt: skip


def coco_region(number: int, image: int, category: int, *, crowd: bool = False) -> dict[str, Any]:
    region: dict[str, Any] = {"segmentation": [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0]]}
    if crowd:  # run lengths, column by column, as the original has for crowds
        region["segmentation"] = {"counts": [10, 6, 48], "size": [8, 8]}
    box = {"area": 8.0, "bbox": [1.0, 1.0, 4.0, 4.0], "iscrowd": int(crowd)}
    return {"id": number, "image_id": image, "category_id": category, **region, **box}


def write_coco(
    root: Path, *, crowds: dict[int, list[int]] | None = None, images: list[Any] = COCO_IMAGES
) -> Path:
    base = root / "coco"
    for split in ("train", "val"):
        chosen = [(number, found) for where, number, found in images if where == split]
        regions = [(n, c, False) for n, found in chosen for c in found]
        regions += [(n, c, True) for n, _ in chosen for c in (crowds or {}).get(n, [])]
        content = {
            "info": {"year": 2017},
            "licenses": [{"id": 1, "name": "x", "url": "y"}],
            "images": [
                {
                    "id": n,
                    "file_name": f"{n:012d}.jpg",
                    "width": 8,
                    "height": 8,
                    "license": 1,
                    "coco_url": "u",
                }
                for n, _ in chosen
            ],
            "annotations": [
                coco_region(900 + i, n, c, crowd=crowd) for i, (n, c, crowd) in enumerate(regions)
            ],
            "categories": [{"id": i, "name": n, "supercategory": "s"} for i, n in NAMES.items()],
        }
        file = base / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
        for n, _ in chosen:
            picture(base / f"{split}2017" / f"{n:012d}.jpg")
    return base


def test_coco_two_categories_and_pair_disjoint(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = opened("mscoco-pairs", tmp_path)
    assert data.kind == "multilabel"
    assert len(data.classes) == 90
    assert [data.classes[i - 1] for i in NAMES] == list(NAMES.values())
    assert data.classes[1] == "(unused 2)"
    ids = {i for split in data.splits.values() for i in split.ids}
    two = {f"{where}/{n:012d}" for where, n, found in COCO_IMAGES if len(set(found)) == 2}
    assert ids == two
    train, val = (set(pairs_of(data, name)) for name in ("train", "val"))
    assert not train & val
    assert {c for p in train for c in p} == {c for p in val for c in p} == set(NAMES.values())
    for split in data.splits.values():
        assert split.labels.dtype == np.bool_
        assert split.labels.shape == (len(split), 90)
        assert (split.labels.sum(axis=1) == 2).all()
        assert split.ids == tuple(sorted(split.ids))
        assert all(
            path.is_file() and path.stem == i.split("/")[1]
            for path, i in zip(split.paths, split.ids, strict=True)
        )
    assert data.notes["train"]["without_annotations"] == 1
    assert data.notes["pairs"]["val_share"] == len(data.splits["val"]) / len(two)
    assert data.notes["manifest"].startswith("sha256:")
    assert opened("mscoco-pairs", tmp_path).fingerprint == data.fingerprint


def test_coco_crowds_count_or_not(tmp_path: Path) -> None:
    base = write_coco(tmp_path, crowds={42: [44], 30: [1]})  # 42 gets a second category, 30 a third
    assert rle.decode(rle.frPyObjects({"counts": [10, 6, 48], "size": [8, 8]}, 8, 8)).sum() == 6
    counted = opened("mscoco-pairs", tmp_path)
    ids = {i for split in counted.splits.values() for i in split.ids}
    assert "train/000000000042" in ids
    assert "train/000000000030" not in ids
    assert counted.notes["train"]["crowd_regions"] == 2
    rules = find_datasets()["mscoco-pairs"].spec.pairs.model_copy(update={"crowd": "ignore"})
    ignored = opened("mscoco-pairs", tmp_path, pairs=rules)
    ids = {i for split in ignored.splits.values() for i in split.ids}
    assert "train/000000000042" not in ids
    assert "train/000000000030" in ids
    assert ignored.fingerprint != counted.fingerprint
    assert base.is_dir()


def test_coco_files_kept_apart_on_request(tmp_path: Path) -> None:
    write_coco(tmp_path)
    rules = find_datasets()["mscoco-pairs"].spec.pairs.model_copy(update={"policy": "given"})
    data = opened("mscoco-pairs", tmp_path, pairs=rules)
    assert {name: {i.split("/")[0] for i in split.ids} for name, split in data.splits.items()} == {
        "train": {"train"}, "val": {"val"},
    }  # fmt: skip
    assert data.notes["pairs"]["shared_pairs"] == 4


def test_coco_pairs_and_files_disjoint(tmp_path: Path) -> None:
    pairs = [[1, 3], [3, 18], [18, 44], [44, 90], [90, 1], [1, 18], [3, 44], [18, 90]]
    images = [
        (file, 10 * i + j, pair) for i, pair in enumerate(pairs) for j, file in enumerate(("train", "val"))
    ]
    write_coco(tmp_path, images=images)
    rules = find_datasets()["mscoco-pairs"].spec.pairs.model_copy(update={"pool": False, "val_share": 0.4})
    data = opened("mscoco-pairs", tmp_path, pairs=rules)
    for name, split in data.splits.items():
        assert {i.split("/")[0] for i in split.ids} == {name}
    assert not set(pairs_of(data, "train")) & set(pairs_of(data, "val"))
    assert sum(map(len, data.splits.values())) == len(pairs), "one of the two images of every pair"


def test_coco_dropped_categories_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [image for image in COCO_IMAGES if image[1] not in (71, 72)]  # toothbrush is left with one pair
    write_coco(tmp_path, images=images)
    data = opened("mscoco-pairs", tmp_path)
    assert data.notes["pairs"]["dropped_categories"].keys() == {"toothbrush"}
    assert data.notes["pairs"]["dropped_images"] == 1
    assert "1 categories cannot be on both sides and are dropped with 1 images: toothbrush" in caplog.text
    assert "train/000000000064" not in {i for split in data.splits.values() for i in split.ids}


def test_coco_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    base = write_coco(tmp_path)
    before = opened("mscoco-pairs", tmp_path)
    for file in (base / "annotations").iterdir():
        content = json.loads(file.read_text())
        for key in ("images", "annotations", "categories"):
            content[key].reverse()
        file.write_text(json.dumps(content))
    after = opened("mscoco-pairs", tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.splits["val"].ids == before.splits["val"].ids


def test_coco_missing_images_are_counted_listed_and_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_coco(tmp_path)
    (base / "train2017" / "000000000025.jpg").unlink()  # another image has the same pair
    with pytest.raises(MissingError, match=r"1 of 12 images.*000000000025.*0\.1%"):
        opened("mscoco-pairs", tmp_path)
    with caplog.at_level(logging.WARNING):
        data = opened("mscoco-pairs", tmp_path, max_broken=0.1)
    assert data.missing == {"train/000000000025": "no file train/000000000025.jpg"}
    assert data.notes["missing_images"] == 1
    assert "left out and counted" in caplog.text
    assert "train/000000000025" not in {i for split in data.splits.values() for i in split.ids}
    (report,) = (tmp_path / "cache" / "manifests" / "mscoco-pairs").rglob("missing.json")
    assert "train/000000000025" in json.loads(report.read_text())["missing"]
    for split in data.splits.values():
        assert len(split.ids) == len(split.paths) == len(split.labels)
        assert (split.labels.sum(axis=1) == 2).all()


def test_coco_a_changed_manifest_is_found_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    write_coco(tmp_path)
    first = opened("mscoco-pairs", tmp_path)
    (path,) = (tmp_path / "cache" / "manifests").rglob("manifest.parquet")
    table = parquet.read_table(path)
    sides = pa.array(["train" if side.as_py() == "val" else "val" for side in table["split"]])
    parquet.write_table(table.set_column(table.schema.get_field_index("split"), "split", sides), path)
    with caplog.at_level(logging.WARNING):
        again = opened("mscoco-pairs", tmp_path)
    assert "it was changed" in caplog.text
    assert again.fingerprint == first.fingerprint
    path.write_bytes(b"PAR1 nothing")
    assert opened("mscoco-pairs", tmp_path).fingerprint == first.fingerprint


def broken_coco(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(base: Path) -> None:
        file = base / VAL
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (broken_coco(lambda c: c.pop("categories")), "categories"),
        (broken_coco(lambda c: c.pop("images")), "not a COCO"),
        (broken_coco(lambda c: c["annotations"][0].update(category_id=77)), "77"),
        (broken_coco(lambda c: c["categories"][0].update(name="robot")), "'robot' here, 'person' before"),
        (broken_coco(lambda c: c["images"].append(c["images"][0])), "twice"),
        (lambda base: (base / VAL).write_text('{"images": [{'), "not a COCO"),
        (lambda base: (base / VAL).write_text("[1, 2]"), "not a COCO"),
    ],
)  # fmt: skip
def test_coco_files_that_are_none(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(write_coco(tmp_path))
    with pytest.raises(CorruptFileError, match=words):
        opened("mscoco-pairs", tmp_path)


def test_coco_columns_must_hold_all_ids(tmp_path: Path) -> None:
    write_coco(tmp_path)
    rules = find_datasets()["mscoco-pairs"].spec.pairs.model_copy(update={"columns": 80})
    with pytest.raises(UsageError, match="asks for 1 to 80"):
        opened("mscoco-pairs", tmp_path, pairs=rules)


def test_coco_too_few_pairs(tmp_path: Path) -> None:
    write_coco(tmp_path, images=COCO_IMAGES[:2] + COCO_IMAGES[11:12])
    with pytest.raises(CorruptFileError, match="More images are needed"):
        opened("mscoco-pairs", tmp_path)


def test_coco_missing_pieces_are_named(tmp_path: Path) -> None:
    base = write_coco(tmp_path)
    shutil.rmtree(base / "val2017")
    with pytest.raises(MissingError, match="val2017/ or images/val2017/"):
        opened("mscoco-pairs", tmp_path)
    (base / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(MissingError, match="data download mscoco-pairs"):
        opened("mscoco-pairs", tmp_path)


def test_coco_a_share_that_cannot_be_met_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A square of pairs: half of them must be on each side."""
    square = [[1, 3], [3, 18], [18, 44], [1, 44]]
    base = write_coco(tmp_path, images=[("train", i, pair) for i, pair in enumerate(square * 3, 1)])
    (base / "val2017").mkdir()
    data = opened("mscoco-pairs", tmp_path)
    assert data.notes["pairs"]["val_share"] == 0.5
    assert "val has 50 % of the images (2 of 4 pairs) instead of 20 %" in caplog.text
