"""Every layout gives the same samples; whatever is wrong with a folder is named."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from comit_bench.data.datasets import open_dataset
from comit_bench.data.labels import read_class_list, read_devkit_synsets, read_ground_truth
from comit_bench.data.pieces import missing_pieces
from comit_bench.data.split import OpenData, PathList
from comit_bench.data.splitting import holdout
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.recipes.specs import DatasetSpec, GeneratorSpec, Recipe, find_datasets

# Devkit order: deliberately not alphabetical. The class list has a third order and lacks one synset.
DEVKIT = ("n02119789", "n01440764", "n03000000", "n02100735")
CLASSES = ("n03000000", "n02119789", "n01440764")
TRUTH = (2, 1, 4, 3, 3, 2, 1, 4)  # 1-based ids of validation images 1..8


def spec_of(**changes: Any) -> DatasetSpec:
    values: dict[str, Any] = {
        "name": "tiny",
        "version": 3,
        "title": "Tiny",
        "reader": "class-folders",
        "folder": "imagenet",
        "splits": {"train": ("train",), "val": ("val", "validation")},
        "class_list": "classes.txt",
        "labels": {"val": ("LOC_val_solution.csv", "truth.txt"), "synsets": ("meta.mat", "synsets.txt")},
        "licence": "none",
        "obtain": "ask the owners",
    }
    return DatasetSpec(**(values | changes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with a foldered train split; ``val`` is still to be written."""
    for name in (*CLASSES, "n09999999"):
        folder = tmp_path / "data" / "imagenet" / "train" / name
        folder.mkdir(parents=True)
        for number, suffix in enumerate((".JPEG", ".png", ".JpG")):
            (folder / f"{name}_{number}{suffix}").write_bytes(b"x" * (number + 1))
        (folder / "notes.txt").write_text("no image")
        (folder / f"._{name}_0.JPEG").write_text("no image")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "classes.txt").write_text("# our order\n" + "\n".join(CLASSES) + "\n\n")
    return tmp_path / "data"


def opened(root: Path, **changes: Any) -> OpenData:
    recipe = Recipe(spec_of(**changes), root.parent / "recipe" / "dataset.yaml", "builtin")
    return open_dataset(recipe, data_root=root, cache=root.parent / "cache", progress=False)


