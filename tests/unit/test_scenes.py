"""The embedded scenes: decided by the seed alone, labelled with what was painted, whole on disk."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comit_bench.data.scenes import digits as scenes_digits
from comit_bench.data.scenes import formats as scenes_formats
from comit_bench.data.scenes import generate as scenes
from comit_bench.data.scenes.digits import COLOUR_NAMES, DIGIT_NAMES, Scenes, paint
from comit_bench.data.scenes.generate import contact_sheet, generate, verify
from comit_bench.data.scenes.sources import load_sources
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.recipes.specs import DatasetSpec, GeneratorSpec, parse_recipe, recipe_root

LAYOUTS = ("recognition", "pairs", "relations", "objectness")
NAMES = ("recognition", "pairs", "relations", "objectness", "counterfactual")
INVERSE = {
    "left of": "right of", "right of": "left of", "above": "below",
    "below": "above", "larger than": "smaller than", "smaller than": "larger than",
}  # fmt: skip
# Content of small_spec(layout), seed 0. Another value means other images or labels: raise FORMAT and the
# versions of the dataset recipes, and renew their checksums.
DIGESTS = {
    "recognition": "sha256:b8bd18f41b21e4f7579ae5d0a9938c6678738d6bd8a295f43d40fbd31d3e1cf5",
    "pairs": "sha256:09f34e8dd693442af89055418b579b0669f014e124a4b596b7a427a7a613b0f7",
    "relations": "sha256:b8d9397a0177a43deacec707e8682efa7ba79597dd27aaec893c458471a10e04",
    "objectness": "sha256:4a36a6dc3835c580bd4d97a7eae4e78b029fb531a4d886b07b425e11a03b1a0e",
}


def small_spec(layout: str, **settings: Any) -> GeneratorSpec:
    counts = {"train": 0 if layout == "objectness" else 30, "val": 20}
    return GeneratorSpec.model_validate({"layout": layout, **counts, **settings})


def make(directory: Path, layout: str, **settings: Any) -> str:
    return generate(small_spec(layout, **settings), directory, progress=False)


def tree(directory: Path) -> dict[str, bytes]:
    """Everything but the lists, whose number depends on the chunk size."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and scenes.LISTS not in p.parts)
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small finished set per layout; tests that change files copy theirs."""
    root = tmp_path_factory.mktemp("scenes")
    for layout in LAYOUTS:
        make(root / layout, layout)
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


# --- painting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "hard"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_depends_on_its_number_only(layout: str, variant: str) -> None:
    spec = small_spec(layout, variant=variant)
    whole = paint(spec, "val", range(12))
    for indices in ([7], [11, 3, 7], range(5, 12)):
        part = paint(spec, "val", indices)
        rows = list(indices)
        for name in ("images", "masks", "boxes", "digits", "colours", "exemplars", "photos"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])


def test_seed_split_layout_and_variant_each_change_the_pictures() -> None:
    base = paint(small_spec("recognition"), "val", range(4)).images
    others = [
        paint(small_spec("recognition", seed=1), "val", range(4)),
        paint(small_spec("recognition"), "train", range(4)),
        paint(small_spec("recognition", variant="hard"), "val", range(4)),
        paint(small_spec("objectness"), "val", range(4)),
    ]
    assert all((other.images != base).any(axis=(1, 2, 3)).all() for other in others)


def test_exemplars_and_photo_columns_of_train_and_val_are_disjoint() -> None:
    sources = load_sources()
    pools = {split: np.concatenate(sources.pools[split]) for split in ("train", "val")}
    assert not set(pools["train"]) & set(pools["val"])
    for digit in range(10):
        train, val = len(sources.pools["train"][digit]), len(sources.pools["val"][digit])
        assert train / (train + val) == pytest.approx(0.7, abs=0.02)
        assert (sources.digits[sources.pools["val"][digit]] == digit).all()
    for layout in LAYOUTS:
        for seed in (0, 5):  # the division is the same for every seed
            train, val = (paint(small_spec(layout, seed=seed), s, range(300)) for s in ("train", "val"))
            assert set(train.exemplars.ravel()) <= set(pools["train"])
            assert set(val.exemplars.ravel()) <= set(pools["val"])
            np.testing.assert_array_equal(sources.digits[val.exemplars], val.digits)
            assert (train.photos[:, 1] + train.photos[:, 3]).max() <= 384  # 60 % of 640 columns
            assert val.photos[:, 1].min() >= 384


def check_geometry(painted: Scenes, side: int) -> None:
    n, things = painted.digits.shape
    assert painted.images.shape == (n, side, side, 3) and painted.images.dtype == np.uint8
    assert painted.masks.sum(axis=1).max() == 1, "objects overlap"
    border = np.ones((side, side), bool)
    border[1:-1, 1:-1] = False
    assert not painted.masks[..., border].any(), "an object touches the border"
    for row in range(n):
        for k in range(things):
            x, y, w, h = painted.boxes[row, k]
            mask = painted.masks[row, k]
            outside = mask.copy()
            outside[y : y + h, x : x + w] = False
            assert not outside.any()
            inside = mask[y : y + h, x : x + w]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("variant", ["default", "hard"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_fit_masks_and_nothing_is_clipped_or_hidden(layout: str, variant: str, side: int) -> None:
    spec = small_spec(layout, variant=variant, image_size=side)
    check_geometry(paint(spec, "train", range(90)), side)


@pytest.mark.parametrize("layout", ["recognition", "objectness"])
def test_the_object_has_the_colour_of_its_label(layout: str) -> None:
    painted = paint(small_spec(layout), "val", range(100))
    palette = np.array(list(scenes_digits.COLOURS.values()))
    for row in range(100):
        field = painted.images[row][painted.masks[row, 0]].astype(int)
        brightest = field[field.sum(axis=1).argsort()[-10:]].mean(axis=0)
        nearest = np.abs(palette * 0.96 - brightest).sum(axis=1).argmin()
        assert nearest == painted.colours[row, 0]


def test_colours_are_far_apart() -> None:
    palette = np.array(list(scenes_digits.COLOURS.values()))
    gaps = np.abs(palette[:, None] - palette[None]).sum(axis=2) + 1000 * np.eye(10, dtype=int)
    assert len(COLOUR_NAMES) == 10 and gaps.min() >= 80


def test_classes_pairs_and_digits_are_balanced() -> None:
    painted = paint(small_spec("recognition"), "train", range(300))
    classes = Counter(zip(painted.colours[:, 0], painted.digits[:, 0], strict=True))
    assert len(classes) == 100 and set(classes.values()) == {3}
    painted = paint(small_spec("pairs"), "val", range(90))
    pairs = Counter(frozenset(row) for row in painted.digits.tolist())
    assert len(pairs) == 45 and set(pairs.values()) == {2}
    assert all(len(pair) == 2 for pair in pairs)
    painted = paint(small_spec("objectness"), "val", range(50))
    assert set(Counter(painted.digits[:, 0].tolist()).values()) == {5}


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("variant", ["default", "hard"])
def test_relations_are_clear(variant: str, side: int) -> None:
    spec = small_spec("relations", variant=variant, image_size=side)
    painted = paint(spec, "train", range(600))
    assert (painted.digits[:, 0] != painted.digits[:, 1]).all()
    assert (painted.colours[:, 0] != painted.colours[:, 1]).all()
    counted: Counter[str] = Counter()
    for row in range(600):
        (ax, ay, aw, ah), (bx, by, bw, bh) = painted.boxes[row].tolist()
        beside = row % 3 != 1  # arrangements go round: beside, above, both
        stacked = row % 3 != 0
        assert (ax + aw <= bx or bx + bw <= ax) == beside
        assert (ay + ah <= by or by + bh <= ay) == stacked
        if not beside:  # nearly the same middle, so nobody would say left or right
            assert abs((ax + aw / 2) - (bx + bw / 2)) <= 0.08 * side
        ratio = max(ah, bh) / min(ah, bh)
        assert ratio >= 1.24 if (row // 3) % 2 else ratio < 1.19
        first, second = painted.boxes[row].tolist()
        there = scenes_formats.relations_between(tuple(first), tuple(second))
        back = scenes_formats.relations_between(tuple(second), tuple(first))
        assert sorted(INVERSE[p] for p in there) == sorted(back)
        assert ("larger than" in there or "smaller than" in there) == bool((row // 3) % 2)
        counted.update(there)
    assert set(counted) == set(INVERSE) and min(counted.values()) > 120


def test_every_object_of_the_default_relations_covers_five_percent() -> None:
    boxes = paint(small_spec("relations"), "val", range(750)).boxes
    assert (boxes[..., 2] * boxes[..., 3]).min() >= 0.05 * 32 * 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "recognition", "image_size": 300}, "256"),
        ({"layout": "pairs", "image_size": 16}, "32 pixels"),
        ({"layout": "recognition", "seed": -1}, "seed = -1"),
        ({"layout": "objectness", "train": 5}, "train = 5"),
    ],
)
def test_settings_that_cannot_be_painted(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate(GeneratorSpec.model_validate(settings), tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


# --- on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_gives_the_same_bytes_whatever_the_chunks(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(scenes, "CHUNK", 7)
    digest = make(tmp_path / "again", layout)
    assert tree(tmp_path / "again") == tree(made / layout)
    assert digest == verify(tmp_path / "again") == DIGESTS[layout]


def test_another_seed_gives_another_digest(tmp_path: Path) -> None:
    assert make(tmp_path / "x", "recognition", seed=1) != DIGESTS["recognition"]


def test_class_folders(made: Path) -> None:
    painted = paint(small_spec("recognition"), "train", range(30))
    files = sorted((made / "recognition" / "train").glob("*/*.png"), key=lambda p: p.name)
    assert len(files) == 30
    for row, path in enumerate(files):
        colour, digit = path.parent.name.split("_")
        assert (colour, int(digit)) == (COLOUR_NAMES[painted.colours[row, 0]], painted.digits[row, 0])
        np.testing.assert_array_equal(pixels(path), painted.images[row])


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_files(made: Path, split: Any) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(made / "pairs" / "annotations" / f"instances_{split}.json"))
    painted = paint(small_spec("pairs"), split, range(30 if split == "train" else 20))
    assert sorted(coco.getCatIds()) == list(range(1, 11))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
    for row, number in enumerate(sorted(coco.getImgIds())):
        image = coco.loadImgs(number)[0]
        stored = pixels(made / "pairs" / split / image["file_name"])
        assert stored.shape == (image["height"], image["width"], 3)
        np.testing.assert_array_equal(stored, painted.images[row])
        annotations = coco.loadAnns(coco.getAnnIds(number))
        assert {a["category_id"] - 1 for a in annotations} == set(painted.digits[row].tolist())
        for k, annotation in enumerate(annotations):
            mask = coco.annToMask(annotation).astype(bool)
            np.testing.assert_array_equal(mask, painted.masks[row, k])
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert annotation["bbox"] == painted.boxes[row, k].tolist()


def test_run_lengths_start_with_zeros() -> None:
    mask = np.array([[1, 0], [1, 1]], bool)
    assert scenes_formats.run_lengths(mask) == [0, 2, 1, 1]
    assert scenes_formats.run_lengths(~mask) == [2, 1, 1]


def test_visual_genome_files(made: Path) -> None:
    root = made / "relations"
    data = {d["image_id"]: d for d in json.loads((root / "image_data.json").read_text())}
    relations = json.loads((root / "relationships.json").read_text())
    splits = {s: json.loads((root / "splits" / f"{s}.json").read_text()) for s in ("train", "val")}
    assert sorted(data) == sorted(splits["train"] + splits["val"]) == list(range(1, 51))
    painted = {s: paint(small_spec("relations"), s, range(len(ids))) for s, ids in splits.items()}
    numbers: list[int] = []
    for entry in relations:
        split = "train" if entry["image_id"] in splits["train"] else "val"
        row = splits[split].index(entry["image_id"])
        scene, info = painted[split], data[entry["image_id"]]
        assert set(info) == {"image_id", "width", "height", "url", "coco_id", "flickr_id"}
        assert info["url"].split("/")[-2] == ("VG_100K" if split == "train" else "VG_100K_2")
        np.testing.assert_array_equal(pixels(root / info["url"]), scene.images[row])
        found = set()
        for relation in entry["relationships"]:
            numbers.append(relation["relationship_id"])
            ends = [relation["subject"], relation["object"]]
            boxes = [tuple(end[c] for c in "xywh") for end in ends]
            order = [scene.boxes[row].tolist().index(list(box)) for box in boxes]
            for end, k in zip(ends, order, strict=True):
                colour, digit = end["name"].split(" ")
                assert colour == COLOUR_NAMES[scene.colours[row, k]]
                assert digit == DIGIT_NAMES[scene.digits[row, k]]
                assert set(end) == {"object_id", "x", "y", "w", "h", "name", "synsets"}
            found.add((order[0], relation["predicate"]))
        for predicate, holds in {
            "left of": lambda a, b: a[0] + a[2] <= b[0],
            "above": lambda a, b: a[1] + a[3] <= b[1],
            "larger than": lambda a, b: a[3] >= 1.2 * b[3],
        }.items():
            for k in (0, 1):
                a, b = scene.boxes[row, k], scene.boxes[row, 1 - k]
                assert ((k, predicate) in found) == bool(holds(a, b))
                assert ((k, predicate) in found) == ((1 - k, INVERSE[predicate]) in found)
    assert len(set(numbers)) == len(numbers) > 150


def test_cssd_files(made: Path) -> None:
    painted = paint(small_spec("objectness"), "val", range(20))
    images = sorted((made / "objectness" / "images").iterdir())
    masks = sorted((made / "objectness" / "ground_truth_mask").iterdir())
    assert [p.name for p in images] == [f"{k:04d}.jpg" for k in range(1, 21)]
    assert [p.stem for p in masks] == [p.stem for p in images]
    for row, (image, mask) in enumerate(zip(images, masks, strict=True)):
        np.testing.assert_array_equal(pixels(image), painted.images[row])
        stored = pixels(mask)
        assert set(np.unique(stored)) == {0, 255} and 0.03 < (stored > 0).mean() < 0.4
        np.testing.assert_array_equal(stored > 0, painted.masks[row, 0])


# --- interruption, damage, other contents -----------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


def test_an_interrupted_run_continues(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "CHUNK", 10)
    target, real, written = tmp_path / "x", scenes._write_image, []

    def dies(path: Path, data: bytes) -> None:
        if len(written) == 14:  # one chunk of ten and four more images
            (path.parent / f".{path.name}.part").write_bytes(data[:20])
            raise Killed
        written.append(path)
        real(path, data)

    monkeypatch.setattr(scenes, "_write_image", dies)
    with pytest.raises(Killed):
        make(target, "pairs")
    assert not (target / "scenes.json").exists()
    with pytest.raises(MissingError, match=r"scenes\.json"):
        verify(target)
    kept = written[:10]
    before = {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(scenes, "_write_image", real)
    painted: list[int] = []
    chunk = scenes.paint_files
    monkeypatch.setattr(scenes, "paint_files", lambda *a: painted.append(a[2]) or chunk(*a))
    assert make(target, "pairs") == DIGESTS["pairs"] == verify(target)
    assert painted == [10, 20, 0, 10], "the finished chunk was painted again"
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert not list(target.rglob("*.part"))
    assert tree(target) == tree(made / "pairs")


def test_a_finished_set_is_returned_without_painting(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "paint_files", None)
    for layout in LAYOUTS:
        assert make(made / layout, layout) == DIGESTS[layout]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("recognition", "train/orange_3/00013.png"),
        ("pairs", "annotations/instances_val.json"),
        ("relations", "relationships.json"),
        ("objectness", "ground_truth_mask/0007.png"),
    ],
)
def test_damage_is_named_and_mended(copied: Path, layout: str, name: str) -> None:
    root, path = copied / layout, copied / layout / name
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(MissingError, match=name):
        verify(root)
    assert make(root, layout) == DIGESTS[layout] and path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=name):
        verify(root)
    assert make(root, layout) == DIGESTS[layout] == verify(root)
    assert path.read_bytes() == whole


def test_one_changed_pixel_is_found(copied: Path) -> None:
    path = copied / "recognition" / "val" / "red_4" / "00004.png"
    changed = pixels(path).copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(path)
    with pytest.raises(CorruptFileError, match=r"00004\.png"):
        verify(copied / "recognition")


def test_one_changed_label_is_found(copied: Path) -> None:
    path = copied / "pairs" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = content["annotations"][0]["category_id"] % 10 + 1
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"instances_train\.json"):
        verify(copied / "pairs")


def test_pixels_count_and_encodings_do_not(copied: Path) -> None:
    for path in (copied / "objectness").rglob("*.png"):
        Image.fromarray(pixels(path)).save(path, compress_level=9)
    labels = copied / "pairs" / "annotations" / "instances_val.json"
    labels.write_text(json.dumps(json.loads(labels.read_text()), indent=1))
    assert verify(copied / "objectness") == DIGESTS["objectness"]
    assert verify(copied / "pairs") == DIGESTS["pairs"]


def test_a_folder_with_other_scenes_is_refused_untouched(copied: Path) -> None:
    before = tree(copied / "recognition")
    with pytest.raises(UsageError, match="seed 0, wanted 3"):
        make(copied / "recognition", "recognition", seed=3)
    assert tree(copied / "recognition") == before


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not embedded scenes"):
        make(tmp_path, "recognition")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", ["[]", "{", '{"digest": "sha256:0", "settings": 3, "labels": {}}'])
def test_a_manifest_that_is_none(copied: Path, content: str) -> None:
    manifest = copied / "pairs" / "scenes.json"
    manifest.write_text(content)
    with pytest.raises(CorruptFileError, match=r"scenes\.json"):
        verify(copied / "pairs")
    assert make(copied / "pairs", "pairs") == DIGESTS["pairs"] == verify(copied / "pairs")
    (copied / "pairs" / scenes.LISTS / "spec.json").write_text("[]")
    with pytest.raises(CorruptFileError, match=r"spec\.json"):
        make(copied / "pairs", "pairs")


def test_a_full_disk_is_explained_and_nothing_finished_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "CHUNK", 10)
    real, written = scenes._write_image, []

    def full(path: Path, data: bytes) -> None:
        if len(written) == 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, data)

    monkeypatch.setattr(scenes, "_write_image", full)
    with pytest.raises(BenchError, match="disk is full"):
        make(tmp_path / "x", "recognition")
    monkeypatch.setattr(scenes, "_write_image", real)
    assert make(tmp_path / "x", "recognition") == DIGESTS["recognition"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="file"):
        make(tmp_path / "file" / "x", "recognition")


# --- recipes and the picture ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipes(name: str) -> None:
    folder = recipe_root("datasets") / f"scenes-{name}"
    spec = parse_recipe(folder / "dataset.yaml", DatasetSpec)
    assert spec.name == spec.folder == folder.name
    assert spec.generator is not None and spec.generator.layout == name.split("-")[0]
    assert (spec.generator.variant == "hard") == name.endswith("hard")
    assert spec.checksum is not None and spec.checksum.startswith("sha256:")
    assert spec.obtain is not None and "CC BY" in spec.licence
    scenes_digits.check_spec(spec.generator)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert str(spec.generator.val) in readme.replace(",", "")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "objectness"] + ["objectness"]
)
def test_the_recipe_makes_what_its_checksum_says(tmp_path: Path, name: str) -> None:
    folder = recipe_root("datasets") / f"scenes-{name}"
    spec = parse_recipe(folder / "dataset.yaml", DatasetSpec)
    assert spec.generator is not None
    assert generate(spec.generator, tmp_path / "x", progress=False) == spec.checksum
    for candidates in spec.splits.values():
        assert (tmp_path / "x" / candidates[0]).exists()


def test_contact_sheet(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", columns=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 96 and sheet.height > 6 * 96
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 1000
