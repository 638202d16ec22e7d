"""Data sets in the layouts their owners publish, with the quirks of the originals."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official import opened, pairs_of, picture

from comit_bench.data.readers.visual_genome import read_aliases
from comit_bench.data.split import OpenData
from comit_bench.errors import BenchError, CorruptFileError, MissingError
from comit_bench.recipes.specs import find_datasets

# ----------------------------------------------------------------------------------------- Visual Genome


def thing(
    name: Any, box: tuple[int, int, int, int] = (0, 0, 50, 50), *, plural: bool = False
) -> dict[str, Any]:
    end = dict(zip("xywh", box, strict=True), object_id=1, synsets=[])
    return end | ({"names": name} if plural else {"name": name})


def relation(subject: Any, predicate: str, target: Any) -> dict[str, Any]:
    return {
        "relationship_id": 1,
        "predicate": predicate,
        "synsets": "['on.r.01']",
        "subject": subject,
        "object": target,
    }


def write_visual_genome(root: Path, images: dict[int, list[dict[str, Any]]], **aliases: str) -> Path:
    base = root / "visual-genome"
    base.mkdir(parents=True)
    listed = [{"image_id": n, "relationships": found} for n, found in images.items()]
    (base / "relationships.json").write_text(json.dumps(listed), encoding="utf-8")
    data = []
    for n in images:
        place = f"VG_100K{'_2' if n % 2 else ''}/{n}.jpg"
        coco = n * 10 if n % 2 else None
        url = f"https://cs.stanford.edu/people/rak248/{place}"
        data.append(
            {"image_id": n, "width": 100, "height": 100, "url": url, "coco_id": coco, "flickr_id": None}
        )
        picture(base / place)
    (base / "image_data.json").write_text(json.dumps(data), encoding="utf-8")
    for name, text in aliases.items():
        (base / f"{name}.txt").write_text(text, encoding="utf-8")
    return base


def words_of(data: OpenData, split: str, *, known: bool = False) -> set[tuple[str, str, str, str]]:
    found = data.splits[split]
    table = found.labels.known if known else found.labels.table
    return {
        (found.ids[i], data.classes[s], data.predicates[p], data.classes[o]) for i, s, p, o in table.tolist()
    }


def all_words(data: OpenData) -> set[tuple[str, str, str]]:
    return {entry[1:] for name in data.splits for entry in words_of(data, name)}


def many(found: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The same relations in 40 images, so that both sides of the split have some."""
    return {n: found for n in range(1, 41)}


def test_vg_names_case_spaces_and_aliases(tmp_path: Path) -> None:
    found = [
        relation(thing("Man "), "ON", thing(["", "Surf  Board", "board"], plural=True)),
        relation(thing(["woman"], plural=True), "wearing a ", thing("shirt")),
        relation(thing("guy"), "sitting on", thing("shirt")),
        relation(thing(""), "on", thing("shirt")),
        relation(thing([], plural=True), "on", thing("shirt")),
        relation(thing("woman"), "  ", thing("shirt")),
    ]
    aliases = {
        "object_alias": "man,guy,dude\nsurfboard,surf board\n",
        "relationship_alias": "on,sitting on\nwears,wearing a",
    }
    write_visual_genome(tmp_path, many(found), **aliases)
    data = opened("visual-genome", tmp_path)
    assert data.kind == "relations"
    assert all_words(data) == {
        ("man", "on", "surfboard"),
        ("woman", "wears", "shirt"),
        ("man", "on", "shirt"),
    }
    assert data.notes["counts"]["unnamed"] == 3 * 40
    assert data.notes["aliases"] == {"object": 3, "predicate": 2}


