"""ImageNet100 from shards and hub copies: the same ids, order and labels as from folders."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comit_bench.data.building import build_dataset
from comit_bench.data.datasets import open_dataset
from comit_bench.data.images import iterate_images
from comit_bench.data.labels import read_class_list
from comit_bench.data.pieces import missing_pieces
from comit_bench.data.split import OpenData
from comit_bench.errors import CorruptFileError, UnsupportedOperation
from comit_bench.recipes.specs import Recipe, find_datasets

CLASSES = ("n02869837", "n01749939", "n02488291")
VAL = {"ILSVRC2012_val_00000001": 1, "ILSVRC2012_val_00000002": 0, "ILSVRC2012_val_00000003": 2}


def jpeg(shade: int, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 8), (shade,) * len(mode) if len(mode) > 1 else shade).save(stream, "JPEG")
    return stream.getvalue()


def train_images() -> dict[str, bytes]:
    """``<wnid>/<wnid>_<number>`` -> content, one CMYK, one grey, and a class nobody asks for."""
    names = [f"{c}/{c}_{n}" for c in (*CLASSES, "n09999999") for n in (1, 2)]
    modes = ("CMYK", "L", *["RGB"] * 6)
    return {name: jpeg(20 * i, mode) for i, (name, mode) in enumerate(zip(names, modes, strict=True))}


def opened(root: Path) -> OpenData:
    recipe = find_datasets()["imagenet100"]
    classes = root / "classes.txt"
    classes.write_text("\n".join(CLASSES))
    return open_dataset(recipe, data_root=root, cache=root / "cache", progress=False, class_list=classes)


def write_folders(root: Path, *, train: bool = True) -> None:
    base = root / "imagenet"
    for name, content in train_images().items() if train else ():
        path = base / "train" / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (base / "val").mkdir(parents=True)
    for number, name in enumerate(VAL):
        (base / "val" / f"{name}.JPEG").write_bytes(jpeg(200 + number))
    write_labels(root)


def write_labels(root: Path) -> None:
    rows = [f"{name},{CLASSES[label]} 1 2 3 4" for name, label in VAL.items()]
    (root / "imagenet").mkdir(parents=True, exist_ok=True)
    (root / "imagenet" / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pixels(data: OpenData, split: str) -> np.ndarray:
    found = [
        b.images.numpy()
        for b in iterate_images(data.splits[split].paths, "resize(8,nearest)", batch_size=2, num_workers=0)
    ]
    return np.concatenate(found)


@pytest.mark.parametrize("flat_names", [False, True])
def test_shards_equal_folders(tmp_path: Path, flat_names: bool) -> None:
    write_folders(tmp_path / "folders")
    base = tmp_path / "shards" / "imagenet"
    members = {
        (n.split("/")[1] if flat_names else n) + ".jpg": c for n, c in reversed(train_images().items())
    }
    names = list(members)
    write_tar(base / "imagenet1k-train-0000.tar", {n: members[n] for n in names[:5]})
    write_tar(base / "imagenet1k-train-0001.tar", {n: members[n] for n in names[5:]})
    write_tar(base / "val-0.tar", {f"{name}.JPEG": jpeg(200 + i) for i, name in enumerate(VAL)})
    write_labels(tmp_path / "shards")
    folders, shards = opened(tmp_path / "folders"), opened(tmp_path / "shards")
    for split in ("train", "val"):
        assert shards.splits[split].ids == folders.splits[split].ids
        assert shards.splits[split].labels.tolist() == folders.splits[split].labels.tolist()
        assert np.array_equal(pixels(shards, split), pixels(folders, split))
    assert len(shards.splits["train"]) == 6
    assert "n01749939" in str(shards.splits["train"].paths[0])
    assert missing_pieces(find_datasets()["imagenet100"].spec, tmp_path / "shards") == []


def test_one_split_in_folders_the_other_in_shards(tmp_path: Path) -> None:
    write_folders(tmp_path, train=False)
    write_tar(tmp_path / "imagenet" / "train" / "a.tar", {f"{n}.jpg": c for n, c in train_images().items()})
    data = opened(tmp_path)
    assert len(data.splits["train"]) == 6
    assert data.splits["val"].paths[0].is_file()


def test_shards_that_do_not_say_the_class(tmp_path: Path) -> None:
    write_folders(tmp_path, train=False)
    write_tar(tmp_path / "imagenet" / "train-0.tar", {"000001.jpg": jpeg(1), "000001.cls": b"5"})
    with pytest.raises(UnsupportedOperation, match="class cannot be told"):
        opened(tmp_path)


def test_shards_without_a_class_or_with_a_repeated_image(tmp_path: Path) -> None:
    write_folders(tmp_path, train=False)
    shard = tmp_path / "imagenet" / "train-0.tar"
    write_tar(shard, {f"{n}.jpg": c for n, c in train_images().items() if not n.startswith(CLASSES[0])})
    with pytest.raises(CorruptFileError, match=f"no image of 1 of 3 classes: {CLASSES[0]}"):
        opened(tmp_path)
    shard.unlink()
    for number in (0, 1):
        write_tar(
            tmp_path / "imagenet" / f"train-{number}.tar", {f"{n}.jpg": c for n, c in train_images().items()}
        )
    with pytest.raises(CorruptFileError, match="there twice"):
        opened(tmp_path)


def test_broken_images_in_shards_are_found(tmp_path: Path) -> None:
    write_folders(tmp_path, train=False)
    members = {f"{n}.jpg": c for n, c in train_images().items()}
    members[f"{CLASSES[1]}/{CLASSES[1]}_1.jpg"] = b"nothing"
    write_tar(tmp_path / "imagenet" / "train-0.tar", members)
    recipe = find_datasets()["imagenet100"]
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    spec = recipe.spec.model_copy(update={"max_broken": 0.5, "class_list": str(tmp_path / "classes.txt")})
    _, _, broken = build_dataset(
        Recipe(spec, recipe.path, "x"), data_root=tmp_path, cache=tmp_path / "cache", progress=False
    )
    assert broken.keys() == {f"{CLASSES[1]}/{CLASSES[1]}_1"}


@pytest.mark.parametrize("named", [True, False])
def test_hub_copy_equals_folders(tmp_path: Path, named: bool) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as HubImage

    write_folders(tmp_path / "folders")
    recipe = find_datasets()["imagenet100"]
    assert set(CLASSES) <= set(read_class_list(recipe.sibling("imagenet100.txt")))
    from timm.data import ImageNetInfo

    order = sorted(ImageNetInfo().label_names())
    features = Features({"image": HubImage(), "label": ClassLabel(num_classes=1000)})
    train = [(n, c) for n, c in train_images().items() if not n.startswith("n09999999")]
    rows = {
        "train": [(f"{n.split('/')[1]}_{n.split('/')[0]}.JPEG", c, n.split("/")[0]) for n, c in train],
        "validation": [
            (f"{name}_{CLASSES[label]}.JPEG", jpeg(200 + i), CLASSES[label])
            for i, (name, label) in enumerate(VAL.items())
        ],
    }
    splits = {
        split: Dataset.from_dict(
            {
                "image": [{"bytes": c, "path": n if named else None} for n, c, _ in found],
                "label": [order.index(w) for _, _, w in found],
            },
            features=features,
        )
        for split, found in rows.items()
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "hub" / "imagenet" / "hf"))
    folders, hub = opened(tmp_path / "folders"), opened(tmp_path / "hub")
    for split in ("train", "val"):
        if named:
            assert hub.splits[split].ids == folders.splits[split].ids
            assert hub.splits[split].labels.tolist() == folders.splits[split].labels.tolist()
            assert np.array_equal(pixels(hub, split), pixels(folders, split))
        else:
            count = np.bincount(folders.splits[split].labels).tolist()
            assert np.bincount(hub.splits[split].labels).tolist() == count
