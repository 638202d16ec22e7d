"""Sets of drawings: official readers read them, recipes make what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing_specs import LAYOUTS, spec_of
from PIL import Image

from comit_bench.data.datasets import open_dataset
from comit_bench.data.scenes.atlas import load_drawings
from comit_bench.data.scenes.formats import painter
from comit_bench.data.scenes.generate import contact_sheet, generate, verify
from comit_bench.data.scenes.painting import EDITS, HUE_NAMES, PLACES, paint
from comit_bench.errors import CorruptFileError
from comit_bench.recipes.specs import (
    DatasetSpec,
    find_datasets,
    find_tasks,
    parse_recipe,
    recipe_root,
)

# --- on disk, through the official readers ----------------------------------------------------------


def opened(tmp_path: Path, layout: str, **changes: Any) -> Any:
    """The recipe's set with few images, opened as a task would."""
    recipe = find_datasets()[f"drawings-{layout}"]
    generator = spec_of(layout, **changes)
    spec = recipe.spec.model_copy(update={"generator": generator, "checksum": None})
    return open_dataset(
        recipe.__class__(spec, recipe.path, recipe.origin),
        data_root=None, cache=tmp_path, progress=False,
    )  # fmt: skip


def test_class_folders_are_concepts(tmp_path: Path) -> None:
    data = opened(tmp_path, "recognition", train=60, val=60)
    assert data.classes == load_drawings().concepts
    scenes = paint(spec_of("recognition"), "val", range(60))
    for name, path, label in zip(
        data.splits["val"].ids, data.splits["val"].paths, data.splits["val"].labels, strict=True
    ):
        number = int(name.rpartition("/")[2])
        assert label == scenes.concepts[number, 0]
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), scenes.images[number])
    numbers = [int(name.rpartition("/")[2]) for name in data.splits["val"].ids]
    said, known = data.splits["val"].attributes, load_drawings()
    assert said["vendor"].tolist() == [known.vendors[v].name for v in scenes.vendors[numbers, 0]]
    assert said["place"].tolist() == [PLACES[p] for p in scenes.places[numbers, 0]]
    assert said["hue"].tolist() == [HUE_NAMES[h] for h in scenes.hues[numbers, 0]]
    some = data.splits["val"].take([1, 5])
    assert some.attributes["hue"].tolist() == said["hue"][[1, 5]].tolist()


def test_attributes_that_lack_an_image_are_an_error(tmp_path: Path) -> None:
    path = opened(tmp_path, "recognition").folder / "attributes.json"
    content = json.loads(path.read_text())
    del content["images"][next(iter(content["images"]))]
    recipe = find_datasets()["drawings-recognition"]
    path.write_text(json.dumps(content))
    spec = recipe.spec.model_copy(update={"generator": None, "folder": path.parent.name})
    with pytest.raises(CorruptFileError, match=r"attributes\.json: does not describe all images of train"):
        open_dataset(
            recipe.__class__(spec, recipe.path, recipe.origin),
            data_root=path.parents[1], cache=tmp_path / "other", progress=False,
        )  # fmt: skip


def test_coco_pairs(tmp_path: Path) -> None:
    data = opened(tmp_path, "pairs", train=120, val=60)
    assert data.classes == load_drawings().concepts
    labels = {name: {tuple(np.flatnonzero(row)) for row in s.labels} for name, s in data.splits.items()}
    assert not labels["train"] & labels["val"] and len(labels["val"]) == 60
    assert verify(data.folder).startswith("sha256:")


def test_a_pair_in_both_files_is_an_error(tmp_path: Path) -> None:
    data = opened(tmp_path, "pairs", train=120, val=60)
    path = data.folder / "annotations" / "instances_val.json"
    train = json.loads((data.folder / "annotations" / "instances_train.json").read_text())
    content = json.loads(path.read_text())
    for k in range(2):
        content["annotations"][k]["category_id"] = train["annotations"][k]["category_id"]
    path.write_text(json.dumps(content))
    recipe = find_datasets()["drawings-pairs"]
    spec = recipe.spec.model_copy(update={"generator": None, "checksum": None, "folder": data.folder.name})
    with pytest.raises(CorruptFileError, match="1 pairs are in train and in val"):
        open_dataset(
            recipe.__class__(spec, recipe.path, recipe.origin),
            data_root=data.folder.parent, cache=tmp_path / "other", progress=False,
        )  # fmt: skip


def test_visual_genome_relations_are_words(tmp_path: Path) -> None:
    data = opened(tmp_path, "relations", train=240, val=20)
    assert set(data.classes) <= set(load_drawings().concepts)
    assert len(data.splits["val"]) == 20
    scenes = paint(spec_of("relations"), "val", range(20))
    for _, subject, predicate, target in data.splits["val"].labels.table.tolist():
        assert data.predicates[predicate] in (
            "left of", "right of", "above", "below", "larger than", "smaller than",
        )  # fmt: skip
        assert data.classes[subject] != data.classes[target]
    names = {scenes.name(row, k) for row in range(20) for k in range(2)}
    assert {data.classes[w] for w in data.splits["val"].labels.table[:, [1, 3]].ravel()} <= names


def test_objectness_masks(tmp_path: Path) -> None:
    data = opened(tmp_path, "objectness")
    scenes = paint(spec_of("objectness"), "val", range(12))
    for row, path in enumerate(data.splits["val"].labels):
        with Image.open(path) as mask:
            np.testing.assert_array_equal(np.asarray(mask) > 127, scenes.masks[row, 0])


def test_edits_are_class_folders(tmp_path: Path) -> None:
    data = opened(tmp_path, "counterfactual")
    assert set(data.classes) == set(EDITS) and len(data.splits["val"]) == len(EDITS)


# --- recipes and the picture ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_recipes(name: str) -> None:
    folder = recipe_root("datasets") / f"drawings-{name}"
    spec = parse_recipe(folder / "dataset.yaml", DatasetSpec)
    assert spec.name == spec.folder == folder.name
    assert spec.generator is not None and spec.generator.layout == name and spec.generator.name == "drawings"
    assert spec.checksum is not None and spec.checksum.startswith("sha256:")
    painter(spec.generator).check_spec(spec.generator)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert str(spec.generator.val) in readme.replace(",", "")
    for vendor in load_drawings().vendors:
        assert vendor.licence.replace("CC-BY-", "CC BY ") in spec.licence and vendor.licence in readme, vendor


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS[:3]] + ["objectness"]
)
def test_the_recipe_makes_what_its_checksum_says(tmp_path: Path, name: str) -> None:
    spec = parse_recipe(recipe_root("datasets") / f"drawings-{name}" / "dataset.yaml", DatasetSpec)
    assert spec.generator is not None
    assert generate(spec.generator, tmp_path / "x", progress=False) == spec.checksum


def test_tasks_are_done_when_asked_for() -> None:
    tasks = {name: recipe.spec for name, recipe in find_tasks().items() if recipe.spec.suite == "drawings"}
    assert all(name.endswith("-drawings") and not spec.by_default for name, spec in tasks.items())
    assert all(spec.dataset.startswith("drawings-") for spec in tasks.values())


def test_contact_sheet(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", name="drawings", image_size=64, columns=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 7 * 128
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 1000