def val_file(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_foldered(base: Path, split: str = "val") -> None:
    for number, synset in enumerate(TRUTH, start=1):
        folder = base / split / DEVKIT[synset - 1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / val_file(number)).write_bytes(b"v" * number)


def write_flat(base: Path) -> None:
    (base / "val").mkdir()
    for number in range(1, len(TRUTH) + 1):
        (base / "val" / val_file(number)).write_bytes(b"v" * number)


def write_csv(base: Path) -> None:
    write_flat(base)
    rows = [
        f"{val_file(n)[:-5]},{DEVKIT[s - 1]} 1 2 3 4 {DEVKIT[s - 1]} 5 6 7 8" for n, s in enumerate(TRUTH, 1)
    ]
    (base / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n"
    )


def write_truth(base: Path) -> None:
    write_flat(base)
    (base / "truth.txt").write_text("".join(f"{s}\n" for s in TRUTH))


def write_meta(base: Path) -> None:
    write_truth(base)
    names = (*DEVKIT, "n00000001")  # inner nodes of the tree follow the leaves
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    table = np.zeros((len(names), 1), dtype=dtype)
    for i, name in enumerate(names):
        table[i, 0] = (float(i + 1), name, "some words", 0.0 if i < len(DEVKIT) else 4.0)
    savemat(base / "meta.mat", {"synsets": table})


def write_synsets(base: Path) -> None:
    write_truth(base)
    (base / "synsets.txt").write_text("\n".join(f"{name} its words" for name in DEVKIT))


LAYOUTS: list[Callable[[Path], None]] = [write_foldered, write_csv, write_meta, write_synsets]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_validation_layout_gives_the_same_samples(root: Path, write: Callable[[Path], None]) -> None:
    write(root / "imagenet")
    data = opened(root)
    val = data.splits["val"]
    truth = sorted(
        (f"{DEVKIT[s - 1]}/{val_file(n)[:-5]}", CLASSES.index(DEVKIT[s - 1]), n)
        for n, s in enumerate(TRUTH, 1)
        if DEVKIT[s - 1] in CLASSES
    )
    assert val.ids == tuple(sample for sample, _, _ in truth)
    assert val.labels.dtype == np.int64
    assert val.labels.tolist() == [label for _, label, _ in truth]
    assert [path.read_bytes() for path in val.paths] == [b"v" * n for _, _, n in truth]

    shutil.rmtree(root / "imagenet" / "val")
    write_foldered(root / "imagenet", "validation")
    foldered = opened(root)
    assert foldered.fingerprint == data.fingerprint
    assert foldered.fingerprints["val"] == data.fingerprints["val"]


def test_folders_files_and_order(root: Path) -> None:
    write_foldered(root / "imagenet")
    data = opened(root)
    train = data.splits["train"]
    assert (data.name, data.version, data.classes, data.folder) == ("tiny", 3, CLASSES, root / "imagenet")
    assert train.ids == tuple(sorted(f"{c}/{c}_{i}" for c in CLASSES for i in range(3)))
    assert [CLASSES[label] for label in train.labels] == [i.split("/")[0] for i in train.ids]
    assert [path.name for path in train.paths[:3]] == [f"n01440764_{n}" for n in ("0.JPEG", "1.png", "2.JpG")]
    assert len(train) == 9


def test_without_a_class_list_the_folders_are_the_classes(root: Path) -> None:
    write_foldered(root / "imagenet")
    data = opened(root, class_list=None, splits={"train": ("train",)})
    assert data.classes == tuple(sorted((*CLASSES, "n09999999")))
    assert len(data.splits["train"]) == 12


def test_another_class_list_changes_labels_and_fingerprint(root: Path, tmp_path: Path) -> None:
    write_foldered(root / "imagenet")
    recipe = Recipe(spec_of(), root.parent / "recipe" / "dataset.yaml", "builtin")
    (tmp_path / "mine.txt").write_text("n01440764 tench\nn02119789, fox\n")
    mine = open_dataset(
        recipe, data_root=root, cache=tmp_path, progress=False, class_list=tmp_path / "mine.txt"
    )
    assert mine.classes == ("n01440764", "n02119789")
    assert mine.fingerprint != opened(root).fingerprint
    assert set(mine.splits["train"].labels) == {0, 1}


def test_fingerprint_sees_added_renamed_resized_files(root: Path) -> None:
    write_foldered(root / "imagenet")
    first = opened(root)
    folder = root / "imagenet" / "train" / CLASSES[0]
    image = folder / f"{CLASSES[0]}_0.JPEG"
    prints = [first.fingerprint, opened(root).fingerprint]
    assert len(set(prints)) == 1
    image.write_bytes(b"xyz")
    prints.append(opened(root).fingerprint)
    image.rename(folder / "other.JPEG")
    prints.append(opened(root).fingerprint)
    (folder / "new.webp").write_bytes(b"")
    last = opened(root)
    assert len({*prints, last.fingerprint}) == 4
    assert last.fingerprints["train"] != first.fingerprints["train"]
    assert last.fingerprints["val"] == first.fingerprints["val"]


def test_missing_root_folder_and_split(root: Path, tmp_path: Path) -> None:
    recipe = Recipe(spec_of(), root.parent / "recipe" / "dataset.yaml", "builtin")

    def message(data_root: Path | None) -> str:
        with pytest.raises(MissingError) as caught:
            open_dataset(recipe, data_root=data_root, cache=tmp_path, progress=False)
        assert caught.value.exit_code == 3
        for words in ("--data-root", "COMIT_BENCH_DATA", "ask the owners"):
            assert words in str(caught.value)
        return str(caught.value)

    assert "no data root" in message(None)
    assert str(tmp_path / "nowhere" / "imagenet") in message(tmp_path / "nowhere")
    assert "parent" in message(root / "imagenet")
    assert "'val'" in (split := message(root))
    assert "val/ or validation/" in split


def test_missing_classes_are_counted_and_named(root: Path) -> None:
    write_foldered(root / "imagenet")
    shutil.rmtree(root / "imagenet" / "train" / CLASSES[1])
    with pytest.raises(MissingError, match=f"1 of 3 class folders are missing: {CLASSES[1]}"):
        opened(root)


def test_flat_split_without_an_image_of_a_class(root: Path) -> None:
    write_csv(root / "imagenet")
    for number in (4, 5):  # the only ones of n03000000
        (root / "imagenet" / "val" / val_file(number)).unlink()
    with pytest.raises(MissingError, match="1 of 3 classes: n03000000"):
        opened(root)


def test_class_folder_without_images(root: Path) -> None:
    write_foldered(root / "imagenet")
    folder = root / "imagenet" / "train" / CLASSES[2]
    for path in folder.iterdir():
        if path.suffix != ".txt":
            path.unlink()
    with pytest.raises(CorruptFileError, match="without images") as caught:
        opened(root)
    assert str(folder) in str(caught.value)


def test_images_beside_class_folders_are_not_lost_silently(root: Path) -> None:
    write_foldered(root / "imagenet")
    (root / "imagenet" / "val" / val_file(9)).write_bytes(b"v")
    with pytest.raises(CorruptFileError, match=val_file(9)):
        opened(root)


def test_two_images_with_one_id(root: Path) -> None:
    write_foldered(root / "imagenet")
    (root / "imagenet" / "train" / CLASSES[0] / f"{CLASSES[0]}_0.webp").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="only in its suffix"):
        opened(root)