def test_vg_words_of_one_synset_are_synonyms(tmp_path: Path) -> None:
    def named(name: str, *synsets: str) -> dict[str, Any]:
        return thing(name) | {"synsets": list(synsets)}

    def said(subject: Any, predicate: str, target: Any, synsets: Any) -> dict[str, Any]:
        return relation(subject, predicate, target) | {"synsets": synsets}

    found = [
        said(named("man", "man.n.01"), "on", named("rock", "rock.n.01"), ["along.r.01"]),
        said(named("guy", "man.n.01"), "upon", named("stone", "rock.n.01"), "['along.r.01']"),
        said(named("guy", "man.n.01"), "on", named("bike", "motorcycle.n.01"), []),
        said(named("woman"), "near", named("bike", "bicycle.n.01"), None),
        said(named("woman"), "wears", named("bike", "bicycle.n.01", "man.n.01"), "[]"),
        said(named("wheel", "bicycle.n.02"), "by", named("rider's", "man's.n.01"), ["by.r.01", "along.r.01"]),
    ]
    write_visual_genome(tmp_path, many(found))
    data = opened("visual-genome", tmp_path)
    # Only what a word mostly means counts; words without a synset are nobody's synonyms.
    assert data.notes["synonyms"] == {
        "words": [["guy", "man"], ["rock", "stone"]],
        "predicates": [["on", "upon"]],
    }
    again = opened("visual-genome", tmp_path)  # the stored manifest
    assert again.notes == data.notes and again.fingerprint == data.fingerprint
    rules = find_datasets()["visual-genome"].spec.relations.model_copy(update={"synsets": False})
    assert "synonyms" not in opened("visual-genome", tmp_path, relations=rules).notes


def test_vg_without_alias_files_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_visual_genome(tmp_path, many([relation(thing("guy"), "ON", thing("Board"))]))
    with caplog.at_level(logging.WARNING):
        data = opened("visual-genome", tmp_path)
    assert "alias files are not there" in caplog.text
    assert data.notes["aliases"] == {"object": 0, "predicate": 0}
    assert all_words(data) == {("guy", "on", "board")}


def test_vg_splits_are_image_disjoint_and_tables_sorted(tmp_path: Path) -> None:
    found = [relation(thing(a), "on", thing(b)) for a, b in (("b", "a"), ("a", "b"), ("a", "b"))]
    write_visual_genome(tmp_path, many(found))
    data = opened("visual-genome", tmp_path)
    train, val = data.splits["train"], data.splits["val"]
    assert not set(train.ids) & set(val.ids)
    assert len(train) + len(val) == 40
    assert 0.05 < len(val) / 40 < 0.4
    assert data.notes["split"]["val_share"] == len(val) / 40
    for split in (train, val):
        table = split.labels.table
        assert table.dtype == np.int64
        assert (
            table.tolist() == sorted(set(map(tuple, table.tolist())))
            or [list(r) for r in sorted(set(map(tuple, table.tolist())))] == table.tolist()
        )
        assert set(table[:, 0].tolist()) == set(range(len(split)))
        assert len(table) == 2 * len(split), "the repeated relation is there once"
        assert all(int(path.stem) == int(i) for path, i in zip(split.paths, split.ids, strict=True))
    seed = find_datasets()["visual-genome"].spec.relations.model_copy(update={"seed": 1})
    assert opened("visual-genome", tmp_path, relations=seed).splits["val"].ids != val.ids


@pytest.mark.parametrize(("area_of", "kept"), [("both", {"large"}), ("either", {"large", "mixed"})])
def test_vg_area_filter(tmp_path: Path, area_of: str, kept: set[str]) -> None:
    large, small = (0, 0, 25, 20), (0, 0, 20, 20)  # 5 % and 4 % of 100 x 100
    outside = (90, 90, 50, 50)  # 25 % on paper, 1 % of the image
    found = [
        relation(thing("x", large), "large", thing("y", large)),
        relation(thing("x", large), "mixed", thing("y", small)),
        relation(thing("x", outside), "small", thing("y", small)),
        relation(thing("y", small), "large", thing("x", large))
        if area_of == "both"
        else relation(thing("y", small), "large", thing("x", small)),
    ]
    write_visual_genome(tmp_path, many(found))
    rules = find_datasets()["visual-genome"].spec.relations.model_copy(update={"area_of": area_of})
    data = opened("visual-genome", tmp_path, relations=rules)
    assert set(data.predicates) == kept
    assert {p for _, p, _ in all_words(data)} == kept
    assert ("y", "large", "x") not in all_words(data), "too small to be a sample"
    known = {entry[1:] for entry in words_of(data, "val", known=True)}
    assert ("y", "large", "x") in known, "but true of its image, so never a negative"
    assert all_words(data) <= known


