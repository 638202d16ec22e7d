"""Data are known by what their files hold: every byte counts, places and times do not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official import COCO, opened, write_small_coco, write_small_vg
from PIL import Image

from comit_bench.data import digests
from comit_bench.data.datasets import open_dataset
from comit_bench.data.digests import file_digests
from comit_bench.data.readers.common import find_folder
from comit_bench.data.split import OpenData
from comit_bench.errors import BenchError, CorruptFileError, MissingError
from comit_bench.recipes.specs import DatasetSpec, Recipe, find_datasets

Write = Callable[[Path], Path]  # a data set below a root; returns one of the files that its numbers depend on


def spec_of(**changes: Any) -> DatasetSpec:
    values: dict[str, Any] = {
        "name": "mine",
        "version": 1,
        "title": "Mine",
        "reader": "class-folders",
        "folder": "mine",
        "splits": {"train": ("train",), "val": ("val",)},
        "licence": "none",
        "max_broken": 0.5,
    }
    return DatasetSpec(**(values | changes))


def open_mine(root: Path, cache: Path | None = None, **changes: Any) -> OpenData:
    recipe = Recipe(spec_of(**changes), root / "dataset.yaml", "builtin")
    return open_dataset(recipe, data_root=root, cache=cache or root / "cache", progress=False)


def noise(path: Path, seed: int, kind: str = "BMP") -> None:
    """Files of one size whatever they hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)


def write_class_folders(root: Path) -> Path:
    for number, name in enumerate(("train/a/1", "train/a/2", "train/b/3", "val/a/4", "val/b/5")):
        noise(root / "mine" / f"{name}.bmp", number)
    return root / "mine" / "train" / "a" / "1.bmp"


def write_saliency(root: Path) -> Path:
    for i in range(3):
        noise(root / "mine" / "images" / f"{i}.bmp", i)
        mask = np.zeros((8, 8), dtype=np.uint8)
        mask[i : i + 3, 2:5] = 255
        (root / "mine" / "ground_truth").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "mine" / "ground_truth" / f"{i}.bmp")
    return root / "mine" / "ground_truth" / "1.bmp"


KINDS: dict[str, tuple[Write, dict[str, Any]]] = {
    "class folders": (write_class_folders, {}),
    "without labels": (write_class_folders, {"labelled": False}),
    "masks": (write_saliency, {"reader": "saliency", "splits": {"val": ("images",)}}),
    "photographs with masks": (
        lambda root: write_saliency(root).parents[1] / "images" / "2.bmp",
        {"reader": "saliency", "splits": {"val": ("images",)}},
    ),
}


def change_a_byte(path: Path) -> None:
    """Same size, same time of modification."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be kept at once, as if they had been written long ago."""
    monkeypatch.setattr(digests, "_is_recent", lambda status: False)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_changes_the_fingerprint_and_a_copy_does_not(kind: str, tmp_path: Path) -> None:
    write, changes = KINDS[kind]
    path = write(tmp_path / "one")
    first = open_mine(tmp_path / "one", **changes)
    shutil.copytree(tmp_path / "one" / "mine", tmp_path / "two" / "mine")  # other times, other inodes
    for file in (tmp_path / "two").rglob("*.bmp"):
        os.utime(file, (7, 7))
    copy = open_mine(tmp_path / "two", **changes)
    assert copy.fingerprint == first.fingerprint and copy.fingerprints == first.fingerprints
    time.sleep(0.01)  # the clock of a file system ticks every few milliseconds
    change_a_byte(path)
    changed = open_mine(tmp_path / "one", **changes)
    assert changed.fingerprint != first.fingerprint
    name = next(name for name in first.splits if name in path.parts or len(first.splits) == 1)
    assert changed.fingerprints[name] != first.fingerprints[name]