def test_dangling_link(root: Path) -> None:
    write_foldered(root / "imagenet")
    link = root / "imagenet" / "train" / CLASSES[0] / "gone.JPEG"
    link.symlink_to(root / "nowhere.JPEG")
    with pytest.raises(MissingError, match="leads nowhere") as caught:
        opened(root)
    assert str(link) in str(caught.value)


def test_flat_split_needs_labels_that_cover_it(root: Path) -> None:
    base = root / "imagenet"
    write_flat(base)
    with pytest.raises(MissingError, match=r"LOC_val_solution\.csv, truth\.txt"):
        opened(root)
    (base / "truth.txt").write_text("1\n2\n")
    with pytest.raises(MissingError, match=r"meta\.mat, synsets\.txt"):
        opened(root)
    (base / "synsets.txt").write_text("\n".join(DEVKIT))
    with pytest.raises(CorruptFileError, match="6 of 8 images have no label"):
        opened(root)
    (base / "LOC_val_solution.csv").write_text("name,class\na,b\n")
    with pytest.raises(CorruptFileError, match="ImageId,PredictionString"):
        opened(root)


def test_alphabetical_synsets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text("\n".join(f"{name} words" for name in sorted(DEVKIT)))
    with pytest.raises(CorruptFileError, match="alphabetical"):
        read_devkit_synsets(path)


def test_damaged_devkit_files(tmp_path: Path) -> None:
    for content in (b"", b"MATLAB 5.0 MAT-file" + b"\0" * 200, b"nothing like it" * 20):
        (tmp_path / "meta.mat").write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"meta\.mat"):
            read_devkit_synsets(tmp_path / "meta.mat")
    for lines in ("1\n5\n", "0\n", "1\nn02119789\n", "-1\n"):
        (tmp_path / "truth.txt").write_text(lines)
        with pytest.raises(CorruptFileError, match="from 1 to 4"):
            read_ground_truth(tmp_path / "truth.txt", DEVKIT)