def test_vg_vocabularies_come_from_train_alone(tmp_path: Path) -> None:
    write_visual_genome(tmp_path, many([relation(thing("x"), "on", thing("y"))]))
    val = set(opened("visual-genome", tmp_path).splits["val"].ids)
    images = many([relation(thing("x"), "on", thing("y"))])
    for n in images:
        if f"{n:07d}" in val:  # a word that is frequent, but in val only
            images[n] = images[n] + [relation(thing("v"), "beside", thing("w"))] * 50
    shutil.rmtree(tmp_path / "visual-genome")
    write_visual_genome(tmp_path, images)
    data = opened("visual-genome", tmp_path)
    assert (set(data.classes), data.predicates) == ({"x", "y"}, ("on",))
    assert data.notes["counts"]["outside_vocabulary"] == 50 * len(val)


def test_vg_vocabulary_size_frequency_and_ties(tmp_path: Path) -> None:
    found = [
        relation(thing("dog"), p, thing(o))
        for p, o in (("on", "cat"), ("on", "bed"), ("by", "ant"), ("at", "ant"))
    ]
    write_visual_genome(tmp_path, many(found))
    rules = find_datasets()["visual-genome"].spec.relations.model_copy(update={"words": 3, "predicates": 2})
    data = opened("visual-genome", tmp_path, relations=rules)
    assert data.classes == ("dog", "ant", "bed")  # dog 4, ant 2, then bed before cat
    assert data.predicates == ("on", "at")
    assert all_words(data) == {("dog", "on", "bed"), ("dog", "at", "ant")}


def test_vg_mscoco_overlap_can_be_excluded(tmp_path: Path) -> None:
    write_visual_genome(tmp_path, many([relation(thing("x"), "on", thing("y"))]))
    rules = find_datasets()["visual-genome"].spec.relations.model_copy(update={"exclude_coco": True})
    data = opened("visual-genome", tmp_path, relations=rules)
    assert all(int(i) % 2 == 0 for split in data.splits.values() for i in split.ids)
    assert data.notes["split"]["mscoco_images_excluded"] == 20


def test_vg_lost_images_unknown_images_and_empty_ones(tmp_path: Path) -> None:
    images = many([relation(thing("x"), "on", thing("y"))]) | {41: []}
    base = write_visual_genome(tmp_path, images)
    listed = json.loads((base / "relationships.json").read_text())
    listed.append({"image_id": 99, "relationships": [relation(thing("x"), "on", thing("y"))]})
    (base / "relationships.json").write_text(json.dumps(listed))
    (base / "VG_100K_2" / "7.jpg").unlink()
    with pytest.raises(MissingError, match="1 of 40"):
        opened("visual-genome", tmp_path)
    data = opened("visual-genome", tmp_path, max_broken=0.05)
    assert data.missing.keys() == {"0000007"}
    assert sum(map(len, data.splits.values())) == 39
    for split in data.splits.values():
        assert set(split.labels.table[:, 0].tolist()) == set(range(len(split)))
    assert data.notes["counts"]["unknown_images"] == 1
    assert data.notes["counts"]["images_without_a_relation"] == 1