def test_inverted_masks_are_other_data(tmp_path: Path) -> None:
    path = write_saliency(tmp_path)
    first = open_mine(tmp_path, **KINDS["masks"][1])
    for file in path.parent.iterdir():
        with Image.open(file) as mask:
            values = 255 - np.asarray(mask)
        Image.fromarray(values).save(file)
    assert open_mine(tmp_path, **KINDS["masks"][1]).fingerprint != first.fingerprint


@pytest.mark.parametrize("layout", ["shards", "hub copy", "hub copy of files"])
def test_archives_and_folders_of_the_same_bytes_have_one_fingerprint(layout: str, tmp_path: Path) -> None:
    """And a changed byte inside an archive changes it."""
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as HubImage
    from image_sets import encoded, write_tar

    classes = ("n01440764", "n02119789")
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    sets = {
        split: {f"{c}/{c}_{start + i}.png": encoded(start + 10 * k + i, "png") for k, c in enumerate(classes)
                for i in range(2)}
        for start, split in ((0, "train"), (50, "val"))
    }  # fmt: skip

    def write(root: Path, files: dict[str, dict[str, bytes]]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        if layout == "shards":
            for split, held in files.items():
                write_tar(root / "mine" / f"{split}-0.tar", held)
            return
        named = layout == "hub copy of files"
        rows: dict[str, Any] = {}
        for split, held in files.items():
            for name, content in held.items() if named else ():
                (root / "mine" / split / name).parent.mkdir(parents=True, exist_ok=True)
                (root / "mine" / split / name).write_bytes(content)
            place = root / "mine" / split
            images = [
                {"bytes": None, "path": str(place / n)} if named else {"bytes": c, "path": n}
                for n, c in held.items()
            ]
            features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
            rows[split] = Dataset.from_dict({"image": images}, features=features).cast_column(
                "image", HubImage()
            )
        DatasetDict(rows).save_to_disk(str(root / "mine" / "hf"))

    def look(root: Path) -> OpenData:
        places = {"splits": {s: (f"in-{s}",) for s in sets}, "shards": {s: (f"{s}-*.tar",) for s in sets}}
        if layout == "folders":
            places = {}
        changes = {"class_list": str(tmp_path / "classes.txt"), "hub_copies": ("hf",), **places}
        return open_mine(root, tmp_path / "cache", **changes)

    folders = tmp_path / "folders"
    for split, held in sets.items():
        for name, content in held.items():
            (folders / "mine" / split / name).parent.mkdir(parents=True, exist_ok=True)
            (folders / "mine" / split / name).write_bytes(content)
    wanted = open_mine(folders, class_list=str(tmp_path / "classes.txt"))
    write(tmp_path / "archive", sets)
    found = look(tmp_path / "archive")
    assert found.splits["train"].contents == wanted.splits["train"].contents
    assert found.fingerprint == wanted.fingerprint
    sets["val"]["n01440764/n01440764_50.png"] = encoded(99, "png")
    write(tmp_path / "archive", sets)
    assert look(tmp_path / "archive").fingerprints["val"] != wanted.fingerprints["val"]


def test_scenes_that_were_changed_are_painted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = find_datasets()["scenes-objectness"]
    assert recipe.spec.generator is not None
    small = recipe.spec.generator.model_copy(update={"val": 6})
    first = opened("scenes-objectness", tmp_path, generator=small, checksum=None)
    path = first.splits["val"].labels[2]
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-20] ^= 255
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        again = opened("scenes-objectness", tmp_path, generator=small, checksum=None)
    assert path.read_bytes() == whole
    assert again.fingerprint == first.fingerprint
    assert f"{path}: is not what was painted" in caplog.text


def test_rows_that_hold_no_image_and_files_that_are_none(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as HubImage

    from comit_bench.data.readers.hub import HfImages

    os.mkfifo(tmp_path / "pipe.png")
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})

    def look(*images: dict[str, Any]) -> HfImages:
        rows = Dataset.from_dict({"image": list(images)}, features=features).cast_column("image", HubImage())
        return HfImages(rows, source=str(tmp_path), split="train")

    held = look({"bytes": b"x", "path": None}, {"bytes": None, "path": None})
    options: dict[str, Any] = {"cache": tmp_path / "cache", "title": "", "progress": False}
    assert held.digests([0, 1], **options)[1] == digests.EMPTY
    with pytest.raises(CorruptFileError, match="holds no image"):
        held.read(1)
    named = look({"bytes": None, "path": str(tmp_path / "pipe.png")})
    with pytest.raises(BenchError, match="named pipe"):
        named.read(0)
    with pytest.raises(BenchError, match="named pipe"):
        named.digests([0], **options)