def test_class_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfgreat dane\r\n\r\n# remark\r\nn01440764 tench, Tinca\r\nn1 odd name\r\n")
    assert read_class_list(path) == ("great dane", "n01440764", "n1 odd name")
    for content, words in (
        (b"# none\n", "empty"),
        (b"a\nb\na\n", "'a' is listed twice"),
        (b"\xff\xfe\x00", "read"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_class_list(path)
    with pytest.raises(MissingError, match="absent"):
        read_class_list(tmp_path / "absent.txt")


def test_empty_recipes(root: Path) -> None:
    with pytest.raises(UsageError, match="no splits"):
        opened(root, splits={})


@pytest.fixture
def generated(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Stands in for the scene generator: writes two splits and remembers its arguments."""
    calls: list[SimpleNamespace] = []

    def generate(spec: GeneratorSpec, folder: Path, *, progress: bool) -> str:
        calls.append(SimpleNamespace(spec=spec, folder=folder, progress=progress))
        for split in ("train", "val"):
            (folder / split / "red_1").mkdir(parents=True, exist_ok=True)
            (folder / split / "red_1" / "0.png").write_bytes(b"abc")
        return "sha256:made"

    monkeypatch.setattr("comit_bench.data.datasets.generate", generate)
    return calls


@pytest.mark.parametrize("checksum", ["sha256:made", "sha256:other", None])
def test_generated_data(
    root: Path, generated: list[SimpleNamespace], checksum: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    generator = GeneratorSpec(layout="recognition", seed=7)
    with caplog.at_level(logging.WARNING):
        data = opened(root, generator=generator, folder="scenes-x", class_list=None, checksum=checksum)
    assert generated[0].spec == generator
    assert (
        generated[0].folder == root.parent / "cache" / "datasets" / f"scenes-x-v{data.version}" == data.folder
    )
    assert data.fingerprint == "sha256:made"
    assert data.classes == ("red_1",)
    assert data.splits["val"].paths[0].read_bytes() == b"abc"
    warned = "cannot be compared" in caplog.text
    assert warned == (checksum == "sha256:other")


def test_imagenet100_recipe_reads_its_layout(tmp_path: Path) -> None:
    recipe = find_datasets()["imagenet100"]
    classes = read_class_list(recipe.path.parent / str(recipe.spec.class_list))
    assert len(classes) == 100
    base = tmp_path / "imagenet"
    for split in ("train", "val"):
        for name in classes:
            (base / split / name).mkdir(parents=True)
            (base / split / name / "1.JPEG").write_bytes(b"")
    data = open_dataset(recipe, data_root=tmp_path, cache=tmp_path, progress=False)
    assert data.classes == classes
    assert sorted(data.splits["val"].labels.tolist()) == list(range(100))


def test_path_list() -> None:
    paths = PathList(Path("/r"), ("a/1.png", "b/2.png", "c/3.png"))
    assert list(paths) == [Path("/r/a/1.png"), Path("/r/b/2.png"), Path("/r/c/3.png")]
    assert list(paths[1:]) == [Path("/r/b/2.png"), Path("/r/c/3.png")]
    assert paths[-1] == Path("/r/c/3.png")
    with pytest.raises(IndexError):
        paths[3]


names = st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=40)


@settings(max_examples=60, deadline=None)
@given(names, st.floats(0, 1), st.randoms(use_true_random=False))
def test_holdout_ignores_order_and_company(ids: list[str], fraction: float, random: Any) -> None:
    chosen = dict(zip(ids, holdout(ids, fraction, "s").tolist(), strict=True))
    shuffled = random.sample(ids, random.randint(0, len(ids)))
    assert holdout(shuffled, fraction, "s").tolist() == [chosen[name] for name in shuffled]


def test_holdout_fraction_and_salt() -> None:
    ids = [f"n{i % 7}/image_{i}" for i in range(20_000)]
    tenth = holdout(ids, 0.1, "recognition")
    assert tenth.dtype == np.bool_
    assert abs(tenth.mean() - 0.1) < 0.01
    assert not holdout(ids, 0.0, "a").any()
    assert holdout(ids, 1.0, "a").all()
    assert (holdout(ids, 0.5, "recognition") | ~tenth).all()  # a larger share contains the smaller one
    other = holdout(ids, 0.1, "other")
    assert 0.0 < (other & tenth).mean() < 0.02
    pinned = holdout([f"n{i}/image_{i}" for i in range(1, 9)], 0.5, "pinned")
    assert np.flatnonzero(pinned).tolist() == PINNED
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            holdout(ids, wrong, "a")


# A change of the hash would move images between training and early stopping: it needs a new task version.
PINNED = [0, 4, 5, 6]


# ------------------------------------------------------------------------------------------- Kaggle's tree


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """ImageNet as Kaggle's archive unpacks: the validation images in one folder, their classes in a table."""
    top = tmp_path / "imagenet-object-localization-challenge"
    tree = top / "ILSVRC" / "Data" / "CLS-LOC"
    for name in CLASSES:
        (tree / "train" / name).mkdir(parents=True)
        (tree / "train" / name / f"{name}_1.JPEG").write_bytes(name.encode())
    write_csv(tree)
    (tree / "LOC_val_solution.csv").rename(top / "LOC_val_solution.csv")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "classes.txt").write_text("\n".join(CLASSES))
    return top


def open_kaggle(top: Path, data_root: Path) -> OpenData:
    recipe = find_datasets()["imagenet100"]
    spec = recipe.spec.model_copy(update={"class_list": str(top.parent / "recipe" / "classes.txt")})
    cache = top.parent / "cache"
    return open_dataset(Recipe(spec, recipe.path, "x"), data_root=data_root, cache=cache, progress=False)


@pytest.mark.parametrize("below", [".", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
@pytest.mark.parametrize("linked", [False, True])
def test_kaggles_tree_is_read_wherever_one_points(kaggle: Path, below: str, linked: bool) -> None:
    data_root = kaggle / below
    if linked:  # DATA/imagenet leads there
        data_root = kaggle.parent / "data"
        data_root.mkdir()
        (data_root / "imagenet").symlink_to(kaggle / below)
    data = open_kaggle(kaggle, data_root)
    assert len(data.splits["train"]) == 3
    assert len(data.splits["val"]) == sum(DEVKIT[s - 1] in CLASSES for s in TRUTH)
    assert missing_pieces(find_datasets()["imagenet100"].spec, data_root) == []
    assert missing_pieces(find_datasets()["imagenet1k-val"].spec, data_root) == []


def test_what_is_not_beside_the_root_is_not_read(kaggle: Path) -> None:
    """DATA/imagenet is what it is, whatever lies beside it."""
    (kaggle / "imagenet" / "train").mkdir(parents=True)
    with pytest.raises(MissingError, match=f"{kaggle}/imagenet"):
        open_kaggle(kaggle, kaggle)


def test_hints_that_help(kaggle: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=f"pass --data-root {kaggle}"):
        open_kaggle(kaggle, tmp_path)
    for split in ("train", "val"):
        (tmp_path / "ILSVRC2012" / split / CLASSES[0]).mkdir(parents=True)
    with pytest.raises(MissingError, match=f"ln -s {tmp_path}/ILSVRC2012 DIR/imagenet"):
        open_kaggle(kaggle, tmp_path / "ILSVRC2012")