def test_vg_version_1_0_spelling(tmp_path: Path) -> None:
    """There an image's number is called ``id``."""
    base = write_visual_genome(tmp_path, many([relation(thing("x"), "on", thing("y"))]))
    for file in ("relationships.json", "image_data.json"):
        listed = json.loads((base / file).read_text())
        for item in listed:
            item["id"] = item.pop("image_id")
        (base / file).write_text(json.dumps(listed))
    assert sum(map(len, opened("visual-genome", tmp_path).splits.values())) == 40


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("relationships.json", '[{"image_id": 1, "relationships": [', "cut short"),
        ("relationships.json", '[{"image_id": 1}]', "not as expected"),
        ("relationships.json", '{"image_id": 1}', "no entries"),
        ("relationships.json", "[]", "no entries"),
        ("relationships.json", '[{"image_id": 1, "relationships": []}]', "no vocabularies"),
        ("image_data.json", '[{"image_id": 1, "url": "x"}]', "not an image"),
        ("image_data.json", "no json", "damaged"),
    ],
)
def test_vg_files_that_are_none(tmp_path: Path, file: str, content: str, words: str) -> None:
    base = write_visual_genome(tmp_path, many([relation(thing("x"), "on", thing("y"))]))
    (base / file).write_text(content)
    with pytest.raises(CorruptFileError, match=words) as caught:
        opened("visual-genome", tmp_path)
    assert file in str(caught.value)


def test_vg_image_folders_of_the_archives(tmp_path: Path) -> None:
    base = write_visual_genome(tmp_path, many([relation(thing("x"), "on", thing("y"))]))
    before = opened("visual-genome", tmp_path)
    (base / "images").mkdir()
    (base / "images2").mkdir()
    (base / "VG_100K").rename(base / "images" / "VG_100K")
    (base / "VG_100K_2").rename(base / "images2" / "VG_100K_2")
    after = opened("visual-genome", tmp_path)
    assert after.fingerprint == before.fingerprint
    assert all(path.is_file() for split in after.splits.values() for path in split.paths)


def test_aliases(tmp_path: Path) -> None:
    path = tmp_path / "alias.txt"
    path.write_text("A, b ,C  d\nb,e\nx,a\n,\n\n")
    assert read_aliases(path) == {"b": "a", "c d": "a", "e": "a"}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFileError, match="aliases"):
        read_aliases(path)


# ---------------------------------------------------------------------------------------- CSSD and ECSSD


@pytest.mark.parametrize("layout", ["ground_truth_mask", "ground_truth", "together", "together in images"])
def test_saliency_layouts(tmp_path: Path, layout: str) -> None:
    base = tmp_path / "cssd"
    folders = {"together": (".", "."), "together in images": ("images", "images")}
    photos, masks = folders.get(layout, ("images", layout))
    for i in (1, 2, 3):
        picture(base / photos / f"{i:04d}.jpg", size=(6, 4))
        picture(base / masks / f"{i:04d}.png", ("L", "RGB", "1")[i - 1], (6, 4), "PNG")
    data = opened("cssd", tmp_path)
    split = data.splits["val"]
    assert data.kind == "masks"
    assert split.ids == ("0001", "0002", "0003")
    assert [p.name for p in split.paths] == [f"{i:04d}.jpg" for i in (1, 2, 3)]
    assert [p.name for p in split.labels] == [f"{i:04d}.png" for i in (1, 2, 3)]
    assert all(p.is_file() for p in (*split.paths, *split.labels))
    assert data.notes["counts_and_official"] == {"val": [3, 200]}


def test_saliency_masks_and_images_must_fit(tmp_path: Path) -> None:
    for i in (1, 2):
        picture(tmp_path / "cssd" / "images" / f"{i:04d}.jpg")
    picture(tmp_path / "cssd" / "ground_truth_mask" / "0001.png", "L", kind="PNG")
    with pytest.raises(MissingError, match=r"0002"):
        opened("cssd", tmp_path)
    assert opened("cssd", tmp_path, max_broken=0.5).missing == {"0002": "no mask"}
    picture(tmp_path / "cssd" / "ground_truth_mask" / "0009.png", "L", kind="PNG")
    with pytest.raises(CorruptFileError, match=r"1 masks have no image.*0009"):
        opened("cssd", tmp_path)
    shutil.rmtree(tmp_path / "cssd" / "ground_truth_mask")
    with pytest.raises(MissingError, match="ground_truth_mask/ or ground_truth/"):
        opened("cssd", tmp_path)