# --------------------------------------------------------------------------------- what is read, and when


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    real = digests._digest_file

    def spy(path: str, name: str) -> tuple[bytes, bytes | None]:
        read.append(name)
        return real(path, name)

    monkeypatch.setattr(digests, "_digest_file", spy)
    return read


@pytest.mark.usefixtures("settled")
def test_contents_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = counting(monkeypatch)
    path = write_class_folders(tmp_path)
    first = open_mine(tmp_path)
    assert len(read) == 5
    open_mine(tmp_path)
    assert len(read) == 5
    time.sleep(0.01)
    change_a_byte(path)
    assert open_mine(tmp_path).fingerprint != first.fingerprint
    assert read[5:] == ["a/1.bmp"]
    for table in (tmp_path / "cache" / "digests").iterdir():  # a damaged table is like none
        table.write_bytes(table.read_bytes()[:50])
    open_mine(tmp_path)
    assert len(read) == 11


def test_a_look_at_counts_reads_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = counting(monkeypatch)
    write_class_folders(tmp_path)
    recipe = Recipe(spec_of(), tmp_path / "dataset.yaml", "builtin")
    data = open_dataset(recipe, data_root=tmp_path, cache=tmp_path / "cache", progress=False, contents=False)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3, "val": 2}
    assert data.fingerprint == "" and data.fingerprints == {}
    assert not read and not (tmp_path / "cache").exists()


