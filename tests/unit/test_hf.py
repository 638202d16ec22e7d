"""Hugging Face data sets: every local form, columns, ids, and everything that is refused."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from image_sets import encoded, image_files, write_folder

from comit_bench.data.readers import hub as hf
from comit_bench.data.readers.hub import ONLY, HfImages, open_splits
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError

FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(files: dict[str, bytes]) -> Dataset:
    """Rows in the order of ``files``."""
    rows = [{"bytes": content, "path": name} for name, content in files.items()]
    return Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=FEATURES)


def read(images: HfImages) -> dict[str, bytes]:
    return {name: images.read(i) for i, name in enumerate(images.ids)}


def write(form: str, folder: Path, train: dict[str, bytes], val: dict[str, bytes]) -> str:
    """Write the two splits and return the name that the second one gets."""
    if form == "saved":
        DatasetDict(train=table(train), validation=table(val)).save_to_disk(str(folder))
        return "validation"
    if form == "imagefolder":
        write_folder(folder, {f"train/{name}": content for name, content in train.items()})
        write_folder(folder, {f"val/{name}": content for name, content in val.items()})
        return "validation"
    folder.mkdir()
    for split, files in (("train", train), ("test", val)):
        rows = table(files)
        if form == "parquet":  # as on the hub
            rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        elif form == "arrow":
            with pa.ipc.new_stream(folder / f"{split}.arrow", rows.data.table.schema) as stream:
                stream.write_table(rows.data.table)
        else:  # parquet of another program: no description of the columns
            plain = pa.table({"image": [{"bytes": b, "path": n} for n, b in files.items()]})
            parquet.write_table(plain, folder / f"{split}.parquet")
    return "test"


def stored(form: str, folder: str, name: str) -> str:
    """The id of a file: its name as far as the form keeps it."""
    return {"saved": name.rpartition("/")[2], "imagefolder": f"{folder}/{name}"}.get(form, name)


FORMS = ("saved", "imagefolder", "parquet", "arrow", "plain-parquet")


@pytest.mark.parametrize("form", FORMS)
def test_every_local_form_gives_the_same_files(tmp_path: Path, form: str) -> None:
    train, val = image_files(12), image_files(5, start=50)
    held = write(form, tmp_path / "set", train, val)
    splits = open_splits(str(tmp_path / "set"))
    assert set(splits) == {"train", held}
    folder = {"train": "train", held: "val"}
    for split, files in (("train", train), (held, val)):
        images = HfImages(splits[split], source=str(tmp_path / "set"), split=split)
        wanted = {stored(form, folder[split], name): content for name, content in files.items()}
        assert list(images.ids) == sorted(wanted)
        assert read(images) == wanted


def test_moved_copies_have_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("imagefolder", tmp_path / "one", image_files(6), image_files(2))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "link").symlink_to(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    found = [
        HfImages(open_splits(source)["train"], source=source, split="train").ids
        for source in (str(tmp_path / "one"), "two", str(tmp_path / "link"))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0].startswith("train/cat/")


def test_one_saved_split(tmp_path: Path) -> None:
    files = image_files(5)
    table(files).save_to_disk(str(tmp_path / "set"))
    splits = open_splits(str(tmp_path / "set"))
    assert list(splits) == [ONLY]
    found = read(HfImages(splits[ONLY], source="x", split=ONLY))
    assert found == {stored("saved", "", name): content for name, content in files.items()}


def test_many_files_are_one_list(tmp_path: Path) -> None:
    files = image_files(20)
    table(files).save_to_disk(str(tmp_path / "set"), num_shards=4)
    images = HfImages(open_splits(str(tmp_path / "set"))[ONLY], source="x", split=ONLY)
    assert len(list((tmp_path / "set").glob("*.arrow"))) == 4
    files = {stored("saved", "", name): content for name, content in files.items()}
    assert read(images) == files
    copy = pickle.loads(pickle.dumps(images))  # what workers get that are not forked
    assert read(copy) == files


def bare(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


def test_ids_come_from_a_column_or_names_or_rows() -> None:
    files = [encoded(i, "png") for i in range(3)]
    same_names = Dataset.from_dict(
        {"image": [{"bytes": b, "path": "0.png"} for b in files]}, features=Features({"image": Image()})
    )
    assert HfImages(same_names, source="x", split="train").ids == tuple(f"train/{i:08d}" for i in range(3))
    rows = bare(image=files, key=["c", "a", "b"], number=[30, 4, 5])
    assert HfImages(rows, source="x", split=ONLY).ids == tuple(f"row/{i:08d}" for i in range(3))
    by_key = HfImages(rows, source="x", split="train", id_key="key")
    assert by_key.ids == ("a", "b", "c")
    assert [by_key.read(i) for i in range(3)] == [files[1], files[2], files[0]]
    assert by_key.where(2) == "x (train), row 0: c"
    assert HfImages(rows, source="x", split="train", id_key="number").ids == ("30", "4", "5")


@pytest.mark.parametrize("path", ["/somewhere/else/0.png", "zip://0.png::a.zip", None])
def test_names_that_other_machines_do_not_have_are_no_ids(path: str | None) -> None:
    rows = Dataset.from_dict(
        {"image": [{"bytes": b"x", "path": path}]}, features=Features({"image": Image()})
    )
    assert HfImages(rows, source="/data", split="train").ids == ("train/00000000",)


@pytest.mark.parametrize(
    ("id_key", "words"),
    [
        ("keys", r"no column 'keys'\. Did you mean 'key'"),
        ("key", r"has 'a' twice; ids must differ"),
        ("image", "more than texts and numbers"),
        ("gap", "more than texts and numbers"),
        ("share", "more than texts and numbers"),
    ],
)
def test_columns_that_are_no_ids(id_key: str, words: str) -> None:
    rows = bare(image=[b"1", b"2"], key=["a", "a"], gap=["a", None], share=[0.5, 0.25])
    with pytest.raises(UsageError, match=f"id_key: column .{id_key}|id_key: .* has no column") as refused:
        HfImages(rows, source="x", split="train", id_key=id_key)
    refused.match(words)


def test_the_image_column_is_found_or_chosen() -> None:
    def column(rows: Dataset, wanted: str | None = None) -> str:
        return HfImages(rows, source="x", split="train", image_key=wanted).column

    pictures = [{"bytes": b"a", "path": None}]
    two = Dataset.from_dict(
        {"left": pictures, "right": pictures, "raw": [b"a"]},
        features=Features({"left": Image(), "right": Image(), "raw": Value("binary")}),
    )
    assert column(two.remove_columns("left")) == "right"  # before plain bytes
    assert column(two, "left") == "left"
    assert column(two, "raw") == "raw"
    assert column(bare(words=["a"], jpg=[b"a"])) == "jpg"
    with pytest.raises(UsageError, match=r"several columns of images \(left, right\): choose .*image_key"):
        column(two)
    with pytest.raises(UsageError, match=r"has no column 'lft'\. Did you mean 'left'"):
        column(two, "lft")
    with pytest.raises(UsageError, match=r"column 'words' of .* holds no images but .*string"):
        column(bare(words=["a"], jpg=[b"a"]), "words")
    with pytest.raises(UsageError, match="no column of images; its columns: words"):
        column(bare(words=["a"]))
    with pytest.raises(UsageError, match="no rows"):
        column(two.select([]))


def test_rows_without_an_image_are_broken_ones(tmp_path: Path) -> None:
    pictures = [None, {"bytes": b"a", "path": "1"}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    rows = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    images = HfImages(rows, source="x", split="train")
    with pytest.raises(CorruptFileError, match=r"row 0: train/00000000: the row holds no image"):
        images.read(0)
    assert images.read(1) == b"a"
    with pytest.raises(MissingError, match=r"row 2.*no such file.*gone\.png"):
        images.read(2)
    archive = Dataset.from_dict(
        {"image": [{"bytes": None, "path": "zip://a.png::b.zip"}]}, features=Features({"image": Image()})
    )
    with pytest.raises(BenchError, match="Unpack the archive"):
        HfImages(archive, source="x", split="train").read(0)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such directory, and this is no hub id"):
        open_splits(f"{tmp_path}/nowhere")
    for name in ("a/b/c", "parquet", "imagefolder"):  # the last two are readers of the library
        with pytest.raises(MissingError, match="no such directory, and this is no hub id"):
            open_splits(name)
    (tmp_path / "file.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match=r"is a file\. Give the directory"):
        open_splits(str(tmp_path / "file.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"empty: .*Expected a directory of save_to_disk"):
        open_splits(str(tmp_path / "empty"))
    write("saved", tmp_path / "set", image_files(3), image_files(3))
    with pytest.raises(UsageError, match=r"revision v1: .* is a directory"):
        open_splits(str(tmp_path / "set"), revision="v1")
    with pytest.raises(UsageError, match=r"subset x: .*without subsets"):
        open_splits(str(tmp_path / "set"), subset="x")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(CorruptFileError, match=f"{tmp_path}/set: "):
        open_splits(str(tmp_path / "set"))
    table(image_files(3)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"short")
    with pytest.raises(CorruptFileError, match=f"{tmp_path}/saved: "):
        open_splits(str(tmp_path / "saved"))


def test_subsets_are_chosen(tmp_path: Path) -> None:
    for name in ("big", "small"):
        (tmp_path / "set" / name).mkdir(parents=True)
        table(image_files(3 if name == "big" else 2)).to_parquet(tmp_path / "set" / name / "train.parquet")
    configs = "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in ("big", "small"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(open_splits(str(tmp_path / "set"), subset="small")["train"]) == 2
    with pytest.raises(UsageError, match=r"big.*small.*subset=NAME"):
        open_splits(str(tmp_path / "set"))
    with pytest.raises(UsageError, match=r"tiny.*subset=NAME"):
        open_splits(str(tmp_path / "set"), subset="tiny")


def test_code_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    write("parquet", folder, image_files(2), image_files(2))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with suppress(BenchError):  # refused, by most versions of the library
        open_splits(str(folder))
    assert not (tmp_path / "ran").exists()


OFFLINE = """
import sys
from comit_bench.data.readers.hub import open_splits
from comit_bench.errors import MissingError
try:
    open_splits("someone/somewhere")
except MissingError as error:
    print(error.exit_code, error)
"""


def test_without_a_network_one_message_says_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3 someone/somewhere: not in the cache of datasets, and the hub cannot")
    assert "hf download someone/somewhere --repo-type dataset" in done.stdout


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(name: str) -> str:
        raise hf.PackageNotFoundError(name)

    monkeypatch.setattr(hf, "version", nothing)
    with pytest.raises(MissingError, match=r'pip install "comit-bench\[hf\]"'):
        open_splits(str(tmp_path))