# ---------------------------------------------------------------------------------------- ImageNet-1k val


def test_imagenet_val_needs_no_labels_and_layouts_agree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "imagenet" / "val"
    modes = ("CMYK", "L", "RGB", "RGB")
    for i, mode in enumerate(modes, start=1):
        kind, size = ("PNG", (8, 8)) if i == 3 else ("JPEG", (1, 1) if i == 4 else (8, 8))
        picture(base / f"ILSVRC2012_val_{i:08d}.JPEG", mode, size, kind)
    with caplog.at_level(logging.WARNING):
        flat = opened("imagenet1k-val", tmp_path)
    assert "4 samples of split 'val', the official one has 50,000" in caplog.text
    assert flat.notes["counts_and_official"] == {"val": [4, 50_000]}
    assert flat.splits["val"].ids == tuple(f"ILSVRC2012_val_{i:08d}" for i in (1, 2, 3, 4))
    for i in (1, 2, 3, 4):
        (base / f"n0000000{i % 2}").mkdir(exist_ok=True)
        name = f"ILSVRC2012_val_{i:08d}.JPEG"
        (base / name).rename(base / f"n0000000{i % 2}" / name)
    sorted_copy = opened("imagenet1k-val", tmp_path)
    assert sorted_copy.fingerprint == flat.fingerprint
    assert all(path.is_file() for path in sorted_copy.splits["val"].paths)
    shutil.copy(base / "n00000001" / "ILSVRC2012_val_00000001.JPEG", base / "n00000000")
    with pytest.raises(CorruptFileError, match="one id cannot"):
        opened("imagenet1k-val", tmp_path)


def test_odd_images_are_read(tmp_path: Path) -> None:
    """CMYK, grey, a PNG with a JPEG name, one pixel: through the same decoder as everything."""
    from comit_bench.data.building import build_dataset

    base = tmp_path / "imagenet" / "val"
    picture(base / "a.JPEG", "CMYK")
    picture(base / "b.JPEG", "L")
    picture(base / "c.JPEG", "RGB", kind="PNG")
    picture(base / "d.JPEG", "RGB", (1, 1))
    recipe = find_datasets()["imagenet1k-val"]
    _, report, broken = build_dataset(recipe, data_root=tmp_path, cache=tmp_path / "cache", progress=False)
    assert broken == {}
    (base / "e.JPEG").write_bytes((base / "a.JPEG").read_bytes()[:40])
    (base / "f.JPEG").write_bytes(b"")
    with pytest.raises(BenchError, match="2 of 6 images are missing or broken"):
        build_dataset(recipe, data_root=tmp_path, cache=tmp_path / "cache", progress=False)
    assert json.loads(report.read_text())["broken"].keys() == {"e", "f"}


@pytest.mark.parametrize("name", ["scenes-pairs", "scenes-relations", "scenes-objectness"])
def test_the_embedded_sets_go_through_the_same_readers(tmp_path: Path, name: str) -> None:
    recipe = find_datasets()[name]
    assert recipe.spec.generator is not None
    small = recipe.spec.generator.model_copy(
        update={"train": 180 if name != "scenes-objectness" else 0, "val": 45}
    )
    data = opened(name, tmp_path, generator=small, checksum=None)
    if name == "scenes-pairs":
        train, val = (set(pairs_of(data, split)) for split in ("train", "val"))
        assert len(train) == len(val) == 45  # the recipe of the task holds each of them out once
        assert {c for p in train for c in p} == {c for p in val for c in p} == set("0123456789")
    elif name == "scenes-relations":
        assert len(data.splits["train"]), len(data.splits["val"]) == (180, 45)
        assert set(data.predicates) == {
            "left of",
            "right of",
            "above",
            "below",
            "larger than",
            "smaller than",
        }
    else:
        assert all(path.is_file() for path in data.splits["val"].labels)