def test_a_file_that_changed_just_now_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one tick of the clock a second change would leave no trace in the times."""
    monkeypatch.setattr(digests, "RECENT", 10**12)
    read = counting(monkeypatch)
    (tmp_path / "a").write_bytes(b"1")
    for _ in range(2):
        file_digests(tmp_path, ["a"], cache=tmp_path / "cache")
    assert read == ["a", "a"]


def test_an_interrupted_reading_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_is_recent", lambda status: False)
    monkeypatch.setattr(digests, "AT_ONCE", 1)
    names = [f"{i:02d}" for i in range(20)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    real, lock, read = digests._digest_file, threading.Lock(), []

    def stops(path: str, name: str) -> tuple[bytes, bytes | None]:
        with lock:
            read.append(name)
        if name == "10":
            raise KeyboardInterrupt
        return real(path, name)

    monkeypatch.setattr(digests, "_digest_file", stops)
    with pytest.raises(KeyboardInterrupt):
        file_digests(tmp_path, names, cache=tmp_path / "cache")
    monkeypatch.setattr(digests, "_digest_file", real)
    read = counting(monkeypatch)
    found = file_digests(tmp_path, names, cache=tmp_path / "cache")
    assert set(read) & set(names[:10]) == set() and "10" in read
    assert len(set(found)) == 20


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="gone"):
        file_digests(tmp_path, ["gone"], cache=tmp_path / "cache")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BenchError, match="pipe: cannot read: this is a named pipe"):
        file_digests(tmp_path, ["pipe"], cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_is_recent", lambda status: False)
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "cache").write_text("a file where the cache should be")
    with caplog.at_level(logging.WARNING):
        assert len(file_digests(tmp_path, ["a"], cache=tmp_path / "cache")) == 1
    assert "read again next time" in caplog.text


# ------------------------------------------------------------------------------------- no image in two splits


def twin(kind: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "copy":
        shutil.copy(source, target)
    elif kind == "hard link":
        os.link(source, target)
    else:
        target.symlink_to(source)


TWINS = ["copy", "hard link", "link"]


@pytest.mark.parametrize("kind", TWINS)
def test_class_folders_lose_training_images_that_are_in_val(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_class_folders(tmp_path)
    before = open_mine(tmp_path)
    twin(kind, tmp_path / "mine" / "val" / "b" / "5.bmp", tmp_path / "mine" / "train" / "a" / "other.bmp")
    twin(kind, tmp_path / "mine" / "train" / "a" / "1.bmp", tmp_path / "mine" / "train" / "a" / "1b.bmp")
    with caplog.at_level(logging.WARNING):
        data = open_mine(tmp_path)
    assert data.splits["train"].ids == ("a/1", "a/1b", "a/2", "b/3"), "twins within one split are harmless"
    assert data.splits["val"].ids == before.splits["val"].ids
    assert data.splits["train"].labels.tolist() == [0, 0, 0, 1]
    assert [p.name for p in data.splits["train"].paths] == ["1.bmp", "1b.bmp", "2.bmp", "3.bmp"]
    assert data.notes["images_in_two_splits"] == {"train": 1}
    assert "1 of 5 images of split 'train' are in another split too" in caplog.text
    assert "a/other = val: b/5" in caplog.text
    report = json.loads((tmp_path / "cache" / "reports" / "mine-shared.json").read_text())
    assert report["left_out"] == {"train": {"a/other": "val: b/5"}}


def test_the_later_split_keeps_an_image_and_train_never(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    noise(tmp_path / "mine" / "test" / "a" / "6.bmp", 6)
    noise(tmp_path / "mine" / "test" / "b" / "7.bmp", 7)
    for split, other in (("train", "val"), ("val", "test"), ("train", "test")):
        source = next((tmp_path / "mine" / other / "b").iterdir())
        twin("copy", source, tmp_path / "mine" / split / "a" / f"from-{other}.bmp")
    splits = {"val": ("val",), "test": ("test",), "train": ("train",)}
    data = open_mine(tmp_path, splits=splits)
    assert list(data.splits) == list(splits)
    assert data.notes["images_in_two_splits"] == {"val": 1, "train": 2}
    held = [set(split.contents) for split in data.splits.values()]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]


def test_one_folder_as_two_splits_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    shutil.rmtree(tmp_path / "mine" / "val")
    (tmp_path / "mine" / "val").symlink_to("train")
    with pytest.raises(CorruptFileError, match="every image of split 'train' is in another split too"):
        open_mine(tmp_path)
    (tmp_path / "mine" / "val").unlink()
    (tmp_path / "mine" / "val" / "b").mkdir(parents=True)
    shutil.copytree(tmp_path / "mine" / "train" / "a", tmp_path / "mine" / "val" / "a")
    noise(tmp_path / "mine" / "val" / "b" / "9.bmp", 9)
    with pytest.raises(CorruptFileError, match=r"all images of 1 classes of split 'train'.*a/1"):
        open_mine(tmp_path)


def test_broken_files_are_no_twins(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "mine" / split / "a" / "empty.bmp").write_bytes(b"")
    data = open_mine(tmp_path)
    assert len(data.splits["train"]) == 4 and "images_in_two_splits" not in data.notes


def contents(data: OpenData) -> list[set[bytes]]:
    return [set(split.contents) for split in data.splits.values()]


def test_coco_one_photograph_under_two_ids_is_one_sample(tmp_path: Path) -> None:
    """Its categories are those of both ids: here three, so it is no sample at all; or the same two."""
    name = f"{1:012d}.jpg"  # shows things 1 and 2
    write_small_coco(tmp_path / "a", [{"id": 901, "file_name": name, "categories": [3, 4]}])
    data = opened("mscoco-pairs", tmp_path / "a", max_broken=0.2)
    assert f"train/{1:012d}" not in {i for split in data.splits.values() for i in split.ids}
    write_small_coco(tmp_path / "b", [{"id": 901, "file_name": f"./{name}", "categories": [1]}])
    data = opened("mscoco-pairs", tmp_path / "b", max_broken=0.2)
    ids = [i for split in data.splits.values() for i in split.ids]
    assert ids.count(f"train/{1:012d}") == 1
    assert data.notes["train"]["further_ids"] == 1


@pytest.mark.parametrize("kind", TWINS)
def test_coco_one_photograph_under_two_names_is_not_in_both_splits(kind: str, tmp_path: Path) -> None:
    first = write_small_coco(tmp_path)
    data = opened("mscoco-pairs", tmp_path)
    shown = next(int(i.split("/")[1]) for i in data.splits["val"].ids)
    other = next(pair for _, n, pair in COCO if f"train/{n:012d}" in data.splits["train"].ids)
    more = [{"id": 900 + i, "file_name": f"again{i}.jpg", "categories": other} for i in range(3)]
    twin(kind, first / "train2017" / f"{shown:012d}.jpg", first / "train2017" / "again1.jpg")
    write_small_coco(tmp_path, more)
    data = opened("mscoco-pairs", tmp_path)
    train, val = contents(data)
    assert not train & val
    assert data.notes["images_in_two_splits"] == {"train": 1}
    assert f"train/{shown:012d}" in data.splits["val"].ids and "train/again1" not in data.splits["train"].ids


def test_coco_the_same_photograph_in_both_annotation_files(tmp_path: Path) -> None:
    listed = [{"id": n, "file_name": f"{n:012d}.jpg"} for _, n, _ in COCO[:6]]
    found = [(n, c) for _, n, pair in COCO[:6] for c in pair]
    base = write_small_coco(tmp_path)
    (base / "val2017").mkdir(exist_ok=True)
    for one in listed:
        twin("copy", base / "train2017" / one["file_name"], base / "val2017" / one["file_name"])
    write_small_coco(tmp_path, val=[listed, found])
    rules = find_datasets()["mscoco-pairs"].spec.pairs.model_copy(update={"policy": "given"})
    data = opened("mscoco-pairs", tmp_path, pairs=rules)
    assert len(data.splits["val"]) == 6 and len(data.splits["train"]) == 12
    train, val = contents(data)
    assert not train & val


@pytest.mark.parametrize("kind", [*TWINS, "one url"])
def test_visual_genome_one_photograph_under_two_ids(kind: str, tmp_path: Path) -> None:
    base = write_small_vg(tmp_path)
    data = opened("visual-genome", tmp_path)
    paths = {name: dict(zip(split.ids, split.paths, strict=True)) for name, split in data.splits.items()}
    val, train = data.splits["val"].ids[0], data.splits["train"].ids[3]
    if kind == "one url":
        listed = json.loads((base / "image_data.json").read_text())
        urls = {one["image_id"]: one for one in listed}
        urls[int(train)]["url"] = urls[int(val)]["url"]
        (base / "image_data.json").write_text(json.dumps(listed))
    else:
        paths["train"][train].unlink()
        twin(kind, paths["val"][val], paths["train"][train])
    again = opened("visual-genome", tmp_path)
    assert again.splits["val"].ids == data.splits["val"].ids
    assert again.splits["train"].ids == tuple(i for i in data.splits["train"].ids if i != train)
    table = again.splits["train"].labels
    assert table.table[:, 0].tolist() == table.known[:, 0].tolist() == list(range(len(again.splits["train"])))
    assert again.notes["images_in_two_splits"] == {"train": 1}


def test_saliency_splits(tmp_path: Path) -> None:
    write_saliency(tmp_path)
    for place in ("images", "ground_truth"):
        shutil.copytree(tmp_path / "mine" / place, tmp_path / "mine" / f"{place}-train")
    noise(tmp_path / "mine" / "images-train" / "9.bmp", 9)
    shutil.copy(
        tmp_path / "mine" / "ground_truth" / "1.bmp", tmp_path / "mine" / "ground_truth-train" / "9.bmp"
    )
    data = open_mine(
        tmp_path,
        reader="saliency",
        splits={"train": ("images-train",), "val": ("images",)},
        labels={"train": ("ground_truth-train",), "val": ("ground_truth",)},
    )
    assert data.splits["train"].ids == ("9",) and len(data.splits["val"]) == 3
    assert [p.name for p in data.splits["train"].labels] == ["9.bmp"]


def test_archives_are_compared_with_folders(tmp_path: Path) -> None:
    from image_sets import encoded, write_tar

    classes = ("n01440764", "n02119789")
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    files = {f"{c}/{c}_{i}.png": encoded(10 * k + i, "png") for k, c in enumerate(classes) for i in range(3)}
    write_tar(tmp_path / "mine" / "train-0.tar", files)
    for k, c in enumerate(classes):
        (tmp_path / "mine" / "val" / c).mkdir(parents=True)
        (tmp_path / "mine" / "val" / c / "x.png").write_bytes(encoded(50 + k, "png"))
    (tmp_path / "mine" / "val" / classes[0] / "y.png").write_bytes(files[f"{classes[0]}/{classes[0]}_1.png"])
    shards = {"train": ("train-*.tar",)}
    data = open_mine(tmp_path, class_list=str(tmp_path / "classes.txt"), shards=shards)
    assert len(data.splits["train"]) == 5 and len(data.splits["val"]) == 3
    assert data.notes["images_in_two_splits"] == {"train": 1}
    assert data.splits["train"].paths.read(0) == files[f"{classes[0]}/{classes[0]}_0.png"]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------ what is no file


def test_what_is_no_file_is_a_missing_image(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    os.mkfifo(tmp_path / "mine" / "train" / "a" / "pipe.jpg")
    (tmp_path / "mine" / "train" / "b" / "folder.png").mkdir()
    data = open_mine(tmp_path)
    assert len(data.splits["train"]) == 3
    assert data.missing == {
        "train/a/pipe.jpg": "this is a named pipe, not a file",
        "train/b/folder.png": "this is a folder, not a file",
    }
    assert data.notes["missing_images"] == 2
    with pytest.raises(MissingError, match=r"a/pipe\.jpg \(this is a named pipe"):
        open_mine(tmp_path, max_broken=0.01)
    (tmp_path / "mine" / "val" / "a" / "loop.png").symlink_to("loop.png")
    with pytest.raises(MissingError, match=r"loop\.png: a link that leads to itself"):
        open_mine(tmp_path)


def test_pipes_among_masks_and_annotated_images(tmp_path: Path) -> None:
    path = write_saliency(tmp_path)
    path.unlink()
    os.mkfifo(path)
    (tmp_path / "mine" / "images" / "0.bmp").unlink()
    os.mkfifo(tmp_path / "mine" / "images" / "0.bmp")
    data = open_mine(tmp_path, **KINDS["masks"][1] | {"max_broken": 0.9})
    assert data.splits["val"].ids == ("2",)
    assert data.missing == dict.fromkeys(("0", "1"), "this is a named pipe, not a file")
    base = write_small_coco(tmp_path)
    (base / "train2017" / f"{1:012d}.jpg").unlink()
    os.mkfifo(base / "train2017" / f"{1:012d}.jpg")
    assert f"train/{1:012d}" in opened("mscoco-pairs", tmp_path, max_broken=0.5).missing


def test_a_recipe_says_whether_images_are_turned(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    assert not open_mine(tmp_path).exif
    turned = open_mine(tmp_path, exif=True)
    assert turned.exif and turned.splits["val"].preprocessing("center_crop(8)") == "exif|center_crop(8)"
    shutil.rmtree(tmp_path / "mine")
    write_saliency(tmp_path)
    assert open_mine(tmp_path, **KINDS["masks"][1]).exif
    assert not open_mine(tmp_path, **KINDS["masks"][1], exif=False).exif
    for name, wanted in (("cssd", True), ("imagenet100", False), ("scenes-objectness", False)):
        assert find_datasets()[name].spec.upright == wanted
    assert find_folder(spec_of(), tmp_path) == tmp_path / "mine"
